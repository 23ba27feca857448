"""Stop trainings early that are worse than most of the complete ones, by more than the noise between seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

    from lightning_l2.search.plan import SearchPlan


def make_pruner(plan: SearchPlan) -> optuna.pruners.BasePruner:
    """Return what stops a training that is worse than three quarters of the complete ones, by more than the noise.

    Nothing is stopped before the coarse grid is complete: without its bad ends, good values would be compared with the
    best alone.
    """
    import optuna

    if not plan.prune:
        return optuna.pruners.NopPruner()
    enough = max(4, len(plan.coarse()))

    class NoisePruner(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
            epoch = trial.last_step
            there = [other.intermediate_values.get(epoch, math.nan) for other in complete]
            others = [plan.sign * value for value in there if math.isfinite(value)]
            if len(others) < enough:
                return False
            best = min(complete, key=lambda other: plan.sign * other.value)
            noise = noise_of([run["value"] for run in best.user_attrs["runs"]])
            return is_hopeless(plan.sign * trial.intermediate_values[epoch], others, noise)

    return NoisePruner()


def noise_of(values: Sequence[float]) -> float:
    """Return the standard deviation between the seeds of a trial, 0 where there is but one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def is_hopeless(value: float, others: Sequence[float], noise: float) -> bool:
    """Return whether a metric, good where small, is above the upper quartile of others by more than the noise.

    Example:
        >>> [is_hopeless(value, [1.0, 2.0, 3.0, 4.0, 5.0], noise=0.5) for value in (4.4, 4.6)]
        [False, True]
    """
    return value > statistics.quantiles(others, n=4, method="inclusive")[2] + noise
