"""Radii against scikit-learn, draws, and where AdamW settles."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from lightning_l2.convert import (
    heuristic_equilibrium_radius,
    prior_to_radius,
    ridge_radius,
)
from tests.convert.test_formulas import ABOVE, regression


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.1, 10.0])
def test_ridge_radius_is_the_norm_of_scikit_learn_s_solution(decay: float) -> None:
    inputs, targets = regression(40, 6)
    curvatures, directions = np.linalg.eigh(2 * inputs.T @ inputs / 40)
    optimum = directions.T @ np.linalg.lstsq(inputs, targets, rcond=None)[0]
    solution = Ridge(alpha=decay * 40 / 2, fit_intercept=False, solver="svd").fit(inputs, targets).coef_
    radius = ridge_radius(decay, curvatures=list(curvatures), optimum=list(optimum))
    assert radius == pytest.approx(np.linalg.norm(solution), rel=1e-9)


def test_flat_directions_have_no_part_in_the_radius() -> None:
    assert ridge_radius(0.1, curvatures=[0.0], optimum=[5.0]) == 0.0
    assert ridge_radius(0.0, curvatures=[0.0, 2.0], optimum=[5.0, 3.0]) == 3.0


def test_prior_radius_is_the_root_mean_square_norm_of_draws() -> None:
    draws = np.random.default_rng(1).normal(scale=0.05, size=(400, 1000))
    norm = math.sqrt(np.mean(np.sum(draws**2, axis=1)))
    assert prior_to_radius(0.05, parameters=1000) == pytest.approx(norm, rel=5e-3)


def test_equilibrium_radius_is_where_adamw_settles_on_noise() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64))
    # beta1 = 0: each coordinate of Adam's direction is noise of size 1, which is the heuristic's assumption
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=1.0, betas=(0.0, 0.999))
    for _ in range(1000):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    expected = heuristic_equilibrium_radius(1.0, lr=0.01, parameters=2000)
    assert weight.norm().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: ridge_radius(1.0, curvatures=[1.0], optimum=[]), "as many `curvatures`.*but got 1 and 0"),
        (lambda: ridge_radius(1.0, curvatures=[-1.0], optimum=[1.0]), r"`curvatures\[0\]` to be finite and at least"),
        (lambda: prior_to_radius(1.0, parameters=0), ABOVE.format("parameters")),
        (lambda: heuristic_equilibrium_radius(0.0, lr=1, parameters=1), ABOVE.format("weight_decay")),
    ],
    ids=range(4),
)
def test_misuse_is_a_clear_error(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()
