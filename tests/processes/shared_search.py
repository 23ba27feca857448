"""Processes that share a search: python search_process.py STORAGE NAME LOG TRIALS PROCESSES.

Every training leaves two lines in the log, and every process one when it has the result. They are forked once the
imports are done, which take longer than the search.
"""

import os
import sys
import time
from pathlib import Path

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


if __name__ == "__main__":
    storage, name, log, trials, processes = sys.argv[1:]
    for _ in range(int(processes)):
        if os.fork() == 0:
            search(storage, name, log, int(trials))
            sys.exit()
    print(*sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(int(processes))))
