"""Projection and Lagrangian against closed forms in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_l2.constraints import (
    AugmentedLagrangian,
    Bound,
    FixedBound,
    InflectionBound,
    InitialBound,
    Method,
    Projection,
    WarmupBound,
)
from lightning_l2.constraints.methods import ball_factors, constrain_, lagrangian_multipliers
from lightning_l2.constraints.vectors import ConstrainedVectors, Per
from lightning_l2.norms.squared import ROW
from tests.constraints.closed_forms import SHAPES, norms_of, project, projected


@pytest.mark.parametrize("per", ["parameter", "row", "group"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 4.0, 1e3])
def test_projection_is_the_closed_form(per: Per, dtype: torch.dtype, bound: float) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    expected, before = projected(tensors, per, bound), norms_of(tensors, per)
    norms = project(tensors, bound, per=per)
    torch.testing.assert_close(norms, torch.tensor(before, dtype=norms.dtype), rtol=1e-6, atol=0)
    rtol = {torch.float64: 4e-15, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    tiny = 1e-7 if dtype == torch.float16 else 0.0  # of its subnormal numbers
    for tensor, reference in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.double(), reference, rtol=rtol, atol=tiny)
    assert max(norms_of(tensors, per)) <= bound * (1 + 1e-6)


def test_rows_are_those_of_torch_renorm() -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES if len(shape) > 1]
    expected = [torch.renorm(tensor, p=2, dim=0, maxnorm=1.5) for tensor in tensors]
    project(tensors, 1.5, per="row")
    for tensor, reference in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=1e-6, atol=0)  # renorm aims 1e-7 inside


@pytest.mark.parametrize("per", ["parameter", "row", "group"])
def test_zero_stays_zero(per: Per) -> None:
    tensors = [torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(2)]
    project(tensors, 1.0, per=per)
    assert all(not tensor.any() for tensor in tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_as_it_is(bad: float) -> None:
    tensor = torch.tensor([100.0, bad])
    project([tensor], 1.0)
    assert tensor[0] == 100.0


def test_leaves_that_require_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    project([parameter], 1.0)
    assert parameter.grad_fn is None
    assert parameter.norm().item() == pytest.approx(1.0, rel=2e-6)


@pytest.mark.parametrize("shape", [(2, 6), (64, 64), (7, ROW + 3), (16, 3, 3, 3)])
@pytest.mark.parametrize("per", ["parameter", "row", "group"])
def test_it_ends_within_a_millionth_of_the_bound_and_never_beyond(per: Per, shape: tuple[int, ...]) -> None:
    for seed in range(20):
        tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(seed))]
        project(tensors, 0.3, per=per)
        norms = norms_of(tensors, per)
        assert norms == pytest.approx([0.3] * len(norms), rel=1e-6)
        assert max(norms) <= 0.3


tensors_of = st.builds(
    lambda shapes, seed, scale, dtype: [
        (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype) for shape in shapes
    ],
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 20)),
            st.tuples(st.integers(1, 8), st.integers(1, 40)),
            st.tuples(st.integers(1, 3), st.integers(ROW, 2 * ROW + 1)),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)


@settings(max_examples=150)
@given(tensors=tensors_of, bound=st.floats(1e-2, 1e2), per=st.sampled_from(["parameter", "row", "group"]))
def test_properties_of_a_projection(tensors: list[Tensor], bound: float, per: Per) -> None:
    before, norms = [tensor.clone() for tensor in tensors], norms_of(tensors, per)
    project(tensors, bound, per=per)
    after = norms_of(tensors, per)
    # It ends inside the ball, and nothing grows.
    assert all(new <= min(bound, old) * (1 + 1e-6) for new, old in zip(after, norms, strict=True))
    # What was inside is untouched, bit for bit.
    if per == "row":
        rows = [row for tensor in tensors for row in tensor]
        rows_before = [row for tensor in before for row in tensor]
    elif per == "parameter":
        rows, rows_before = tensors, before
    else:
        rows, rows_before = [torch.cat([t.flatten() for t in tensors])], [torch.cat([t.flatten() for t in before])]
    for row, old, norm in zip(rows, rows_before, norms, strict=True):
        if norm < bound * (1 - 1e-6):
            assert torch.equal(row, old)
    # Twice is once, bit for bit.
    once = [tensor.clone() for tensor in tensors]
    project(tensors, bound, per=per)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, once, strict=True))


def test_factors() -> None:
    squares = torch.tensor([0.0, 1.0, 4.0, 16.0, math.inf, math.nan], dtype=torch.float64)
    assert ball_factors(squares, 2.0).tolist() == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert ball_factors(squares[:4], torch.tensor([1.0, 0.5, math.inf, 8.0])).tolist() == [1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("bound", [math.inf, 1e308])
def test_multipliers_before_there_is_a_bound_are_zero(bound: float) -> None:
    multipliers = lagrangian_multipliers(torch.zeros(2), torch.tensor([0.0, 1e6]), bound, rates=1.0)
    assert multipliers.tolist() == [0.0, 0.0]


class AuthorsCPR:
    """CPR of one vector as its authors write it: R(w) = ||w||^2, rate mu / n, gradient 2 w; plain Python in float64.

    `kappa` gives the bound on R from the number of steps done and the weights, before the first step and after each.
    """

    def __init__(self, w: np.ndarray, kappa: Callable[[int, np.ndarray], float | None], mu: float) -> None:
        self.kappa_of, self.mu, self.multiplier, self.t = kappa, mu, 0.0, 0
        self.kappa = kappa(0, w)

    def step(self, w: np.ndarray) -> np.ndarray:
        self.t += 1
        if self.kappa is not None:
            violation = float((w**2).sum()) - self.kappa
            self.multiplier = max(0.0, self.multiplier + self.mu / w.size * violation)
            w = w - self.multiplier * 2 * w
        else:
            self.kappa = self.kappa_of(self.t, w)
        return w


def at_inflection(period: int, smoothing: float) -> Callable[[int, np.ndarray], float | None]:
    memory: dict[str, Any] = {"smoothed": 0.0, "samples": []}

    def kappa(t: int, w: np.ndarray) -> float | None:
        if t == 0:
            return None
        norm = math.sqrt(float((w**2).sum()))
        memory["smoothed"] = norm if t < period else smoothing * memory["smoothed"] + (1 - smoothing) * norm
        if t >= 2 * period and t % period == 0:
            memory["samples"].append(memory["smoothed"])
            if len(memory["samples"]) > 2:
                a, b, c = memory["samples"][-3:]
                if (b - a) / b > (c - b) / c > 0.01:
                    return norm**2
        return None

    return kappa


@pytest.mark.parametrize(
    ("bound", "kappa"),
    [
        (FixedBound(0.5), lambda: lambda t, w: 0.25),
        (InitialBound(1.1), lambda: lambda t, w: 1.21 * float((w**2).sum()) if t == 0 else None),
        (WarmupBound(20), lambda: lambda t, w: float((w**2).sum()) if t == 20 else None),
        (InflectionBound(8, 0.9), lambda: at_inflection(8, 0.9)),
    ],
    ids=["fixed", "initial", "warmup", "inflection"],
)
@pytest.mark.parametrize("mu", [1.0, 0.3])
def test_lagrangian_is_cpr(bound: Bound, kappa: Callable[[], Any], mu: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.15 for shape in ((4, 5), (6,), (3, 2, 2))
    ]
    # What pulls the weights away from zero, fast at first: a least-squares loss with its optimum further out.
    optima = [5 * weight for weight in weights]
    references = [weight.numpy().copy() for weight in weights]
    authors = [AuthorsCPR(reference, kappa(), mu) for reference in references]
    vectors = ConstrainedVectors(weights)
    squares = vectors.squares()
    state = {**bound.start(squares.sqrt()), "multiplier": torch.zeros_like(squares)}
    active = False
    for _ in range(80):
        for weight, optimum in zip(weights, optima, strict=True):
            weight.add_(optimum - weight, alpha=0.02)
        state, _ = constrain_(vectors, state, bound, method=AugmentedLagrangian(mu))
        for i, (optimum, cpr) in enumerate(zip(optima, authors, strict=True)):
            references[i] = cpr.step(references[i] + 0.02 * (optimum.numpy() - references[i]))
        for weight, reference, multiplier, cpr in zip(weights, references, state["multiplier"], authors, strict=True):
            np.testing.assert_allclose(weight.numpy(), reference, rtol=1e-12)
            assert multiplier.item() == pytest.approx(2 * cpr.multiplier, abs=1e-12)
        active = active or bool(state["multiplier"].all())
    assert active


def test_lagrangian_settles_at_its_bound() -> None:
    """In balance the decay is what the drift adds, (1 - Lambda) (b + drift) = b, and the norm after it is the bound."""
    drift, bound = 0.01, 2.0
    weight = torch.tensor([0.6, 0.8] * 50, dtype=torch.float64)
    weight /= weight.norm()
    vectors, state = ConstrainedVectors([weight]), {"multiplier": torch.zeros(1, dtype=torch.float64)}
    for _ in range(5000):
        weight.add_(weight / weight.norm(), alpha=drift)
        state, squares = constrain_(vectors, state, FixedBound(bound), method=AugmentedLagrangian())
    assert squares.sqrt().item() == pytest.approx(bound, rel=1e-3)
    assert state["multiplier"].item() == pytest.approx(drift / bound, rel=1e-2)


@pytest.mark.parametrize("method", [Projection(), AugmentedLagrangian()])
@pytest.mark.parametrize("bound", [FixedBound(1.0), InitialBound(0.9), WarmupBound(2), InflectionBound(1, 0.5)])
def test_a_skipped_step_changes_nothing(bound: Bound, method: Method) -> None:
    def run(skipped: set[int], steps: int) -> tuple[Tensor, dict[str, Tensor]]:
        weight = torch.linspace(0.1, 1.0, 10)
        vectors = ConstrainedVectors([weight])
        state = bound.start(vectors.squares().sqrt())
        if method.quantity:
            state["multiplier"] = torch.zeros(1, dtype=torch.float64)
        for step in range(steps):
            stepped = torch.tensor(step not in skipped)
            if stepped:
                weight.mul_(1.1)
            state, _ = constrain_(vectors, state, bound, method, stepped=stepped)
        return weight, state

    weight, state = run({1, 4, 5}, 9)
    expected_weight, expected_state = run(set(), 6)
    assert torch.equal(weight, expected_weight)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


def test_a_multiplier_of_1_is_warned_of() -> None:
    method = AugmentedLagrangian(0.5)
    assert method.warning(math.nextafter(1.0, 0.0)) == ""
    assert method.warning(1.0).startswith("the multiplier has reached 1, ")
