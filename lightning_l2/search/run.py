"""`TrialRun`, which a fit function is given, and the record that is made of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.suggestion import Run

CURVE_POINTS = 200


def never(epoch: int, value: float) -> bool:
    """Call no training hopeless."""
    return False


@dataclass
class TrialRun:
    """One training to do, given to a fit function.

    Args:
        weight_decay: lambda, dimensionless.
        seed: the random seed of this training.
        others: what is searched jointly, by name.
        trial: the number of the trial.
        report: tells the search a value of the metric (epoch, value) while training goes on and returns whether
            the training is hopeless and may end at once.
    """

    weight_decay: float
    seed: int
    others: Mapping[str, float] = field(default_factory=dict)
    trial: int = 0
    report: Callable[[int, float], bool] = never


Outcome = float | Mapping[str, float | Sequence[float]]
Fit = Callable[[TrialRun], Outcome]


def as_run(outcome: Outcome, seed: int, plan: SearchPlan, seconds: float) -> Run:
    """Return what a fit function returned as the record of a training.

    Raises:
        ValueError: If the monitored metric is missing, with those there are.

    Example:
        >>> run = as_run({"val_loss": [0.9, 0.7], "l2_norm": 2}, seed=0, plan=SearchPlan(), seconds=1.0)
        >>> run.value, run.l2_norm
        (0.7, 2.0)
    """
    metrics = dict(outcome) if isinstance(outcome, Mapping) else {plan.monitor: outcome}
    norm = metrics.pop("l2_norm", None)
    curves = {name: _numbers(value) for name, value in metrics.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
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
