"""How the values after the coarse grid are chosen."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_l2.search.suggestion import Run, Trial, best_trial, suggested_trial

if TYPE_CHECKING:
    import optuna

    from lightning_l2.search.plan import SearchPlan

# Values of lambda that are closer than this factor act alike.
NARROW = 1.2


def make_sampler(plan: SearchPlan, place: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one trial, seeded by its place so that it doesn't matter which process runs it."""
    import optuna

    if plan.method == "grid" or not (plan.method or plan.also):
        return _halving_sampler(plan)
    with warnings.catch_warnings():
        # Sampling jointly and minding running trials have been marked as experimental for years.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=len(plan.coarse()),
            multivariate=bool(plan.also),
            constant_liar=True,
            seed=plan.seed + place,
        )


def _halving_sampler(plan: SearchPlan) -> optuna.samplers.BaseSampler:
    """Return a sampler that halves, on the log scale, the widest gap beside the best and the suggested value so far.

    A trial that is still running, here or in another process, counts as a neighbour, so nothing is tried twice.
    """
    import optuna

    class HalvingSampler(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
            trials = [other for other in study.get_trials(deepcopy=False) if param_name in other.params]
            ended = [
                Trial(
                    other.number, other.params[param_name], runs=tuple(Run(**run) for run in other.user_attrs["runs"])
                )
                for other in trials
                if other.state == optuna.trial.TrialState.COMPLETE
            ]
            chosen = [best_trial(ended, plan.sign), suggested_trial(ended, plan.sign)] if ended else []
            tried = [other.params[param_name] for other in trials]
            return middle_of_gap(tried, [trial.weight_decay for trial in chosen])

    return HalvingSampler()


def middle_of_gap(tried: Sequence[float], chosen: Sequence[float]) -> float:
    """Return the middle, on the log scale, of the widest gap beside chosen values, or of all where those are narrow.

    Args:
        tried: the values so far, two at least.
        chosen: those to look at more closely.

    Example:
        >>> tried = [0.0001, 0.01, 0.1]
        >>> [middle_of_gap(tried, chosen) for chosen in ([0.01], [0.1], [])]
        [0.001, 0.0316228, 0.001]
    """
    gaps = list(itertools.pairwise(sorted(set(tried))))
    beside = [gap for gap in gaps if not set(gap).isdisjoint(chosen) and gap[1] / gap[0] > NARROW]
    left, right = max(beside or gaps, key=lambda gap: gap[1] / gap[0])
    return float(f"{math.sqrt(left * right):.6g}")
