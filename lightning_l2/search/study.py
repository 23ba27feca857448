"""The search itself: takes trials from the queue, trains each seed, keeps what came out in the study."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.progress import SearchProgress
from lightning_l2.search.pruner import make_pruner
from lightning_l2.search.queue import TrialQueue
from lightning_l2.search.quiet import quiet_trainings
from lightning_l2.search.result import SearchResult
from lightning_l2.search.run import Fit, TrialRun, as_run
from lightning_l2.search.sampler import make_sampler
from lightning_l2.search.storage import import_optuna, open_storage
from lightning_l2.search.suggestion import Run, Trial, best_trial

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)


def run_search(
    fit: Fit,
    plan: SearchPlan,
    *,
    storage: str | Path | optuna.storages.BaseStorage | None = None,
    name: str = "weight_decay",
    setting: Mapping[str, Any] | None = None,
    progress: bool = True,
    heartbeat: float = 15.0,
    while_waiting: Callable[[], None] = lambda: None,
) -> SearchResult:
    """Run the trials of a plan that aren't done yet and wait for those that other processes run.

    Args:
        fit: does one training and returns the metric, or all metrics by name: a number, or numbers for each epoch.
            A metric called `l2_norm` is taken as the norm of the weights.
        plan: what to search.
        storage: where trials are kept, as for `open_storage`.
        name: name of the study in the storage.
        setting: plain values that must be the same for trials to be comparable, kept with the study.
        progress: whether to show a progress bar.
        heartbeat: time between two signs of life for other processes, in seconds; after 8 without one they
            run the trial again.
        while_waiting: called about every second while other processes run the last trials.

    Raises:
        ModuleNotFoundError: If Optuna isn't installed.
        MisconfigurationException: If the study in the storage answers another question.
        RuntimeError: If no trial is complete in the end.
        ValueError: If the metric is missing.
    """
    with _quiet(import_optuna()), quiet_trainings(), open_storage(storage) as opened:
        study, is_new = _open_study(opened, name, plan, {**plan.question(), **(setting or {})})
        queue = TrialQueue(study, opened, _places(plan), heartbeat)
        if is_new:
            queue.fill()
        with SearchProgress(plan, enabled=progress) as bar:
            while not queue.is_finished():
                bar.show(_trials(queue, plan))
                trial = queue.take()
                if trial is None:
                    queue.wait()
                    while_waiting()
                else:
                    _run_trial(trial, fit, plan, queue, lambda: bar.show(_trials(queue, plan)))
            bar.show(_trials(queue, plan))
        trials = _trials(queue, plan)
    best_trial(trials, plan.sign)  # raises where none is complete
    return SearchResult(trials, plan)


def load_result(plan: SearchPlan, storage: str | Path | optuna.storages.BaseStorage, name: str) -> SearchResult:
    """Return what a storage has of a search, finished or not."""
    with _quiet(import_optuna()) as optuna_module, open_storage(storage) as opened:
        study = optuna_module.load_study(study_name=name, storage=opened)
        return SearchResult(_trials(TrialQueue(study, opened, _places(plan)), plan), plan)


@contextmanager
def _quiet(optuna_module: Any) -> Iterator[Any]:
    """Keep Optuna from logging each trial; the progress bar and the table say it."""
    before = optuna_module.logging.get_verbosity()
    optuna_module.logging.set_verbosity(optuna_module.logging.WARNING)
    try:
        yield optuna_module
    finally:
        optuna_module.logging.set_verbosity(before)


def _places(plan: SearchPlan) -> list[dict[str, float]]:
    coarse = plan.coarse()
    return coarse + [{} for _ in range(plan.trials - len(coarse))]


def _open_study(
    storage: optuna.storages.BaseStorage, name: str, plan: SearchPlan, question: Mapping[str, Any]
) -> tuple[optuna.Study, bool]:
    optuna = import_optuna()
    pruner = make_pruner(plan)
    direction = "minimize" if plan.mode == "min" else "maximize"
    question = json.loads(json.dumps(question, default=float))  # numbers of numpy too
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction=direction, pruner=pruner)
        study.set_user_attr("question", question)
        return study, True
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
    return study, False


def _has_begun(study: optuna.Study) -> bool:
    """Return whether there is a training in a study, done or running; else only settings that didn't work."""
    idle = (import_optuna().trial.TrialState.WAITING, import_optuna().trial.TrialState.FAIL)
    return any(trial.state not in idle or "runs" in trial.user_attrs for trial in study.get_trials(deepcopy=False))


