"""Inner products against float64 sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_l2.norms.inner_products import local_inner_products
from lightning_l2.norms.layout import BLOCK
from tests.norms.tensors import CONTENTS, HALVES, LAYOUTS, Watch, reference


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_inner_products(layout: str, dtype: torch.dtype) -> None:
    a = LAYOUTS[layout](CONTENTS["normal"](600_000).to(dtype))
    b = LAYOUTS[layout](CONTENTS["growing"](600_000).to(dtype))
    expected = (a.double() * b.double()).sum().item()
    scale = reference(a) * reference(b)
    assert local_inner_products([a], [b]).item() == pytest.approx(expected, abs=3e-7 * scale)
    assert local_inner_products([a], [b.contiguous()]).item() == pytest.approx(expected, abs=3e-7 * scale)


DTYPES = [torch.float32, torch.float64, *HALVES]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 30, 600, 20_000, 300_000]), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
        max_size=10,
    )
)
def test_any_mixture_of_dtypes(kinds: list[tuple[int, torch.dtype, torch.dtype]]) -> None:
    left, right = [], []
    for number, (size, a, b) in enumerate(kinds):
        generator = torch.Generator().manual_seed(number)
        left.append(torch.randn(size, generator=generator, dtype=torch.float64).to(a))
        right.append(torch.randn(size, generator=generator, dtype=torch.float64).to(b))
    products = local_inner_products(left, right)
    assert products.dtype == torch.float64
    for found, a, b in zip(products.tolist(), left, right, strict=True):
        # two wide ones are multiplied in float64
        rel = 1e-12 if torch.float64 in (a.dtype, b.dtype) else 3e-7
        scale = reference(a) * reference(b)
        assert found == pytest.approx(math.fsum((a.double() * b.double()).tolist()), abs=rel * scale)


def test_complex_tensors() -> None:
    a, b = torch.tensor([1 + 2j, 3 - 1j]), torch.tensor([2 - 1j, 1j])
    real = torch.tensor([5.0, 7.0])
    expected = [(a.conj() * b).sum().real.item(), 1 * 5 + 3 * 7, 2 * 5 + 0 * 7]
    assert local_inner_products([a, a, real], [b, real, b]).tolist() == pytest.approx(expected)


def test_sparse_tensors() -> None:
    a, b = torch.tensor([0.0, 2.0, 3.0, 0.0]), torch.tensor([5.0, 7.0, 0.0, 0.0])
    assert local_inner_products([a.to_sparse()], [b.to_sparse()]).tolist() == [14.0]
    assert local_inner_products([a.to_sparse()], [b]).tolist() == [14.0]


@pytest.mark.parametrize("right", [(2, 2), (3,), (3, 1)], ids=str)
def test_other_shapes_are_refused(right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected `right` to have the shapes of `left`, got"):
        local_inner_products([torch.ones(3, 2)], [torch.ones(right)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_is_large(dtype: torch.dtype) -> None:
    a, b = torch.ones(2048, 3000, dtype=dtype), torch.ones(3000, 2048, dtype=dtype).t()
    small = [torch.ones(90, 90, dtype=dtype)] * 300
    with Watch() as watch:
        products = local_inner_products([a, a, *small], [a, b, *small])
    assert products.tolist() == [2048 * 3000] * 2 + [8100] * 300
    assert watch.largest <= 4 * BLOCK
