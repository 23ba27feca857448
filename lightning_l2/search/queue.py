"""Which trial a process runs next, by Optuna's `ask`, and what becomes of those that were lost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread, is_heartbeat_enabled  # no public way but optimize
from optuna.trial import FrozenTrial, TrialState

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def trials_by_place(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trial that counts of each place: the one that has ended, else the latest.

    A place is what was asked for once. A trial whose process died has failed without an error of its own, and Optuna
    puts another one in its place with the same values and the seeds that are done.
    """
    places: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        origin = trial.system_attrs.get("failed_trial", trial.number)
        if origin not in places or not has_ended(places[origin]):
            places[origin] = trial
    return [places[origin] for origin in sorted(places)]


def has_ended(trial: FrozenTrial) -> bool:
    """Return whether a trial has a result: a value, a stop, or an error of its own."""
    return trial.state in FINISHED or (trial.state == TrialState.FAIL and "error" in trial.user_attrs)


def place_of(study: optuna.Study, trial: optuna.Trial) -> int:
    """Return the place of a trial in the search, 0 for the first."""
    return [other.number for other in trials_by_place(study)].index(trial.number)


class Queue:
    """Hands out the trials of a study until every place has a result.

    Args:
        study: The study, whose storage decides who gets a trial.
        places: How many there are.
        pause: Time between two looks at the storage while other processes run the last trials, in seconds.
    """

    def __init__(self, study: optuna.Study, places: int, pause: float = 1.0) -> None:
        self._study = study
        self._places = places
        self._pause = pause
        self._orphans: set[int] = set()

    def is_finished(self) -> bool:
        """Return whether every place has a result."""
        trials = trials_by_place(self._study)[: self._places]
        return len(trials) == self._places and all(map(has_ended, trials))

    def take(self) -> optuna.Trial | None:
        """Take the next trial, or return None while other processes run the rest."""
        with warnings.catch_warnings():
            # Heartbeats are experimental, and thought for Study.optimize; `keep_alive` does what that does.
            warnings.simplefilter("ignore")
            optuna.storages.fail_stale_trials(self._study)
            trials = trials_by_place(self._study)
            if len(trials) >= self._places and all(trial.state != TrialState.WAITING for trial in trials):
                return None
            trial = self._study.ask()
        storage: Any = self._study._storage
        if is_heartbeat_enabled(storage):
            # At once, not in the thread's own time: Optuna never gives up a trial that showed no sign of life at all.
            storage.record_heartbeat(trial._trial_id)
        if place_of(self._study, trial) < self._places:
            return trial
        # Another process was faster. Were the search longer, this would be the next place.
        self._study.tell(trial, state=TrialState.FAIL)
        return None

    def wait(self) -> None:
        """Sleep for a moment, and give back what a process lost that died while it gave a trial back."""
        time.sleep(self._pause)
        lost = {
            trial.number: trial
            for trial in trials_by_place(self._study)[: self._places]
            if trial.state == TrialState.FAIL and not has_ended(trial)
        }
        for number in self._orphans & lost.keys():
            _retry(self._study, lost[number])
        self._orphans = set(lost)

    def give_back(self, trial: optuna.Trial) -> bool:
        """Give up a running trial, so that its place is filled again with its values and finished seeds.

        Returns:
            Whether it was still running; False if another process gave it up before.
        """
        frozen = next(other for other in self._study.get_trials(deepcopy=False) if other.number == trial.number)
        if frozen.state.is_finished():
            return False
        _retry(self._study, self._study.tell(trial, state=TrialState.FAIL))
        return True


def _retry(study: optuna.Study, trial: FrozenTrial) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback()(study, trial)


@contextmanager
def keep_alive(trial: optuna.Trial) -> Iterator[Any]:
    """Show signs of life of a trial to other processes, where its storage can."""
    with get_heartbeat_thread(trial._trial_id, trial.study._storage):
        yield
