"""The part of Optuna that decides: which lambda a trial gets, and which trial is stopped early."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from lightning_l2.search.plan import middle_of_gap
from lightning_l2.search.storage import trials_by_place
from lightning_l2.search.suggestion import Comparison
from lightning_l2.search.trials import Run, Trial

if TYPE_CHECKING:
    from lightning_l2.search.plan import SearchPlan

# The smallest p-value of a Wilcoxon test on n pairs is 2^-n, so at 0.1 it can speak from the fourth seed on.
P_VALUE, PAIRS = 0.1, 4


class PlanSampler(optuna.samplers.BaseSampler):
    """Gives each trial the lambda of its place: of the coarse grid, then by halving gaps or by Optuna's TPE.

    It depends on the place and on the trials there are, not on the process that runs the trial.

    Args:
        plan: What to search.
        place: The trial's place in the search, 0 for the first.
    """

    def __init__(self, plan: SearchPlan, place: int) -> None:
        self._plan = plan
        self._place = place
        self._coarse = plan.coarse()
        with warnings.catch_warnings():
            # Sampling jointly and minding running trials have been marked as experimental for years.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._tpe = optuna.samplers.TPESampler(
                n_startup_trials=len(self._coarse),
                multivariate=bool(plan.also),
                constant_liar=True,
                seed=plan.seed + place,
            )

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """Search jointly after the coarse grid."""
        is_coarse = self._place < len(self._coarse)
        return {} if is_coarse or self._halves() else self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        """Leave it to TPE."""
        return self._tpe.sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """Return the lambda of the grid, or in the widest gap beside the best and the suggested one.

        A trial that is still running, here or in another process, counts as a neighbour, so nothing is tried twice.
        """
        trials = trials_by_place(study)
        tried = [known for other in trials if (known := weight_decay_of(other))]
        # A search that was made longer has another grid than it began with.
        if param_name == "weight_decay" and not set(self._coarse[self._place : self._place + 1]) <= set(tried):
            return self._coarse[self._place]
        if not self._halves():
            return self._tpe.sample_independent(study, trial, param_name, param_distribution)
        places = enumerate(trials)
        ended = [as_trial(other, place, self._plan) for place, other in places if other.state == TrialState.COMPLETE]
        found = Comparison(ended, self._plan)
        chosen = [found.best.weight_decay, found.weight_decay] if ended else []
        # Who was lost, or asked before, and has no lambda yet will have that of the grid, or a middle too.
        for place, other in enumerate(trials[: self._place]):
            if weight_decay_of(other) is None:
                coarse = self._coarse[place : place + 1]
                tried += filter(None, coarse or [middle_of_gap(tried, chosen)])
        return middle_of_gap(tried, chosen)

    def _halves(self) -> bool:
        return self._plan.method == "grid" or not (self._plan.method or self._plan.also)


def compares_seeds(plan: SearchPlan) -> bool:
    """Return whether there are enough seeds to stop a trial by those it has done."""
    return plan.seeds > PAIRS


def make_pruner(plan: SearchPlan) -> optuna.pruners.BasePruner:
    """Return what stops a trial: seed by seed against the best one, or with few seeds epoch by epoch against all."""
    if not plan.prune:
        return optuna.pruners.NopPruner()
    if compares_seeds(plan):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.pruners.WilcoxonPruner(p_threshold=P_VALUE, n_startup_steps=PAIRS)
    enough = max(4, len(plan.coarse()))
    return optuna.pruners.PercentilePruner(75.0, n_startup_trials=enough, n_min_trials=enough)


def as_trial(trial: optuna.trial.FrozenTrial, place: int, plan: SearchPlan) -> Trial:
    """Return one of Optuna's trials as ours."""
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    state: Any = states[trial.state.name]
    runs = tuple(Run(**run) for run in trial.user_attrs.get("runs", ()))
    others = {name: trial.params[name] for name in plan.also if name in trial.params}
    return Trial(place, weight_decay_of(trial), others, state, runs, trial.user_attrs.get("error"))


def weight_decay_of(trial: optuna.trial.FrozenTrial) -> Any:
    """Return the lambda of a trial, None before it has one. There is no 0 on Optuna's log scale: it is an attribute."""
    return trial.params.get("weight_decay", trial.user_attrs.get("weight_decay"))
