"""Trials of a search and the choice among them: the plain best, and the largest lambda that is as good."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Run:
    """One training: the lambda of a trial with one seed.

    Args:
        seed: the random seed.
        value: the monitored metric.
        metrics: the last value of every metric.
        curves: values of every metric, one for each epoch.
        l2_norm: L2 norm of the weights that decay at the end, or None if it wasn't measured.
        seconds: duration.
    """

    seed: int
    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    l2_norm: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One value of lambda and its trainings.

    Args:
        number: place in the search, 0 for the first.
        weight_decay: lambda, dimensionless.
        others: what was searched jointly, by name.
        state: "complete", "pruned" (stopped early), "failed" (diverged), "running" or "waiting".
        runs: the trainings, one for each seed.
        error: why it failed.
    """

    number: int
    weight_decay: float
    others: Mapping[str, float] = field(default_factory=dict)
    state: Literal["complete", "pruned", "failed", "running", "waiting"] = "complete"
    runs: tuple[Run, ...] = ()
    error: str | None = None

    @property
    def mean(self) -> float:
        """Mean of the metric over the seeds, nan without a training and for one that was stopped before its end."""
        has_ended = self.runs and self.state != "pruned"
        return statistics.fmean(run.value for run in self.runs) if has_ended else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of the metric between seeds, nan with fewer than two."""
        return statistics.stdev(run.value for run in self.runs) if len(self.runs) > 1 else math.nan

    def average(self, metric: str) -> float:
        """Return the mean over the seeds of a metric's last value, nan where no training has it."""
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return statistics.fmean(values) if values else math.nan

    @property
    def l2_norm(self) -> float:
        """Mean over the seeds of the L2 norm of the weights, nan where it wasn't measured."""
        norms = [run.l2_norm for run in self.runs if run.l2_norm is not None]
        return statistics.fmean(norms) if norms else math.nan

    @property
    def parameters(self) -> dict[str, Any]:
        """Lambda and what was searched jointly, by name."""
        return {"weight_decay": self.weight_decay, **self.others}


def best_trial(trials: Sequence[Trial], sign: int = 1) -> Trial:
    """Return the complete trial with the best mean; among equals the one with the largest lambda.

    Args:
        trials: the trials of a search.
        sign: 1 where small values of the metric are good, -1 where large ones are.

    Raises:
        RuntimeError: If no trial is complete.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        reasons = "; ".join(f"lambda={trial.weight_decay:.3g}: {trial.error}" for trial in trials if trial.error)
        raise RuntimeError(
            f"None of the {len(trials)} trials is complete, so there is no lambda to suggest "
            f"({reasons or 'no error was kept'}). Look for the error, or search a lower range of lambda."
        )
    return min(complete, key=lambda trial: (sign * trial.mean, -trial.weight_decay))


def suggested_trial(trials: Sequence[Trial], sign: int = 1) -> Trial:
    r"""Return the complete trial with the largest lambda within one standard error of the best.

    Seeds are shared, so trials are compared seed by seed. With d_s how much worse a trial is than the best one with
    seed s, of n seeds, it is as good if

        mean(d) <= std(d) / sqrt(n)

    What all trials share, such as a hard split of the data for one of the seeds, drops out of d; the plain standard
    error of the best mean holds it and would accept a lambda that is worse with every seed. With one seed the noise
    is unknown, and the best trial is returned.

    Args:
        trials: the trials of a search.
        sign: 1 where small values of the metric are good, -1 where large ones are.

    Raises:
        RuntimeError: If no trial is complete.

    Example:
        >>> def trial(weight_decay, *values):
        ...     return Trial(0, weight_decay, runs=tuple(Run(seed, value) for seed, value in enumerate(values)))
        >>> trials = [trial(0.01, 0.50, 0.70), trial(0.02, 0.52, 0.69), trial(0.04, 0.55, 0.75)]
        >>> best_trial(trials).weight_decay, suggested_trial(trials).weight_decay
        (0.01, 0.02)

    Source: Breiman, Friedman, Olshen, Stone, "Classification and Regression Trees", 1984, section 3.4.3 (the
    one-standard-error rule), with the paired standard error in place of that of the best.
    """
    best = best_trial(trials, sign)
    complete = [trial for trial in trials if trial.state == "complete"]
    return max((trial for trial in complete if _as_good(trial, best, sign)), key=lambda trial: trial.weight_decay)


def _as_good(trial: Trial, best: Trial, sign: int) -> bool:
    reference = {run.seed: run.value for run in best.runs}
    worse = [sign * (run.value - reference[run.seed]) for run in trial.runs if run.seed in reference]
    if trial is best or len(worse) < 2:
        return trial is best or (bool(worse) and worse[0] <= 0)
    return statistics.fmean(worse) <= statistics.stdev(worse) / math.sqrt(len(worse))
