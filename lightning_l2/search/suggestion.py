"""The choice among trials: the plain best, and the largest lambda that is as good, by differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.trials import Trial

# An improvement over lambda = 0 by less than this share of the metric is no reason to choose lambda.
SMALL = 0.01


class Difference(NamedTuple):
    """How much worse one trial is than another, paired by seed.

    Args:
        mean: Mean over the seeds, in the unit of the metric; negative where it is better.
        error: Standard error of that mean, nan with fewer than two seeds.
    """

    mean: float
    error: float

    @property
    def is_within_error(self) -> bool:
        """Whether it is not worse by more than one standard error; with one seed, whether it is not worse."""
        return self.mean <= (0.0 if math.isnan(self.error) else self.error)


def difference(trial: Trial, reference: Trial, sign: int = 1) -> Difference:
    r"""Return how much worse a trial is than another, paired by seed.

    With $d_s$ the difference with seed $s$, of $n$ seeds, the mean is $\bar d$ and its error $\mathrm{std}(d)/\sqrt n$.
    What both share, such as a hard split of the data for one of the seeds, drops out of $d$.
    """
    known = {run.seed: run.value for run in reference.runs}
    worse = [sign * (run.value - known[run.seed]) for run in trial.runs if run.seed in known]
    if not worse:
        return Difference(math.nan, math.nan)
    error = statistics.stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else math.nan
    return Difference(statistics.fmean(worse), error)


@dataclass(frozen=True)
class Comparison:
    """Trials of a search, and what they say.

    Args:
        trials: All trials in the order of their numbers.
        plan: What was searched.
        lr_steps: Peak of the learning rate times optimizer steps, or None where they weren't known.

    >>> from lightning_l2.search.trials import Run
    >>> def trial(weight_decay, *values):
    ...     return Trial(0, weight_decay, runs=tuple(Run(seed, value) for seed, value in enumerate(values)))
    >>> found = Comparison([trial(0.01, 0.50, 0.70), trial(0.02, 0.52, 0.69), trial(0.04, 0.55, 0.75)])
    >>> found.best.weight_decay, found.suggestion.weight_decay
    (0.01, 0.02)
    """

    trials: Sequence[Trial]
    plan: SearchPlan = field(default_factory=SearchPlan)
    lr_steps: float | None = None

    @property
    def complete(self) -> list[Trial]:
        """The trials that have ended with a value."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def zero(self) -> Trial | None:
        """The complete trial of lambda = 0, if there is one."""
        return next((trial for trial in self.complete if trial.weight_decay == 0), None)

    @property
    def best(self) -> Trial:
        """The complete trial with the best mean, which may be that of lambda = 0; among equals the largest lambda.

        Raises:
            RuntimeError: If no trial is complete.
        """
        if not self.complete:
            reasons = "; ".join(
                f"lambda={trial.weight_decay:.3g}: {trial.error}" for trial in self.trials if trial.error
            )
            raise RuntimeError(
                f"None of the {len(self.trials)} trials is complete, so there is no lambda to suggest "
                f"({reasons or 'no error was kept'}). Look for the error, or search a lower range of lambda."
            )
        return min(self.complete, key=lambda trial: (self.plan.sign * trial.mean, -trial.weight_decay))

    @property
    def suggestion(self) -> Trial:
        """The complete trial with the largest lambda within one standard error of the best, paired by seed.

        It is at most one decade above the best one, not worse than lambda = 0, and not equal to it in every bit. Where
        the best lambda doesn't help, it is the largest that is worse than lambda = 0 by less than 1 %, or else 0.

        Source: Breiman, Friedman, Olshen, Stone, Classification and Regression Trees, Wadsworth 1984, section 3.4.3
        (the one-standard-error rule), with the paired standard error in place of that of the best.
        """
        best, zero, helps = self.best, self.zero, self.helps
        candidates = [trial for trial in self.complete if trial.weight_decay > 0]
        if zero is not None:
            candidates = [trial for trial in candidates if trial.values != zero.values]
            allowed = 0.0 if helps else SMALL * self._scale(zero)
            candidates = [trial for trial in candidates if self.to_zero(trial).mean <= allowed]
        if helps:
            near = [trial for trial in candidates if trial.weight_decay <= 10 * best.weight_decay]
            candidates = [trial for trial in near if trial is best or self.to_best(trial).is_within_error]
        return max(candidates, key=lambda trial: trial.weight_decay, default=best if zero is None else zero)

    @property
    def weight_decay(self) -> float:
        """The suggested lambda, dimensionless; 0 where every lambda does harm or none acts."""
        return self.suggestion.weight_decay

    @property
    def helps(self) -> bool:
        """Whether the best lambda is better than 0 by more than one standard error, and by 1 % at least.

        Where 0 was not tried, nobody knows that it doesn't.
        """
        zero, best = self.zero, self.best
        if zero is None or best is zero:
            return zero is None
        gain = difference(zero, best, self.plan.sign)
        return not gain.is_within_error and gain.mean >= SMALL * self._scale(zero)

    @property
    def depends_on_lambda(self) -> bool:
        """Whether any two complete trials differ with the same seed; with fewer than two trials nobody knows."""
        complete = self.complete
        return len(complete) < 2 or any(trial.values != complete[0].values for trial in complete[1:])

    @property
    def remark(self) -> str | None:
        """What is to be said of the suggestion: that decay doesn't help, or that the range should go on."""
        if not self.complete:
            return None
        if not self.depends_on_lambda:
            return (
                f"{self.plan.monitor} does not depend on lambda at all: all trials are equal. Either lambda does not "
                "reach the weights, or every value of this range rounds away."
            )
        if not self.helps and self.weight_decay == 0:
            return "Weight decay does not help here: no lambda that acts is better than 0, and all do harm."
        if not self.helps:
            return f"Weight decay does not help here; up to {self.weight_decay:.3g} it does no harm."
        tried = [trial.weight_decay for trial in self.trials if trial.weight_decay > 0]
        if len(tried) > 1 and self.weight_decay >= (self.plan.high or max(tried)):
            return "The suggested lambda is the upper end of the range: a larger one may do as well, so raise `high`."
        if len(tried) > 1 and self.weight_decay <= (self.plan.low or min(tried)):
            return "The suggested lambda is the lower end of the range: a smaller one may do better, so lower `low`."
        return None

    @property
    def train_metric(self) -> str | None:
        """The training metric that belongs to the monitored one (`train_loss` for `val_loss`), or None."""
        names = {name for trial in self.trials for run in trial.runs for name in run.metrics}
        word = next((word for word in ("validation", "valid", "val") if word in self.plan.monitor), None)
        twins = [self.plan.monitor.replace(word, to) for to in ("train", "training")] if word else []
        return next((name for twin in twins for name in (f"{twin}_epoch", twin) if name in names), None)

    def to_best(self, trial: Trial) -> Difference:
        """Return how much worse a trial is than the best one, paired by seed; nan where it hasn't ended."""
        ended = trial.state == "complete"
        return difference(trial, self.best, self.plan.sign) if ended else Difference(math.nan, math.nan)

    def to_zero(self, trial: Trial) -> Difference:
        """Return how much worse a trial is than that of lambda = 0, or without one the best, paired by seed."""
        return difference(trial, self.zero or self.best, self.plan.sign)

    def gap(self, trial: Trial) -> float:
        """Return the generalisation gap of a trial: how much worse the monitored metric is than the training's."""
        train = self.train_metric
        return math.nan if train is None else self.plan.sign * (trial.mean - trial.average(train))

    def strength(self, trial: Trial) -> float:
        """Return eta * lambda * T of a trial, nan where it isn't known."""
        return math.nan if self.lr_steps is None else self.lr_steps * trial.weight_decay

    def _scale(self, zero: Trial) -> float:
        """Return what 1 % is of: the metric, or what an accuracy lacks to 1."""
        is_accuracy = self.plan.mode == "max" and all(0 <= value <= 1 for value in zero.values.values())
        return 1 - zero.mean if is_accuracy else abs(zero.mean)
