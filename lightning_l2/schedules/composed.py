"""Schedules put together from values, points or other schedules."""

from __future__ import annotations

import itertools
import math
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lightning_l2.arguments import check_not_negative, check_positive, check_types
from lightning_l2.schedules.base import Schedule, blend, check_milestones, check_part, check_progress, part_of
from lightning_l2.schedules.shapes import ConstantSchedule


@final
@dataclass(frozen=True)
class StepSchedule(Schedule):
    r"""Jump by a factor at each milestone: $f(progress) = start * \prod factors[i]$ over $milestones[i] \le progress$.

    The factors add up, as in torch's `MultiStepLR`: milestones 0.5 and 0.75 with factors 2 and 2 give 1, 2, 4.

    Args:
        milestones: Fractions of the training, 0 to 1, strictly increasing.
        factors: What the multiplier is multiplied with at each milestone, dimensionless, at least 0.
        start: Multiplier before the first milestone, dimensionless, at least 0.

    Raises:
        ValueError: If milestones don't increase within [0, 1], there isn't one factor for each, or a multiplier is
            negative or not finite.

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, 2015.

    >>> schedule = StepSchedule([0.5, 0.75], [0.1, 5.0])
    >>> [schedule(progress) for progress in (0.0, 0.49, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.1, 0.5, 0.5]
    """

    milestones: Sequence[float]
    factors: Sequence[float]
    start: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        object.__setattr__(self, "factors", tuple(self.factors))
        check_milestones(self, "milestones", self.milestones)
        if len(self.factors) != len(self.milestones):
            raise ValueError(
                f"StepSchedule needs one factor for each milestone, but got {len(self.factors)} `factors` for "
                f"{len(self.milestones)} `milestones`. The value before the first milestone is `start`."
            )
        check_not_negative(start=self.start)
        for index, factor in enumerate(self.factors):
            check_not_negative(**{f"factors[{index}]": factor})
        check_not_negative(**{"start * product(factors)": max(self._levels())})

    def _levels(self) -> list[float]:
        return list(itertools.accumulate(self.factors, lambda level, factor: level * factor, initial=float(self.start)))

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        # see `part_of`
        return self._levels()[bisect_right(self.milestones, check_progress(progress) + 1e-9)]


@final
@dataclass(frozen=True)
class PiecewiseSchedule(Schedule):
    """Draw straight lines between points, and keep the outer values before the first and after the last one.

    Between points `(p0, v0)` and `(p1, v1)`: $f(progress) = v0 + (v1 - v0) * (progress - p0) / (p1 - p0)$.

    Args:
        points: Pairs of progress (fraction of the training, 0 to 1, strictly increasing) and multiplier
            (dimensionless, at least 0).

    Raises:
        ValueError: If there is no point, progress doesn't increase within [0, 1], or a multiplier is negative or not
            finite.

    >>> schedule = PiecewiseSchedule([(0.0, 1.0), (0.5, 3.0), (1.0, 0.0)])
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [1.0, 2.0, 3.0, 1.5, 0.0]
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        object.__setattr__(self, "points", tuple((progress, value) for progress, value in self.points))
        if not self.points:
            raise ValueError("PiecewiseSchedule needs at least one point in `points`, but got none.")
        check_milestones(self, "points", [progress for progress, _ in self.points])
        for index, (_, value) in enumerate(self.points):
            check_not_negative(**{f"points[{index}][1]": value})

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        right = bisect_right([position for position, _ in self.points], check_progress(progress))
        if right in (0, len(self.points)):
            return float(self.points[max(right - 1, 0)][1])
        (p0, v0), (p1, v1) = self.points[right - 1], self.points[right]
        return blend(v0, v1, (progress - p0) / (p1 - p0))


@final
@dataclass(frozen=True)
class WarmupSchedule(Schedule):
    """Rise in a straight line to the first value of another schedule, then follow that one.

    $f(progress) = then(0) * (start + (1 - start) * progress / fraction)$ while $progress < fraction$, and
    $f(progress) = then((progress - fraction) / (1 - fraction))$ from there on. With `steps` the fraction follows from
    the length of the training: step `steps`, counted from 0, is the first that has $then(0)$.

    Args:
        fraction: Fraction of the training that warms up, at least 0 and below 1; or give `steps`.
        then: The schedule that follows, None for a multiplier of 1; it sees progress 0 to 1 over the rest.
        start: Share of `then(0)` at the first step, dimensionless, at least 0.
        steps: Steps that warm up, above 0, whatever the length of the training; epochs where a scheduler counts them.

    Raises:
        TypeError: If `then` is not a `Schedule`.
        ValueError: If not one of `fraction` and `steps` is given, `fraction` is outside [0, 1), `steps` is not above 0,
            or `start` is negative or not finite; if it counts in steps and nobody said how many there are (`over`).

    Source: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv 1706.02677, 2017.

    >>> from lightning_l2.schedules import LinearSchedule
    >>> schedule = WarmupSchedule(0.5, LinearSchedule(2.0, 1.0))
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 1.0, 2.0, 1.5, 1.0]
    >>> schedule = WarmupSchedule(steps=2).over(5)
    >>> [schedule(step / 4) for step in range(5)]
    [0.0, 0.5, 1.0, 1.0, 1.0]
    """

    fraction: float | None = None
    then: Schedule | None = None
    start: float = field(default=0.0, kw_only=True)
    steps: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.then is not None:
            check_part(self, "then", self.then)
        check_types(type(self), vars(self))
        if (self.fraction is None) == (self.steps is None):
            raise ValueError(
                f"Expected one of `fraction` and `steps` of WarmupSchedule, got fraction={self.fraction} and "
                f"steps={self.steps}."
            )
        if self.steps is not None:
            check_positive(steps=self.steps)
        if self.fraction is not None and not 0.0 <= self.fraction < 1.0:
            raise ValueError(
                f"WarmupSchedule needs a `fraction` within [0, 1), but got {self.fraction}. It is a fraction of the "
                "training; a number of steps is `steps`."
            )
        check_not_negative(start=self.start)

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        if self.fraction is None:
            raise ValueError(f"WarmupSchedule(steps={self.steps}) needs the length of the training: call `over` first.")
        return _Warmup(self.fraction, self.then or ConstantSchedule(), self.start)(progress)

    def over(self, length: float) -> Schedule:
        """Return the schedule of a training of so many steps."""
        span, fraction = length - 1, self.fraction or 0.0
        if self.steps is not None:
            fraction = self.steps / span if span > 0 else math.inf
            if fraction > 1 and span > 0:
                warnings.warn(
                    f"WarmupSchedule warms up over {self.steps} steps of a training that has {length:g}: "
                    f"it ends at {1 / fraction:.3g} of the way.",
                    stacklevel=2,
                )
        then = (self.then or ConstantSchedule()).over(1 + max(0.0, 1 - fraction) * span)
        return _Warmup(fraction, then, self.start)


@final
@dataclass(frozen=True)
class _Warmup(Schedule):
    """A warm-up over a fraction of the training that is known, also one that the training doesn't live to see end."""

    fraction: float
    then: Schedule
    start: float

    def __call__(self, progress: float) -> float:
        if check_progress(progress) < self.fraction:
            return self.then(0.0) * blend(self.start, 1.0, progress / self.fraction)
        return self.then((progress - self.fraction) / (1.0 - self.fraction) if self.fraction < 1 else 0.0)


