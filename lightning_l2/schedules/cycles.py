"""Schedules that go up and down, once or again and again."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import final

from lightning_l2.arguments import check_fraction, check_not_negative, check_positive, check_types
from lightning_l2.schedules.base import Schedule, blend, check_progress, part_of
from lightning_l2.schedules.shapes import cosine_weight


@final
@dataclass(frozen=True)
class CyclicSchedule(Schedule):
    """Swing in triangles between two values.

    With `phase` the fraction of the current cycle, $phase = progress * cycles mod 1$:
    $f = start + (peak - start) * phase / rise$ up to `phase = rise`, then
    $f = start + (peak - start) * (1 - phase) / (1 - rise)$. Every cycle begins and ends at `start`.

    Args:
        start: Multiplier at the ends of each cycle, dimensionless, at least 0.
        peak: Multiplier in the middle, dimensionless, at least 0; below `start` the triangles point down.
        cycles: Number of cycles in the training, at least 1.
        rise: Fraction of a cycle from `start` to `peak`, above 0 and below 1.

    Raises:
        ValueError: If a value is negative or not finite, `cycles` is below 1 or `rise` is not between 0 and 1.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, 2015.

    >>> schedule = CyclicSchedule(1.0, 3.0, cycles=2)
    >>> [schedule(progress) for progress in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
    [1.0, 2.0, 3.0, 1.0, 3.0, 1.0]
    """

    start: float
    peak: float
    cycles: int = field(default=1, kw_only=True)
    rise: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start, peak=self.peak)
        check_cycles(self, self.cycles)
        check_positive(rise=self.rise)
        check_fraction(rise=self.rise)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        phase = (check_progress(progress) * self.cycles) % 1.0
        weight = phase / self.rise if phase < self.rise else (1.0 - phase) / (1.0 - self.rise)
        return blend(self.start, self.peak, weight)


@final
@dataclass(frozen=True)
class CosineRestartsSchedule(Schedule):
    r"""Repeat half a cosine from `start` to `end`, jumping back between the cycles.

    $f = end + (start - end) * (1 + \cos(\pi * phase)) / 2$ with `phase` the fraction of the current cycle.
    Cycle `i` takes a share of the training in proportion to $growth^i$. The last one ends at `end`.

    Args:
        start: Multiplier at the beginning of each cycle, dimensionless, at least 0.
        end: Multiplier that each cycle leads to, dimensionless, at least 0.
        cycles: Number of cycles in the training, at least 1.
        growth: Length of a cycle over that of the one before, dimensionless, above 0.

    Raises:
        ValueError: If a value is negative or not finite, `cycles` is below 1, or `growth` is not above 0 or leaves
            a cycle no share of the training.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983, 2016.

    >>> schedule = CosineRestartsSchedule(3.0, 1.0, cycles=2)
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [3.0, 2.0, 3.0, 2.0, 1.0]
    """

    start: float
    end: float
    cycles: int = field(kw_only=True)
    growth: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start, end=self.end)
        check_cycles(self, self.cycles)
        check_positive(growth=self.growth)
        with suppress(OverflowError):
            if all(left < right for left, right in pairwise(_edges(self.cycles, self.growth))):
                return
        raise ValueError(
            f"CosineRestartsSchedule needs a `growth` that leaves each of {self.cycles} cycles a share of the "
            f"training, but got {self.growth}. Bring it nearer to 1, or take fewer cycles."
        )

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        _, phase = part_of(_edges(self.cycles, self.growth), progress)
        return blend(self.start, self.end, cosine_weight(phase))


@lru_cache(maxsize=16)  # asked in each step, and many cycles take milliseconds
def _edges(cycles: int, growth: float) -> list[float]:
    """Return the progress at which each cycle begins, and 1."""
    # As quotients of sums, edges meet the progress of a step that falls on them, which a running sum would miss.
    lengths = [growth**cycle for cycle in range(cycles)]
    return [math.fsum(lengths[:cycle]) / math.fsum(lengths) for cycle in range(cycles + 1)]


@final
@dataclass(frozen=True)
class OneCycleSchedule(Schedule):
    """Rise along half a cosine to a peak, then fall along another one.

    Up to `progress = rise` from `start` to `peak`, from there to `end`, each half a cosine over its share.

    Args:
        start: Multiplier at the first step, dimensionless, at least 0.
        peak: Multiplier at `progress = rise`, dimensionless, at least 0.
        end: Multiplier at the last step, dimensionless, at least 0.
        rise: Fraction of the training from `start` to `peak`, above 0 and below 1.

    Raises:
        ValueError: If a value is negative or not finite, or `rise` is not between 0 and 1.

    Source: Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    arXiv 1708.07120, 2017.

    >>> schedule = OneCycleSchedule(1.0, 5.0, 0.0, rise=0.5)
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 3.0, 5.0, 0.0]
    """

    start: float
    peak: float
    end: float
    rise: float = field(default=0.3, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start, peak=self.peak, end=self.end)
        check_positive(rise=self.rise)
        check_fraction(rise=self.rise)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        if check_progress(progress) < self.rise:
            return blend(self.start, self.peak, cosine_weight(progress / self.rise))
        return blend(self.peak, self.end, cosine_weight((progress - self.rise) / (1.0 - self.rise)))


def check_cycles(schedule: object, cycles: int) -> None:
    """Raise a `ValueError` unless the number of cycles is from 1 to 1000, more than which no training has use for."""
    if not 1 <= cycles <= 1000:
        raise ValueError(f"{type(schedule).__name__} needs from 1 to 1000 `cycles`, but got {cycles}.")
