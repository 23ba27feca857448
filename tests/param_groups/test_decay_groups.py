"""The parts of an optimizer's groups that decay alike: lambda in force, and what is known outside of updates."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule, weight_decay_in_force
from lightning_l2.param_groups.decay_groups import decay_groups, decay_groups_of
from tests.param_groups.others import Given, Spy, in_force, ones


def sgd(*lambdas: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": ones(1), "weight_decay": value, **options} for value in lambdas], lr=0.1)


def test_groups_made_by_hand_are_one_part_each_with_their_own_lambda() -> None:
    optimizer = torch.optim.SGD([{"params": ones(2), "name": "a", "weight_decay": 0.3}, {"params": []}], lr=0.1)
    first, second = decay_groups(optimizer).groups
    assert (first.name, first.rule, first.base, first.weight_decay, first.decisions) == ("a", "a", 0.3, 0.3, [])
    assert [id(p) for p in first.params] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert (second.name, second.rule, second.params) == ("group1", "empty", [])
    optimizer.param_groups[0]["weight_decay"] = 0.5
    assert first.weight_decay == 0.5
    assert not decay_groups(optimizer).is_decided


def test_a_group_without_weight_decay_has_0() -> None:
    assert weight_decay_in_force(torch.optim.Rprop(ones(1), lr=0.1)) == {"group0": 0.0}


def test_one_optimizer_has_one_of_them_as_long_as_it_lives() -> None:
    optimizer = sgd(0.1)
    known = weakref.ref(decay_groups(optimizer))
    assert decay_groups(optimizer) is known()
    in_force(optimizer, {})
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert known() is None


def test_parts_are_the_same_objects_until_groups_or_parameters_change() -> None:
    parameters = ones(4)
    optimizer = torch.optim.SGD(parameters[:2], lr=0.1)
    groups = decay_groups(optimizer)
    given = Given(dict(zip(parameters, (0.1, 0.0, 0.1, 0.2), strict=True)))
    groups.decide(given)
    before, version = list(groups.groups), groups.current_version()
    assert [(group.rule, group.indices) for group in before] == [("at 0.1", [0]), ("at 0", [1])]
    optimizer.param_groups[0]["lr"] = 0.7
    assert all(one is other for one, other in zip(groups.groups, before, strict=True))
    assert groups.current_version() == version
    assert len(given.asked) == 2, "each parameter is asked for once"

    optimizer.add_param_group({"params": parameters[2:3]})
    assert groups.current_version() > version
    after = groups.groups
    assert [after[0], after[1]] == before
    assert len(after) == 3
    optimizer.param_groups[0]["params"][1] = parameters[3]
    assert [group.weight_decay for group in groups.groups] == [0.1, 0.2, 0.1]
    optimizer.param_groups[:] = optimizer.param_groups[1:]
    assert [group.weight_decay for group in groups.groups] == [0.1]


def test_parameters_that_no_rule_decided_on_keep_their_groups_lambda() -> None:
    known, stranger = ones(2)
    optimizer = torch.optim.SGD([known, stranger], lr=0.1, weight_decay=0.7)
    in_force(optimizer, {known: 0.1})
    assert weight_decay_in_force(optimizer) == {"at 0.1": 0.1, "unassigned": 0.7}
    optimizer.step()
    assert [p[0].item() for p in (known, stranger)] == pytest.approx([0.99, 0.93], rel=1e-15)


class Multiplied(Given):
    """Decisions without a base: a multiple of whatever the group has."""

    def of(self, number: int, parameter: Any, group: Any, own: float) -> Any:
        decision = super().of(number, parameter, group, own)
        return decision._replace(base=None, rule=DecayRule(f"times {decision.base:g}", multiplier=decision.base))


def test_without_a_base_a_group_that_is_written_to_is_the_base() -> None:
    parameters = ones(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)
    groups = decay_groups(optimizer)
    groups.decide(Multiplied(dict(zip(parameters, (1.0, 0.5), strict=True))))
    assert weight_decay_in_force(optimizer) == {"times 1": 0.5, "times 0.5": 0.25}
    optimizer.param_groups[0]["weight_decay"] = 0.8
    assert weight_decay_in_force(optimizer) == {"times 1": 0.8, "times 0.5": 0.4}
    groups.multiply(2.0)
    assert weight_decay_in_force(optimizer) == {"times 1": 1.6, "times 0.5": 0.8}


def test_a_group_that_is_written_to_in_vain_is_told_once() -> None:
    parameters = ones(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)
    in_force(optimizer, dict(zip(parameters, (0.1, 0.0), strict=True)))
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.5  # the same
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.8
    with pytest.warns(UserWarning, match=r"of SGD was changed from 0.5 to 0.8. It has no effect"):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.9
    optimizer.step()  # a second warning would be an error here
    assert weight_decay_in_force(optimizer) == {"at 0.1": 0.1, "at 0": 0.0}


# --- multipliers ---


def test_one_multiplier_for_all_also_for_groups_that_come_later() -> None:
    optimizer = sgd(0.1, 0.0)
    groups = decay_groups(optimizer)
    groups.multiply(3.0)
    optimizer.add_param_group({"params": ones(1), "weight_decay": 0.2})
    assert [group.weight_decay for group in groups.groups] == pytest.approx([0.3, 0.0, 0.6], rel=1e-15)
    assert [group.base for group in groups.groups] == [0.1, 0.0, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.2]


def test_a_multiplier_each_the_last_also_for_groups_that_come_later() -> None:
    optimizer = sgd(0.1, 0.1)
    groups = decay_groups(optimizer)
    groups.multiply([2.0, 3.0])
    optimizer.add_param_group({"params": ones(1), "weight_decay": 0.2})
    assert [group.weight_decay for group in groups.groups] == pytest.approx([0.2, 0.3, 0.6], rel=1e-15)
    groups.multiply([5.0])
    assert [group.weight_decay for group in groups.groups] == pytest.approx([0.5, 0.5, 1.0], rel=1e-15)


def test_a_multiplier_comes_back_to_a_part_whose_parameters_are_replaced() -> None:
    parameters = ones(3)
    optimizer = torch.optim.SGD(parameters[:2], lr=0.1)
    groups = in_force(optimizer, dict(zip(parameters, (0.1, 0.2, 0.2), strict=True)))
    groups.multiply([2.0, 3.0])
    optimizer.param_groups[0]["params"][1] = parameters[2]
    assert [group.weight_decay for group in groups.groups] == pytest.approx([0.2, 0.6], rel=1e-15)


def test_an_absolute_lambda_of_the_strongest_that_others_follow() -> None:
    optimizer = sgd(0.4, 0.1, 0.0)
    groups = decay_groups(optimizer)
    groups.multiply(1.0, (0.8, 0.4))
    assert [group.weight_decay for group in groups.groups] == pytest.approx([0.8, 0.2, 0.0], rel=1e-15)
    groups.multiply(0.0, (0.8, 0.0))  # nothing decays
    assert [group.weight_decay for group in groups.groups] == [0.0, 0.0, 0.0]
    groups.multiply(2.0)
    assert [group.weight_decay for group in groups.groups] == pytest.approx([0.8, 0.2, 0.0], rel=1e-15)


def test_multiplying_by_1_gives_the_very_value() -> None:
    """Tensors too, which nobody reads on the host."""
    value = torch.tensor(0.3)
    optimizer = torch.optim.SGD(ones(1), lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = value
    decay_groups(optimizer).multiply(1.0)
    assert decay_groups(optimizer).groups[0].weight_decay is value


# --- held and released ---


def test_in_force_as_long_as_anybody_holds_it() -> None:
    (parameter,) = ones(1)
    optimizer = Spy([parameter], weight_decay=0.7)
    groups = decay_groups(optimizer)
    first, second = object(), object()
    groups.hold(first, "First")
    groups.hold(second, "Second")
    groups.decide(Given({parameter: 0.1}))
    groups.multiply(2.0)
    groups.release(first)
    groups.release(first)
    optimizer.step()
    assert optimizer.lambdas() == [0.2]
    groups.release(second)
    optimizer.step()
    assert optimizer.lambdas() == [0.7]
    assert weight_decay_in_force(optimizer) == {"group0": 0.7}
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "step" not in vars(optimizer)


def test_an_optimizer_without_hooks_is_refused_in_the_name_of_who_asks() -> None:
    class Wrapper:
        param_groups: list[Any] = []  # noqa: RUF012

    wrapper = Wrapper()
    with pytest.raises(TypeError, match=r"^Somebody needs step hooks .* which Wrapper does not call"):
        decay_groups(wrapper).hold(None, "Somebody")


def test_copies_of_an_optimizer_have_nothing_in_force() -> None:
    parameters = ones(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.7)
    in_force(optimizer, dict(zip(parameters, (0.1, 0.0), strict=True)))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert weight_decay_in_force(twin) == {"group0": 0.7}
        assert len(twin.param_groups) == 1
        twin.step()


def test_lambda_that_a_strategy_needs_written() -> None:
    optimizer = sgd(0.4, 0.0)
    groups = decay_groups(optimizer)
    groups.fix([0.2, 0.1])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1]
    groups.multiply(3.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.6, 0.3], rel=1e-15)
    optimizer.param_groups[0]["weight_decay"] = 9.0
    groups.multiply(2.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.2], rel=1e-15)


# --- several optimizers ---


def test_of_a_wrapped_optimizer_lambda_is_that_of_the_inner_ones() -> None:
    class Both(torch.optim.Optimizer):
        def __init__(self, *inner: Any) -> None:
            self.inner = inner
            super().__init__([p for one in inner for group in one.param_groups for p in group["params"]], {})

    first, second = sgd(0.1), sgd(0.2)
    assert weight_decay_in_force(Both(first, second)) == {"optimizer0/group0": 0.1, "optimizer1/group0": 0.2}


def test_names_are_unique_over_the_optimizers_of_a_module() -> None:
    parameters = ones(4)
    optimizers = [torch.optim.SGD(parameters[:2], lr=0.1), torch.optim.SGD(parameters[2:], lr=0.1)]
    lambdas = dict(zip(parameters, (0.1, 0.0, 0.1, 0.2), strict=True))
    for one in decay_groups_of(optimizers):
        one.decide(Given(lambdas))
    names = [list(weight_decay_in_force(optimizer)) for optimizer in optimizers]
    assert names == [["optimizer0/at 0.1", "at 0"], ["optimizer1/at 0.1", "at 0.2"]]
    assert [one.number for one in map(decay_groups, optimizers)] == [0, 1]


def test_a_sibling_that_is_gone_is_forgotten() -> None:
    kept, gone = sgd(0.1), sgd(0.2)
    decay_groups_of([kept, gone])
    assert list(weight_decay_in_force(kept)) == ["optimizer0/group0"]
    del gone
    gc.collect()
    assert len(decay_groups(kept).siblings) == 1


def test_a_shared_parameter_decays_by_what_its_own_optimizer_says() -> None:
    (parameter,) = ones(1)
    first, second = Spy([parameter]), Spy([parameter])
    in_force(first, {parameter: 0.1})
    in_force(second, {parameter: 0.2})
    first.step()
    second.step()
    assert (first.lambdas(), second.lambdas()) == ([0.1], [0.2])
    assert nn.Parameter(parameter)[0].item() == pytest.approx(0.99 * 0.98, rel=1e-15)
