"""Where trials are kept and who runs one: the storage decides once; what a dead process leaves behind is run again."""

import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_l2.search.storage import Queue, keep_alive, open_storage, trials_by_place

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


def take(queue: Queue, place: int) -> optuna.Trial:
    taken = queue.take()
    assert taken is not None
    assert taken[1] == place
    return taken[0]


def make_stale(study: optuna.Study, number: int) -> None:
    """Let the last sign of life of a trial be an hour ago."""
    import sqlalchemy

    hour = "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour') WHERE trial_id = :id"
    trial_id = study.trials[number]._trial_id
    with study._storage._backend.engine.begin() as connection:
        connection.execute(sqlalchemy.text(hour), {"id": trial_id})


def test_each_trial_is_handed_out_once(queues: Any) -> None:
    (first, study), (second, _) = queues
    for place, queue in enumerate((first, second, first)):
        take(queue, place)
    assert second.take() is None
    assert states(study) == ["RUNNING"] * 3


def test_it_is_finished_when_every_place_has_a_result(queues: Any) -> None:
    (first, study), (second, _) = queues
    for number in range(PLACES):
        assert not second.is_finished()
        trial = take(first, number)
        if number == 1:
            trial.set_user_attr("error", "nan")
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, 1.0)
    assert second.is_finished()
    assert second.take() is None


def test_what_was_given_back_keeps_its_values_seeds_and_place(queues: Any) -> None:
    (first, _), (second, other) = queues
    trials = [take(first, place) for place in range(PLACES)]
    value = trials[1].suggest_float("weight_decay", 1e-5, 1e-1, log=True)
    trials[1].set_user_attr("runs", [{"seed": 0}])
    assert first.give_back(trials[1])
    assert not first.give_back(trials[1]), "only once"
    again = take(second, 1)
    assert again.user_attrs["runs"] == [{"seed": 0}]
    assert again.suggest_float("weight_decay", 1e-5, 1e-1, log=True) == value
    assert states(other) == ["RUNNING"] * 3


def test_what_was_given_back_comes_before_later_places(queues: Any) -> None:
    (first, _), (second, _) = queues
    first.give_back(take(first, 0))
    for place in range(PLACES):
        take(second, place)


def test_a_trial_without_a_sign_of_life_is_run_again(queues: Any) -> None:
    (first, study), (second, other) = queues
    lost, alive, _ = (take(first, place) for place in range(PLACES))
    lost.set_user_attr("runs", [{"seed": 0}])
    make_stale(study, 0)
    with keep_alive(alive):
        again = take(second, 0)
        assert again.user_attrs["runs"] == [{"seed": 0}]
        assert second.take() is None
    assert not first.give_back(lost), "it was only slow, and runs elsewhere now"
    study.tell(lost, 1.0, skip_if_finished=True)
    other.tell(again, 2.0)
    assert [trial.value for trial in trials_by_place(study)] == [2.0, None, None]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning")
def test_a_trial_whose_process_died_the_moment_it_took_it(queues: Any) -> None:
    """Nothing but `ask` came to pass, of a new trial and of one that was given back and shows its old attributes."""
    (first, study), (second, _) = queues
    study.ask()
    first.give_back(take(first, 1))
    study.ask()
    assert [len(found.user_attrs) for found in study.trials] == [1, 1, 1]
    take(second, 2)
    assert second.take() is None, "its time has only begun"
    make_stale(study, 0)
    make_stale(study, 2)
    take(second, 0)
    take(second, 1)
    assert second.take() is None


def test_a_trial_that_was_lost_while_it_was_given_back(queues: Any) -> None:
    """The process died after it failed the trial and before it put another one in its place."""
    (first, study), (second, other) = queues
    study.tell(take(first, 0), state=TrialState.FAIL)
    second.wait()
    assert states(other) == ["FAIL"], "it may still be at it"
    second.wait()
    assert states(other) == ["WAITING"]


def test_a_trial_that_two_processes_put_in_a_place_is_run_once(queues: Any) -> None:
    (first, study), (second, other) = queues
    study.tell(take(first, 0), state=TrialState.FAIL)
    for queue in (first, second, first, second):
        queue.wait()
    other.add_trial(study.trials[1])
    assert [trial.state.name for trial in other.trials] == ["FAIL", "WAITING", "WAITING"]
    assert second.take() is None, "the earlier one doesn't count"
    for place in range(PLACES):
        take(second, place)
    assert second.take() is None


def test_two_processes_ask_for_the_last_place_at_once(queues: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw that one was left: the later trial is dropped, and is the next place of a longer search."""
    (first, study), (second, other) = queues
    take(first, 0)
    take(first, 1)
    ask = other.ask

    def late() -> optuna.Trial:
        take(first, 2)
        return ask()

    monkeypatch.setattr(other, "ask", late)
    assert second.take() is None
    assert states(study) == ["RUNNING"] * 3 + ["FAIL"]
    longer = Queue(study, PLACES + 1, pause=0.0)
    longer.wait()
    longer.wait()
    take(longer, PLACES)


def test_a_storage_without_heartbeats() -> None:
    with open_storage(None) as storage:
        study = optuna.create_study(storage=storage)
        queue = Queue(study, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trial = take(queue, 0)
        with keep_alive(trial):
            study.tell(trial, 1.0)
        assert queue.is_finished()


def test_an_optuna_storage_is_taken_as_it_is() -> None:
    mine = optuna.storages.InMemoryStorage()
    with open_storage(mine) as storage:
        assert storage is mine


def test_a_storage_must_be_one() -> None:
    told = r"storage to be a path, a URL or an Optuna storage but got int: 3"
    with pytest.raises(TypeError, match=told), open_storage(3):
        pass
