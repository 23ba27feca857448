"""The search itself: asks for trials, trains each seed, keeps what came out in the study."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.trial import TrialState

from lightning_l2.search.plan import STRENGTHS, WEAK, SearchPlan
from lightning_l2.search.progress import SearchProgress, quiet_trainings
from lightning_l2.search.result import SearchResult
from lightning_l2.search.sampling import PlanSampler, as_trial, compares_seeds, make_pruner, weight_decay_of
from lightning_l2.search.storage import Queue, keep_alive, open_storage
from lightning_l2.search.trials import Fit, TrialRun, as_run

log = logging.getLogger(__name__)


def run_search(
    fit: Fit,
    plan: SearchPlan,
    *,
    storage: str | Path | optuna.storages.BaseStorage | None = None,
    name: str = "weight_decay",
    setting: Mapping[str, Any] | None = None,
    looks: bool = False,
    progress: bool = True,
    heartbeat: int = 15,
    while_waiting: Callable[[], None] = lambda: None,
) -> SearchResult:
    """Run the trials of a plan that aren't done yet and wait for those that other processes run.

    Args:
        fit: Does one training and returns the metric, or all metrics by name: a number, or numbers for each epoch.
            A metric called `l2_norm` is taken as the norm of the weights.
        plan: What to search.
        storage: Where trials are kept, as for `open_storage`.
        name: Name of the study in the storage.
        setting: Plain values that must be the same for trials to be comparable, kept with the study.
        looks: Whether `fit` can be asked for `lr_steps`, the peak of the learning rate times optimizer steps.
        progress: Whether to show a progress bar.
        heartbeat: Time between two signs of life for other processes, in seconds.
        while_waiting: Called about every second while other processes run the last trials.

    Raises:
        MisconfigurationException: If the study in the storage answers another question.
        RuntimeError: If no trial is complete in the end.
        ValueError: If the metric is missing.
    """
    with quiet_trainings(), open_storage(storage, heartbeat) as opened, SearchProgress(enabled=progress) as bar:
        lr_steps = _look(fit, plan) if looks else None
        plan = plan.within(lr_steps)
        study = _open_study(opened, name, plan, {**plan.question(), "lr_steps": lr_steps, **(setting or {})})
        queue = Queue(study, plan.places, pause=min(1.0, heartbeat / 4))
        while not queue.is_finished():
            bar.show(_found(queue, plan))
            if taken := queue.take():
                _run_trial(*taken, fit, plan, queue, lambda: bar.show(_found(queue, plan)))
            else:
                queue.wait()
                while_waiting()
        result = _found(queue, plan, lr_steps)
        bar.show(result)
    result.best  # noqa: B018  raises where no trial is complete
    return result


def load_result(plan: SearchPlan, storage: str | Path | optuna.storages.BaseStorage, name: str) -> SearchResult:
    """Return what a storage has of a search, finished or not."""
    with quiet_trainings(), open_storage(storage) as opened:
        study = optuna.load_study(study_name=name, storage=opened)
        kept = study.user_attrs["question"]
        plan = replace(plan, low=kept["low"], high=kept["high"])
        return _found(Queue(study, plan.places), plan, kept["lr_steps"])


def _look(fit: Fit, plan: SearchPlan) -> float | None:
    """Ask for the peak of the learning rate times optimizer steps, and warn where the range can't do anything."""
    others = {name: space.points(3)[1] for name, space in plan.also.items()}
    outcome = fit(TrialRun(plan.first, plan.seed, others, only_looks=True))
    lr_steps = outcome.get("lr_steps") if isinstance(outcome, Mapping) else None
    if not isinstance(lr_steps, float):
        if plan.low is None or plan.high is None:
            ends = plan.within(None)
            warnings.warn(
                "The learning rate or the number of optimizer steps can't be known before the training, so lambda is "
                f"searched from {ends.low:g} to {ends.high:g}. Give `low` and `high`.",
                stacklevel=2,
            )
        return None
    strongest = lr_steps * (plan.high or math.inf)
    if strongest < WEAK:
        warnings.warn(
            f"eta * lambda * T = {strongest:.2g} for the largest lambda, {plan.high:g}, with eta * T = {lr_steps:.3g}: "
            f"over the whole training no lambda of this range changes the weights by more than {WEAK:.0%}, so trials "
            f"will compare noise. Search up to high={STRENGTHS[1] / lr_steps:.2g}, or train longer.",
            stacklevel=2,
        )
    return lr_steps


