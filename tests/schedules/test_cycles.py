"""Cycles against closed forms in numpy, and torch's LR schedulers of the same shape."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from lightning_l2.schedules import (
    CosineRestartsSchedule,
    CyclicSchedule,
    OneCycleSchedule,
    Schedule,
)
from tests.schedules.every import ABOVE, STEPS, assert_closed_form, lr_curve, values, with_closed_forms


@with_closed_forms("cycles")
def test_schedule_equals_its_closed_form(schedule: Schedule, closed_form: Callable[[np.ndarray], np.ndarray]) -> None:
    assert_closed_form(schedule, closed_form)


ONE_CYCLE = {"pct_start": 15 / 61, "div_factor": 10, "final_div_factor": 10, "cycle_momentum": False}
TORCH_SCHEDULERS = [
    (
        OneCycleSchedule(0.2, 2.0, 0.02, rise=14 / STEPS),
        2.0,
        lambda o: lr_scheduler.OneCycleLR(o, 2.0, total_steps=STEPS + 1, **ONE_CYCLE),
    ),
    (
        CyclicSchedule(0.5, 2.0, cycles=3, rise=0.25),
        0.5,
        lambda o: lr_scheduler.CyclicLR(o, 0.5, 2.0, step_size_up=5, step_size_down=15),
    ),
]


@pytest.mark.parametrize(("schedule", "lr", "make"), TORCH_SCHEDULERS, ids=lambda value: type(value).__name__)
def test_schedule_equals_the_torch_scheduler_of_its_shape(
    schedule: Schedule, lr: float, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    curve = lr_curve(make, lr, STEPS)
    np.testing.assert_allclose(values(schedule, np.arange(STEPS + 1) / STEPS), curve, rtol=1e-12, atol=1e-12)


MISUSES = [
    (lambda: CyclicSchedule(1.0, 2.0, cycles=0), ValueError, "from 1 to 1000 `cycles`, but got 0"),
    (lambda: CosineRestartsSchedule(1.0, 2.0, cycles=1001), ValueError, "from 1 to 1000 `cycles`"),
    (lambda: CyclicSchedule(1.0, 2.0, cycles=1.5), TypeError, "`cycles` to be int, but got 1.5"),
    (lambda: CyclicSchedule(1.0, 2.0, rise=0.0), ValueError, "`rise` to be finite and above 0, got 0.0"),
    (lambda: OneCycleSchedule(1.0, 2.0, 1.0, rise=1.0), ValueError, "`rise` to be at least 0 and below 1"),
    (lambda: CosineRestartsSchedule(1.0, 0.0, cycles=2, growth=0.0), ValueError, ABOVE.format("growth")),
    (lambda: CosineRestartsSchedule(1.0, 0.0, cycles=2, growth=1e-17), ValueError, "`growth` that leaves each of 2"),
    (lambda: CosineRestartsSchedule(1.0, 0.0, cycles=99, growth=1e9), ValueError, "`growth` that leaves each of 99"),
]


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES, ids=range(len(MISUSES)))
def test_misuse_is_a_clear_error(misuse: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        misuse()


@pytest.mark.parametrize(("growth", "cycles"), [(1, 3), (1, 7), (1, 11), (2, 3), (3, 4)])
def test_restarts_equal_torch_up_to_the_last_step(growth: int, cycles: int) -> None:
    last = 10 * sum(growth**cycle for cycle in range(cycles))
    reference = lr_curve(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, growth, 0.1), 2.0, last)
    ours = values(CosineRestartsSchedule(2.0, 0.1, cycles=cycles, growth=growth), np.arange(last + 1) / last)
    np.testing.assert_allclose(ours[:-1], reference[:-1], rtol=1e-12)
    assert ours[-1] == 0.1  # torch begins another cycle here
