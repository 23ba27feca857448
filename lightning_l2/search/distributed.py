"""A training on several processes (DDP, FSDP): rank 0 searches, the others train what it trains."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from lightning_l2.extras import brought_by
from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.progress import quiet_trainings
from lightning_l2.search.result import SearchResult
from lightning_l2.search.trials import Fit, Outcome, TrialRun, never

log = logging.getLogger(__name__)

VARIABLE = "LIGHTNING_L2_TRAINING"
WAIT_SECONDS = 30.0
DONE = "nothing is left to train"
_searches = itertools.count()


def search_on_all_ranks(fit: Fit, plan: SearchPlan, **options: Any) -> SearchResult:
    """Run a search on rank 0 and its trainings on all ranks; return the result on all of them.

    A Trainer connects the processes in the first training. What that is, those that it starts itself learn from an
    environment variable and those that a launcher started from a store of torch at the master's address; all others
    come from rank 0 through the process group.

    Args:
        fit: Does one training, on all ranks together.
        plan: What to search.
        options: Those of `run_search`.

    Raises:
        MisconfigurationException: If rank 0 can't be heard.
    """
    with brought_by("search", "A search for weight decay needs"):
        import optuna  # noqa: F401
        import scipy  # type: ignore[import-untyped]  # noqa: F401  for Optuna's pruner
    from lightning_l2.search.study import load_result, run_search

    search = next(_searches)
    first = None if _is_connected() else _inherited(search)
    board = None if _is_connected() or first else _board(search)

    def led(run: TrialRun) -> Outcome:
        _tell(replace(run, report=never), search, board)
        return fit(run)

    if not is_first_rank():
        first = first or (_hear() if _is_connected() else _read(board, search))
        return load_result(plan, options["storage"], options["name"]) if first == DONE else _follow(fit, first)
    try:
        result = run_search(led, plan, while_waiting=_say_wait(), **options)
        _tell(result, search, board)
        return result
    finally:
        os.environ.pop(VARIABLE, None)


def is_first_rank() -> bool:
    """Return whether this process searches; the others of a distributed training follow it."""
    # Lightning keeps it on a function, from the environment of whatever started the process. Until a Trainer is made
    # it leaves out the number of the machine, all that there is where one command was given on each of them.
    return getattr(rank_zero_only, "rank", 0) == 0 and LightningEnvironment().node_rank() == 0


def _follow(fit: Fit, message: Any) -> SearchResult:
    with quiet_trainings():
        return _train_all(fit, message)


def _train_all(fit: Fit, message: Any) -> SearchResult:
    while not isinstance(message, SearchResult):
        if isinstance(message, TrialRun):
            try:
                fit(message)
            except Exception as error:
                if not _is_connected():
                    raise
                # Rank 0 meets the same error and decides whether the search goes on.
                log.warning("The training failed on this rank: %s", error)
        message = _hear()
    return message


def _tell(message: TrialRun | SearchResult | None, search: int = 0, board: Board | None = None) -> None:
    if _is_connected():
        dist.broadcast_object_list([message], src=0)
    elif isinstance(message, TrialRun):
        names = ("weight_decay", "seed", "trial", "only_looks")
        values = {**{name: getattr(message, name) for name in names}, "others": dict(message.others)}
        os.environ[VARIABLE] = json.dumps([search, values])
        if board is not None:
            board.write(os.environ[VARIABLE])
    elif board is not None and isinstance(message, SearchResult):
        board.write(json.dumps([search, None]))
        board.wait_for_readers()


def _inherited(search: int) -> Any:
    """Return the first training of a search as it is in the environment; nothing where there is none."""
    number, values = json.loads(os.environ.get(VARIABLE, "[-1, null]"))
    if number < search:
        return None
    # A process that was started for a later search begins with those before it, which have ended.
    return DONE if number > search or values is None else TrialRun(**values)


def _read(board: Board | None, search: int) -> Any:
    if board is None:
        raise MisconfigurationException(
            "Expected `MASTER_ADDR` and `MASTER_PORT` to be where rank 0 of this search is, got neither in a process "
            "with a rank above 0. Set them in all processes, or unset RANK, LOCAL_RANK and NODE_RANK to search alone."
        )
    os.environ[VARIABLE] = board.read()  # also for those that a Trainer starts on this machine
    return _inherited(search)


def _hear() -> Any:
    messages = [None]
    dist.broadcast_object_list(messages, src=0)
    return messages[0]


def _say_wait() -> Callable[[], None]:
    """Return what keeps the other ranks from giving up while rank 0 waits for other machines."""
    last = time.monotonic()

    def say() -> None:
        nonlocal last
        if time.monotonic() - last > WAIT_SECONDS:
            last = time.monotonic()
            _tell(None)

    return say


def _is_connected() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Board:
    """Where rank 0 writes the first training for processes that a launcher started: a store of torch.

    Args:
        address: Name of the machine of rank 0.
        port: The port at which the processes will meet for the process group too.
        readers: How many other processes there are, 0 where that isn't known.
        search: Number of the search in this process.
    """

    def __init__(self, address: str, port: int, readers: int, search: int) -> None:
        # torchrun has a store at that port; the process group shares the one that rank 0 opens here.
        opens = is_first_rank() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        distributed: Any = dist
        store = distributed.TCPStore(address, port, is_master=opens, wait_for_workers=False, multi_tenant=True)
        # torchrun's store outlives a failure, after which it starts all processes once more.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = distributed.PrefixStore(f"{VARIABLE}/{attempt}/{search}", store)
        self._readers = readers

    def write(self, text: str) -> None:
        """Put a text in the place of the one before."""
        self._store.set("text", text)

    def read(self) -> str:
        """Wait for a text and return it."""
        self._store.wait(["text"], timedelta(days=1))
        text: str = self._store.get("text").decode()
        if self._store.add("readers", 1) == self._readers:
            self._store.set("all", "")
        return text

    def wait_for_readers(self) -> None:
        """Wait until all others have read, who would find nothing once this process has ended."""
        if self._readers > 0:
            self._store.wait(["all"], timedelta(minutes=5))


def _board(search: int) -> Board | None:
    """Return the board of processes that a launcher started, None for a process alone."""
    variables = os.environ.keys()
    if variables & {"RANK", "LOCAL_RANK", "NODE_RANK"} and variables >= {"MASTER_ADDR", "MASTER_PORT"}:
        world = int(os.environ.get("WORLD_SIZE", 0))
        # With the number of the machine alone, a Trainer starts the others on it, and only if there is a training.
        readers = world - 1 if variables & {"RANK", "LOCAL_RANK"} else 0
        return None if world == 1 else Board(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), readers, search)
    for environment in (SLURMEnvironment, LSFEnvironment, MPIEnvironment):
        if environment.detect() and (cluster := environment()).world_size() > 1:
            return Board(cluster.main_address, cluster.main_port, cluster.world_size() - 1, search)
    return None
