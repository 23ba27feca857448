"""Angles against float64 geometry, and the predicted equilibrium against networks trained to it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2.decay import attach_decay
from lightning_l2.monitor import NormOptions, NormTracker
from lightning_l2.monitor.rotation import angular_update, effective_lr, equilibrium_angle, learning_rate, norm_power
from lightning_l2.param_groups.decay_groups import decay_groups


@pytest.mark.parametrize("degrees", [1e-7, 1e-4, 0.1, 45.0, 90.0, 135.0, 180.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_angle(degrees: float, scale: float) -> None:
    angle = math.radians(degrees)
    before, after = (2.0, 0.0), (2 * scale * math.cos(angle), 2 * scale * math.sin(angle))
    difference = [a - b for a, b in zip(before, after, strict=True)]
    product = sum(d * a for d, a in zip(difference, after, strict=True))
    found = angular_update(4.0, sum(d * d for d in difference), product)
    # where the length changes as well, an angle below the square root of the rounding error is lost
    assert found == pytest.approx(angle, rel=1e-6, abs=1e-12 if scale == 1 else 3e-8)


@pytest.mark.parametrize("square", [1e-300, 1e300])
def test_angles_where_squares_of_squares_are_beyond_floats(square: float) -> None:
    assert angular_update(square, 2 * square, -square) == pytest.approx(math.pi / 2)
    assert angular_update(square, 0.25 * square, -0.25 * square) == pytest.approx(math.atan2(0.5, 1.0))


@pytest.mark.parametrize(
    "numbers", [(math.inf, 1.0, 1.0), (1.0, math.inf, 1.0), (math.nan, 1.0, 1.0), (1e-9, 1e308, 0)]
)
def test_no_angle_where_weights_diverged(numbers: tuple[float, float, float]) -> None:
    assert math.isnan(angular_update(*numbers))


def test_angles_of_steps_that_throw_the_weights_far() -> None:
    for far in (1e3, 1e5):
        before, after = (2.0, 0.0), (-far, far)
        difference = [a - b for a, b in zip(before, after, strict=True)]
        product = sum(d * a for d, a in zip(difference, after, strict=True))
        found = angular_update(4.0, sum(d * d for d in difference), product)
        assert found == pytest.approx(0.75 * math.pi, rel=1e-6)
    assert math.isnan(angular_update(4.0, 1e14, -1e14))


def test_no_angle_where_there_is_no_direction() -> None:
    assert math.isnan(angular_update(0.0, 1.0, 1.0))
    assert math.isnan(angular_update(4.0, 4.0, 0.0))  # shrunk to 0
    assert angular_update(4.0, 0.0, 0.0) == 0.0


WEIGHT = [torch.zeros(1)]
FORMULAS: dict[str, tuple[torch.optim.Optimizer, float | None]] = {
    "AdamW": (torch.optim.AdamW(WEIGHT, lr=0.1, weight_decay=0.2, betas=(0.7, 0.9)), math.sqrt(2 * 0.02 * 0.3 / 1.7)),
    "decoupled Adam": (
        torch.optim.Adam(WEIGHT, lr=0.1, weight_decay=0.2, betas=(0.7, 0.9), decoupled_weight_decay=True),
        math.sqrt(2 * 0.02 * 0.3 / 1.7),
    ),
    "Adam": (torch.optim.Adam(WEIGHT, lr=0.1, weight_decay=0.2), None),
    "SGD": (torch.optim.SGD(WEIGHT, lr=0.1, weight_decay=0.2), math.sqrt(2 * 0.02)),
    "momentum": (torch.optim.SGD(WEIGHT, lr=0.1, weight_decay=0.2, momentum=0.6), math.sqrt(2 * 0.02 / 1.6)),
    "dampening": (
        torch.optim.SGD(WEIGHT, lr=0.1, weight_decay=0.2, momentum=0.6, dampening=0.25),
        math.sqrt(2 * 0.02 * 0.75 / 1.6),
    ),
    "dampening without momentum": (
        torch.optim.SGD(WEIGHT, lr=0.1, weight_decay=0.2, dampening=0.25),
        math.sqrt(2 * 0.02),
    ),
    "Nesterov": (torch.optim.SGD(WEIGHT, lr=0.1, weight_decay=0.2, momentum=0.6, nesterov=True), None),
    "no decay": (torch.optim.AdamW(WEIGHT, lr=0.1, weight_decay=0.0), 0.0),
    "RMSprop": (torch.optim.RMSprop(WEIGHT, lr=0.1, weight_decay=0.2), None),
    "LBFGS": (torch.optim.LBFGS(WEIGHT), None),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    optimizer, expected = FORMULAS[name]
    assert equilibrium_angle(optimizer, decay_groups(optimizer).groups[0]) == pytest.approx(expected)


def adam(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(WEIGHT, lr=0.1, weight_decay=0.2, betas=(0.7, 0.9), **options)


def sgd(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(WEIGHT, lr=0.1, weight_decay=0.2, momentum=0.6, **options)


# in parts of 2 (1 - beta) / (1 + beta): eta lambda, lambda, or lambda eta / eta_max
ATTACHED: list[tuple[torch.optim.Optimizer, dict[str, Any], float | None]] = [
    (adam(), {"apply": "decoupled"}, math.sqrt(2 * 0.02 * 0.3 / 1.7)),
    (adam(), {"apply": "independent"}, math.sqrt(2 * 0.2 * 0.3 / 1.7)),
    (adam(), {"apply": "independent", "peak_lr": 0.4}, math.sqrt(2 * 0.05 * 0.3 / 1.7)),
    (adam(), {"apply": "coupled"}, None),
    (adam(), {"apply": "cautious"}, None),
    (adam(decoupled_weight_decay=True), {"apply": "coupled"}, None),
    (sgd(), {"apply": "optimizer"}, math.sqrt(2 * 0.02 / 1.6)),
    (sgd(), {"apply": "coupled"}, math.sqrt(2 * 0.02 / 1.6)),
    (sgd(dampening=0.25), {"apply": "coupled", "before_clipping": True}, math.sqrt(2 * 0.02 * 0.75 / 1.6)),
    (sgd(dampening=0.25), {"apply": "decoupled"}, math.sqrt(2 * 0.02 * 0.4 / 1.6)),
    (sgd(), {"apply": "independent"}, math.sqrt(2 * 0.2 * 0.4 / 1.6)),
    (sgd(nesterov=True), {"apply": "decoupled"}, None),
    (torch.optim.RMSprop(WEIGHT, lr=0.1, weight_decay=0.2), {"apply": "decoupled"}, None),
]


@pytest.mark.parametrize(("optimizer", "options", "expected"), ATTACHED)
def test_formulas_go_by_the_way_that_decay_acts(
    optimizer: torch.optim.Optimizer, options: dict[str, Any], expected: float | None
) -> None:
    group = decay_groups(optimizer).groups[0]
    own = equilibrium_angle(optimizer, group)
    handle = attach_decay(optimizer, **options)
    assert equilibrium_angle(optimizer, group) == pytest.approx(expected)
    handle.remove()
    assert equilibrium_angle(optimizer, group) == own


def test_effective_learning_rates() -> None:
    assert norm_power(torch.optim.SGD(WEIGHT)) == 2
    assert norm_power(torch.optim.AdamW(WEIGHT)) == 1
    assert effective_lr(0.3, 9.0, 2) == pytest.approx(0.3 / 9)
    assert effective_lr(0.3, 9.0, 1) == pytest.approx(0.1)
    assert effective_lr(0.3, 0.0, 1) == math.inf
    assert math.isnan(learning_rate({"params": []}))


def adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=0.02, weight_decay=0.5, betas=(0.9, 0.99))


TRAINED: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (adamw, {}),
    "AdamW with little momentum": (
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5, betas=(0.5, 0.99)),
        {},
    ),
    "AdamW, independent": (lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.01), {"apply": "independent"}),
    "Adam, decoupled": (
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.5, betas=(0.9, 0.99)),
        {"apply": "decoupled"},
    ),
    "SGDM": (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.02), {}),
    "SGDM with dampening": (
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, dampening=0.5, weight_decay=0.02),
        {},
    ),
    "SGDM, decoupled": (
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.02),
        {"apply": "decoupled"},
    ),
    "SGDM, independent": (
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.01),
        {"apply": "independent"},
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_weights_in_equilibrium_turn_as_predicted(name: str) -> None:
    """A layer before a normalisation without parameters, on noise; 2 % is ten times better than needed to tell."""
    make, options = TRAINED[name]
    layer, normalisation = nn.Linear(32, 64, bias=False), nn.BatchNorm1d(64, affine=False)
    model = nn.Sequential(layer, normalisation)
    optimizer = make(model.parameters())
    if options:
        attach_decay(optimizer, **options)
    tracker = NormTracker(NormOptions(rotation=True), {})
    turns: list[float] = []
    for step in range(800):
        x, noise = torch.randn(32, 32), torch.randn(32, 64)
        is_measured = step >= 350 and step % 3 == 0
        if is_measured:
            tracker.begin(step, model, [optimizer], None, step)
        optimizer.zero_grad()
        (-(model(x) * noise).mean()).backward()
        optimizer.step()
        if is_measured:
            metrics = tracker.observe().metrics
            turns.append(metrics["angular_update/0"])
            predicted = metrics["angular_equilibrium/0"]
    measured = math.sqrt(sum(turn**2 for turn in turns) / len(turns))
    assert measured == pytest.approx(predicted, rel=0.02)
    norm = layer.weight.norm().item()
    power = 2 if name.startswith("SGD") else 1
    assert metrics["effective_lr/0"] == pytest.approx(optimizer.param_groups[0]["lr"] / norm**power, rel=0.1)
