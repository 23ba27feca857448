"""Where the trials of a search are kept, which one a process runs next, and what becomes of those that were lost."""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread, is_heartbeat_enabled  # no public way but optimize
from optuna.trial import FrozenTrial, TrialState

# Heartbeats without which a running trial counts as lost.
MISSED = 4
# An attribute of a trial: the number under which it showed its first sign of life.
SEEN = "seen"


@contextmanager
def open_storage(
    storage: str | Path | optuna.storages.BaseStorage | None, heartbeat: int = 15
) -> Iterator[optuna.storages.BaseStorage]:
    """Open the place that keeps the trials, and close it when the context ends if it was opened here.

    Args:
        storage: None for this process alone; a path for an SQLite file; a database URL such as
            `postgresql+psycopg://user@host/name` for many machines; or an Optuna storage, whose own heartbeat holds.
        heartbeat: Time between two signs of life of a running trial, in seconds. After four without one another
            process runs it again, with the seeds that are done.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(storage, str | Path | optuna.storages.BaseStorage | None):
        raise TypeError(
            f"Expected storage to be a path, a URL or an Optuna storage but got {type(storage).__name__}: {storage!r}."
        )
    if not isinstance(storage, str | Path):
        yield optuna.storages.get_storage(storage)
        return
    url = str(storage)
    if "://" not in url:
        path = Path(url).expanduser().resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    database = _database(url, heartbeat)
    try:
        yield optuna.storages.get_storage(database)
    finally:
        database.engine.dispose()


def _database(url: str, heartbeat: int) -> optuna.storages.RDBStorage:
    is_sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    for attempt in itertools.count():
        try:
            with warnings.catch_warnings():
                # Optuna has marked heartbeats and retries as experimental for years.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=heartbeat,
                    grace_period=MISSED * heartbeat,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
            break
        except sqlalchemy.exc.DBAPIError:
            # Several processes that start on an empty database create the same tables.
            if attempt == 9:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    if is_sqlite:
        _serialise(storage.engine)
    return storage


def _serialise(engine: Any) -> None:
    """Make every transaction of an SQLite engine take the file's lock at its start.

    By default reading a trial's state takes no lock, so two processes can both find a trial waiting and take it.
    """

    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connect)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()


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
    if trial.state == TrialState.FAIL:
        return "error" in trial.user_attrs
    return trial.state.is_finished()


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

    def trials(self) -> list[FrozenTrial]:
        """Return the trial that counts of each place that was asked for."""
        return trials_by_place(self._study)[: self._places]

    def is_finished(self) -> bool:
        """Return whether every place has a result."""
        trials = self.trials()
        return len(trials) == self._places and all(map(has_ended, trials))

    def take(self) -> tuple[optuna.Trial, int] | None:
        """Take the next trial and its place, 0 for the first, or return None while other processes run the rest."""
        with warnings.catch_warnings():
            # Heartbeats are experimental, and thought for Study.optimize; `keep_alive` does what that does.
            warnings.simplefilter("ignore")
            _show_first_signs_of_life(self._study)
            optuna.storages.fail_stale_trials(self._study)
            trials = trials_by_place(self._study)
            if len(trials) >= self._places and all(trial.state != TrialState.WAITING for trial in trials):
                return None
            trial = self._study.ask()
        _show_first_signs_of_life(self._study)
        numbers = [counted.number for counted in self.trials()]
        if trial.number in numbers:
            return trial, numbers.index(trial.number)
        # Another process was faster. Were the search longer, this would be the next place.
        self._study.tell(trial, state=TrialState.FAIL)
        return None

    def wait(self) -> None:
        """Sleep for a moment, and give back what a process lost that died while it gave a trial back."""
        time.sleep(self._pause)
        lost = {
            trial.number: trial for trial in self.trials() if trial.state == TrialState.FAIL and not has_ended(trial)
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


def _show_first_signs_of_life(study: optuna.Study) -> None:
    """Let the time run in which a trial has to show signs of life, also for whoever died before the first of them.

    Optuna never gives up a trial that showed none at all, as of a process that was killed in the moment it took it.
    """
    storage: Any = study._storage
    if not is_heartbeat_enabled(storage):
        return
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # A trial in the place of a lost one has its attributes, and another number.
        if trial.user_attrs.get(SEEN) != trial.number:
            storage.record_heartbeat(trial._trial_id)
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                storage.set_trial_user_attr(trial._trial_id, SEEN, trial.number)


def _retry(study: optuna.Study, trial: FrozenTrial) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback()(study, trial)


@contextmanager
def keep_alive(trial: optuna.Trial) -> Iterator[Any]:
    """Show signs of life of a trial to other processes, where its storage can."""
    with get_heartbeat_thread(trial._trial_id, trial.study._storage):
        yield
