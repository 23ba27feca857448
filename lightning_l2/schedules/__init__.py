"""Multipliers of weight decay over the training: functions of its progress, and of what it does.

A `Schedule` is a pure function of progress: 0 at the first optimizer step, 1 at the last one. A `FeedbackSchedule`
answers to a metric, the learning rate or the gradients; those that read tensors are in `lightning_l2.adaptive`.
"""

from lightning_l2.schedules.base import Schedule
from lightning_l2.schedules.composed import PiecewiseSchedule, SequenceSchedule, StepSchedule, WarmupSchedule
from lightning_l2.schedules.cycles import CosineRestartsSchedule, CyclicSchedule, OneCycleSchedule
from lightning_l2.schedules.feedback import FeedbackSchedule, LRSchedule, OptimizerLike, PlateauSchedule
from lightning_l2.schedules.shapes import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    PolynomialSchedule,
)

__all__ = [
    "ConstantSchedule",
    "CosineRestartsSchedule",
    "CosineSchedule",
    "CyclicSchedule",
    "ExponentialSchedule",
    "FeedbackSchedule",
    "InverseSquareRootSchedule",
    "LRSchedule",
    "LinearSchedule",
    "OneCycleSchedule",
    "OptimizerLike",
    "PiecewiseSchedule",
    "PlateauSchedule",
    "PolynomialSchedule",
    "Schedule",
    "SequenceSchedule",
    "StepSchedule",
    "WarmupSchedule",
]


def __dir__() -> list[str]:
    return __all__
