"""What a search for lambda tries: the range, the seeds, and which values come first and next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_l2.arguments import check_types

# eta * lambda * T, decay alone leaves exp of minus that: from 99 % of the weights to nothing of them.
STRENGTHS = (0.01, 10.0)
WEAK = 0.02
UNKNOWN = (1e-5, 1e-1)
# Values of lambda that are closer than this factor act alike.
NARROW = 1.2


@dataclass(frozen=True)
class Range:
    """An interval to search.

    Args:
        low: Lower end, in the unit of the searched quantity.
        high: Upper end, same unit.
        log: Whether values are spaced evenly in their logarithm; needs `low` above 0.

    Raises:
        ValueError: If the interval is empty or not finite, or logarithmic and not positive.

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
            raise ValueError(f"Expected a range with finite ends, got low={self.low}, high={self.high}.")
        if self.low >= self.high:
            what = "is empty" if self.low == self.high else "is upside down: low is above high"
            raise ValueError(f"The range low={self.low}, high={self.high} {what}. Give low < high.")
        if self.log and self.low <= 0:
            raise ValueError(
                f"Expected `low`, on the log scale, to be above 0, got {self.low}. "
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
        monitor: The metric that decides, by the name it is logged under.
        mode: Whether a small ("min") or a large ("max") value of it is good.
        low: Smallest lambda (weight_decay) to try, dimensionless. None is 0.01 / (eta * T), with the peak of the
            learning rate eta and T optimizer steps; 1e-5 where these can't be known.
        high: Largest lambda to try. None is 10 / (eta * T), or 1e-1.
        first: Lambda of the first trial; the middle of the range on the log scale where it lies outside of it.
        trials: Number of values of lambda above 0 to try.
        seeds: Trainings for each of them, each with its own random seed, the same seeds for every lambda.
        seed: The first of these seeds; the second is one more, and so on.
        zero: Whether lambda = 0 is tried too, as one trial more; not in a joint search.
        method: How values are chosen once a coarse grid is done: "grid" halves the widest gap beside the best and the
            suggested one, "tpe" samples where good values are likely. None is "grid" for lambda alone, "tpe" for a
            joint search.
        also: Further quantities to search jointly, name to range; not with "grid".
        prune: Whether hopeless trials are stopped once the grid is complete; see `search_weight_decay`.
        pick: Which value of the metric counts, the "last" of a training or its "best".

    Raises:
        TypeError: If `also` has something else than a `Range`.
        ValueError: If a value is out of its range or two of them contradict each other.

    >>> SearchPlan(trials=8).within(lr_steps=100.0).coarse()
    [0.001, 0.0, 0.0001, 0.01, 0.1]
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    low: float | None = None
    high: float | None = None
    first: float = 1e-3
    trials: int = 12
    seeds: int = 3
    seed: int = 0
    zero: bool = True
    method: Literal["grid", "tpe"] | None = None
    also: Mapping[str, Range] = field(default_factory=dict)
    prune: bool = True
    pick: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        low = (self.high or 1.0) / 2 if self.low is None else self.low
        Range(low, max(2 * low, 1.0) if self.high is None else self.high)
        for name, allowed in (("mode", ("min", "max")), ("method", ("grid", "tpe", None)), ("pick", ("last", "best"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected `{name}` to be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("trials", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {getattr(self, name)}.")
        if not 0 < self.first < math.inf:
            raise ValueError(
                f"Expected `first`, a lambda on the log scale, to be finite and above 0, got {self.first}. "
                "Lambda = 0 is a trial of its own: `zero=True`."
            )
        if self.seed < 0:
            raise ValueError(f"Expected `seed` to be at least 0, got {self.seed}.")
        if self.also and self.method == "grid":
            raise ValueError(
                f"Expected `method` to be 'tpe' beside also={sorted(self.also)}, got 'grid'. It searches lambda alone."
            )
        if "weight_decay" in self.also:
            raise ValueError(
                "Expected `also` to name other quantities, got 'weight_decay'. Set its range by low and high."
            )

    def within(self, lr_steps: float | None) -> SearchPlan:
        """Return the plan with numbers for both ends of the range."""
        ends = UNKNOWN if lr_steps is None else tuple(float(f"{strength / lr_steps:.3g}") for strength in STRENGTHS)
        low, high = (
            given if given is not None else end for given, end in zip((self.low, self.high), ends, strict=True)
        )
        return replace(self, low=low, high=high)

    @property
    def weight_decay(self) -> Range:
        """The range of lambda, of a plan that has numbers for both ends."""
        assert self.low is not None and self.high is not None, "within() comes first"  # noqa: PT018
        return Range(self.low, self.high)

    @property
    def sign(self) -> int:
        """1 where small values are good, -1 where large ones are."""
        return 1 if self.mode == "min" else -1

    @property
    def all_seeds(self) -> range:
        """The random seeds of the trainings of one trial."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def tries_zero(self) -> bool:
        """Whether lambda = 0 is a trial: in a joint search the others would differ in more than lambda."""
        return self.zero and not self.also

    @property
    def places(self) -> int:
        """Number of trials, that of lambda = 0 among them."""
        return self.trials + self.tries_zero

    def coarse(self) -> list[float]:
        """Return the lambdas that are fixed beforehand: `first`, 0, a grid to both ends in half of all trials."""
        ends = self.weight_decay
        low, high = ends.low, ends.high
        first = self.first if low < self.first < high else float(f"{math.sqrt(low * high):.6g}")
        intervals = max(min(self.trials, 3), self.trials // 2) - 1
        share_below = math.log(first / low) / math.log(high / low)
        # in proportion, but at least one on each side where there are two
        below = min(max(math.ceil(intervals * share_below - 0.5), 1), max(intervals - 1, 0))
        grid = [*Range(low, first).points(below + 1)[:-1], *Range(first, high).points(intervals - below + 1)[1:]]
        values = [first, *grid][: self.trials]
        return [values[0], *([0.0] if self.tries_zero else []), *values[1:]]

    def question(self) -> dict[str, Any]:
        """Return what must be the same for trials to be comparable, as plain values."""
        also = {name: [space.low, space.high, space.log] for name, space in sorted(self.also.items())}
        names = ("monitor", "mode", "low", "high", "seeds", "seed", "zero", "pick")
        return {**{name: getattr(self, name) for name in names}, "also": also}


def middle_of_gap(tried: Sequence[float], chosen: Sequence[float]) -> float:
    """Return the middle, on the log scale, of the widest gap beside chosen values, or of all where those are narrow.

    >>> tried = [0.0001, 0.01, 0.1]
    >>> [middle_of_gap(tried, chosen) for chosen in ([0.01], [0.1], [])]
    [0.001, 0.0316228, 0.001]
    """
    gaps = list(itertools.pairwise(sorted(set(tried))))
    beside = [gap for gap in gaps if not set(gap).isdisjoint(chosen) and gap[1] / gap[0] > NARROW]
    left, right = max(beside or gaps, key=lambda gap: gap[1] / gap[0])
    return float(f"{math.sqrt(left * right):.6g}")