@final
@dataclass(frozen=True)
class SequenceSchedule(Schedule):
    """Follow one schedule after another: $f(progress) = schedules[i]((progress - m[i]) / (m[i + 1] - m[i]))$.

    `m` are the milestones with 0 before and 1 after them, and `i` is the part that `progress` lies in. Each part sees
    progress 0 to 1 over its own share; at a milestone the next part begins.

    Args:
        schedules: The schedules in their order, at least one.
        milestones: Fractions of the training at which the next schedule begins, between 0 and 1 (both excluded),
            strictly increasing, one fewer than schedules.

    Raises:
        TypeError: If a part is not a `Schedule`.
        ValueError: If milestones don't increase between 0 and 1, or their number doesn't fit.

    Source: torch's `SequentialLR`; stable and then falling, as here: Hu et al., "MiniCPM: Unveiling the Potential of
    Small Language Models with Scalable Training Strategies", arXiv 2404.06395, 2024.

    >>> from lightning_l2.schedules import ConstantSchedule, LinearSchedule
    >>> schedule = SequenceSchedule([ConstantSchedule(2.0), LinearSchedule(2.0, 0.0)], milestones=[0.5])
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [2.0, 2.0, 2.0, 1.0, 0.0]
    """

    schedules: Sequence[Schedule]
    milestones: Sequence[float]

    def __post_init__(self) -> None:
        for index, schedule in enumerate(self.schedules if isinstance(self.schedules, Sequence) else ()):
            check_part(self, f"schedules[{index}]", schedule)
        check_types(type(self), vars(self))
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if len(self.milestones) != len(self.schedules) - 1:
            raise ValueError(
                f"SequenceSchedule needs one milestone between each two schedules, but got {len(self.milestones)} "
                f"`milestones` for {len(self.schedules)} `schedules`."
            )
        check_milestones(self, "milestones", self.milestones)
        if 0.0 in self.milestones or 1.0 in self.milestones:
            raise ValueError(
                f"SequenceSchedule needs `milestones` above 0 and below 1, but got {list(self.milestones)}. "
                "A schedule without a share of the training has no place in the sequence."
            )

    def __call__(self, progress: float) -> float:
        """Return the multiplier at a fraction of the training."""
        index, within = part_of((0.0, *self.milestones, 1.0), progress)
        return self.schedules[index](within)

    def over(self, length: float) -> Schedule:
        """Return the schedule with parts that know how many steps their share has."""
        shares = [right - left for left, right in itertools.pairwise((0.0, *self.milestones, 1.0))]
        parts = [part.over(1 + share * (length - 1)) for part, share in zip(self.schedules, shares, strict=True)]
        return replace(self, schedules=parts)
