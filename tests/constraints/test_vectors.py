"""Vectors whose norms are held: their norms and what scales them, for any layout, type and size."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_l2.constraints import AugmentedLagrangian, FixedBound
from lightning_l2.constraints.methods import constrain_
from lightning_l2.constraints.vectors import ConstrainedVectors, Per
from lightning_l2.norms.squared import ROW
from tests.constraints.closed_forms import norms_of, project, projected


@pytest.mark.parametrize("per", ["parameter", "row"])
@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(40, 30).t(),
        lambda: torch.randn(8, 80, 3, 3).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(700, 3).t(),
        lambda: torch.randn(6, 2000)[:, ::2],
        lambda: torch.randn(1).expand(3, 1100).clone().view(3, 1100),
    ],
)
def test_any_memory_layout(per: Per, view: Callable[[], Tensor]) -> None:
    tensor = view()
    strides = tensor.stride()
    expected = projected([tensor], per, 0.7)[0]
    project([tensor], 0.7, per=per)
    assert tensor.stride() == strides
    torch.testing.assert_close(tensor.double(), expected, rtol=2e-6, atol=0)


def test_several_groups() -> None:
    tensors = [torch.full((4,), 3.0), torch.full((4,), 4.0), torch.full((4,), 0.1)]
    assert project(tensors, 5.0, per="group", counts=[2, 1]).tolist() == pytest.approx([10.0, 0.2])
    assert [tensor[0].item() for tensor in tensors] == pytest.approx([1.5, 2.0, 0.1], rel=2e-6)


def test_one_bound_a_vector() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])]
    project(tensors, torch.tensor([10.0, 1.0]))
    assert tensors[0].tolist() == [3.0, 4.0]
    assert tensors[1].tolist() == pytest.approx([0.6, 0.8], rel=2e-6)


@pytest.mark.parametrize("per", ["parameter", "row", "group"])
def test_types_side_by_side(per: Per) -> None:
    tensors = [torch.randn(5, 6, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    before = [tensor.clone() for tensor in tensors]
    project(tensors, 0.5, per=per)
    for tensor, reference in zip(tensors, projected(before, per, 0.5), strict=True):
        # A group aims inside the ball by the rounding of its coarsest type.
        eps = torch.finfo(torch.bfloat16 if per == "group" else tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), reference, rtol=2 * eps + 2e-6, atol=0)
    assert max(norms_of(tensors, per)) <= 0.5


@pytest.mark.parametrize("per", ["parameter", "row", "group"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(), (4,), (4, 5), (4, ROW)], ids=str)
def test_complex_tensors(shape: tuple[int, ...], dtype: torch.dtype, per: Per) -> None:
    tensor = torch.randn(shape, dtype=torch.complex128).to(dtype)
    rows = tensor.clone().view(-1, *shape[1:])
    vectors = [rows[i] for i in range(len(rows))] if per == "row" else [rows]
    norms = [vector.to(torch.complex128).abs().square().sum().sqrt().item() for vector in vectors]
    bound = 0.7 * min(norms)
    assert project([tensor], bound, per=per).tolist() == pytest.approx(norms, rel=1e-6)
    expected = torch.cat([(vector * (bound / norm)).flatten() for vector, norm in zip(vectors, norms, strict=True)])
    torch.testing.assert_close(tensor.flatten(), expected, rtol=2e-6 if dtype == torch.complex64 else 4e-15, atol=0)


def test_an_empty_tensor_beside_a_lagrangian() -> None:
    vectors = ConstrainedVectors([torch.zeros(0, 3), torch.full((4,), 0.6)])
    state, _ = constrain_(vectors, {"multiplier": torch.zeros(2)}, FixedBound(1.0), method=AugmentedLagrangian())
    assert state["multiplier"].tolist() == pytest.approx([0.0, 4 / 4 * (1.2**2 - 1) / 2])


@pytest.mark.parametrize("per", ["parameter", "row"])
def test_long_vectors_of_equal_elements(per: Per) -> None:
    """Where a plain fp32 sum of squares drifts by percents."""
    tensor = torch.full((1, 4_194_304), 0.1)
    norms = project([tensor], 1.0, per=per)
    assert norms.item() == pytest.approx(2048 * float(np.float32(0.1)), rel=1e-6)
    assert 1 - 4e-6 < float(np.linalg.norm(tensor.double().numpy())) <= 1 + 1e-6
