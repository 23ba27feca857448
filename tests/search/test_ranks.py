"""A training on two processes: both follow one search."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("distributed_process.py")
ROOT = Path(__file__).parents[2]


def run(folder: Path, strategy: str) -> list[dict[str, Any]]:
    # two processes, which can't share a GPU
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LIGHTNING_L2_ACCELERATOR": "cpu"}
    command = [sys.executable, str(SCRIPT), str(folder), strategy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / rank).read_text()) for rank in ("0", "1")]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ddp"), "ddp")


def test_two_processes_train_together(ddp: list[dict[str, Any]]) -> None:
    first, second = ddp
    assert first["search"] == second["search"], "both have the result"
    assert [len(trial) for trial in first["search"]] == [6] * 4
    norms = [trial[-1] for trial in sorted(first["search"])]
    assert norms == sorted(norms, reverse=True), "lambda acted on the weights"
    assert first["finder"] == second["finder"]
    assert first["set"] == second["set"]
    for rank in (first, second):
        after_finder, given = rank["weights"]
        assert after_finder == given, "the training after the finder is the one with its lambda, bit for bit"
    assert first["weights"][0][:-2] == pytest.approx(second["weights"][0][:-2])


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2-full"])
def test_sharded_trainings_find_what_ddp_finds(strategy: str, ddp: list[dict[str, Any]], tmp_path: Path) -> None:
    """The finder would have to put sharded weights back, and says that it can't."""
    for rank, reference in zip(run(tmp_path, strategy), ddp, strict=True):
        np.testing.assert_allclose(rank["search"], reference["search"], rtol=1e-5)
        assert "can't put back weights" in rank["finder"]
        assert "Use lightning_l2.search_weight_decay" in rank["finder"]
