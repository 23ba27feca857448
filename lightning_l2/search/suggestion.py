"""The choice among trials: the plain best, and the largest lambda that is as good, by differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

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


def best_trial(trials: Sequence[Trial], sign: int = 1) -> Trial:
    """Return the complete trial with the best mean; among equals the one with the largest lambda.

    Raises:
        RuntimeError: If no trial is complete.
    """
    complete = complete_trials(trials)
    if not complete:
        reasons = "; ".join(f"lambda={trial.weight_decay:.3g}: {trial.error}" for trial in trials if trial.error)
        raise RuntimeError(
            f"None of the {len(trials)} trials is complete, so there is no lambda to suggest "
            f"({reasons or 'no error was kept'}). Look for the error, or search a lower range of lambda."
        )
    return min(complete, key=lambda trial: (sign * trial.mean, -trial.weight_decay))


def complete_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have ended with a value."""
    return [trial for trial in trials if trial.state == "complete"]


def zero_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the complete trial of lambda = 0, if there is one."""
    return next((trial for trial in complete_trials(trials) if trial.weight_decay == 0), None)


def helps(trials: Sequence[Trial], sign: int = 1) -> bool:
    """Return whether the best lambda is better than 0 by more than one standard error, and by 1 % at least.

    Where 0 was not tried, nobody knows that it doesn't.
    """
    zero, best = zero_trial(trials), best_trial(trials, sign)
    if zero is None or best is zero:
        return zero is None
    gain = difference(zero, best, sign)
    return not gain.is_within_error and gain.mean >= SMALL * _scale(zero, sign)


def depends_on_lambda(trials: Sequence[Trial]) -> bool:
    """Return whether any two complete trials differ with the same seed; with fewer than two trials nobody knows."""
    complete = complete_trials(trials)
    return len(complete) < 2 or any(not _are_equal(trial, complete[0]) for trial in complete[1:])


def suggested_trial(trials: Sequence[Trial], sign: int = 1) -> Trial:
    """Return the complete trial with the largest lambda within one standard error of the best, paired by seed.

    It is at most one decade above the best one, not worse than lambda = 0, and not equal to it in every bit. Where the
    best lambda doesn't help, it is the largest that is worse than lambda = 0 by less than 1 %, or else 0.

    Raises:
        RuntimeError: If no trial is complete.

    Source: Breiman, Friedman, Olshen, Stone, Classification and Regression Trees, Wadsworth 1984, section 3.4.3 (the
    one-standard-error rule), with the paired standard error in place of that of the best.

    >>> from lightning_l2.search.trials import Run
    >>> def trial(weight_decay, *values):
    ...     return Trial(0, weight_decay, runs=tuple(Run(seed, value) for seed, value in enumerate(values)))
    >>> trials = [trial(0.01, 0.50, 0.70), trial(0.02, 0.52, 0.69), trial(0.04, 0.55, 0.75)]
    >>> best_trial(trials).weight_decay, suggested_trial(trials).weight_decay
    (0.01, 0.02)
    """
    best, zero = best_trial(trials, sign), zero_trial(trials)
    candidates = [trial for trial in complete_trials(trials) if trial.weight_decay > 0]
    if zero is not None:
        candidates = [trial for trial in candidates if not _are_equal(trial, zero)]
        allowed = 0.0 if helps(trials, sign) else SMALL * _scale(zero, sign)
        candidates = [trial for trial in candidates if difference(trial, zero, sign).mean <= allowed]
    if helps(trials, sign):
        near = [trial for trial in candidates if trial.weight_decay <= 10 * best.weight_decay]
        candidates = [trial for trial in near if trial is best or difference(trial, best, sign).is_within_error]
    return max(candidates, key=lambda trial: trial.weight_decay, default=best if zero is None else zero)


def verdict(trials: Sequence[Trial], monitor: str, sign: int = 1) -> str | None:
    """Return in words why the suggestion is no lambda that helps, or None where it does."""
    if not depends_on_lambda(trials):
        return (
            f"{monitor} does not depend on lambda at all: all trials are equal. Either lambda does not reach the "
            "weights, or every value of this range rounds away."
        )
    if helps(trials, sign):
        return None
    suggestion = suggested_trial(trials, sign)
    if suggestion.weight_decay == 0:
        return "Weight decay does not help here: no lambda that acts is better than 0, and all do harm."
    return f"Weight decay does not help here; up to {suggestion.weight_decay:.3g} it does no harm."


def _are_equal(one: Trial, other: Trial) -> bool:
    return {run.seed: run.value for run in one.runs} == {run.seed: run.value for run in other.runs}


def _scale(trial: Trial, sign: int) -> float:
    """Return what 1 % is of: the metric, or what an accuracy lacks to 1."""
    is_accuracy = sign < 0 and all(0 <= run.value <= 1 for run in trial.runs)
    return 1 - trial.mean if is_accuracy else abs(trial.mean)
