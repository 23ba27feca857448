"""Names of parameter groups, against a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_l2.param_groups.decay_groups import decay_groups, decay_groups_of
from lightning_l2.param_groups.names import Owner, unique_names


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([], []),
        ([(0, 0, None, "decay"), (0, 0, None, "no_decay")], ["decay", "no_decay"]),
        ([(0, 0, None, "decay"), (0, 1, None, "decay")], ["group0/decay", "group1/decay"]),
        ([(0, 0, "a", "decay"), (0, 1, None, "decay")], ["a/decay", "group1/decay"]),
        ([(0, 0, "a", "decay"), (0, 1, "b", "decay")], ["a/decay", "b/decay"]),
        ([(0, 0, "a", "decay"), (1, 0, "a", "decay")], ["optimizer0/decay", "optimizer1/decay"]),
        ([(0, 0, "a", "decay"), (1, 0, "b", "decay")], ["a/decay", "b/decay"]),
        (
            [(0, 0, "a", "d"), (0, 1, "b", "d"), (1, 0, "a", "d")],
            ["optimizer0/a/d", "optimizer0/b/d", "optimizer1/a/d"],
        ),
        ([(0, 0, None, "decay"), (1, 1, None, "decay")], ["optimizer0/decay", "optimizer1/decay"]),
        # what one rule made of one group, where a checkpoint has several lambdas
        ([(0, 0, None, "decay")] * 3, ["decay", "part2/decay", "part3/decay"]),
        (
            [(0, 0, None, "decay"), (0, 0, None, "decay"), (0, 1, None, "decay")],
            ["group0/decay", "part2/group0/decay", "group1/decay"],
        ),
        # groups by hand
        ([(0, 0, "a", None), (0, 1, None, None)], ["a", "group1"]),
        ([(0, 0, "a", None), (1, 0, "a", None), (1, 1, "b", None)], ["optimizer0/a", "optimizer1/a", "b"]),
        ([(0, 0, "a", None), (0, 1, "a", None)], ["optimizer0/a/group0", "optimizer0/a/group1"]),
        ([(0, 0, None, None), (1, 0, None, None)], ["optimizer0/group0", "optimizer1/group0"]),
        # beside them
        ([(0, 0, "decay", None), (0, 1, None, "decay")], ["decay", "group1/decay"]),
        # "l2_norm/total" is the one of all
        ([(0, 0, "total", None)], ["total_"]),
        ([(0, 0, None, "total"), (0, 0, None, "b")], ["total_", "b"]),
    ],
)
def test_prefixed_only_where_needed(owners: list[tuple[int, int, str | None, str | None]], expected: list[str]) -> None:
    assert unique_names([Owner(*owner) for owner in owners]) == expected


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 2),
            st.sampled_from([None, "a", "decay", "group0", "total"]),
            st.sampled_from(["decay", "no_decay", "a", "total"]),
        ),
        max_size=8,
        unique=True,
    )
)
def test_unique_always(owners: list[tuple[int, int, str | None, str]]) -> None:
    own = {owner[:2]: owner[2] for owner in owners}
    names = unique_names([Owner(number, parent, own[number, parent], label) for number, parent, _, label in owners])
    assert len(set(names)) == len(names)


def groups(*names: str | None) -> torch.optim.Optimizer:
    made = [{"params": [torch.zeros(1)], **({"name": name} if name else {})} for name in names]
    return torch.optim.SGD(made, lr=0.1)


def test_names_of_optimizers_that_nobody_split() -> None:
    first, second = groups("a"), groups("a", None)
    assert [group.name for group in decay_groups(second).groups] == ["a", "group1"]
    several = decay_groups_of([first, second])
    assert [group.name for one in several for group in one.groups] == [
        *("optimizer0/a", "optimizer1/a", "optimizer1/group1")
    ]


def test_names_follow_a_group_that_is_added() -> None:
    optimizer = groups(None)
    assert [group.name for group in decay_groups(optimizer).groups] == ["group0"]
    optimizer.add_param_group({"params": [torch.zeros(1)], "name": "late"})
    assert [group.name for group in decay_groups(optimizer).groups] == ["group0", "late"]


def test_a_name_that_is_no_text() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "name": 3}], lr=0.1)
    assert [group.name for group in decay_groups(optimizer).groups] == ["3"]
