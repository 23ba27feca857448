"""The search on functions that stand in for a training."""

import functools
import itertools
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.search import Range, SearchPlan, TrialRun, search_weight_decay
from lightning_l2.search.study import load_result, run_search

# Lambda = 0 has tests of its own, in test_suggestion.py.
search = functools.partial(search_weight_decay, progress=False, zero=False)


def valley(run: TrialRun) -> float:
    """A metric with its minimum at lambda = 0.02, and a little noise that all lambdas share."""
    return 1.0 + math.log10(run.weight_decay / 0.02) ** 2 + 0.1 * run.seed


class Ridge:
    """Linear regression with D inputs of unequal variance s, N samples, noise sigma and weights w ~ N(0, tau^2).

    Minimising |y - X w|^2 / 2N + lambda/2 |w|^2 is the Bayes estimate, and so has the least expected risk, for
    lambda = sigma^2 / (N tau^2). In the axes of X^T X / N = diag(s) the solution is (X^T y / N) / (s + lambda).
    """

    N, D, sigma, tau = 2000, 1000, 1.0, 0.25
    best = sigma**2 / (N * tau**2)
    s = np.geomspace(0.01, 1.0, D)

    @classmethod
    @functools.cache
    def draw(cls, seed: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        w = generator.normal(size=cls.D) * cls.tau
        return w, cls.s * w + cls.sigma * np.sqrt(cls.s / cls.N) * generator.normal(size=cls.D)

    @classmethod
    def risk(cls, run: TrialRun) -> float:
        """The expected squared error of a prediction on new data, less the noise."""
        w, xy = cls.draw(run.seed)
        return float((cls.s * (xy / (cls.s + run.weight_decay) - w) ** 2).sum())


@pytest.mark.parametrize("method", ["grid", "tpe"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_known_best_lambda_of_ridge_regression(method: Any, seeds: int) -> None:
    for problem in range(10):
        result = search(fit=Ridge.risk, trials=12, seeds=seeds, seed=1000 * problem, method=method)
        assert len(result.trials) == 12
        assert Ridge.best / 2 < result.weight_decay < Ridge.best * 2, (problem, result.weight_decay)


@pytest.mark.parametrize("method", ["grid", "tpe"])
def test_a_large_metric_can_be_the_goal(method: Any) -> None:
    result = search(fit=lambda run: -valley(run), mode="max", method=method)
    assert 0.01 < result.weight_decay < 0.04
    assert result.best.mean == max(trial.mean for trial in result.trials)


def test_a_search_can_be_repeated() -> None:
    for method in ("grid", "tpe"):
        once, twice = (search(fit=valley, method=method, seeds=1) for _ in range(2))
        assert [trial.weight_decay for trial in once.trials] == [trial.weight_decay for trial in twice.trials]


def test_the_order_of_trials() -> None:
    """The first, the grid, then always the wider gap beside the best."""
    tried = [trial.weight_decay for trial in search(fit=valley, trials=8, seeds=1).trials]
    assert tried[:4] == pytest.approx([1e-3, 1e-5, 1e-2, 1e-1])
    # 0.01 is the best with equal gaps of one decade; then 0.0316, whose gaps are half of one
    assert tried[4:6] == pytest.approx([10**-2.5, 10**-1.5], rel=1e-5)
    assert set(np.round(np.log10(tried[6:]), 3)) == {-1.75, -1.25} or tried[6] == pytest.approx(10**-1.75, rel=1e-5)


def test_the_suggested_value_is_refined_too() -> None:
    """On a plateau that begins at 0 what is asked for is where it ends: here at 0.004."""

    def plateau(run: TrialRun) -> float:
        noise = np.random.default_rng([run.trial, run.seed]).normal()
        return 1.0 + 0.001 * noise + math.log10(max(run.weight_decay, 0.004) / 0.004)

    for seed in range(0, 100, 10):
        result = search(fit=plateau, seeds=3, seed=seed, zero=True)
        assert result.weight_decay < 0.004 * 1.1
        beyond = min(trial.weight_decay for trial in result.trials if trial.weight_decay > result.weight_decay)
        assert beyond / result.weight_decay < 3, "the grid's gaps are factors of 4.6 above 0.001, and of 10 below"


def test_no_value_is_tried_twice_at_the_end_of_a_range() -> None:
    """Where the end is best, halving would come ever closer to it."""
    tried = sorted(trial.weight_decay for trial in search(fit=lambda run: run.weight_decay, seeds=1, trials=20).trials)
    assert min(larger / smaller for smaller, larger in itertools.pairwise(tried)) > 1.09


def test_lambda_and_the_learning_rate_together() -> None:
    def fit(run: TrialRun) -> float:
        return valley(run) + math.log10(run.others["lr"] / 0.003) ** 2 + (run.others["dropout"] - 0.2) ** 2

    also = {"lr": Range(1e-5, 1.0), "dropout": Range(0.0, 0.5, log=False)}
    result = search(fit=fit, also=also, trials=40, seeds=1)
    best = result.best.others
    assert 0.001 < best["lr"] < 0.01
    assert all(0 <= trial.others["dropout"] <= 0.5 for trial in result.trials)
    assert 0.005 < result.best.weight_decay < 0.08
    assert set(result.best.parameters) == {"weight_decay", "lr", "dropout"}


def test_curves_and_other_metrics_are_kept() -> None:
    def fit(run: TrialRun) -> dict[str, Any]:
        return {"val_loss": [3.0, 1.0, 2.0], "train_loss": np.float32(0.5), "l2_norm": 4, "empty": []}

    (trial,) = search(fit=fit, trials=1, seeds=1).trials
    (run,) = trial.runs
    assert run.value == 2.0
    assert run.metrics == {"val_loss": 2.0, "train_loss": 0.5}
    assert run.curves == {"val_loss": [3.0, 1.0, 2.0], "train_loss": [0.5]}
    assert run.l2_norm == 4.0
    assert search(fit=fit, trials=1, seeds=1, pick="best").best.mean == 1.0
    assert search(fit=fit, trials=1, seeds=1, pick="best", mode="max").best.mean == 3.0


def test_long_curves_are_thinned_for_the_storage() -> None:
    (trial,) = search(fit=lambda run: {"val_loss": list(range(1001))}, trials=1, seeds=1).trials
    assert trial.runs[0].curves["val_loss"] == list(range(0, 1001, 6))
    assert trial.mean == 1000


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


def test_a_search_can_be_extended(tmp_path: Path) -> None:
    search(fit=valley, trials=4, seeds=1, storage=tmp_path / "study.db")
    longer = search(fit=valley, trials=8, seeds=1, storage=tmp_path / "study.db")
    assert [trial.state for trial in longer.trials] == ["complete"] * 8


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plan = {"low": np.float32(0.25), "high": np.float64(0.5), "trials": np.int64(2), "seeds": np.int32(1)}
    search(fit=valley, storage=tmp_path / "study.db", **plan)
    again = search(fit=valley, storage=tmp_path / "study.db", low=0.25, high=0.5, trials=3, seeds=1)
    assert [trial.state for trial in again.trials] == ["complete"] * 3


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


def test_an_optuna_storage_can_be_given() -> None:
    storage = optuna.storages.InMemoryStorage()
    search(fit=valley, storage=storage, trials=2)
    assert len(optuna.load_study(study_name="weight_decay", storage=storage).trials) == 2


def test_hopeless_trainings_are_stopped() -> None:
    """After a grid of 10 values with metrics 0 to 9, whose upper quartile is 6.75, come 6, 7, 8, 9 and so on."""
    epochs: dict[tuple[int, int], int] = {}

    def fit(run: TrialRun) -> float:
        metric = float(run.trial if run.trial < 10 else run.trial - 4)
        for epoch in range(5):
            epochs[run.trial, run.seed] = epoch + 1
            if run.report(epoch, metric):
                break
        return metric

    search = functools.partial(search_weight_decay, fit=fit, trials=20, seeds=2, zero=False, progress=False)
    result = search()
    assert [trial.state for trial in result.trials] == ["complete"] * 11 + ["pruned"] * 9
    for trial in result.trials:
        stopped = trial.number > 10
        assert len(trial.runs) == (1 if stopped else 2), "no further seeds"
        assert epochs[trial.number, 0] == (1 if stopped else 5)
    assert all(trial.state == "complete" for trial in search(prune=False).trials)


def test_a_trial_that_is_worse_with_every_seed_is_stopped_by_the_wilcoxon_test() -> None:
    """With four pairs that all speak against it p is 1/16, below 0.1; three would give 1/8."""

    def worse(run: TrialRun) -> float:
        return run.seed % 2 + (run.trial if run.trial < 8 else 0.5 + run.trial / 100)

    result = search(fit=worse, trials=16, seeds=8)
    assert [(trial.state, len(trial.runs)) for trial in result.trials[:8]] == [("complete", 8)] * 8, "the grid"
    assert [(trial.state, len(trial.runs)) for trial in result.trials[8:]] == [("pruned", 4)] * 8
    assert {trial.state for trial in search(fit=worse, trials=16, seeds=4).trials} == {"complete"}


def test_the_grid_is_trained_in_full_also_where_a_part_of_it_is_late() -> None:
    """Another process trains all the rest during the second trial."""
    plan, storage = SearchPlan(trials=12, seeds=1, zero=False), optuna.storages.InMemoryStorage()
    late: list[int] = []

    def leave() -> None:
        raise InterruptedError

    def fit(run: TrialRun) -> float:
        if run.trial == 1:
            late.append(run.trial)
            with pytest.raises(InterruptedError):
                run_search(fit, plan, storage=storage, progress=False, while_waiting=leave)
        metric = {0: 0.0, 1: 9.0}.get(run.trial, 1.0)
        return math.nan if run.report(3, metric) else metric

    result = run_search(fit, plan, storage=storage, progress=False)
    assert late == [1]
    assert [trial.state for trial in result.trials] == ["complete"] * 12


def test_each_warning_is_shown_once_and_levels_come_back() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level

    def fit(run: TrialRun) -> float:
        assert logger.level >= logging.WARNING
        with warnings.catch_warnings():
            warnings.simplefilter("default")
        warnings.warn("the same each time", stacklevel=1)
        return valley(run)

    with pytest.warns(UserWarning, match="the same") as shown:
        search(fit=fit, trials=4)
    assert [str(warning.message) for warning in shown] == ["the same each time"]
    assert logger.level == before


def test_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    search_weight_decay(fit=valley, trials=2, seeds=2, zero=False)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "weight decay: 100%" in last
    assert "4/4" in last
    assert "best lambda=0.1 with val_loss=1.5" in last


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_l2\[search\]"'):
        search(fit=valley)


def test_a_storage_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"storage to be a path, a URL or an Optuna storage but got int: 3"):
        search(fit=valley, storage=3)


def test_either_make_or_fit() -> None:
    with pytest.raises(TypeError, match="either make or fit but got neither"):
        search()
    with pytest.raises(TypeError, match="either make or fit but got both"):
        search(lambda weight_decay: None, fit=valley)
