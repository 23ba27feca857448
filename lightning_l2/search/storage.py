"""Where the trials of a search are kept, so that processes and machines can share them."""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_l2.extras import brought_by

if TYPE_CHECKING:
    import optuna

# Heartbeats without which a running trial counts as lost.
MISSED = 4


def import_optuna() -> Any:
    """Return the `optuna` module.

    Raises:
        ModuleNotFoundError: If it or scipy, which its pruner needs, isn't installed, with the way to get it.
    """
    with brought_by("search", "A search for weight decay needs"):
        import optuna
        import scipy  # type: ignore[import-untyped]  # noqa: F401
    return optuna


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
        ModuleNotFoundError: If Optuna isn't installed.
        TypeError: If it is something else.
    """
    optuna = import_optuna()
    if not isinstance(storage, str | Path | optuna.storages.BaseStorage | None):
        raise TypeError(
            f"Expected storage to be a path, a URL or an Optuna storage but got {type(storage).__name__}: {storage!r}."
        )
    if isinstance(storage, str | Path) and "://" not in str(storage):
        path = Path(storage).expanduser().resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{path}"
    if isinstance(storage, str):
        database = _database(storage, heartbeat)
        yield optuna.storages.get_storage(database)
        database.engine.dispose()
    else:
        yield optuna.storages.InMemoryStorage() if storage is None else optuna.storages.get_storage(storage)


def _database(url: str, heartbeat: int) -> optuna.storages.RDBStorage:
    import optuna
    import sqlalchemy

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
                    heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
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
    import sqlalchemy

    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", connect)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()
