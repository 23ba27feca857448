"""Split, merge and names of parameter groups."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_l2.group_names import name_groups, unique_names
from lightning_l2.param_groups import (
    GroupKey,
    GroupSplit,
    base_weight_decay,
    multiply_weight_decay,
    weight_decay_in_force,
    without_multiplier,
)


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2,), float(index))) for index in range(count)]


def by_rule(rules: dict[int, str], weight_decay: dict[str, float]):
    return lambda parameter, group: GroupKey(rules[id(parameter)], weight_decay[rules[id(parameter)]])


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]


def take_step(optimizer: torch.optim.Optimizer, everything: list[nn.Parameter]) -> None:
    for parameter in everything:
        parameter.grad = parameter.detach() + 1.0
    optimizer.step()


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.3),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_split_then_merge_is_the_identity(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    everything = parameters(sum(sizes))
    rules = data.draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=len(everything), max_size=len(everything)))
    names = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    groups, first = [], 0
    for index, size in enumerate(sizes):
        own = {"lr": 0.01 * (index + 1)} | ({"name": f"own{index}"} if names[index] else {})
        groups.append({"params": everything[first : first + size], **own})
        first += size
    optimizer = OPTIMIZERS[data.draw(st.sampled_from(sorted(OPTIMIZERS)))](groups)
    before, decided = snapshot(optimizer), dict(zip(map(id, everything), rules, strict=True))
    weight_decay = {"a": 0.5, "b": 0.0, "c": 0.25}
    split = GroupSplit(optimizer, list)
    split.split_new(by_rule(decided, weight_decay))
    name_groups([split])

    children = optimizer.param_groups
    assert all(group["params"] for group in children)
    assert sorted(id(p) for group in children for p in group["params"]) == sorted(map(id, everything))
    for group in children:
        assert {decided[id(parameter)] for parameter in group["params"]} == {group["rule"]}
        assert group["weight_decay"] == group["initial_weight_decay"] == weight_decay[group["rule"]]
        assert group["name"].endswith(group["rule"])
        order = [list(map(id, everything)).index(id(parameter)) for parameter in group["params"]]
        assert order == sorted(order)
        assert all(isinstance(value, str | float) for key, value in group.items() if key in ("name", "rule"))
    assert len({group["name"] for group in children}) == len(children)
    first = 0
    for size in sizes:  # never more groups than rules within a parent, and children next to their parent
        wanted = list(dict.fromkeys(rules[first : first + size]))
        assert [group["rule"] for group in children[: len(wanted)]] == wanted
        children, first = children[len(wanted) :], first + size

    take_step(optimizer, everything)
    split.merge()
    assert snapshot(optimizer) == before
    state = optimizer.state_dict()
    split.restore()
    take_step(optimizer, everything)
    split.merge()
    assert snapshot(optimizer) == before
    fresh = OPTIMIZERS[type(optimizer).__name__]([{"params": p["params"]} for p in groups])
    fresh.load_state_dict(state)


def test_restore_gives_back_the_very_groups() -> None:
    weight, bias = nn.Linear(2, 1).parameters()
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    split = GroupSplit(optimizer, list)
    split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.1))
    groups = optimizer.param_groups[:]
    groups[1]["lr"] = 0.7
    split.merge()
    split.merge()
    assert len(optimizer.param_groups) == 1
    split.restore()
    split.restore()
    assert [id(group) for group in optimizer.param_groups] == [id(group) for group in groups]
    assert optimizer.param_groups[1]["lr"] == 0.7


def test_groups_added_late_are_split_alone_and_merge_back() -> None:
    early, late = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(early.parameters(), lr=0.1, weight_decay=0.2)
    split = GroupSplit(optimizer, list)

    def key_of(parameter: nn.Parameter, group: dict[str, Any]) -> GroupKey:
        return GroupKey("decay", 0.2) if parameter.ndim > 1 else GroupKey("no_decay", 0.0)

    split.split_new(key_of)
    name_groups([split])
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.01})
    assert len(split.new_groups) == 1
    split.merge()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    split.restore()
    split.split_new(key_of)
    name_groups([split])
    assert [group["name"] for group in optimizer.param_groups] == [
        "decay",
        "no_decay",
        "group1/decay",
        "group1/no_decay",
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.01, 0.01]
    split.merge()
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (2, 0.1, 0.2),
        (2, 0.01, 0.2),
    ]


def test_parameter_names_are_split_along() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    split = GroupSplit(optimizer, list)
    split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.0))
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    split.merge()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_lbfgs_takes_one_group() -> None:
    optimizer = torch.optim.LBFGS(nn.Linear(2, 1).parameters())
    split = GroupSplit(optimizer, list)
    with pytest.raises(
        ValueError, match=r"LBFGS takes one parameter group, and the rules ask for 2: \['2', '1'\].*L2Penalty"
    ):
        split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.0))
    split.split_new(lambda p, group: GroupKey("all", 0.1))
    assert len(optimizer.param_groups) == 1


def test_a_multiplied_base_survives_the_split() -> None:
    weight, bias = nn.Linear(2, 1).parameters()
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, weight_decay=0.3)
    multiply_weight_decay(optimizer.param_groups[0], 2.0)
    split = GroupSplit(optimizer, list)
    split.split_new(lambda p, group: GroupKey("a", 0.5 * base_weight_decay(group)))
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.3)
    assert optimizer.param_groups[0]["initial_weight_decay"] == pytest.approx(0.15)
    split.merge()
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert "initial_weight_decay" not in optimizer.param_groups[0]


def test_multiplying() -> None:
    group = {"params": [], "weight_decay": 0.0}
    multiply_weight_decay(group, 5.0)
    assert group == {"params": [], "weight_decay": 0.0, "initial_weight_decay": 0.0, "weight_decay_multiplier": 5.0}
    group = {"params": [], "weight_decay": 0.2}
    multiply_weight_decay(group, 0.0)
    multiply_weight_decay(group, 3.0)
    assert weight_decay_in_force(group) == pytest.approx(0.6)
    before = without_multiplier(group)
    assert group == {"params": [], "weight_decay": 0.2}
    group.update(before)
    assert weight_decay_in_force(group) == pytest.approx(0.6)
    assert weight_decay_in_force({}) == base_weight_decay({}) == 0.0


@pytest.mark.parametrize(
    ("owners", "taken", "expected"),
    [
        ([(0, 0, None, "decay"), (0, 0, None, "no_decay")], [], ["decay", "no_decay"]),
        ([(0, 0, None, "decay"), (0, 1, None, "decay")], [], ["group0/decay", "group1/decay"]),
        ([(0, 0, "a", "decay"), (0, 1, None, "decay")], [], ["a/decay", "group1/decay"]),
        ([(0, 0, "a", "decay"), (1, 0, "a", "decay")], [], ["optimizer0/decay", "optimizer1/decay"]),
        (
            [(0, 0, "a", "d"), (0, 1, "b", "d"), (1, 0, "a", "d")],
            [],
            ["optimizer0/a/d", "optimizer0/b/d", "optimizer1/a/d"],
        ),
        ([(0, 1, None, "decay")], ["decay"], ["group1/decay"]),
        ([(0, 0, None, "decay"), (1, 1, None, "decay")], [], ["optimizer0/decay", "optimizer1/decay"]),
        ([(0, 0, None, "decay")] * 3, [], ["decay", "part2/decay", "part3/decay"]),
        (
            [(0, 0, None, "decay"), (0, 0, None, "decay"), (0, 1, None, "decay")],
            [],
            ["group0/decay", "part2/group0/decay", "group1/decay"],
        ),
    ],
)
def test_names_are_prefixed_only_where_needed(owners, taken, expected) -> None:
    assert unique_names(owners, taken) == expected


def test_groups_of_one_rule_that_are_called_after_their_parameters() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    names = {id(p): f"{at}.{name}" for at, model in enumerate((first, second)) for name, p in model.named_parameters()}
    groups = [{"params": list(first.parameters()), "name": "own"}, {"params": list(second.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.7)
    split = GroupSplit(optimizer, list)
    before = snapshot(optimizer)

    def key_of(parameter: nn.Parameter, group: dict[str, Any]) -> GroupKey:
        return GroupKey("a", 0.1, f"a/{names[id(parameter)]}") if parameter.ndim > 1 else GroupKey("b", 0.0)

    split.split_new(key_of)
    name_groups([split])
    assert [(group["name"], group["rule"]) for group in optimizer.param_groups] == [
        ("a/0.weight", "a"),
        ("own/b", "b"),
        ("a/1.weight", "a"),
        ("group1/b", "b"),
    ]
    split.merge()
    assert snapshot(optimizer) == before


def test_groups_hold_plain_values_only() -> None:
    weight, bias = nn.Linear(2, 1).parameters()
    optimizer = torch.optim.AdamW([weight, bias])
    split = GroupSplit(optimizer, list)
    split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.1))
    name_groups([split])
    for group in optimizer.state_dict()["param_groups"]:
        assert pickle.loads(pickle.dumps(group)) == group
        assert {type(group[key]) for key in ("name", "rule")} == {str}
        assert {type(group[key]) for key in ("weight_decay", "initial_weight_decay")} == {float}
    assert copy.deepcopy(optimizer).param_groups[0]["rule"] == "2"


def test_siblings_share_what_is_written_to_one_of_them() -> None:
    weight, bias = nn.Linear(2, 1).parameters()
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.5)
    split = GroupSplit(optimizer, list)
    split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.1 * p.ndim))
    optimizer.param_groups[-1]["lr"] = 0.7
    split.align()
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
    optimizer.param_groups[0]["lr"] = 0.1
    split.align()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    for group, lr in zip(optimizer.param_groups, (0.2, 0.3), strict=True):
        group["lr"] = lr
    split.align()
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.3]  # written to each, so meant for each
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5]


def tensor_groups() -> tuple[torch.optim.Optimizer, GroupSplit, torch.Tensor]:
    lr = torch.tensor(0.5)
    optimizer = torch.optim.AdamW(nn.Linear(2, 1).parameters(), lr=lr)
    split = GroupSplit(optimizer, list)
    split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.1))
    return optimizer, split, lr


def test_a_tensor_that_every_group_changes_in_place_changes_once() -> None:
    """As schedulers do it that lower what they find."""
    optimizer, split, lr = tensor_groups()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
        split.align()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.125]
    split.merge()
    assert optimizer.param_groups[0]["lr"] is lr


def test_a_number_may_take_the_place_of_a_tensor() -> None:
    """Older schedulers of torch write numbers over learning rates that were tensors."""
    optimizer, split, _ = tensor_groups()
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    split.align()
    optimizer.param_groups[1]["lr"] = 0.75
    split.align()
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]


@pytest.mark.parametrize("index", [0, 1])
def test_a_tensor_that_somebody_fills_is_the_one_of_all_siblings(index: int) -> None:
    optimizer, split, lr = tensor_groups()
    for value in (0.25, 0.75):
        (lr if index == 0 else optimizer.param_groups[1]["lr"]).fill_(value)
        split.align()
        assert [float(group["lr"]) for group in optimizer.param_groups] == [value, value]
    split.merge()
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.75


def test_an_empty_group_stays_and_schedulers_follow() -> None:
    """An optimizer may have a group without parameters, such as one for a head that this model lacks."""
    weight, bias = nn.Linear(2, 1).parameters()
    groups = [{"params": [], "lr": 0.3}, {"params": [weight, bias], "lr": 0.1}, {"params": [], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = snapshot(optimizer)
    split = GroupSplit(optimizer, lambda: [scheduler])
    rules = {id(weight): "decay", id(bias): "no_decay"}
    split.split_new(by_rule(rules, {"decay": 0.5, "no_decay": 0.0}))
    name_groups([split])
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [
        *((0.3, 0), (0.1, 1), (0.1, 1), (0.2, 0))
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0, 0.5]
    assert scheduler.base_lrs == [0.3, 0.1, 0.1, 0.2]
    split.merge()
    assert snapshot(optimizer) == before
    assert scheduler.base_lrs == [0.3, 0.1, 0.2]
