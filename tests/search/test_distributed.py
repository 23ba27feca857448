"""A training on two processes: both follow one search."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from lightning_l2.search import search_weight_decay
from tests.processes.forked import pythons

SCRIPT = Path(__file__).parents[1] / "processes" / "distributed_search.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four searches ran, the first of which connects the processes."""
    folder = tmp_path_factory.mktemp("searches")
    _run(folder, _ranks(), "ddp", "fsdp1", "fsdp2-full", "formula")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank has of them."""
    return _results(folder)


def _run(folder: Path, variables: list[dict[str, str]], *strategies: str) -> None:
    """Start the script once for each set of variables and wait for all."""
    # two processes, which can't share a GPU
    environments = [{"LIGHTNING_L2_ACCELERATOR": "cpu", **own} for own in variables]
    ended = pythons(str(SCRIPT), str(folder), *strategies, environments=environments)
    assert not any(done.returncode for done in ended), [done.stderr for done in ended]


def _ranks() -> list[dict[str, str]]:
    """Return what a launcher tells each of two processes."""
    master = _master()
    return [{**master, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def _master() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}


def _results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / rank).read_text()) for rank in ("0", "1")]


def test_two_processes_train_together(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert first == second, "both have the result"
    ddp = first["ddp"]
    # SGD(lr=0.1) for 2 epochs of 32 samples in batches of 4 on two processes: eta T = 0.1 * 8
    assert ddp["lr_steps"] == pytest.approx(0.8)
    assert sorted(trial[0] for trial in ddp["search"]) == pytest.approx([0, 0.0125, 0.395285, 12.5], rel=1e-4)
    assert [len(trial) for trial in ddp["search"]] == [6] * 4
    norms = [trial[-1] for trial in sorted(ddp["search"])][:-1]
    assert norms == sorted(norms, reverse=True), "lambda acted on the weights"


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2-full"])
def test_sharded_trainings_find_what_ddp_finds(strategy: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        np.testing.assert_allclose(rank[strategy]["search"], rank["ddp"]["search"], rtol=1e-5)


@pytest.mark.parametrize("start", ["by the Trainer", "by a launcher", "on each machine"])
def test_processes_begin_with_the_search_that_rank_0_begins_with(
    start: str, folder: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    # of the formula nothing is left, of fsdp2-full all
    shutil.copy(folder / "study.db", tmp_path)
    optuna.delete_study(study_name="fsdp2-full", storage=f"sqlite:///{tmp_path / 'study.db'}")
    master = _master()
    variables: list[dict[str, str]] = {
        "by the Trainer": [{}],
        "by a launcher": _ranks(),
        "on each machine": [{**master, "NODE_RANK": rank, "LIGHTNING_L2_NODES": "2"} for rank in "01"],
    }[start]
    _run(tmp_path, variables, "formula", "fsdp2-full")
    for rank in _results(tmp_path):
        assert rank["formula"] == found[0]["formula"]
        np.testing.assert_allclose(rank["fsdp2-full"]["search"], found[0]["ddp"]["search"], rtol=1e-5)


def test_a_rank_that_rank_0_did_not_start_needs_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(MisconfigurationException, match="Expected `MASTER_ADDR` and `MASTER_PORT` to be where rank 0"):
        search_weight_decay(fit=lambda run: 0.0, low=0.1, high=1.0, progress=False)
