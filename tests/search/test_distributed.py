"""A training on two processes: both follow one search."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "processes" / "distributed_search.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has of three searches, the first of which starts and connects the processes."""
    folder = tmp_path_factory.mktemp("searches")
    # two processes, which can't share a GPU
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LIGHTNING_L2_ACCELERATOR": "cpu"}
    command = [sys.executable, str(SCRIPT), str(folder), "ddp", "fsdp1", "fsdp2-full"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
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
