"""Processes that share a search: no trial is lost, none done twice, and those of killed processes are run again.

One is killed in the middle of a training, one between taking a trial and its first sign of life.

The test with a database server runs on Debian, after `apt install postgresql` and `pip install "psycopg[binary]"`, by

    pg_virtualenv sh -c 'LIGHTNING_L2_DATABASE=postgresql+psycopg://$PGUSER:$PGPASSWORD@localhost:$PGPORT/postgres \
        python -m pytest tests/search/test_processes.py -k database'
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

TRIALS = 8  # with that of lambda = 0
SCRIPT = Path(__file__).parents[1] / "processes" / "shared_search.py"
ROOT = Path(__file__).parents[2]


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def kill_one_in_the_middle_of_a_training(parent: subprocess.Popen[str], log: Path) -> tuple[str, ...]:
    """Kill one process between the two lines of a training, not its first, and return which training that was."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and parent.poll() is None:
        now = lines(log)
        for number in {line[1] for line in now}:
            mine = [line for line in now if line[1] == number]
            if len(mine) >= 3 and mine[-1][0] == "begin":
                os.kill(int(number), signal.SIGKILL)
                time.sleep(0.1)
                mine = [line for line in lines(log) if line[1] == number]
                assert mine[-1][0] == "begin", "the training ended before the signal came"
                return tuple(mine[-1][2:])
        time.sleep(0.005)
    raise AssertionError("no process ever trained")


def share_a_search(storage: str, log: Path) -> None:
    command = [sys.executable, str(SCRIPT), storage, uuid.uuid4().hex, str(log), str(TRIALS - 1), "3"]
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        killed = kill_one_in_the_middle_of_a_training(parent, log)
        codes, _ = parent.communicate(timeout=120)
    assert Counter(codes.split()) == {"-9": 2, "0": 2}
    begun, ended = (Counter(tuple(line[2:]) for line in lines(log) if line[0] == word) for word in ("begin", "end"))
    assert len(ended) == TRIALS * 2, "every lambda with every seed"
    assert set(ended.values()) == {1}, "none done twice"
    assert begun - ended == Counter({killed: 1}), "only the killed training began once more"
    assert [line[2] for line in lines(log) if line[0] == "result"] == [str(TRIALS)] * 2, "both see the whole result"


def test_three_processes_share_a_file(tmp_path: Path) -> None:
    share_a_search(str(tmp_path / "study.db"), tmp_path / "log")


@pytest.mark.skipif(
    "LIGHTNING_L2_DATABASE" not in os.environ,
    reason="needs a database server: set LIGHTNING_L2_DATABASE to its URL, such as postgresql+psycopg://user@host/name",
)
def test_three_processes_share_a_database(tmp_path: Path) -> None:
    share_a_search(os.environ["LIGHTNING_L2_DATABASE"], tmp_path / "log")
