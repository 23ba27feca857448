"""A trial, its trainings, and what a training is asked for and hands back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_l2.search.plan import SearchPlan

CURVE_POINTS = 200


@dataclass(frozen=True)
class Run:
    """One training: the lambda of a trial with one seed.

    Args:
        seed: The random seed.
        value: The monitored metric.
        metrics: The last value of every metric.
        curves: Values of every metric, one for each epoch.
        l2_norm: L2 norm of the trained weights at the end, or None if it wasn't measured.
        seconds: Duration.
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
        number: Place in the search, 0 for the first.
        weight_decay: Lambda, dimensionless.
        others: What was searched jointly, by name.
        state: "complete", "pruned" (stopped early), "failed" (diverged), "running" or "waiting".
        runs: The trainings, one for each seed.
        error: Why it failed.
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

    @property
    def values(self) -> dict[int, float]:
        """The monitored metric by seed."""
        return {run.seed: run.value for run in self.runs}

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


def never(epoch: int, value: float) -> bool:
    """Call no training hopeless."""
    return False


@dataclass
class TrialRun:
    """One training to do, given to a fit function.

    Args:
        weight_decay: Lambda, dimensionless.
        seed: The random seed of this training.
        others: What is searched jointly, by name.
        trial: The number of the trial.
        report: Tells the search a value of the metric (epoch, value) while training goes on and returns whether
            the training is hopeless and may end at once.
        only_looks: Whether a Trainer is only set up, to read its length and learning rate; never for your own function.
    """

    weight_decay: float
    seed: int
    others: Mapping[str, float] = field(default_factory=dict)
    trial: int = 0
    report: Callable[[int, float], bool] = never
    only_looks: bool = False


Outcome = float | Mapping[str, float | Sequence[float]]
Fit = Callable[[TrialRun], Outcome]


def as_run(outcome: Outcome, seed: int, plan: SearchPlan, seconds: float) -> Run:
    """Return what a fit function returned as the record of a training.

    Raises:
        ValueError: If the monitored metric is missing, with those there are.

    >>> run = as_run({"val_loss": [0.9, 0.7], "l2_norm": 2}, seed=0, plan=SearchPlan(), seconds=1.0)
    >>> run.value, run.l2_norm
    (0.7, 2.0)
    """
    metrics = dict(outcome) if isinstance(outcome, Mapping) else {plan.monitor: outcome}
    norm = metrics.pop("l2_norm", None)
    curves = {name: curve for name, value in metrics.items() if (curve := _numbers(value))}
    if plan.monitor not in curves:
        raise ValueError(
            f"The metric monitor={plan.monitor!r} never appeared in a training. Those that did: "
            f"{', '.join(sorted(curves)) or 'none'}. Give one of them as monitor, or log it."
        )
    curve = [plan.sign * value for value in curves[plan.monitor]]
    value = plan.sign * (min(curve) if plan.pick == "best" else curve[-1])
    last = {name: values[-1] for name, values in curves.items()}
    thin = {name: values[:: -(-len(values) // CURVE_POINTS)] for name, values in curves.items()}
    return Run(seed, value, last, thin, None if norm is None else _numbers(norm)[-1], seconds)


def _numbers(value: Any) -> list[float]:
    value = value.tolist() if hasattr(value, "tolist") else value
    return [float(number) for number in value] if isinstance(value, Sequence) else [float(value)]
