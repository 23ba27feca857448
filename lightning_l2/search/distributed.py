"""A training on several processes (DDP, FSDP): rank 0 searches, the others train what it trains."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
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


def search_on_all_ranks(fit: Fit, plan: SearchPlan, **options: Any) -> SearchResult:
    """Run a search on rank 0 and its trainings on all ranks; return the result on all of them.

    A Trainer starts the script once more for each further rank when it trains for the first time. Those processes
    come here too; they learn their first training from an environment variable and the others from rank 0 itself.

    Args:
        fit: Does one training, on all ranks together.
        plan: What to search.
        options: Those of `run_search`.
    """
    with brought_by("search", "A search for weight decay needs"):
        import optuna  # noqa: F401
        import scipy  # type: ignore[import-untyped]  # noqa: F401  for Optuna's pruner
    from lightning_l2.search.study import load_result, run_search

    store = None if _is_connected() else _store()
    if not is_first_rank():
        first = _hear() if _is_connected() else _first(store)
        return load_result(plan, options["storage"], options["name"]) if first == DONE else _follow(fit, first)

    def led(run: TrialRun) -> Outcome:
        _tell(replace(run, report=never), store)
        return fit(run)

    try:
        result = run_search(led, plan, while_waiting=_say_wait(), **options)
        _tell(result, store)
        return result
    finally:
        os.environ.pop(VARIABLE, None)


def is_first_rank() -> bool:
    """Return whether this process searches; the others of a distributed training follow it."""
    # Lightning keeps it on a function, from the environment of whatever started the process.
    return getattr(rank_zero_only, "rank", 0) == 0


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


def _tell(message: TrialRun | SearchResult | None, store: Any = None) -> None:
    if _is_connected():
        dist.broadcast_object_list([message], src=0)
    elif isinstance(message, TrialRun):
        names = ("weight_decay", "seed", "trial", "only_looks")
        text = json.dumps({**{name: getattr(message, name) for name in names}, "others": dict(message.others)})
        os.environ[VARIABLE] = text
        if store is not None:
            store.set(VARIABLE, text)
    elif store is not None and isinstance(message, SearchResult):
        store.set(VARIABLE, json.dumps(DONE))


def _first(store: Any) -> Any:
    if store is not None:
        store.wait([VARIABLE], timedelta(days=1))
    values = json.loads(os.environ[VARIABLE] if store is None else store.get(VARIABLE))
    return values if values == DONE else TrialRun(**values)


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


def _store() -> Any:
    """Return what processes share that torchrun or SLURM started, before a Trainer has connected them; else None."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and environment().world_size() > 1:
            cluster = environment()
            # torchrun has a store of its own at that port; elsewhere the Trainer will need the port.
            there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            port = cluster.main_port + (not there)
            is_master = not there and cluster.global_rank() == 0
            distributed: Any = dist
            return distributed.TCPStore(cluster.main_address, port, is_master=is_master, wait_for_workers=False)
    return None
