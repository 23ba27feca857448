"""Who runs a trial: the storage decides once; what a dead process leaves behind is run again."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_l2.search import queue as queue_module
from lightning_l2.search.queue import TrialQueue
from lightning_l2.search.storage import open_storage
from lightning_l2.search.worker import Heartbeat, Watch, is_known_dead, process_id

PLACES = [{"weight_decay": 0.001}, {"weight_decay": 0.1}, {}]


@pytest.fixture(params=["journal", "sqlite3"])
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Two views of one file, as two processes have them."""
    file = tmp_path / f"study.{request.param}"
    with open_storage(file) as first, open_storage(file) as second:
        optuna.create_study(study_name="study", storage=first)
        yield first, second


def queues(storages: Any, heartbeat: float = 15.0) -> list[TrialQueue]:
    return [
        TrialQueue(optuna.load_study(study_name="study", storage=storage), storage, PLACES, heartbeat)
        for storage in storages
    ]


def states(queue: TrialQueue) -> list[str]:
    return [trial.state.name for _, trial in sorted(queue.trials().items())]


def finish(queue: TrialQueue, trial: optuna.Trial) -> None:
    trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True)
    trial.study.tell(trial, 1.0)


def test_each_trial_is_handed_out_once(storages: Any) -> None:
    first, second = queues(storages)
    first.fill()
    second.fill()
    taken = [queue.take() for queue in (first, second, first, second)]
    assert [trial.user_attrs["place"] for trial in taken[:3]] == [0, 1, 2]
    assert taken[3] is None
    assert states(first) == states(second) == ["RUNNING"] * 3


def test_it_is_finished_when_every_place_is(storages: Any) -> None:
    first, second = queues(storages)
    first.fill()
    for number in range(3):
        assert not second.is_finished()
        trial = first.take()
        if number == 1:
            trial.set_user_attr("error", "nan")
            trial.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            finish(first, trial)
    assert second.is_finished()
    assert states(second) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_what_was_given_back_keeps_its_values_and_seeds(storages: Any) -> None:
    first, second = queues(storages)
    first.fill()
    trials = [first.take() for _ in PLACES]
    value = trials[2].suggest_float("weight_decay", 1e-5, 1e-1, log=True)
    trials[2].set_user_attr("runs", [{"seed": 0}])
    assert first.give_back(trials[2])
    assert not first.give_back(trials[2]), "only once"
    again = second.take()
    assert again.user_attrs["place"] == 2
    assert again.user_attrs["runs"] == [{"seed": 0}]
    assert again.suggest_float("weight_decay", 1e-5, 1e-1, log=True) == value
    assert states(second) == ["RUNNING"] * 3


def test_what_was_given_back_comes_before_later_places(storages: Any) -> None:
    first, second = queues(storages)
    first.fill()
    first.give_back(first.take())
    assert [second.take().user_attrs["place"] for _ in PLACES] == [0, 1, 2]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks the kernel about processes through /proc")
def test_a_trial_of_a_process_that_is_gone_is_run_again(storages: Any) -> None:
    first, second = queues(storages)
    first.fill()
    lost = first.take()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        lost.set_user_attr("worker", process_id(process.pid))
        assert [trial.user_attrs["place"] for trial in (second.take(), second.take())] == [1, 2]
        assert second.take() is None, "it lives"
        process.kill()
    assert second.take().user_attrs["place"] == 0
    assert second.take() is None


def test_a_trial_without_a_sign_of_life_is_run_again(storages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on another machine, whose end nobody can see: 8 heartbeats of 10 s without one."""
    now = [0.0]
    monkeypatch.setattr(queue_module, "Watch", lambda grace: Watch(grace, clock=lambda: now[0]))
    first, second = queues(storages, heartbeat=10.0)
    first.fill()
    elsewhere = [first.take() for _ in PLACES]
    for number, trial in enumerate(elsewhere):
        trial.set_user_attr("worker", f"another-machine//{number}/1")
    for seconds in (0.0, 79.0, 81.0):
        now[0] = seconds
        elsewhere[1].set_user_attr("heartbeat", seconds)
        elsewhere[2].set_user_attr("heartbeat", seconds)
        taken = second.take()
        assert (taken is None) == (seconds < 80)
    assert taken.user_attrs["place"] == 0


def test_the_result_of_a_process_that_was_given_up_is_dropped(storages: Any) -> None:
    """It was only slow, and its trial is run elsewhere now."""
    first, second = queues(storages)
    first.fill()
    slow = first.take()
    second.give_back(slow)
    slow.study.tell(slow, 1.0, skip_if_finished=True)
    again = next(trial for trial in (second.take() for _ in PLACES) if trial.user_attrs["place"] == 0)
    finish(second, again)
    assert second.trials()[0].number == again.number
    assert sum(trial.state.name == "COMPLETE" for trial in again.study.trials) == 1


def test_places_that_stay_empty_are_filled(storages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that filled them died half way."""
    now = [0.0]
    monkeypatch.setattr(queue_module, "Watch", lambda grace: Watch(grace, clock=lambda: now[0]))
    first, second = queues(storages, heartbeat=0.01)
    first._study.enqueue_trial(PLACES[0], user_attrs={"place": 0})
    second.wait()
    assert states(second) == ["WAITING"], "the other process may still be at it"
    now[0] = 3.0
    second.wait()
    assert states(second) == ["WAITING"] * 3


def test_of_two_trials_for_one_place_the_older_counts(storages: Any) -> None:
    first, second = queues(storages)
    first.fill()
    second._study.enqueue_trial(PLACES[1], user_attrs={"place": 1})
    places = [second.take().user_attrs["place"] for _ in PLACES]
    assert places == [0, 1, 2]
    assert first.take() is None
    assert [trial.state.name for trial in first._study.trials] == ["RUNNING"] * 3 + ["FAIL"]


def test_trials_of_others_in_the_study_are_left_alone(storages: Any) -> None:
    first, _ = queues(storages)
    first._study.enqueue_trial({"weight_decay": 0.01})
    first.fill()
    assert [first.take().user_attrs["place"] for _ in PLACES] == [0, 1, 2]
    assert first.take() is None


def test_heartbeats_are_written_while_a_trial_runs(storages: Any) -> None:
    first, second = queues(storages, heartbeat=0.02)
    first.fill()
    trial = first.take()
    with first.keep_alive(trial):
        deadline = time.monotonic() + 20
        while second.trials()[0].user_attrs.get("heartbeat", 0) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    beats = second.trials()[0].user_attrs["heartbeat"]
    assert beats >= 2
    time.sleep(0.1)
    assert second.trials()[0].user_attrs["heartbeat"] == beats, "and not after"


def test_a_heartbeat_survives_a_storage_out_of_reach() -> None:
    beats: list[int] = []
    with Heartbeat(beats.append, interval=0.01):
        deadline = time.monotonic() + 20
        while len(beats) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert beats[:3] == [1, 2, 3]


def test_a_living_process_is_not_dead() -> None:
    assert not is_known_dead(process_id())
    machine, namespace, number, _ = process_id().split("/")
    assert machine == socket.gethostname()
    assert number == str(os.getpid())
    assert not is_known_dead(f"elsewhere/{namespace}/{number}/1"), "another machine may have a process of that number"
    assert not is_known_dead(f"{machine}/{namespace}/{number}/"), "nothing is known without the time of its start"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks the kernel about processes through /proc")
def test_a_number_that_was_given_to_a_later_process_is_a_dead_process() -> None:
    machine, namespace, number, started = process_id().split("/")
    assert is_known_dead(f"{machine}/{namespace}/{number}/{int(started) - 1}")
