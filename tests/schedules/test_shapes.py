"""Shapes against closed forms in numpy, torch's LR schedulers of the same shape, and the schedules of papers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.optim import lr_scheduler

from lightning_l2.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
    WarmupSchedule,
)
from tests.schedules.every import (
    ABOVE,
    STEPS,
    VALUE,
    assert_closed_form,
    fraction,
    lr_curve,
    positive,
    values,
    with_closed_forms,
)


@with_closed_forms("shapes")
def test_schedule_equals_its_closed_form(schedule: Schedule, closed_form: Callable[[np.ndarray], np.ndarray]) -> None:
    assert_closed_form(schedule, closed_form)


TORCH_SCHEDULERS = [
    (CosineSchedule(2.0, 0.1), 2.0, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1)),
    (PolynomialSchedule(2.0, 0.0, 1.7), 2.0, lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=1.7)),
    (ExponentialSchedule(2.0, 0.5), 2.0, lambda o: lr_scheduler.ExponentialLR(o, 0.25 ** (1 / STEPS))),
    (LinearSchedule(0.2, 2.0), 2.0, lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, STEPS)),
]


@pytest.mark.parametrize(("schedule", "lr", "make"), TORCH_SCHEDULERS, ids=lambda value: type(value).__name__)
def test_schedule_equals_the_torch_scheduler_of_its_shape(
    schedule: Schedule, lr: float, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    curve = lr_curve(make, lr, STEPS)
    np.testing.assert_allclose(values(schedule, np.arange(STEPS + 1) / STEPS), curve, rtol=1e-12, atol=1e-12)


MISUSES = [
    (lambda: ConstantSchedule(-1.0), ValueError, VALUE.format("value")),
    (lambda: LinearSchedule(math.nan, 1.0), ValueError, VALUE.format("start")),
    (lambda: LinearSchedule(1.0, math.inf), ValueError, VALUE.format("end")),
    (lambda: CosineSchedule(1.0, -0.1), ValueError, VALUE.format("end")),
    (lambda: ExponentialSchedule(0.0, 1.0), ValueError, ABOVE.format("start")),
    (lambda: ExponentialSchedule(1.0, 0.0), ValueError, ABOVE.format("end")),
    (lambda: PolynomialSchedule(1.0, 0.0, 0.0), ValueError, ABOVE.format("power")),
    (lambda: InverseSquareRootSchedule(1.0, 0.0), ValueError, ABOVE.format("timescale")),
]


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES, ids=range(len(MISUSES)))
def test_misuse_is_a_clear_error(misuse: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        misuse()


def test_inverse_square_root_after_warmup_is_the_transformer_schedule() -> None:
    warmup, last = 20, 200
    schedule = WarmupSchedule(warmup / last, InverseSquareRootSchedule(3.0, timescale=warmup / (last - warmup)))
    steps = np.arange(last + 1)
    # Vaswani et al. (2017), equation 3, with the step counted so that its peak is at `warmup`
    expected = 3.0 * np.sqrt(warmup) * np.minimum(steps * warmup**-1.5, np.maximum(steps, 1) ** -0.5)
    np.testing.assert_allclose(values(schedule, steps / last), expected, rtol=1e-12)


@given(positive, fraction)
def test_equal_ends_make_a_constant(value: float, progress: float) -> None:
    for schedule in (LinearSchedule, CosineSchedule, ExponentialSchedule):
        assert schedule(value, value)(progress) == value
