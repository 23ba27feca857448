import math
import statistics
from typing import Any

import numpy as np
import pytest

from lightning_l2.search import Run, SearchPlan, Trial, search_weight_decay
from lightning_l2.search.suggestion import Comparison, difference


def trial(weight_decay: float, *values: float, state: str = "complete", error: str | None = None) -> Trial:
    return Trial(0, weight_decay, state=state, runs=tuple(Run(*run) for run in enumerate(values)), error=error)


def found(*trials: Trial, mode: Any = "min", **plan: Any) -> Comparison:
    return Comparison(trials, SearchPlan(mode=mode, **plan))


def test_the_largest_within_one_standard_error_of_the_difference() -> None:
    best = trial(0.01, 1.0, 2.0, 3.0)
    # differences 0, 0, 0.3: mean 0.1, standard error sqrt(0.03)/sqrt(3) = 0.1, just within
    within = trial(0.02, 1.0, 2.0, 3.3)
    # differences 0.1, 0.1, 0.4: mean 0.2, the same standard error
    beyond = trial(0.04, 1.1, 2.1, 3.4)
    assert found(beyond, within, best).best is best
    assert found(beyond, within, best).suggestion is within


def test_what_all_trials_share_is_no_noise() -> None:
    """The plain standard error of the best mean is 0.58 here; lambda=0.1 is worse with each seed alike."""
    best, worse = trial(0.01, 1.0, 2.0, 3.0), trial(0.1, 1.5, 2.5, 3.5)
    assert statistics.stdev([1.0, 2.0, 3.0]) / math.sqrt(3) > 0.5
    assert found(best, worse).suggestion is best


def test_a_large_metric_can_be_good() -> None:
    trials = [trial(0.01, 0.90, 0.92), trial(0.02, 0.89, 0.93), trial(0.04, 0.80, 0.81)]
    assert found(*trials, mode="max").best.weight_decay == 0.02  # a tie in the mean, the larger lambda
    assert found(*trials, mode="max").weight_decay == 0.02
    assert found(*trials).best.weight_decay == 0.04


def test_one_seed_gives_the_plain_best() -> None:
    trials = [trial(0.01, 1.0), trial(0.02, 1.0), trial(0.1, 1.001)]
    assert found(*trials).weight_decay == 0.02


def test_only_complete_trials_count() -> None:
    trials = [
        trial(0.01, 1.0, 1.2),
        trial(0.1, 0.5, state="pruned"),
        trial(0.2, math.nan, state="failed", error="nan"),
        trial(0.3, state="running"),
    ]
    assert found(*trials).suggestion is found(*trials).best is trials[0]


def test_nothing_complete_tells_the_reasons() -> None:
    trials = [trial(0.1, state="failed", error="val_loss is nan"), trial(0.2, 1.0, state="pruned")]
    with pytest.raises(RuntimeError, match=r"None of the 2 trials is complete.*lambda=0\.1: val_loss is nan"):
        _ = found(*trials).best


def test_the_suggestion_covers_the_optimum_as_often_as_one_standard_error_should() -> None:
    """Of two lambdas with equal true risk and independent noise the larger is taken with probability 0.813.

    That is when its mean difference is at most one standard error: when a t-distributed value with n - 1 = 4 degrees
    of freedom is at most 1.
    """
    generator = np.random.default_rng(0)
    pairs = [(trial(0.1, *values[0]), trial(0.2, *values[1])) for values in generator.normal(size=(4000, 2, 5))]
    taken = statistics.fmean(found(*pair).weight_decay == 0.2 for pair in pairs)
    assert taken == pytest.approx(0.813, abs=0.02)


def told(*trials: Trial, mode: Any = "min") -> tuple[float, str | None]:
    """Return the suggestion and what is said of it, in a range that goes on to both sides."""
    comparison = found(*trials, mode=mode, low=1e-9, high=1e9)
    return comparison.weight_decay, comparison.remark


def test_the_difference_and_its_standard_error() -> None:
    away = difference(trial(0.02, 1.1, 2.3, 3.2), trial(0.01, 1.0, 2.0, 3.0))
    assert away == pytest.approx((0.2, 0.1 / math.sqrt(3)))
    assert difference(trial(0.02, 1.1), trial(0.01, 1.0), sign=-1)[0] == pytest.approx(-0.1)
    assert math.isnan(difference(trial(0.02, 1.1), trial(0.01, 1.0)).error)
    assert math.isnan(difference(trial(0.02), trial(0.01, 1.0)).mean)


def test_at_most_one_decade_above_the_best() -> None:
    """Where noise is large, everything is within one standard error."""
    best, *larger = trial(0.01, 1.0, 3.0), trial(0.1, 1.5, 2.6), trial(0.2, 1.9, 2.2)
    assert found(best, *larger).suggestion is larger[0]


