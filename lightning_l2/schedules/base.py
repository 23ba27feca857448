"""What every schedule is, and the checks and the blend that most of them share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence


class Schedule(ABC):
    """Give the multiplier of weight decay at each point of the training.

    Derive a frozen dataclass and define `__call__`: a pure function, finite and never negative. With
    `WeightDecayScheduler(values="weight_decay")` the same numbers are weight decays instead of multipliers.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class SecondHalf(Schedule):
    ...     value: float
    ...     def __call__(self, progress: float) -> float:
    ...         return self.value if check_progress(progress) >= 0.5 else 0.0
    >>> SecondHalf(3.0)(0.25), SecondHalf(3.0)(0.5)
    (0.0, 3.0)
    """

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the multiplier at a point of the training.

        Args:
            progress: Fraction of the training, 0 (first optimizer step) to 1 (last optimizer step).

        Returns:
            The multiplier, dimensionless, at least 0.

        Raises:
            ValueError: If `progress` is outside [0, 1].
        """

    def over(self, length: float) -> Schedule:
        """Return the schedule as it is in a training of a known length: itself, unless it counts in steps.

        Args:
            length: Steps of the training, or of the share of it that the schedule has.
        """
        return self


def check_progress(progress: float) -> float:
    """Return `progress`, or raise a `ValueError` if it is not within [0, 1]."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(
            f"Expected `progress` to be within [0, 1], got {progress}. It is the fraction of the "
            "training: 0 at the first optimizer step, 1 at the last one."
        )
    return progress


def part_of(edges: Sequence[float], progress: float) -> tuple[int, float]:
    """Return which part of the training a progress lies in, and the progress within that part.

    The progress of a step within parts of parts is off by rounding errors. A step that is nearer than 1e-9 to an edge
    is on it, so jumps come in their exact step.

    Args:
        edges: Where each part begins, then where the last one ends, strictly increasing from 0 to 1.
        progress: Fraction of the training, 0 to 1.

    >>> part_of([0.0, 0.25, 1.0], 0.25), part_of([0.0, 0.25, 1.0], 1.0)
    ((1, 0.0), (1, 1.0))
    """
    index = min(bisect_right(edges, check_progress(progress) + 1e-9), len(edges) - 1) - 1
    left, right = edges[index], edges[index + 1]
    return index, min(max((progress - left) / (right - left), 0.0), 1.0)


def check_milestones(schedule: object, name: str, milestones: Sequence[float]) -> None:
    """Raise a `ValueError` unless milestones are within [0, 1] and increase strictly."""
    inside = all(0.0 <= milestone <= 1.0 for milestone in milestones)
    increasing = all(left < right for left, right in itertools.pairwise(milestones))
    if not (inside and increasing):
        raise ValueError(
            f"{type(schedule).__name__} needs `{name}` that increase strictly within [0, 1], but got "
            f"{list(milestones)}. They are fractions of the training, not steps or epochs."
        )


def check_part(schedule: object, name: str, part: object) -> None:
    """Raise a `TypeError` unless a part of a composed schedule is a `Schedule`."""
    if not isinstance(part, Schedule):
        raise TypeError(
            f"{type(schedule).__name__} needs a Schedule as `{name}`, but got {part!r}. Schedules that answer to the "
            "training (plateau, learning rate, adaptive) can't be a part of another; derive from Schedule for a "
            "function of your own."
        )


def blend(start: float, end: float, weight: float) -> float:
    """Return $(1 - weight) * start + weight * end$: exact at 0 and 1, and never outside the two values.

    $start + weight * (end - start)$ misses `end` by a rounding error, and would lift a multiplier off 0.
    """
    low, high = (start, end) if start <= end else (end, start)
    return float(min(max((1.0 - weight) * start + weight * end, low), high))
