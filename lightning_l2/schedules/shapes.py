"""Schedules that go from one value to another along a curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from lightning_l2.arguments import check_not_negative, check_positive, check_types
from lightning_l2.schedules.base import Schedule, blend, check_progress


@final
@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """Keep one multiplier: `f(progress) = value`.

    Args:
        value: Multiplier, dimensionless, at least 0.

    Raises:
        ValueError: If `value` is negative or not finite.

    >>> ConstantSchedule(2.0)(0.3)
    2.0
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(value=self.value)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        check_progress(progress)
        return float(self.value)


@final
@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """Move in a straight line: $f(progress) = start + (end - start) * progress$.

    Args:
        start: Multiplier at the first step, dimensionless, at least 0.
        end: Multiplier at the last step, dimensionless, at least 0.

    Raises:
        ValueError: If a value is negative or not finite.

    >>> schedule = LinearSchedule(1.0, 3.0)
    >>> [schedule(progress) for progress in (0.0, 0.5, 1.0)]
    [1.0, 2.0, 3.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start, end=self.end)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        return blend(self.start, self.end, check_progress(progress))


@final
@dataclass(frozen=True)
class CosineSchedule(Schedule):
    r"""Follow half a cosine: $f(progress) = end + (start - end) * (1 + \cos(\pi * progress)) / 2$.

    Flat at both ends. DINO and its successors raise weight decay this way from 0.04 to 0.4.

    Args:
        start: Multiplier at the first step, dimensionless, at least 0.
        end: Multiplier at the last step, dimensionless, at least 0.

    Raises:
        ValueError: If a value is negative or not finite.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983, 2016;
    for weight decay Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294, 2021.

    >>> schedule = CosineSchedule(1.0, 10.0)
    >>> [schedule(progress) for progress in (0.0, 0.5, 1.0)]
    [1.0, 5.5, 10.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start, end=self.end)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        return blend(self.start, self.end, cosine_weight(check_progress(progress)))


def cosine_weight(progress: float) -> float:
    r"""Return how far half a cosine has gone, $(1 - \cos(\pi * progress)) / 2$; exact at 0, 1/2 and 1 in this form."""
    return 0.5 * (1.0 + math.sin(math.pi * (progress - 0.5)))


@final
@dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    """Change by the same factor in each step: $f(progress) = start * (end / start)^{progress}$.

    Args:
        start: Multiplier at the first step, dimensionless, above 0.
        end: Multiplier at the last step, dimensionless, above 0.

    Raises:
        ValueError: If a value is not finite and above 0: no factor leads to or away from 0.

    >>> schedule = ExponentialSchedule(1.0, 4.0)
    >>> [schedule(progress) for progress in (0.0, 0.5, 1.0)]
    [1.0, 2.0, 4.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(start=self.start, end=self.end)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        check_progress(progress)
        start, end = float(self.start), float(self.end)
        value = start ** (1.0 - progress) * end**progress
        return float(min(max(value, min(start, end)), max(start, end)))


@final
@dataclass(frozen=True)
class PolynomialSchedule(Schedule):
    """Approach the end along a power: $f(progress) = end + (start - end) * (1 - progress)^{power}$.

    A power of 1 is a straight line, above 1 the change is fast first, below 1 fast last.

    Args:
        start: Multiplier at the first step, dimensionless, at least 0.
        end: Multiplier at the last step, dimensionless, at least 0.
        power: Exponent, dimensionless, above 0.

    Raises:
        ValueError: If a value is negative or not finite, or `power` is not finite and above 0.

    Source: Liu, Rabinovich and Berg, "ParseNet: Looking Wider to See Better", arXiv 1506.04579, 2015.

    >>> schedule = PolynomialSchedule(1.0, 5.0, power=2.0)
    >>> [schedule(progress) for progress in (0.0, 0.5, 1.0)]
    [1.0, 4.0, 5.0]
    """

    start: float
    end: float
    power: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start, end=self.end)
        check_positive(power=self.power)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        return blend(self.start, self.end, 1.0 - (1.0 - check_progress(progress)) ** self.power)


@final
@dataclass(frozen=True)
class InverseSquareRootSchedule(Schedule):
    r"""Fall with the root of time: $f(progress) = start / \sqrt{1 + progress / timescale}$.

    Behind a `WarmupSchedule(fraction, ...)` the transformer's schedule has
    $timescale = fraction / (1 - fraction)$: from then on it is proportional to $1 / \sqrt{step}$.

    Args:
        start: Multiplier at the first step, dimensionless, at least 0.
        timescale: Fraction of the training after which the multiplier is down by $\sqrt{2}$, above 0.

    Raises:
        ValueError: If `start` is negative or not finite, or `timescale` is not finite and above 0.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, 2017.

    >>> schedule = InverseSquareRootSchedule(2.0, timescale=1 / 3)
    >>> [schedule(progress) for progress in (0.0, 1.0)]
    [2.0, 1.0]
    """

    start: float
    timescale: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(start=self.start)
        check_positive(timescale=self.timescale)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        return float(self.start) / math.sqrt(1.0 + check_progress(progress) / self.timescale)
