import math
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_l2.constraints import Bound, FixedBound, InflectionBound, InitialBound, RmsBound, WarmupBound


def follow(bound: Bound, norms: list[float]) -> list[float]:
    """Return the bound in force before each step, and after the last; `norms[0]` is the norm at the start."""
    state = bound.start(torch.tensor(norms[:1], dtype=torch.float64))
    seen = [float(bound.bounds(state))]
    for norm in norms[1:]:
        state = {**state, **bound.advance(state, torch.tensor([norm], dtype=torch.float64))}
        seen.append(float(bound.bounds(state)))
    return seen


def test_fixed() -> None:
    assert follow(FixedBound(2.5), [1.0, 7.0, 3.0]) == [2.5, 2.5, 2.5]


def test_of_the_root_mean_square() -> None:
    assert RmsBound(0.5).bounds({}, sizes=16.0) == 2.0
    assert RmsBound(0.5).bounds({}, sizes=torch.tensor([4.0, 9.0])).tolist() == [1.0, 1.5]


def test_relative_to_the_start() -> None:
    assert follow(InitialBound(1.5), [2.0, 7.0, 9.0]) == [3.0, 3.0, 3.0]


def test_after_warmup() -> None:
    assert follow(WarmupBound(2, factor=0.5), [1.0, 3.0, 4.0, 5.0]) == [math.inf, math.inf, 2.0, 2.0]


def inflection_by_hand(norms: list[float], period: int, smoothing: float) -> float:
    """Find the bound with if and for: the norm at the end of the first period that grew by less than the one before."""
    smoothed, samples = 0.0, []
    for step, norm in enumerate(norms, start=1):
        smoothed = norm if step < period else smoothing * smoothed + (1 - smoothing) * norm
        if step >= 2 * period and step % period == 0:
            samples.append(smoothed)
            if len(samples) >= 3:
                growth, before = ((b - a) / b for a, b in ((samples[-2], samples[-1]), (samples[-3], samples[-2])))
                # rounding alone decides between equals
                assume(not math.isclose(growth, before, rel_tol=1e-9))
                assume(not math.isclose(growth, 0.01, rel_tol=1e-9))
                if before > growth > 0.01:
                    return norm
    return math.inf


@given(
    growth=st.lists(st.floats(-0.2, 0.5), min_size=1, max_size=60),
    period=st.integers(1, 6),
    smoothing=st.floats(0.0, 0.95),
)
def test_at_inflection(growth: list[float], period: int, smoothing: float) -> None:
    norms = [1.0]
    for fraction in growth:
        norms.append(norms[-1] * (1 + fraction))
    expected = inflection_by_hand(norms[1:], period, smoothing)
    assert follow(InflectionBound(period, smoothing, factor=3.0), norms)[-1] == pytest.approx(3.0 * expected, rel=1e-12)


def test_inflection_of_a_logistic_curve() -> None:
    """The relative growth of a logistic curve falls from the start, so it is bounded as soon as there are samples."""
    norms = [1 / (1 + math.exp(-(step - 50) / 10)) for step in range(200)]
    seen = follow(InflectionBound(period=10, smoothing=0.0), norms)
    assert seen[39] == math.inf
    assert seen[40] == seen[-1] == norms[40]


@pytest.mark.parametrize("norms", [[1.0] * 100, [0.0] * 100, [0.99**step for step in range(100)]])
def test_no_growth_has_no_inflection(norms: list[float]) -> None:
    assert follow(InflectionBound(period=5), norms)[-1] == math.inf


def test_each_vector_has_its_own_bound() -> None:
    bound = InflectionBound(period=1, smoothing=0.0)
    state = bound.start(torch.tensor([1.0, 1.0]))
    for norms in ([1.0, 1.0], [1.1, 1.0], [1.5, 1.1], [2.0, 1.5], [2.1, 2.0]):
        state = bound.advance(state, torch.tensor(norms))
    assert bound.bounds(state).tolist() == [2.0, 2.0]
    assert state["steps"].tolist() == [5, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBound(0.0), "Expected `norm` to be finite and above 0, got 0.0."),
        (lambda: FixedBound(math.nan), "Expected `norm` to be finite and above 0, got nan."),
        (lambda: RmsBound(0.0), "Expected `rms` to be finite and above 0, got 0.0."),
        (lambda: InitialBound(-1.0), "Expected `factor` to be finite and above 0, got -1.0."),
        (lambda: WarmupBound(10, factor=math.inf), "Expected `factor` to be finite and above 0, got inf."),
        (lambda: WarmupBound(0), "Expected `steps` to be at least 1, got 0."),
        (lambda: InflectionBound(period=-5), "Expected `period` to be at least 1, got -5."),
        (lambda: InflectionBound(factor=0.0), "Expected `factor` to be finite and above 0, got 0.0."),
        (lambda: InflectionBound(smoothing=1.0), "Expected `smoothing` to be at least 0 and below 1, got 1.0."),
    ],
)
def test_messages(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
