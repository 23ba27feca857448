"""Conversions against what they promise of a training, against scikit-learn and against published numbers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from lightning_l2.convert import (
    normalised_to_weight_decay,
    prior_to_weight_decay,
    timescale_to_weight_decay,
    weight_decay_to_normalised,
    weight_decay_to_prior,
    weight_decay_to_timescale,
)

positive = st.floats(1e-6, 1e6)


@given(positive, positive, positive, positive)
def test_conversions_have_inverses(value: float, first: float, second: float, third: float) -> None:
    timescale = timescale_to_weight_decay(value, lr=first, steps_per_epoch=second)
    assert weight_decay_to_timescale(timescale, lr=first, steps_per_epoch=second) == pytest.approx(value)
    assert weight_decay_to_prior(prior_to_weight_decay(value, samples=first), samples=first) == pytest.approx(value)
    lengths = {"batch_size": first, "samples": second, "epochs": third}
    normalised = normalised_to_weight_decay(value, **lengths)
    assert weight_decay_to_normalised(normalised, **lengths) == pytest.approx(value)


@pytest.mark.parametrize("epochs", [0.5, 4.0])
def test_timescale_is_the_time_in_which_adamw_forgets(epochs: float) -> None:
    steps_per_epoch, lr = 200, 1e-3
    decay = timescale_to_weight_decay(epochs, lr=lr, steps_per_epoch=steps_per_epoch)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay)
    weight.grad = torch.zeros_like(weight)
    for _ in range(int(epochs * steps_per_epoch)):
        optimizer.step()
    # After one timescale an average keeps 1/e of what it was, up to its step of 1/timescale
    assert weight.item() == pytest.approx(math.exp(-1.0), rel=1.0 / (epochs * steps_per_epoch))


def test_timescale_of_published_settings() -> None:
    # ViT on ImageNet-1k (DeiT): lr 1e-3, weight decay 0.05, batch 1024, so 1251 steps an epoch
    assert weight_decay_to_timescale(0.05, lr=1e-3, steps_per_epoch=1251) == pytest.approx(15.987, abs=1e-3)


def test_normalised_is_the_paper_s_formula() -> None:
    # Loshchilov and Hutter, appendix B.1: lambda = lambda_norm * sqrt(b / (B T)); CIFAR-10 with b = 128
    assert normalised_to_weight_decay(0.025, batch_size=128, samples=50_000, epochs=100) == pytest.approx(
        0.025 * np.sqrt(128 / 5_000_000), rel=1e-14
    )
    # a training four times as long wants half the decay
    short = normalised_to_weight_decay(0.05, batch_size=64, samples=1000, epochs=10)
    assert normalised_to_weight_decay(0.05, batch_size=64, samples=1000, epochs=40) == pytest.approx(short / 2)


def regression(samples: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(samples, features)) * np.logspace(0, -1.5, features)
    return inputs, inputs @ random.normal(size=features) + 0.3 * random.normal(size=samples)


def test_prior_is_the_map_estimate_of_linear_regression() -> None:
    inputs, targets = regression(40, 6)
    sigma, noise = 0.7, 0.3
    # The posterior mean of a Gaussian model is its MAP estimate
    precision = inputs.T @ inputs / noise**2 + np.eye(6) / sigma**2
    expected = np.linalg.solve(precision, inputs.T @ targets / noise**2)
    decay = prior_to_weight_decay(sigma, samples=40)
    # mean negative log-likelihood: ||Xw - y||^2 / (2 noise^2 N); Ridge minimises ||Xw - y||^2 + alpha ||w||^2
    ridge = Ridge(alpha=decay * 40 * noise**2, fit_intercept=False, solver="cholesky").fit(inputs, targets)
    np.testing.assert_allclose(ridge.coef_, expected, rtol=1e-10)


ABOVE = "Expected `{}` to be finite and above 0, got"
LENGTHS = {"batch_size": 1, "samples": 1, "epochs": 1}


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: timescale_to_weight_decay(math.nan, lr=1, steps_per_epoch=1), ABOVE.format("epochs")),
        (lambda: weight_decay_to_timescale(0.0, lr=1, steps_per_epoch=1), ABOVE.format("weight_decay")),
        (lambda: prior_to_weight_decay(1.0, samples=0), ABOVE.format("samples")),
        (lambda: weight_decay_to_prior(0.0, samples=1), ABOVE.format("weight_decay")),
        (lambda: normalised_to_weight_decay(-1.0, **LENGTHS), "`normalised` to be finite and at least 0"),
        (lambda: weight_decay_to_normalised(-1.0, **LENGTHS), "`weight_decay` to be finite and at least 0"),
    ],
    ids=range(6),
)
def test_misuse_is_a_clear_error(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()
