"""Lambda over training in a bare loop: closed forms of what is left of a weight."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2 import weight_decay_in_force
from lightning_l2.adaptive import AdaptiveDecay, AutoL2Decay, CorrectedDecay
from lightning_l2.decay import RuleDecay, ScheduledDecay, attach_decay
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.schedules import ConstantSchedule, LinearSchedule, Schedule
from tests.param_groups.others import ones

LR = 0.1


def sgd(*lambdas: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": ones(1), "weight_decay": value} for value in lambdas], lr=LR)


def left(optimizer: Any) -> list[float]:
    return [p.flatten()[0].item() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("apply", [None, "decoupled", "coupled", "independent"])
def test_lambda_of_each_step(apply: Any) -> None:
    optimizer = sgd(0.5, 0.0)
    scheduled = ScheduledDecay(LinearSchedule(0.0, 2.0), [optimizer], length=5)
    if apply is not None:
        attach_decay(optimizer, apply)
    for step in range(7):
        scheduled.set(step)
        optimizer.step()
    # progress 0, 1/4, ... 1, and 1 after that
    lambdas = [0.5 * 2.0 * min(step / 4, 1.0) for step in range(7)]
    factor = math.prod(1 - value * (1.0 if apply == "independent" else LR) for value in lambdas)
    assert left(optimizer) == pytest.approx([factor, 1.0], rel=1e-12)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_a_schedule_of_one_step_is_at_its_start() -> None:
    optimizer = sgd(0.5)
    ScheduledDecay(LinearSchedule(0.4, 2.0), [optimizer], length=1).set(0)
    assert weight_decay_in_force(optimizer) == {"group0": 0.2}


def test_values_of_the_group_with_the_strongest_base() -> None:
    optimizers = [sgd(0.1, 0.0), sgd(0.4)]
    scheduled = ScheduledDecay(LinearSchedule(0.8, 0.0), optimizers, length=3, values="weight_decay")
    assert scheduled.strongest() == 0.4
    for step, value in enumerate((0.8, 0.4, 0.0)):
        scheduled.set(step)
        found = [group.weight_decay for one in optimizers for group in decay_groups(one).groups]
        assert found == pytest.approx([value / 4, 0.0, value], rel=1e-15)


def test_values_where_nothing_decays() -> None:
    optimizer = sgd(0.0)
    scheduled = ScheduledDecay(ConstantSchedule(0.8), [optimizer], values="weight_decay")
    scheduled.set(0)
    assert weight_decay_in_force(optimizer) == {"group0": 0.0}


@pytest.mark.parametrize("rules_first", [True, False])
def test_rules_and_schedule_in_any_order(rules_first: bool) -> None:
    layer = nn.Linear(1, 1).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    attach = [
        lambda: RuleDecay(layer, [optimizer], 0.5),
        lambda: ScheduledDecay(ConstantSchedule(2.0), [optimizer]).set(0),
    ]
    for one in attach if rules_first else attach[::-1]:
        one()
    assert weight_decay_in_force(optimizer) == {"decay": 1.0, "no_decay": 0.0}


def test_a_group_that_comes_later_is_scheduled_too() -> None:
    optimizer = sgd(0.5)
    ScheduledDecay(ConstantSchedule(2.0), [optimizer]).set(0)
    optimizer.add_param_group({"params": ones(1), "weight_decay": 0.3})
    optimizer.step()
    assert left(optimizer) == pytest.approx([1 - LR * 1.0, 1 - LR * 0.6], rel=1e-12)


def test_optimizers_that_have_not_updated_keep_their_lambda() -> None:
    """Their step of this batch may still be to come."""
    first, second = sgd(0.5), sgd(0.5)
    scheduled = ScheduledDecay(LinearSchedule(0.0, 1.0), [first, second], length=3)
    scheduled.set(0)
    first.step()
    scheduled.set(1, only_updated=True)
    assert [weight_decay_in_force(one) for one in (first, second)] == [
        {"optimizer0/group0": 0.25},
        {"optimizer1/group0": 0.0},
    ]
    scheduled.set(1, only_updated=True)
    second.step()
    scheduled.set(2, only_updated=True)
    assert [weight_decay_in_force(one) for one in (first, second)] == [
        {"optimizer0/group0": 0.25},
        {"optimizer1/group0": 0.5},
    ]


def test_other_optimizers() -> None:
    first, second = sgd(0.5), sgd(0.5)
    scheduled = ScheduledDecay(ConstantSchedule(2.0), [first])
    scheduled.set(0)
    assert scheduled.follow([second])
    assert not scheduled.follow([second])
    scheduled.set(0)
    assert [weight_decay_in_force(one) for one in (first, second)] == [{"group0": 0.5}, {"group0": 1.0}]
    first.step()
    second.step()
    assert left(first) + left(second) == pytest.approx([1 - LR * 0.5, 1 - LR * 1.0], rel=1e-12)
    scheduled.remove()
    assert weight_decay_in_force(second) == {"group0": 0.5}
    assert not second._optimizer_step_pre_hooks


def test_written_where_a_strategy_leaves_no_other_way() -> None:
    optimizer = sgd(0.5)
    decay_groups(optimizer).fix([0.5])
    scheduled = ScheduledDecay(LinearSchedule(0.0, 2.0), [optimizer], length=3, writes=True)
    for step, value in enumerate((0.0, 0.5, 1.0)):
        scheduled.set(step)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [value]
    assert not optimizer._optimizer_step_pre_hooks


class Wrong(Schedule):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, progress: float) -> Any:
        return self.value if progress > 0.5 else 1.0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None])
def test_what_no_lambda_can_be_is_refused_before_it_costs_a_training(value: Any) -> None:
    optimizer = sgd(0.5)
    if value == "1":  # a text that is a number is one
        ScheduledDecay(Wrong(value), [optimizer], length=10).remove()
        return
    with pytest.raises(ValueError, match=r"Wrong gives .* at progress 0.5\d*; a multiplier"):
        ScheduledDecay(Wrong(value), [optimizer], length=10)
    assert not optimizer._optimizer_step_pre_hooks


# --- schedules that read the training ---


def test_the_learning_rate_is_read_when_lambda_is_set() -> None:
    """CorrectedDecay multiplies by lr / max lr."""
    optimizer = sgd(0.5)
    optimizer.param_groups[0]["initial_lr"] = 0.4
    scheduled = ScheduledDecay(CorrectedDecay(), [optimizer])
    scheduled.check()
    for lr in (0.4, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        scheduled.set(0)
        assert weight_decay_in_force(optimizer) == pytest.approx({"group0": 0.5 * lr / 0.4}, rel=1e-15)


def test_metrics_are_read_when_they_are_observed_and_the_memory_goes_along() -> None:
    optimizer = sgd(0.5)
    schedule = AutoL2Decay("loss", factor=0.5, patience=1, refractory=0.0)
    memory: dict[int, dict[str, Any]] = {}
    scheduled = ScheduledDecay(schedule, [optimizer], memory=memory)
    seen = []
    for loss in (1.0, 2.0, 0.5, 3.0):
        scheduled.observe({"loss": loss})
        scheduled.set(0)
        seen.append(weight_decay_in_force(optimizer)["group0"])
    assert seen == [0.5, 0.25, 0.25, 0.125]
    state = {int(key): value for key, value in json.loads(json.dumps(scheduled.state())).items()}
    assert state == memory
    scheduled.remove()

    fresh = sgd(0.5)
    again = ScheduledDecay(schedule, [fresh], memory=state)
    again.set(0)
    assert weight_decay_in_force(fresh) == {"group0": 0.125}
    again.observe({"loss": 4.0})
    assert weight_decay_in_force(fresh) == {"group0": 0.0625}


def test_before_a_feedback_schedule_was_asked_the_multiplier_is_1() -> None:
    optimizer = sgd(0.5)
    ScheduledDecay(AutoL2Decay("loss"), [optimizer]).set(0)
    assert weight_decay_in_force(optimizer) == {"group0": 0.5}
    assert decay_groups(optimizer).is_scheduled


def test_a_schedule_sees_a_group_for_each_part_and_what_the_optimizer_is() -> None:
    seen: list[Any] = []

    class Looking(AdaptiveDecay):
        reads = "lr"

        def multipliers(self, optimizer: Any, metrics: Any, state: Any) -> list[float]:
            seen.append(optimizer)
            return [2.0] * len(optimizer.param_groups)

    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LR, betas=(0.5, 0.6))
    RuleDecay(layer, [optimizer], 0.5)
    ScheduledDecay(Looking(), [optimizer]).set(0)
    (view,) = seen
    assert isinstance(view, torch.optim.AdamW)
    assert type(view).__name__ == "AdamW"
    assert view.state is optimizer.state
    assert view.defaults is optimizer.defaults
    keys = ("name", "rule", "weight_decay", "initial_weight_decay", "lr", "betas")
    assert [tuple(group[key] for key in keys) for group in view.param_groups] == [
        ("decay", "decay", 0.5, 0.5, LR, (0.5, 0.6)),
        ("no_decay", "no_decay", 0.0, 0.0, LR, (0.5, 0.6)),
    ]
    assert [[id(p) for p in group["params"]] for group in view.param_groups] == [[id(layer.weight)], [id(layer.bias)]]
    assert weight_decay_in_force(optimizer) == {"decay": 1.0, "no_decay": 0.0}


def test_a_schedule_sees_gradients_before_anything_joins_them() -> None:
    from lightning_l2.optimizers.step_hook import gradients_are_complete

    seen: list[float] = []

    class Looking(AdaptiveDecay):
        def multipliers(self, optimizer: Any, metrics: Any, state: Any) -> list[float]:
            seen.append(float(optimizer.param_groups[0]["params"][0].grad[0]))
            return [3.0]

    optimizer = sgd(0.5)
    handle = attach_decay(optimizer, "coupled", before_clipping=True)
    scheduled = ScheduledDecay(Looking(), [optimizer])
    gradients_are_complete(optimizer, "a callback")
    assert seen == [0.0]
    assert optimizer.param_groups[0]["params"][0].grad[0].item() == pytest.approx(1.5)  # 3 lambda w, of the same step
    optimizer.step()
    assert left(optimizer) == pytest.approx([1 - LR * 1.5], rel=1e-12)
    scheduled.remove()
    handle.remove()


@pytest.mark.parametrize("groups", [None, "^group0$"])
def test_a_schedule_that_is_taken_off_leaves_the_base_in_force(groups: str | None) -> None:
    """Also where something else, such as decay by rules, keeps lambda in force."""
    optimizer = sgd(0.5, 0.25)
    handle = attach_decay(optimizer, "independent")
    scheduled = ScheduledDecay(ConstantSchedule(0.5), [optimizer], groups=groups)
    scheduled.set(0)
    assert weight_decay_in_force(optimizer) == {"group0": 0.25, "group1": 0.125 if groups is None else 0.25}
    scheduled.remove()
    assert weight_decay_in_force(optimizer) == {"group0": 0.5, "group1": 0.25}
    optimizer.step()
    handle.remove()
    assert left(optimizer) == [0.5, 0.75]
