"""Histograms against torch.histc of the whole tensor."""

import pytest
import torch

from lightning_l2.monitor.histograms import BINS, Histogram, count, count_weights, histogram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 100, 700_001])
def test_counts(dtype: torch.dtype, size: int) -> None:
    weight = torch.randn(size).to(dtype)
    found = histogram(count(weight).tolist())
    assert (found.lowest, found.highest) == (pytest.approx(weight.min().item()), pytest.approx(weight.max().item()))
    assert sum(found.counts) == size
    assert len(found.counts) == BINS == len(found.edges) - 1
    if size > 1:
        expected = torch.histc(weight.double(), BINS, found.lowest, found.highest)
        # entries within rounding of an edge may fall to either side
        assert (torch.tensor(found.counts) - expected).abs().max() <= max(1, size * 2e-5)


def test_constant_and_strided_weights() -> None:
    assert histogram(count(torch.full((3, 3), 2.0)).tolist()).counts[0] == 9
    weight = torch.arange(12.0).view(3, 4)
    assert torch.equal(count(weight.t(), bins=4), count(weight, bins=4))
    assert count(weight[:, ::2], bins=2)[2:].tolist() == [3.0, 3.0]


def test_edges() -> None:
    assert Histogram(-1.0, 1.0, (1.0,) * 4).edges == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_parts_of_complex_weights_and_none_of_empty_ones() -> None:
    assert count_weights(torch.zeros(0, 3)) is None
    found = histogram(count_weights(torch.tensor([1 + 3j, 2 + 5j])).tolist())
    assert (found.lowest, found.highest, sum(found.counts)) == (1.0, 5.0, 4)
