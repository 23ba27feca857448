"""The search on functions that stand in for a training."""

import functools
import json
import logging
import math
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.search import SearchPlan, TrialRun
from lightning_l2.search.storage import open_storage
from lightning_l2.search.study import load_result, run_search
from tests.search.functions import search, valley


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_training_that_diverges_counts_as_failed_and_the_search_goes_on(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(run: TrialRun) -> float:
        return bad if run.weight_decay > 0.05 and run.seed == 1 else valley(run)

    with caplog.at_level(logging.WARNING):
        result = search(fit=fit)
    states = {trial.weight_decay: trial.state for trial in result.trials}
    assert states.pop(0.1) == "failed"
    assert set(states.values()) == {"complete"}
    assert result.trials[5].error == f"val_loss is {bad} with seed 1"
    assert len(result.trials[5].runs) == 2, "no further seeds"
    assert "Trial 5 (lambda=0.1) failed: val_loss is" in caplog.text


def test_an_error_counts_as_failed_once_a_trial_is_complete() -> None:
    def fit(run: TrialRun) -> float:
        if run.weight_decay > 0.05:
            raise ValueError("found invalid values: nan")
        return valley(run)

    result = search(fit=fit)
    assert [trial.error for trial in result.trials if trial.state == "failed"] == [
        "ValueError: found invalid values: nan"
    ]
    assert 0.01 < result.weight_decay < 0.04


def test_an_error_in_the_first_trial_ends_the_search_and_the_next_one_begins_there(tmp_path: Path) -> None:
    def broken(run: TrialRun) -> float:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        search(fit=broken, storage=tmp_path / "study.db", trials=4)
    result = search(fit=valley, storage=tmp_path / "study.db", trials=4)
    assert [trial.state for trial in result.trials] == ["complete"] * 4
    assert result.trials[0].weight_decay == 1e-3


def test_every_trial_fails() -> None:
    with pytest.raises(RuntimeError, match=r"None of the 2 trials is complete.*lambda=0\.001: val_loss is nan"):
        search(fit=lambda run: math.nan, trials=2)


def test_a_missing_metric_names_those_there_are(tmp_path: Path) -> None:
    def fit(run: TrialRun) -> dict[str, float]:
        return {"val_acc": 0.5, "train_loss": 1.0} if run.weight_decay > 0.05 else {"val_loss": 1.0}

    with pytest.raises(ValueError, match=r"monitor='val_loss' never appeared.*Those that did: train_loss, val_acc"):
        search(fit=fit, storage=tmp_path / "study.db", trials=4, seeds=1)
    kept = load_result(SearchPlan(trials=4, seeds=1, zero=False), tmp_path / "study.db", "weight_decay")
    assert [trial.state for trial in kept.trials] == ["complete", "complete", "waiting"], "finished trials are kept"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_search_goes_on_where_it_was(interrupt: Any, tmp_path: Path) -> None:
    done: list[tuple[float, int]] = []

    def fit(run: TrialRun, stop_at: int) -> float:
        if len(done) == stop_at:
            raise interrupt
        done.append((run.weight_decay, run.seed))
        return valley(run)

    plan = SearchPlan(trials=6, seeds=3, zero=False)
    for stop_at in (4, 11):
        with pytest.raises(interrupt):
            run_search(functools.partial(fit, stop_at=stop_at), plan, storage=tmp_path / "study.db", progress=False)
    result = run_search(functools.partial(fit, stop_at=-1), plan, storage=tmp_path / "study.db", progress=False)
    straight = run_search(valley, plan, progress=False)
    assert len(done) == len(set(done)) == 18, "nothing twice"
    assert [trial.parameters for trial in result.trials] == [trial.parameters for trial in straight.trials]
    assert [trial.mean for trial in result.trials] == [trial.mean for trial in straight.trials]
    again = run_search(functools.partial(fit, stop_at=18), plan, storage=tmp_path / "study.db", progress=False)
    assert again.table() == result.table(), "a finished search trains nothing"


def test_a_search_can_be_extended() -> None:
    """Its grid of six has two that the grid of the first four had not: 10^(-5/3) comes, 0.1 doesn't come again."""
    storage = optuna.storages.InMemoryStorage()
    search(fit=valley, trials=4, seeds=1, storage=storage)
    longer = search(fit=valley, trials=12, seeds=1, storage=storage)
    assert [trial.state for trial in longer.trials] == ["complete"] * 12
    tried = [trial.weight_decay for trial in longer.trials]
    assert tried[:6] == pytest.approx([1e-3, 1e-5, 1e-1, 1e-2, 10 ** (-5 / 3), 10 ** (-4 / 3)], rel=1e-5)
    assert len(set(tried)) == 12


def test_another_search_in_the_same_study_is_refused(tmp_path: Path) -> None:
    search(fit=valley, trials=2, storage=tmp_path / "study.db")
    told = r"another search: high=0\.5 \(there: 0\.1\), seeds=2 \(there: 3\)\. Repeat"
    with pytest.raises(MisconfigurationException, match=told):
        search(fit=valley, trials=2, storage=tmp_path / "study.db", high=0.5, seeds=2)
    search(fit=valley, trials=2, storage=tmp_path / "study.db", high=0.5, seeds=2, name="another")


def test_settings_that_never_trained_can_be_mended(tmp_path: Path) -> None:
    """A first try with a wrong name leaves a study behind, with values of its own range waiting in it."""

    def fit(run: TrialRun) -> dict[str, float]:
        return {"val_acc": -valley(run)}

    with pytest.raises(ValueError, match="never appeared"):
        search(fit=fit, storage=tmp_path / "study.db", trials=4)
    mended = search(fit=fit, storage=tmp_path / "study.db", trials=4, monitor="val_acc", mode="max", low=1e-3, seeds=1)
    assert [trial.state for trial in mended.trials] == ["complete"] * 4
    assert min(trial.weight_decay for trial in mended.trials) == 1e-3


def test_optunas_own_tools_read_the_study(tmp_path: Path) -> None:
    """Its dashboard loads studies in this way."""
    result = search(fit=valley, storage=tmp_path / "study.db", trials=6)
    study = optuna.load_study(study_name="weight_decay", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.best_params == {"weight_decay": result.best.weight_decay}
    assert study.best_value == result.best.mean
    study._storage._backend.engine.dispose()


def test_the_dashboard_opens_the_study(tmp_path: Path) -> None:
    """On demand, after `pip install optuna-dashboard`."""
    dashboard = pytest.importorskip("optuna_dashboard")
    result = search(fit=valley, storage=tmp_path / "study.db", trials=3, seeds=1)
    with open_storage(tmp_path / "study.db") as storage:
        application = dashboard.wsgi(storage)

        def get(path: str) -> Any:
            request: dict[str, Any] = {"PATH_INFO": path}
            setup_testing_defaults(request)
            return json.loads(b"".join(application(request, lambda *_: None)))

        (study,) = get("/api/studies")["study_summaries"]
        assert study["study_name"] == "weight_decay"
        trials = get(f"/api/studies/{study['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete"] * 3
    assert [trial["values"] for trial in trials] == [[trial.mean] for trial in result.trials]
