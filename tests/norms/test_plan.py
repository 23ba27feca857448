"""Plans hold no tensor, and none outlives a change of the tensors."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_l2.norms import plan as plans
from lightning_l2.norms import squared_norms
from lightning_l2.norms.plan import PACK, ROW, kinds, plan
from tests.norms.tensors import reference


def ways(*tensors: Tensor) -> list[tuple[str, list[int]]]:
    return [(group.way, group.indices) for group in plan(kinds(tensors)).groups]


def test_what_is_measured_how() -> None:
    assert ways(
        torch.ones(3),
        torch.ones(256, 256),
        torch.tensor(1.0),
        torch.ones(256, 256).bfloat16(),
        torch.ones(256, 257)[:, 1:],
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(0),
        torch.ones(2, device="meta"),
        torch.ones(40_009),
    ) == [
        ("in rows", [1]),
        ("in rows", [3]),
        ("in blocks", [4, 9]),
        ("unusual", [5, 6]),
        ("empty", [7]),
        ("without data", [8]),
        ("packed", [0, 2]),
    ]


def test_tensors_alike_are_joined_as_they_are() -> None:
    groups = plan(kinds([torch.ones(64, 64), torch.ones(64)] * 100)).groups
    assert [(group.shape, group.cell, group.rows) for group in groups] == [((64,), ROW, 32), ((), 64, 1)]
    assert not any(group.flattened or group.filled for group in groups)
    for group in groups:
        assert [rows for _, rows in group.packs] == [
            sum(group.rows for _ in group.indices[span]) for span, _ in group.packs
        ]
        assert max(rows for _, rows in group.packs) * group.cell <= PACK


def test_a_plan_is_made_once() -> None:
    first, second = ([torch.ones(5), torch.ones(3, 3)] for _ in range(2))
    assert plan(kinds(first)) is plan(kinds(second))


def test_few_plans_are_kept() -> None:
    for size in range(3 * plans.KEPT):
        plan(kinds([torch.ones(size)]))
    assert len(plans._decided) <= plans.KEPT


def test_no_tensor_is_kept() -> None:
    tensors = [nn.Parameter(torch.ones(7, 3)), torch.ones(300, 300), torch.ones(0), torch.eye(3).to_sparse()]
    kept = [weakref.ref(tensor) for tensor in tensors]
    squared_norms(tensors)
    del tensors
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4

    def inside(value: object) -> list[object]:
        nested = value if isinstance(value, tuple | list) else []
        return [value, *(found for one in nested for found in inside(one))]

    assert not [value for value in inside(list(plans._decided.items())) if isinstance(value, Tensor)]


CHANGES: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "shape": lambda p: torch.full((700, 90), 2.0),
    "order of dimensions": lambda p: p.data.t(),
    "dtype": lambda p: p.data.half(),
    "gaps": lambda p: torch.full((60, 40), 3.0)[:, ::2],
    "storage": lambda p: torch.full((60, 20), 4.0),
    "conjugate": lambda p: torch.full((60, 20), 3 + 4j).conj(),
    "nothing": lambda p: torch.zeros(0),
    "expanded": lambda p: torch.full((1, 20), 5.0).expand(60, 20),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_measured_anew(change: str) -> None:
    parameters = [nn.Parameter(torch.full((60, 20), float(number))) for number in range(12)]
    assert squared_norms(parameters).tolist() == pytest.approx([1200.0 * number**2 for number in range(12)], rel=1e-6)
    new = CHANGES[change](parameters[5])
    if new.dtype == torch.float32:
        parameters[5].data = new
    else:
        parameters[5] = nn.Parameter(new)
    expected = [reference(parameter.detach().abs()) ** 2 for parameter in parameters]
    assert squared_norms(parameters).tolist() == pytest.approx(expected, rel=1e-6)


def test_inference_mode_leaves_nothing_behind() -> None:
    tensors = [torch.ones(5), torch.ones(3, 3), torch.ones(5)]
    with torch.inference_mode():
        squared_norms(tensors)
    assert squared_norms(tensors).add_(1.0).tolist() == pytest.approx([6.0, 10.0, 6.0], rel=1e-6)


def test_a_compiled_function_gives_the_same() -> None:
    tensors = [torch.ones(5), torch.ones(3, 3), torch.ones(300, 300), torch.full((4,), 1e-30)]
    compiled = torch.compile(lambda: squared_norms(tensors), backend="eager")
    assert compiled().tolist() == pytest.approx([5.0, 9.0, 90_000.0, 4e-60], rel=1e-6, abs=0)