def test_never_worse_than_zero() -> None:
    """0.02 is within one standard error of the best, and worse than lambda = 0."""
    zero, best, near = trial(0.0, 2.0, 2.1, 2.0), trial(0.01, 1.0, 2.0, 1.9), trial(0.02, 1.0, 2.0, 3.2)
    assert found(best, near).suggestion is near
    assert told(zero, best, near) == (0.01, None)


def test_weight_decay_that_does_not_help() -> None:
    """The digits of the issue: 1e-5 to 1e-3 give 0.4138 to 0.4149, paired differences are sharp, nothing matters."""
    zero = trial(0.0, 0.4138, 0.4238, 0.4038)
    rows = {1e-5: 0.0, 3.16e-5: -0.0002, 1e-3: 0.0011, 1e-2: 0.02}
    trials = [zero, *(trial(value, *(run.value + away for run in zero.runs)) for value, away in rows.items())]
    assert found(*trials).best.weight_decay == 3.16e-5
    assert told(*trials) == (1e-3, "Weight decay does not help here; up to 0.001 it does no harm.")


def test_what_is_better_by_less_than_its_standard_error_does_not_help() -> None:
    zero = trial(0.0, 1.0, 1.0, 1.0)
    # better by 0.2 with a standard error of 0.06, and by 0.1 with one of 0.15
    assert told(zero, trial(0.01, 0.7, 0.9, 0.8)) == (0.01, None)
    assert told(zero, trial(0.01, 0.6, 1.1, 1.0)) == (
        0.01,
        "Weight decay does not help here; up to 0.01 it does no harm.",
    )


def test_one_percent_of_an_accuracy_is_one_of_its_errors() -> None:
    """From 97 to 97.5 % is a sixth of the errors; 96.5 % does harm, although it is less than 1 % of the accuracy."""
    zero = trial(0.0, 0.97, 0.97)
    assert told(zero, trial(0.01, 0.975, 0.975), mode="max") == (0.01, None)
    assert told(zero, trial(0.01, 0.97, 0.9701), trial(0.1, 0.965, 0.965), mode="max")[0] == 0.01


def test_a_lambda_that_changes_no_bit_is_never_suggested() -> None:
    zero, alike = trial(0.0, 1.0, 2.0), trial(1e-3, 1.0, 2.0)
    assert told(zero, alike, trial(0.1, 1.5, 2.5)) == (
        0.0,
        "Weight decay does not help here: no lambda that acts is better than 0, and all do harm.",
    )
    assert told(zero, alike, trial(0.1, 1.0, 2.001))[0] == 0.1
    value, words = told(zero, alike, trial(0.1, 1.0, 2.0))
    assert value == 0.0
    assert words is not None
    assert words.startswith("val_loss does not depend on lambda at all: all trials are equal.")
    assert told(trial(0.01, 1.0), trial(0.1, 1.0))[1] == words, "and where 0 was not tried"


def test_without_zero_nobody_knows_whether_it_helps() -> None:
    assert told(trial(0.01, 1.0, 2.0), trial(0.1, 1.5, 2.5)) == (0.01, None)
    assert told(trial(0.0, 1.0, state="failed"), trial(0.01, 1.0, 2.0), trial(0.1, 1.5, 2.5)) == (0.01, None)


def test_the_regret_on_ridge_regression() -> None:
    """Problems of 20 weights and 30 samples with little noise, whose risk is known in closed form.

    The three seeds are three draws of the noise of the data. With X the samples and w the weights, the solution is
    (X'X / n + lambda)^-1 X'y / n, and its risk |w - solution|^2 + noise^2 for inputs of variance 1.
    """
    regrets = [regret_of(problem, noise) for noise in (0.1, 0.3, 1.0) for problem in range(10)]
    suggested, best = map(statistics.fmean, zip(*regrets, strict=True))
    assert best < 0.01
    assert suggested - best < 0.05


def regret_of(problem: int, noise: float) -> tuple[float, float]:
    generator = np.random.default_rng(problem)
    w, x = generator.normal(size=20), generator.normal(size=(30, 20))
    values, axes = np.linalg.eigh(x.T @ x / 30)

    def risk(weight_decay: float, seed: int) -> float:
        y = x @ w + noise * np.random.default_rng([problem, seed]).normal(size=30)
        away = axes.T @ w - axes.T @ (x.T @ y / 30) / (values + weight_decay)
        return float(away @ away) + noise**2

    def mean(weight_decay: float) -> float:
        return statistics.fmean(risk(weight_decay, seed) for seed in range(3))

    result = search_weight_decay(fit=lambda run: risk(run.weight_decay, run.seed), low=1e-4, high=10.0, progress=False)
    known = min(map(mean, np.geomspace(1e-5, 10, 200)))
    return mean(result.weight_decay) / known - 1, mean(result.best.weight_decay) / known - 1
