"""Processes that share a search: python shared_search.py STORAGE NAME LOG TRIALS PROCESSES.

Every training leaves two lines in the log, and every process one when it has the result. They are forked once the
imports are done, which take longer than the search. One more comes first and is killed the moment it takes a trial.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import optuna

from lightning_l2.search import SearchPlan, TrialRun
from lightning_l2.search.study import run_search


def search(storage: str, name: str, log: str, trials: int) -> None:
    def write(word: str, *values: float) -> None:
        # One write to a file open for appending stays one piece between processes.
        with Path(log).open("a") as file:
            file.write(" ".join(map(str, (word, os.getpid(), *values))) + "\n")

    def fit(run: TrialRun) -> float:
        write("begin", run.weight_decay, run.seed)
        time.sleep(0.3)
        write("end", run.weight_decay, run.seed)
        return run.weight_decay + run.seed

    plan = SearchPlan(trials=trials, seeds=2)
    result = run_search(fit, plan, storage=storage, name=name, progress=False, heartbeat=1)
    write("result", sum(trial.state == "complete" and len(trial.runs) == 2 for trial in result.trials))


def die_once_it_has_asked() -> None:
    ask = optuna.Study.ask

    def last(study: optuna.Study) -> None:
        ask(study)
        os.kill(os.getpid(), signal.SIGKILL)

    optuna.Study.ask = last  # type: ignore[assignment]


def run(count: int, *arguments: Any, killed: bool = False) -> list[int]:
    """Run a search in several processes and return their exit codes."""
    for _ in range(count):
        if os.fork() == 0:
            if killed:
                die_once_it_has_asked()
            search(*arguments)
            sys.exit()
    return [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(count)]


if __name__ == "__main__":
    *given, trials, processes = sys.argv[1:]
    print(*run(1, *given, int(trials), killed=True), *run(int(processes), *given, int(trials)))
