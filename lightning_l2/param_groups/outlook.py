"""What decay will do to a group over the training, before its first step, and what of that may be a mistake."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_l2.param_groups.shrinkage import coarsest, vanishing_share

if TYPE_CHECKING:
    from lightning_l2.param_groups.decay_groups import DecayGroups
    from lightning_l2.param_groups.parts import DecayGroup

# Shares of up to so many times the one that rounds away are rounded by an eighth of themselves or more.
_IS_DISTORTED = 8
# Where eta * lambda * steps is below this, decay changes the weights by less than a hundredth.
_IS_FELT = 0.01
# Where eta * lambda is from this on, weights are forgotten within ten steps.
_IS_FORGOTTEN = 0.1


@dataclass(frozen=True)
class Outlook:
    """What decay will do to a group of weights.

    Args:
        group: Its name.
        first: Lambda in the first step.
        last: Lambda in the last step, as far as that is planned.
        largest: The largest lambda that is planned.
        strength: Eta lambda at the peaks of both, None where nobody knows it.
        share: The share s of the weights that decay takes in a step at the peaks of learning rate and lambda; None
            where there is none, or nobody knows it.
        steps: How many steps T the training has, None where nobody knows.
        vanishing: The share below which decay rounds away in the number format of the weights.
        dtype: That format.

    >>> outlook = Outlook("decay", 1.0, 1.0, 1.0, 0.001, share=0.001, steps=1000, vanishing=0.0, dtype="float32")
    >>> outlook.timescale, round(outlook.left, 2)
    (1000.0, 0.37)
    """

    group: str
    first: float
    last: float
    largest: float
    strength: float | None
    share: float | None
    steps: int | None
    vanishing: float
    dtype: str

    @property
    def timescale(self) -> float | None:
        """The timescale of decay, $1/s$, in steps; infinite without decay."""
        return None if self.share is None else (1 / self.share if self.share else math.inf)

    @property
    def left(self) -> float | None:
        """What decay leaves of the weights over the training, at least: $(1 - s)^T$, dimensionless."""
        if self.share is None or self.steps is None:
            return None
        return float(max(0.0, 1 - self.share) ** self.steps)

    @property
    def is_lost(self) -> bool:
        """Whether decay rounds away in the number format of the weights."""
        return self.share is not None and 0 < self.share < self.vanishing

    @property
    def is_distorted(self) -> bool:
        """Whether rounding changes decay by an eighth of itself or more."""
        return self.share is not None and self.vanishing <= self.share < _IS_DISTORTED * self.vanishing

    @property
    def course(self) -> str:
        """Lambda over the training, for a table."""
        return f"{self.first:g}" if self.first == self.last else f"{self.first:g} to {self.last:g}"

    @property
    def duration(self) -> str:
        """The timescale, for a table."""
        if not self.share:
            return ""
        of_training = f" ({100 / (self.share * self.steps):,.0f} %)" if self.steps else ""
        return f"{1 / self.share:,.0f} steps{of_training}"

    @property
    def remainder(self) -> str:
        """What decay leaves, for a table."""
        if self.is_lost:
            return f"all: lost in {self.dtype}"
        if not self.share or self.left is None:
            return ""
        digits = 2 - math.floor(math.log10(self.left)) if self.left else 0
        return f">= {math.floor(self.left * 10**digits) / 10**digits:.6g}"  # a bound is not rounded up

    def warnings(self) -> Iterator[str]:
        """Yield what can only be suspected to be a mistake, with its numbers."""
        if not self.share:
            return
        if self.strength is not None and self.strength >= 1:
            yield (
                f"Weight decay of group {self.group!r} takes all of the weights in one step: eta * lambda = "
                f"{self.strength:g} at the peak of the learning rate. Give a weight_decay of less than "
                f"{self.largest / self.strength:g}."
            )
        if self.is_lost:
            yield (
                f"Weight decay of group {self.group!r} is lost: 1 - eta * lambda = 1 - {self.share:g} rounds to 1 in "
                f"{self.dtype}, even at the peak of the learning rate. Use WeightDecay(rounding='accumulate')."
            )
        elif self.is_distorted:
            yield (
                f"Weight decay of group {self.group!r} is distorted: 1 - eta * lambda = 1 - {self.share:g} is rounded "
                f"to multiples of {2 * self.vanishing:g} in {self.dtype}. Use WeightDecay(rounding='accumulate')."
            )

    def remark(self) -> str | None:
        """Say that decay changes almost nothing over the training, or lets few steps count, if so; None else."""
        if not self.share or not self.steps or self.is_lost:
            return None
        changes = self.share * self.steps
        if _IS_FORGOTTEN <= self.share < 1 < changes:
            return (
                f"Weight decay forgets the weights of group {self.group!r} within {1 / self.share:.2g} of {self.steps} "
                f"steps (eta * lambda = {self.share:.2g}); a lambda of {self.largest / changes:.2g} would act over the "
                "whole training."
            )
        if changes >= _IS_FELT:
            return None
        return (
            f"Weight decay changes the weights of group {self.group!r} by {100 * changes:.2g} % over the whole "
            f"training (eta * lambda * steps = {changes:.2g}); a lambda of {self.largest / changes:.2g} "
            "would act over it."
        )


def outlook_of(groups: DecayGroups, group: DecayGroup, steps: int | None) -> Outlook:
    """Return what decay will do to a part of an optimizer's groups.

    Args:
        groups: The parts of the optimizer's groups.
        group: One of them.
        steps: How many steps the training has, None where nobody knows.
    """
    first = float(group.weight_decay)
    last, largest = groups.foretell(group)
    peak, largest = peak_lr_of(group.parent), max(first, largest)
    share = groups.share(group, peak, largest)
    return Outlook(
        group=group.name,
        first=first,
        last=last,
        largest=largest,
        # momentum makes of a small step a larger share in the long run
        strength=share if share is None or peak is None else min(share, peak * largest),
        share=share,
        steps=steps,
        vanishing=vanishing_share(group.params) if groups.rounds_away else 0.0,
        dtype=coarsest(group.params),
    )


def peak_lr_of(group: Mapping[str, Any]) -> float | None:
    """Return the largest learning rate that a group's schedule is known to reach, None where nobody knows it.

    >>> peak_lr_of({"lr": 0.0, "initial_lr": 0.1})
    0.1
    """
    rates = [group[key] for key in ("lr", "initial_lr", "max_lr") if group.get(key) is not None]
    return max((float(rate) for rate in rates if not getattr(rate, "is_cuda", False)), default=None)
