"""One of each schedule, or several, with its closed form; and values at many points of progress."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from lightning_l2.schedules import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    LRSchedule,
    OneCycleSchedule,
    PiecewiseSchedule,
    PlateauSchedule,
    PolynomialSchedule,
    Schedule,
    SequenceSchedule,
    StepSchedule,
    WarmupSchedule,
)

PROGRESS = np.linspace(0.0, 1.0, 211)


def values(schedule: Schedule, progress: np.ndarray = PROGRESS) -> np.ndarray:
    return np.array([schedule(float(point)) for point in progress])


STEPS = 60


def lr_curve(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], lr: float, steps: int) -> np.ndarray:
    """Return what a torch scheduler sets in steps 0 to `steps`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler, curve = make(optimizer), []
    for step in range(steps + 1):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps:  # OneCycleLR allows no more
            scheduler.step()
    return np.array(curve)


positive = st.floats(1e-12, 1e12)
fraction = st.floats(0.0, 1.0)


def half_cosine(start: float, end: float, progress: np.ndarray) -> np.ndarray:
    return end + (start - end) * (1 + np.cos(np.pi * progress)) / 2


# A new schedule has a row here
CLOSED_FORMS: list[tuple[Schedule, Callable[[np.ndarray], np.ndarray]]] = [
    (ConstantSchedule(), np.ones_like),
    (ConstantSchedule(0.3), lambda p: np.full_like(p, 0.3)),
    (LinearSchedule(2.0, 0.5), lambda p: 2.0 - 1.5 * p),
    (LinearSchedule(0.0, 3.0), lambda p: 3.0 * p),
    (CosineSchedule(1.0, 10.0), lambda p: half_cosine(1.0, 10.0, p)),
    (CosineSchedule(0.4, 0.0), lambda p: half_cosine(0.4, 0.0, p)),
    (ExponentialSchedule(2.0, 0.02), lambda p: 2.0 * np.power(0.01, p)),
    (PolynomialSchedule(1.0, 0.1, 2.0), lambda p: 0.1 + 0.9 * (1 - p) ** 2),
    (PolynomialSchedule(0.5, 4.0, 0.5), lambda p: 4.0 - 3.5 * np.sqrt(1 - p)),
    (InverseSquareRootSchedule(2.0, 0.1), lambda p: 2.0 / np.sqrt(1 + 10 * p)),
    (
        CyclicSchedule(1.0, 3.0, cycles=2, rise=0.25),
        lambda p: np.interp(p, [0, 0.125, 0.5, 0.625, 1.0], [1.0, 3.0, 1.0, 3.0, 1.0]),
    ),
    (CyclicSchedule(3.0, 1.0), lambda p: 1.0 + 2.0 * np.abs(2 * p - 1)),
    (
        CosineRestartsSchedule(3.0, 1.0, cycles=3),
        lambda p: half_cosine(3.0, 1.0, np.where(p == 1.0, 1.0, 3 * p - np.floor(3 * p + 1e-12))),
    ),
    (
        CosineRestartsSchedule(3.0, 1.0, cycles=3, growth=2.0),
        lambda p: half_cosine(
            3.0, 1.0, np.select([p < 1 / 7 - 1e-12, p < 3 / 7 - 1e-12], [7 * p, (7 * p - 1) / 2], (7 * p - 3) / 4)
        ),
    ),
    (
        OneCycleSchedule(1.0, 5.0, 0.5, rise=0.3),
        lambda p: np.where(p < 0.3, half_cosine(1.0, 5.0, p / 0.3), half_cosine(5.0, 0.5, (p - 0.3) / 0.7)),
    ),
    (StepSchedule([0.5, 0.75], [0.1, 5.0]), lambda p: np.select([p < 0.5, p < 0.75], [1.0, 0.1], 0.5)),
    (StepSchedule([0.0, 1.0], [3.0, 0.0], start=2.0), lambda p: np.where(p < 1.0, 6.0, 0.0)),
    (
        PiecewiseSchedule([(0.0, 1.0), (0.2, 3.0), (0.9, 0.0)]),
        lambda p: np.interp(p, [0.0, 0.2, 0.9], [1.0, 3.0, 0.0]),
    ),
    (PiecewiseSchedule([(0.3, 1.0), (0.6, 2.0)]), lambda p: np.interp(p, [0.3, 0.6], [1.0, 2.0])),
    (PiecewiseSchedule([(0.5, 4.0)]), lambda p: np.full_like(p, 4.0)),
    (
        WarmupSchedule(0.2, LinearSchedule(4.0, 2.0)),
        lambda p: np.interp(p, [0.0, 0.2, 1.0], [0.0, 4.0, 2.0]),
    ),
    (WarmupSchedule(0.2, ConstantSchedule(4.0), start=0.5), lambda p: np.interp(p, [0.0, 0.2], [2.0, 4.0])),
    (WarmupSchedule(0.0, LinearSchedule(4.0, 2.0)), lambda p: 4.0 - 2.0 * p),
    (
        SequenceSchedule([ConstantSchedule(2.0), LinearSchedule(1.0, 3.0), CosineSchedule(3.0, 0.0)], [0.25, 0.5]),
        lambda p: np.select([p < 0.25, p < 0.5], [2.0, 1.0 + 8 * (p - 0.25)], half_cosine(3.0, 0.0, 2 * p - 1)),
    ),
    (SequenceSchedule([LinearSchedule(1.0, 3.0)], []), lambda p: 1.0 + 2.0 * p),
]
ONE_OF_EACH = list({type(schedule): schedule for schedule, _ in CLOSED_FORMS}.values())
FEEDBACK = [PlateauSchedule("val_loss", factor=2.0, max_multiplier=8.0), LRSchedule(), LRSchedule(max_lr=0.1)]


def with_closed_forms(module: str) -> pytest.MarkDecorator:
    """The schedules of a module of the package."""
    rows = [row for row in CLOSED_FORMS if type(row[0]).__module__ == f"lightning_l2.schedules.{module}"]
    return pytest.mark.parametrize(("schedule", "closed_form"), rows, ids=[repr(schedule)[:60] for schedule, _ in rows])


def assert_closed_form(schedule: Schedule, closed_form: Callable[[np.ndarray], np.ndarray]) -> None:
    np.testing.assert_allclose(values(schedule), closed_form(PROGRESS), rtol=1e-13, atol=1e-13)
    assert all(type(schedule(progress)) is float for progress in (0.0, 0.5, 1.0))


VALUE = r"Expected `{}` to be finite and at least 0, got"
ABOVE = r"Expected `{}` to be finite and above 0, got"
MILESTONES = r"needs `{}` that increase strictly within \[0, 1\], but got .*not steps or epochs"
