"""What a search for lambda tries: the range, the seeds, and which values come first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_l2.arguments import check_types


@dataclass(frozen=True)
class Range:
    """An interval to search.

    Args:
        low: lower end, in the unit of the searched quantity.
        high: upper end, same unit.
        log: whether values are spaced evenly in their logarithm; needs `low` above 0.

    Raises:
        ValueError: If the interval is empty or not finite, or logarithmic and not positive.

    Example:
        >>> Range(1e-4, 1e-2).points(3)
        [0.0001, 0.001, 0.01]
        >>> Range(0.0, 0.5, log=False).points(3)
        [0.0, 0.25, 0.5]
    """

    low: float
    high: float
    log: bool = True

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"Expected a range with finite ends but got low={self.low}, high={self.high}.")
        if self.low >= self.high:
            what = "is empty" if self.low == self.high else "is upside down: low is above high"
            raise ValueError(f"The range low={self.low}, high={self.high} {what}. Give low < high.")
        if self.log and self.low <= 0:
            raise ValueError(
                f"A range on the log scale starts above 0 but got low={self.low}. "
                "Give a small positive number, or log=False where the scale is linear."
            )

    def points(self, count: int) -> list[float]:
        """Return `count` evenly spaced values, both ends included, rounded to 12 digits."""
        if count < 2:
            return [self.low]
        steps = [index / (count - 1) for index in range(count)]
        if self.log:
            values = [self.low * (self.high / self.low) ** step for step in steps]
        else:
            values = [self.low + (self.high - self.low) * step for step in steps]
        inner = [float(f"{value:.12g}") for value in values[1:-1]]
        return [self.low, *inner, self.high]


@dataclass(frozen=True)
class SearchPlan:
    """The question a search answers, the same in every process that takes part.

    Args:
        monitor: the metric that decides, by the name it is logged under.
        mode: whether a small ("min") or a large ("max") value of it is good.
        low: smallest lambda (weight_decay) to try, dimensionless.
        high: largest lambda to try.
        first: lambda of the first trial; the middle of the range on the log scale where it lies outside of it.
        trials: number of values of lambda to try.
        seeds: trainings for each of them, each with its own random seed, the same seeds for every lambda.
        seed: the first of these seeds; the second is one more, and so on.
        method: how values are chosen once a coarse grid is done: "grid" halves the widest gap beside the best and the
            suggested one, "tpe" samples where good values are likely. None is "grid" for lambda alone, "tpe" for a
            joint search.
        also: further quantities to search jointly, name to range; not with "grid".
        prune: whether a training is stopped that, once the grid is complete, is worse than three quarters of the
            complete trials at the same epoch, by more than seeds differ; nothing is stopped in the first half of a
            training.
        pick: which value of the metric counts, the "last" of a training or its "best".

    Raises:
        TypeError: If `also` has something else than a `Range`.
        ValueError: If a value is out of its range or two of them contradict each other.

    Example:
        >>> [params["weight_decay"] for params in SearchPlan(trials=8).coarse()]
        [0.001, 1e-05, 0.01, 0.1]
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    low: float = 1e-5
    high: float = 1e-1
    first: float = 1e-3
    trials: int = 12
    seeds: int = 3
    seed: int = 0
    method: Literal["grid", "tpe"] | None = None
    also: Mapping[str, Range] = field(default_factory=dict)
    prune: bool = True
    pick: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        Range(self.low, self.high)
        for name, allowed in (("mode", ("min", "max")), ("method", ("grid", "tpe", None)), ("pick", ("last", "best"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected {name} to be one of {allowed} but got {getattr(self, name)!r}.")
        for name in ("trials", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} to be at least 1 but got {getattr(self, name)}.")
        if not 0 < self.first < math.inf:
            raise ValueError(
                f"Expected first, a lambda on the log scale, to be finite and above 0 but got {self.first}."
            )
        if self.seed < 0:
            raise ValueError(f"Expected seed to be at least 0 but got {self.seed}.")
        if self.also and self.method == "grid":
            raise ValueError(
                f"method='grid' searches lambda alone but also={sorted(self.also)} asks for more. Use 'tpe'."
            )
        if "weight_decay" in self.also:
            raise ValueError("also has 'weight_decay', which is searched anyway. Set its range by low and high.")

    @property
    def weight_decay(self) -> Range:
        """The range of lambda."""
        return Range(self.low, self.high)

    @property
    def sign(self) -> int:
        """1 where small values are good, -1 where large ones are."""
        return 1 if self.mode == "min" else -1

    @property
    def all_seeds(self) -> range:
        """The random seeds of the trainings of one trial."""
        return range(self.seed, self.seed + self.seeds)

    def coarse(self) -> list[dict[str, float]]:
        """Return the trials that are fixed beforehand: `first`, then a grid to both ends in half of all trials."""
        inside = self.low < self.first < self.high
        first = self.first if inside else math.sqrt(self.low * self.high)
        intervals = max(min(self.trials, 3), self.trials // 2) - 1
        share_below = math.log(first / self.low) / math.log(self.high / self.low)
        # in proportion, but at least one on each side where there are two
        below = min(max(math.ceil(intervals * share_below - 0.5), 1), max(intervals - 1, 0))
        values = [
            first,
            *Range(self.low, first).points(below + 1)[:-1],
            *Range(first, self.high).points(intervals - below + 1)[1:],
        ]
        return [{"weight_decay": value} for value in values[: self.trials]]

    def question(self) -> dict[str, Any]:
        """Return what must be the same for trials to be comparable, as plain values."""
        also = {name: [space.low, space.high, space.log] for name, space in sorted(self.also.items())}
        names = ("monitor", "mode", "low", "high", "seeds", "seed", "pick")
        return {**{name: getattr(self, name) for name in names}, "also": also}
