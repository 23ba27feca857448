"""Parts of tensors that are spread over processes: what is told of them, and what two processes make of them."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2.sharding import (
    gradient_of,
    group_members,
    groups_within_rows,
    has_flat_pieces,
    is_flat_parameter,
    is_flat_piece,
    is_fsdp1,
    is_sharded,
    local_part,
    local_rows,
    process_groups,
    shapes_before_flattening,
    show_shards,
    sum_over_shards,
    whole,
    whole_rows,
)
from tests.processes import forked, sharded_tensors


def test_plain_tensors_are_whole() -> None:
    tensor, rows = torch.ones(3, 2), torch.ones(3)
    parameter = nn.Parameter(torch.zeros(3, 2))
    assert gradient_of(parameter) is None
    parameter.grad = tensor
    for found in (local_part(tensor), whole(tensor), gradient_of(parameter)):
        assert found is tensor
    assert whole_rows(rows, tensor) is local_rows(rows, tensor) is sum_over_shards(rows, [tensor]) is rows
    assert process_groups(tensor) == groups_within_rows(tensor) == []
    assert not any(is_so(tensor) for is_so in (is_sharded, is_flat_piece, is_flat_parameter))
    assert not is_fsdp1(nn.Linear(1, 1))
    assert shapes_before_flattening(nn.Linear(1, 1)) == {}
    show_shards(nn.Linear(1, 1))


def test_deepspeed_keeps_the_parameters_in_lists_of_its_own() -> None:
    a, b, flat = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer: Any = torch.optim.SGD([{"params": [flat]}, {"params": []}])
    assert not has_flat_pieces(optimizer)
    assert group_members(optimizer) == [[flat], []]
    optimizer.bit16_groups, optimizer.sub_group_to_group_id = [[a], [b], [flat]], {0: 1, 1: 0, 2: 1}
    assert has_flat_pieces(optimizer)
    assert group_members(optimizer) == [[b], [a, flat]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes makes of the same tensors."""
    folder = tmp_path_factory.mktemp("sharding")
    forked.ranks(sharded_tensors.work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


ROWS = [[float(10 * row + column) for column in range(4)] for row in range(5)]


@pytest.mark.parametrize(
    ("placement", "parts", "rows", "groups"),
    [
        ("rows", [ROWS[:3], ROWS[3:]], [[0.0, 1.0, 2.0], [3.0, 4.0]], [1, 0]),
        ("columns", [[row[:2] for row in ROWS], [row[2:] for row in ROWS]], [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2, [1, 1]),
        ("replicated", [ROWS, ROWS], [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2, [0, 0]),
    ],
)
def test_parts_of_two_processes(
    placement: str, parts: Any, rows: Any, groups: list[int], found: list[dict[str, Any]]
) -> None:
    for rank in (0, 1):
        seen = found[rank][placement]
        assert seen["local"] == parts[rank]
        assert seen["whole"] == ROWS
        assert seen["local_rows"] == rows[rank]
        assert seen["whole_rows"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert [seen["groups"], seen["within_rows"]] == groups
        assert seen["is_sharded"]
        # each process counts its elements; a replicated tensor's are not added up
        assert seen["sum"] == 20.0


@pytest.mark.parametrize("placement", ["rows", "columns", "replicated", "partial"])
def test_gradients_take_the_placements_of_their_parameters(placement: str, found: list[dict[str, Any]]) -> None:
    doubled = [[2 * value for value in row] for row in ROWS]
    assert [seen[f"{placement} gradient"] for seen in found] == [doubled[:3], doubled[3:]]


def test_all_processes_decide_alike_whether_a_step_is_one(found: list[dict[str, Any]]) -> None:
    # the second one has gradients of 0 everywhere, as torch makes to have an optimizer's state
    assert [seen["acts"] for seen in found] == [[True], [True]]


def test_pieces_of_fsdp1(found: list[dict[str, Any]]) -> None:
    for seen in found:
        assert seen["fsdp1"] == {"pieces": [True, True], "shapes": [[5, 4], [5]], "sum": [20.0, 5.0]}
        assert seen["flat"] == {"parameters": [True], "spread": 1}


def test_whole_modules_within_sharded_ones_of_fsdp1_count_once(found: list[dict[str, Any]]) -> None:
    for seen in found:
        assert seen["nested"] == [
            [True, True, False, False],
            [20.0, 5.0, 15.0, 3.0],
            [False, False, True, True],
            [20.0, 5.0, 15.0, 3.0],
        ]