def _run_trial(trial: optuna.Trial, fit: Fit, plan: SearchPlan, queue: TrialQueue, trained: Callable[[], None]) -> None:
    """Train every seed of a trial that isn't done yet and tell the study how it ended."""
    optuna = import_optuna()
    study, state = trial.study, optuna.trial.TrialState
    try:
        with queue.keep_alive(trial):
            error, hopeless = _train_seeds(trial, fit, plan, trained)
            if error is not None:
                log.warning("Trial %d (%s) failed: %s", trial.user_attrs["place"], trial.params, error)
                trial.set_user_attr("error", error)
        values = [run["value"] for run in trial.user_attrs["runs"]] if error is None else []
        if error is not None or hopeless:
            study.tell(trial, state=state.FAIL if error is not None else state.PRUNED, skip_if_finished=True)
        else:
            study.tell(trial, statistics.fmean(values), skip_if_finished=True)
    except BaseException as exception:
        if queue.give_back(trial) or not isinstance(exception, RuntimeError):
            raise
        log.warning("Trial %d was taken over by another process; its result here is dropped.", trial.number)


def _train_seeds(
    trial: optuna.Trial, fit: Fit, plan: SearchPlan, trained: Callable[[], None]
) -> tuple[str | None, bool]:
    """Return why the trial failed, or None, and whether it was stopped as hopeless."""
    place = trial.user_attrs["place"]
    weight_decay, others = _sample(trial, plan)
    runs = list(trial.user_attrs.get("runs", []))
    stopped: list[int] = []

    def report(epoch: int, value: float) -> bool:
        # Other seeds report nothing: Optuna keeps one value for each epoch of a trial.
        if plan.prune and not runs:
            trial.report(value, epoch)
            if place >= len(plan.coarse()) and trial.should_prune():
                stopped.append(epoch)
        return bool(stopped)

    for seed in plan.all_seeds[len(runs) :]:
        started = time.monotonic()
        try:
            outcome = fit(TrialRun(weight_decay, seed, others, place, report))
        except Exception as error:
            if isinstance(error, MisconfigurationException) or not _any_complete(trial.study):
                raise
            return f"{type(error).__name__}: {error}", False
        run = as_run(outcome, seed, plan, time.monotonic() - started)
        runs.append(asdict(run))
        trial.set_user_attr("runs", runs)
        trained()
        if not math.isfinite(run.value):
            return f"{plan.monitor} is {run.value} with seed {seed}", False
        if stopped:
            return None, True
    return None, False


def _sample(trial: optuna.Trial, plan: SearchPlan) -> tuple[float, dict[str, float]]:
    """Return the lambda of a trial, and what is searched jointly."""
    trial.study.sampler = make_sampler(plan, trial.user_attrs["place"])
    weight_decay = trial.suggest_float("weight_decay", plan.low, plan.high, log=True)
    return weight_decay, {n: trial.suggest_float(n, r.low, r.high, log=r.log) for n, r in plan.also.items()}


def _any_complete(study: optuna.Study) -> bool:
    """Before, an error is most likely a mistake in the user's code; later, a training that diverged."""
    return bool(study.get_trials(deepcopy=False, states=(import_optuna().trial.TrialState.COMPLETE,)))


def _trials(queue: TrialQueue, plan: SearchPlan) -> list[Trial]:
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    trials = []
    for place, trial in sorted(queue.trials().items()):
        values = trial.params or trial.system_attrs.get("fixed_params", {})
        if place < plan.trials and "weight_decay" in values:
            others = {name: values[name] for name in plan.also if name in values}
            runs = tuple(Run(**run) for run in trial.user_attrs.get("runs", ()))
            state: Any = states[trial.state.name]
            trials.append(Trial(place, values["weight_decay"], others, state, runs, trial.user_attrs.get("error")))
    return trials
