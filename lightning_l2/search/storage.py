"""Where the trials of a search are kept, so that processes and machines can share them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_l2.extras import brought_by

if TYPE_CHECKING:
    import optuna

SQLITE_SUFFIXES = (".db", ".sqlite", ".sqlite3")


def import_optuna() -> Any:
    """Return the `optuna` module.

    Raises:
        ModuleNotFoundError: If it isn't installed, with the command that installs it.
    """
    with brought_by("search", "A search for weight decay needs"):
        import optuna
    return optuna


@contextmanager
def open_storage(
    storage: str | Path | optuna.storages.BaseStorage | None,
) -> Iterator[optuna.storages.BaseStorage]:
    """Open the place that keeps the trials, and close it when the context ends if it was opened here.

    Args:
        storage: None for this process alone; a path that ends in .db, .sqlite or .sqlite3 for an SQLite file; any
            other path for a journal file, which also works on a network file system; a database URL such as
            `postgresql+psycopg://user@host/name` for many machines; or an Optuna storage.

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
        # Absolute, because the journal's lock looks for its file from the directory of the lock.
        path = Path(storage).expanduser().resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{path}" if path.suffix in SQLITE_SUFFIXES else _journal(path)
    if isinstance(storage, str):
        database = _database(storage)
        yield optuna.storages.get_storage(database)
        database.engine.dispose()
    else:
        yield optuna.storages.get_storage(storage)


def _journal(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    # A lock that needs no symbolic links works on Windows too.
    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


def _database(url: str) -> optuna.storages.RDBStorage:
    import sqlalchemy
    from optuna.storages import RDBStorage

    is_sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    for attempt in itertools.count():
        try:
            storage = RDBStorage(url, engine_kwargs=options)
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
