"""The search as one call."""

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_l2.search import TrialRun
from tests.search.functions import search, valley


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


@pytest.mark.parametrize("library", ["optuna", "scipy"])
def test_a_missing_library_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    told = rf"A search for weight decay needs {library}, which isn't installed.*pip install \"lightning_l2\[search\]\""
    with pytest.raises(ModuleNotFoundError, match=told):
        search(fit=valley)


def test_either_make_or_fit() -> None:
    with pytest.raises(TypeError, match="either make or fit but got neither"):
        search()
    with pytest.raises(TypeError, match="either make or fit but got both"):
        search(lambda weight_decay: None, fit=valley)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plan = {"low": np.float32(0.25), "high": np.float64(0.5), "trials": np.int64(2), "seeds": np.int32(1)}
    search(fit=valley, storage=tmp_path / "study.db", **plan)
    again = search(fit=valley, storage=tmp_path / "study.db", low=0.25, high=0.5, trials=3, seeds=1)
    assert [trial.state for trial in again.trials] == ["complete"] * 3
