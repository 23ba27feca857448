"""Trials, their trainings, and what a fit function may return."""

import math
from typing import Any

import numpy as np
import pytest

from lightning_l2.search import Run, SearchPlan, Trial
from lightning_l2.search.trials import TrialRun, as_run


def trial(*values: float, **others: Any) -> Trial:
    return Trial(0, 0.1, runs=tuple(Run(seed, value) for seed, value in enumerate(values)), **others)


def test_mean_and_spread() -> None:
    assert trial(1.0, 2.0, 4.0).mean == pytest.approx(7 / 3)
    assert trial(1.0, 2.0, 4.0).spread == pytest.approx(math.sqrt(7 / 3))  # the sample's: n - 1
    assert math.isnan(trial(1.0).spread)
    assert math.isnan(trial().mean)
    assert math.isnan(trial(1.0, 2.0, state="pruned").mean), "a value from the middle of a training"


def test_averages_of_what_was_measured() -> None:
    runs = Run(0, 1.0, {"loss": 1.0}, l2_norm=3.0), Run(1, 1.0, {"loss": 2.0}, l2_norm=5.0), Run(2, 1.0)
    found = Trial(0, 0.1, {"lr": 0.5}, runs=runs)
    assert found.average("loss") == 1.5
    assert found.l2_norm == 4.0
    assert math.isnan(found.average("error"))
    assert math.isnan(trial(1.0).l2_norm)
    assert found.values == {0: 1.0, 1: 1.0, 2: 1.0}
    assert found.parameters == {"weight_decay": 0.1, "lr": 0.5}


def test_numbers_curves_and_other_metrics_are_kept() -> None:
    outcome = {"val_loss": [3.0, 1.0, 2.0], "train_loss": np.float32(0.5), "l2_norm": 4, "empty": []}
    run = as_run(outcome, 7, SearchPlan(), 1.5)
    assert run == Run(
        seed=7,
        value=2.0,
        metrics={"val_loss": 2.0, "train_loss": 0.5},
        curves={"val_loss": [3.0, 1.0, 2.0], "train_loss": [0.5]},
        l2_norm=4.0,
        seconds=1.5,
    )
    assert as_run(outcome, 0, SearchPlan(pick="best"), 0.0).value == 1.0
    assert as_run(outcome, 0, SearchPlan(pick="best", mode="max"), 0.0).value == 3.0
    assert as_run(0.25, 0, SearchPlan(monitor="error"), 0.0).metrics == {"error": 0.25}


def test_long_curves_are_thinned_for_the_storage() -> None:
    run = as_run({"val_loss": list(range(1001))}, 0, SearchPlan(), 0.0)
    assert run.curves["val_loss"] == list(range(0, 1001, 6))
    assert run.value == 1000


def test_a_missing_metric_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"monitor='val_loss' never appeared .*Those that did: a, b\. Give one"):
        as_run({"b": 1.0, "a": [2.0], "c": []}, 0, SearchPlan(), 0.0)


def test_nobody_calls_a_training_hopeless_outside_of_a_search() -> None:
    assert not TrialRun(0.1, 0).report(3, math.inf)
