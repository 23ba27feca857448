"""Who runs a trial: the storage decides once; what a dead process leaves behind is run again."""

import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_l2.search.queue import Queue, keep_alive, place_of, trials_by_place
from lightning_l2.search.storage import open_storage

PLACES = 3


@pytest.fixture
def queues(tmp_path: Path) -> Any:
    """Two views of one file, as two processes have them, with their studies."""
    file = tmp_path / "study.db"
    with open_storage(file, heartbeat=1) as first, open_storage(file, heartbeat=1) as second:
        optuna.create_study(study_name="study", storage=first)
        studies = [optuna.load_study(study_name="study", storage=storage) for storage in (first, second)]
        yield [(Queue(study, PLACES, pause=0.0), study) for study in studies]


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in trials_by_place(study)]


def places(study: optuna.Study, *trials: Any) -> list[int | None]:
    return [None if trial is None else place_of(study, trial) for trial in trials]


def make_stale(study: optuna.Study, trial: optuna.Trial) -> None:
    """Let the last sign of life of a trial be an hour ago: there is one from the moment it was taken."""
    import sqlalchemy

    with study._storage._backend.engine.begin() as connection:
        hour = sqlalchemy.text(
            "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour') WHERE trial_id = :id"
        )
        connection.execute(hour, {"id": trial._trial_id})


def test_each_trial_is_handed_out_once(queues: Any) -> None:
    (first, study), (second, _) = queues
    taken = [queue.take() for queue in (first, second, first, second)]
    assert places(study, *taken) == [0, 1, 2, None]
    assert states(study) == ["RUNNING"] * 3


def test_it_is_finished_when_every_place_has_a_result(queues: Any) -> None:
    (first, study), (second, _) = queues
    for number in range(PLACES):
        assert not second.is_finished()
        trial = first.take()
        if number == 1:
            trial.set_user_attr("error", "nan")
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, 1.0)
    assert second.is_finished()
    assert second.take() is None


def test_what_was_given_back_keeps_its_values_seeds_and_place(queues: Any) -> None:
    (first, _), (second, other) = queues
    trials = [first.take() for _ in range(PLACES)]
    value = trials[1].suggest_float("weight_decay", 1e-5, 1e-1, log=True)
    trials[1].set_user_attr("runs", [{"seed": 0}])
    assert first.give_back(trials[1])
    assert not first.give_back(trials[1]), "only once"
    again = second.take()
    assert place_of(other, again) == 1
    assert again.user_attrs["runs"] == [{"seed": 0}]
    assert again.suggest_float("weight_decay", 1e-5, 1e-1, log=True) == value
    assert states(other) == ["RUNNING"] * 3


def test_what_was_given_back_comes_before_later_places(queues: Any) -> None:
    (first, study), (second, _) = queues
    first.give_back(first.take())
    assert places(study, *(second.take() for _ in range(PLACES))) == [0, 1, 2]


def test_a_trial_without_a_sign_of_life_is_run_again(queues: Any) -> None:
    (first, study), (second, other) = queues
    lost, alive, _ = (first.take() for _ in range(PLACES))
    lost.set_user_attr("runs", [{"seed": 0}])
    make_stale(study, lost)
    with keep_alive(alive):
        again = second.take()
        assert place_of(other, again) == 0
        assert again.user_attrs["runs"] == [{"seed": 0}]
        assert second.take() is None
    assert not first.give_back(lost), "it was only slow, and runs elsewhere now"
    study.tell(lost, 1.0, skip_if_finished=True)
    other.tell(again, 2.0)
    assert [trial.value for trial in trials_by_place(study)] == [2.0, None, None]


def test_a_trial_that_was_lost_while_it_was_given_back(queues: Any) -> None:
    """The process died after it failed the trial and before it put another one in its place."""
    (first, study), (second, other) = queues
    lost = first.take()
    study.tell(lost, state=TrialState.FAIL)
    second.wait()
    assert states(other) == ["FAIL"], "it may still be at it"
    second.wait()
    assert states(other) == ["WAITING"]


def test_two_processes_ask_for_the_last_place_at_once(queues: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw that one was left: the later trial is dropped, and is the next place of a longer search."""
    (first, study), (second, other) = queues
    first.take()
    first.take()
    ask = other.ask

    def late() -> optuna.Trial:
        first.take()
        return ask()

    monkeypatch.setattr(other, "ask", late)
    assert second.take() is None
    assert states(study) == ["RUNNING"] * 3 + ["FAIL"]
    longer = Queue(study, PLACES + 1, pause=0.0)
    longer.wait()
    longer.wait()
    assert place_of(study, longer.take()) == PLACES


def test_a_storage_without_heartbeats() -> None:
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    queue = Queue(study, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial = queue.take()
    with keep_alive(trial):
        study.tell(trial, 1.0)
    assert queue.is_finished()
