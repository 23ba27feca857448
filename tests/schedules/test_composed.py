"""Schedules of parts against closed forms in numpy, and torch's LR schedulers of the same shape."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from lightning_l2.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LRSchedule,
    PiecewiseSchedule,
    Schedule,
    SequenceSchedule,
    StepSchedule,
    WarmupSchedule,
)
from tests.schedules.every import MILESTONES, STEPS, VALUE, assert_closed_form, lr_curve, values, with_closed_forms


@with_closed_forms("composed")
def test_schedule_equals_its_closed_form(schedule: Schedule, closed_form: Callable[[np.ndarray], np.ndarray]) -> None:
    assert_closed_form(schedule, closed_form)


TORCH_SCHEDULERS = [
    (
        StepSchedule([0.25, 0.5], [0.1, 0.1], start=2.0),
        2.0,
        lambda o: lr_scheduler.MultiStepLR(o, [15, 30], gamma=0.1),
    ),
    (
        WarmupSchedule(0.25, CosineSchedule(2.0, 0.0), start=0.1),
        2.0,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 15), lr_scheduler.CosineAnnealingLR(o, 45)], [15]
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "lr", "make"), TORCH_SCHEDULERS, ids=lambda value: type(value).__name__)
def test_schedule_equals_the_torch_scheduler_of_its_shape(
    schedule: Schedule, lr: float, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    curve = lr_curve(make, lr, STEPS)
    np.testing.assert_allclose(values(schedule, np.arange(STEPS + 1) / STEPS), curve, rtol=1e-12, atol=1e-12)


MISUSES = [
    (lambda: StepSchedule([0.5, 0.5], [1.0, 1.0]), ValueError, MILESTONES.format("milestones")),
    (lambda: StepSchedule([30, 60], [0.1, 0.1]), ValueError, MILESTONES.format("milestones")),
    (lambda: StepSchedule([math.nan], [0.1]), ValueError, MILESTONES.format("milestones")),
    (lambda: StepSchedule([0.5], [0.1, 0.1]), ValueError, "one factor for each milestone, but got 2 .* for 1"),
    (lambda: StepSchedule([0.5], [-0.1]), ValueError, r"`factors\[0\]` to be finite and at least 0"),
    (lambda: StepSchedule([0.1, 0.2], [1e200, 1e200]), ValueError, r"`start \* product\(factors\)`"),
    (lambda: PiecewiseSchedule([]), ValueError, "at least one point"),
    (lambda: PiecewiseSchedule([(0.5, 1.0), (0.2, 1.0)]), ValueError, MILESTONES.format("points")),
    (lambda: PiecewiseSchedule([(0.5, -1.0)]), ValueError, r"`points\[0\]\[1\]` to be finite and at least 0"),
    (lambda: WarmupSchedule(1.0, ConstantSchedule()), ValueError, r"`fraction` within \[0, 1\), but got 1.0.*steps"),
    (lambda: WarmupSchedule(0.1, ConstantSchedule(), start=-1), ValueError, VALUE.format("start")),
    (lambda: WarmupSchedule(0.1, LRSchedule()), TypeError, "Schedule as `then`, but got LRSchedule.* can't be a part"),
    (lambda: SequenceSchedule([math.sin], []), TypeError, r"Schedule as `schedules\[0\]`"),
    (lambda: SequenceSchedule([ConstantSchedule()], [0.5]), ValueError, "1 `milestones` for 1 `schedules`"),
    (lambda: SequenceSchedule([], []), ValueError, "one milestone between each two schedules"),
    (lambda: SequenceSchedule([ConstantSchedule()] * 2, [1.0]), ValueError, "above 0 and below 1.*no place"),
    (lambda: SequenceSchedule([ConstantSchedule()] * 3, [0.6, 0.5]), ValueError, MILESTONES.format("milestones")),
]


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES, ids=range(len(MISUSES)))
def test_misuse_is_a_clear_error(misuse: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        misuse()
