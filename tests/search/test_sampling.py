"""Which lambda a trial gets, and which trial is stopped early."""

import functools
import itertools
import math

import numpy as np
import optuna
import pytest

from lightning_l2.search import Range, SearchPlan, TrialRun
from lightning_l2.search.sampling import PlanSampler
from lightning_l2.search.study import run_search
from tests.search.functions import search, valley


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


def test_what_others_asked_for_and_have_not_yet_is_left_to_them() -> None:
    """Another process has taken the first of the grid and two middles, and has no lambda for any of them."""
    plan, study = SearchPlan(zero=False, trials=6).within(None), optuna.create_study()
    trials = [study.ask() for _ in range(6)]

    def sample(place: int) -> float:
        study.sampler = PlanSampler(plan, place)
        return optuna.trial.Trial(study, trials[place]._trial_id).suggest_float("weight_decay", 1e-5, 1e-1, log=True)

    # the grid is 1e-3, 1e-5, 1e-1, and its middles are 1e-4, 1e-2 and then any of four
    assert sample(4) == pytest.approx(1e-2)
    assert round(math.log10(sample(5)), 4) in (-4.5, -3.5, -2.5, -1.5)
    assert [sample(place) for place in (0, 1, 2)] == [1e-3, 1e-5, 1e-1]
    sample(3)
    assert len({trial.params["weight_decay"] for trial in study.trials}) == 6


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


def test_a_search_can_be_repeated() -> None:
    for method in ("grid", "tpe"):
        once, twice = (search(fit=valley, method=method, seeds=1) for _ in range(2))
        assert [trial.weight_decay for trial in once.trials] == [trial.weight_decay for trial in twice.trials]


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

    hopeless = functools.partial(search, fit=fit, trials=20, seeds=2)
    result = hopeless()
    assert [trial.state for trial in result.trials] == ["complete"] * 11 + ["pruned"] * 9
    for trial in result.trials:
        stopped = trial.number > 10
        assert len(trial.runs) == (1 if stopped else 2), "no further seeds"
        assert epochs[trial.number, 0] == (1 if stopped else 5)
    assert all(trial.state == "complete" for trial in hopeless(prune=False).trials)


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
