"""What can't be scheduled in a bare loop, and schedules of some groups beside each other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_l2 import DecayRule, weight_decay_in_force
from lightning_l2.decay import RuleDecay, ScheduledDecay
from lightning_l2.decay.schedule_checks import pattern_of, probe, warn_of_values
from lightning_l2.schedules import ConstantSchedule, LinearSchedule, Schedule
from tests.param_groups.others import ones


def sgd(**lambdas: float) -> torch.optim.Optimizer:
    groups = [{"params": ones(1), "weight_decay": value, "name": name} for name, value in lambdas.items()]
    return torch.optim.SGD(groups, lr=0.1)


def constant(value: float, optimizer: Any, groups: str | None = None, **options: Any) -> ScheduledDecay:
    scheduled = ScheduledDecay(ConstantSchedule(value), [optimizer], groups=groups, **options)
    scheduled.set(0)
    return scheduled


def test_each_schedule_has_its_groups_and_gives_them_back() -> None:
    optimizer = sgd(body=0.1, head=0.2, bias=0.0)
    body, head = constant(3.0, optimizer, "body"), constant(5.0, optimizer, "head|bias")
    assert body.check()
    assert head.check()
    assert weight_decay_in_force(optimizer) == pytest.approx({"body": 0.3, "head": 1.0, "bias": 0.0})
    body.remove()
    assert weight_decay_in_force(optimizer) == pytest.approx({"body": 0.1, "head": 1.0, "bias": 0.0})
    head.remove()
    assert weight_decay_in_force(optimizer) == {"body": 0.1, "head": 0.2, "bias": 0.0}
    constant(2.0, optimizer)
    assert weight_decay_in_force(optimizer) == {"body": 0.2, "head": 0.4, "bias": 0.0}


def test_what_others_took_stays_theirs_in_the_update() -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    RuleDecay(layer, [optimizer], 0.5, rules=[DecayRule("all")])
    constant(4.0, optimizer, "^all$")
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(1 - 0.1 * 0.5 * 4.0, rel=1e-12)


def test_two_schedules_of_one_group() -> None:
    optimizer = sgd(body=0.1, head=0.2)
    first, second = constant(1.0, optimizer), constant(1.0, optimizer, "^h")
    for scheduled in (first, second):
        with pytest.raises(MisconfigurationException) as caught:
            scheduled.check()
        assert str(caught.value) == (
            "2 schedules take the parameter group 'head', by groups=None and groups='^h'. Let one of them take it: "
            "patterns are searched for, so '^decay$' takes 'decay' alone."
        )
    first.remove()
    assert second.check()


def test_no_group_of_that_name() -> None:
    with pytest.raises(MisconfigurationException) as caught:
        constant(1.0, sgd(body=0.1, head=0.2), "hed").check()
    assert str(caught.value) == (
        "WeightDecayScheduler(groups='hed') takes no parameter group. The groups are 'body', 'head'."
    )
    with pytest.raises(MisconfigurationException, match=r"As a glob it would match 'group/head', .*: write '\^gr"):
        constant(1.0, sgd(**{"group/head": 0.2}), "grou?/h*d").check()


@pytest.mark.parametrize(
    ("groups", "values", "message"),
    [
        (None, "multiplier", "nothing to schedule: the weight decay of every parameter group is 0."),
        ("a", "multiplier", "nothing to schedule: the weight decay of every parameter group that 'a' takes is 0."),
        (None, "weight_decay", "but the base weight decay of every parameter group is 0. Give a base"),
    ],
)
def test_nothing_to_schedule(groups: Any, values: Any, message: str) -> None:
    optimizer = sgd(a=0.0, b=0.3 if groups else 0.0)
    scheduled = constant(1.0, optimizer, groups, values=values)
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        scheduled.check()
    if values == "multiplier":
        assert scheduled.check(is_followed=True)


def test_rules_that_exempt_everything_and_a_base_of_0() -> None:
    """The one can't be meant, the other is a value of a sweep."""
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.3)
    decay = RuleDecay(layer, [optimizer], 0.0)
    scheduled = constant(2.0, optimizer)
    assert scheduled.check()
    decay.remove()
    RuleDecay(layer, [optimizer], 0.5, rules=[DecayRule("all", multiplier=0.0)])
    with pytest.raises(MisconfigurationException, match=r"every parameter group is 0\. Rules exempt all of them\."):
        scheduled.check()


def test_no_optimizer() -> None:
    with pytest.raises(MisconfigurationException, match="WeightDecayScheduler needs an optimizer"):
        ScheduledDecay(ConstantSchedule(), []).check()


def test_lazy_parameters_are_waited_for() -> None:
    layer = nn.LazyLinear(1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    scheduled = constant(1.0, optimizer, "other")
    assert not scheduled.check()
    layer(torch.ones(1, 1))
    with pytest.raises(MisconfigurationException, match="takes no parameter group"):
        scheduled.check()


def test_the_anchor_is_what_rules_multiply() -> None:
    layers = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 2)) for name in "abc"})
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    rules = [DecayRule("a", pattern="a", multiplier=8.0), DecayRule("b", pattern="b", weight_decay=9.0), "default"]
    RuleDecay(layers, [optimizer], 0.25, rules=rules)
    scheduled = constant(0.5, optimizer, values="weight_decay")
    assert scheduled.anchor() == 0.25
    assert weight_decay_in_force(optimizer) == {"a": 4.0, "b": 18.0, "decay": 0.5}


def test_multipliers_at_the_base_are_told_and_others_not(recwarn: pytest.WarningsRecorder) -> None:
    for start, base in ((1.0, 1.0), (0.0, 0.0), (0.5, 0.04), (1.0, 0.04)):
        warn_of_values("LinearSchedule", start, base)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"LinearSchedule starts at a multiplier of 0.1, and the base .* = 0.01\."):
        warn_of_values("LinearSchedule", 0.1, 0.1)


def test_patterns() -> None:
    assert pattern_of(None) is None
    with pytest.raises(ValueError, match=r"Expected `groups` to be a regular expression, got '\*': "):
        pattern_of("*")


def test_a_schedule_that_gives_no_lambda() -> None:
    class Falling(Schedule):
        def __call__(self, progress: float) -> float:
            return 0.5 - progress

    probe(LinearSchedule(0.0, 1.0), 10, "LinearSchedule")
    with pytest.raises(ValueError, match=r"Falling gives -0.* at progress 0\.6; a multiplier"):
        probe(Falling(), 11, "Falling")