def _open_study(
    storage: optuna.storages.BaseStorage, name: str, plan: SearchPlan, question: Mapping[str, Any]
) -> optuna.Study:
    pruner = make_pruner(plan)
    direction: Any = "minimize" if plan.mode == "min" else "maximize"
    question = json.loads(json.dumps(question, default=float))  # numbers of numpy too
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction=direction, pruner=pruner)
        study.set_user_attr("question", question)
        return study
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    kept = study.user_attrs.get("question", question)
    changed = [key for key in sorted({*kept, *question}) if kept.get(key) != question.get(key)]
    if changed and not _has_begun(study):
        optuna.delete_study(study_name=name, storage=storage)
        return _open_study(storage, name, plan, question)
    if changed:
        told = ", ".join(f"{key}={question.get(key)!r} (there: {kept.get(key)!r})" for key in changed)
        raise MisconfigurationException(
            f"The study {name!r} in this storage holds trials of another search: {told}. "
            "Repeat the settings it was started with, or give another storage or name, or on the command line another "
            "--search.folder."
        )
    return study


def _has_begun(study: optuna.Study) -> bool:
    """Return whether there is a training in a study, done or running; else only settings that didn't work."""
    idle = (TrialState.WAITING, TrialState.FAIL)
    return any(trial.state not in idle or "runs" in trial.user_attrs for trial in study.get_trials(deepcopy=False))


def _run_trial(
    trial: optuna.Trial, place: int, fit: Fit, plan: SearchPlan, queue: Queue, trained: Callable[[], None]
) -> None:
    """Train every seed of a trial that isn't done yet and tell the study how it ended."""
    try:
        with keep_alive(trial):
            state, value = _train_seeds(trial, place, fit, plan, trained)
        trial.study.tell(trial, value, state, skip_if_finished=True)
    except BaseException as exception:
        if queue.give_back(trial) or not isinstance(exception, RuntimeError):
            raise
        log.warning("Trial %d was taken over by another process; its result here is dropped.", place)


def _train_seeds(
    trial: optuna.Trial, place: int, fit: Fit, plan: SearchPlan, trained: Callable[[], None]
) -> tuple[TrialState, float | None]:
    by_seed = compares_seeds(plan)
    weight_decay, others = _sample(trial, place, plan)
    runs = list(trial.user_attrs.get("runs", []))
    stopped = False

    def report(step: int, value: float) -> bool:
        nonlocal stopped
        if plan.prune and not stopped:
            trial.report(value, step)
            stopped = place >= len(plan.coarse()) and trial.should_prune()
        return stopped

    def report_epoch(epoch: int, value: float) -> bool:
        # Optuna keeps one value for each step of a trial: epochs of the first seed, or the seeds.
        return not (by_seed or runs) and report(epoch, value)

    def fail(error: str) -> tuple[TrialState, None]:
        log.warning("Trial %d (lambda=%g) failed: %s", place, weight_decay, error)
        trial.set_user_attr("error", error)
        return TrialState.FAIL, None

    for done in runs if by_seed else ():
        report(done["seed"], done["value"])
    for seed in plan.all_seeds[len(runs) :]:
        if stopped:
            return TrialState.PRUNED, None
        started = time.monotonic()
        try:
            outcome = fit(TrialRun(weight_decay, seed, others, place, report_epoch))
        except Exception as error:
            # Before a trial is complete it is most likely a mistake in the user's code; later, a diverged training.
            is_first = not trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if is_first or isinstance(error, MisconfigurationException):
                raise
            return fail(f"{type(error).__name__}: {error}")
        run = as_run(outcome, seed, plan, time.monotonic() - started)
        runs.append(asdict(run))
        trial.set_user_attr("runs", runs)
        trained()
        if not math.isfinite(run.value):
            return fail(f"{plan.monitor} is {run.value} with seed {seed}")
        if by_seed:
            report(seed, run.value)
    if stopped and not by_seed:  # within its last training
        return TrialState.PRUNED, None
    return TrialState.COMPLETE, statistics.fmean(run["value"] for run in runs)


def _sample(trial: optuna.Trial, place: int, plan: SearchPlan) -> tuple[float, dict[str, float]]:
    """Return lambda and what is searched jointly; lambda is kept as an attribute too, since it may be 0."""
    trial.study.sampler = PlanSampler(plan, place)
    if place < len(plan.coarse()) and plan.coarse()[place] == 0:
        weight_decay = 0.0
    else:
        space = plan.weight_decay
        weight_decay = trial.suggest_float("weight_decay", space.low, space.high, log=True)
    trial.set_user_attr("weight_decay", weight_decay)
    return weight_decay, {n: trial.suggest_float(n, r.low, r.high, log=r.log) for n, r in plan.also.items()}


def _found(queue: Queue, plan: SearchPlan, lr_steps: float | None = None) -> SearchResult:
    known = [(trial, place) for place, trial in enumerate(queue.trials()) if weight_decay_of(trial) is not None]
    return SearchResult([as_trial(trial, place, plan) for trial, place in known], plan, lr_steps)
