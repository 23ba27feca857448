"""A network, its groups and a loop, as several tests of adaptive schedules train them."""

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2.schedules import FeedbackSchedule

STEPS = 20
LR = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def groups_of(model: nn.Sequential, **body: Any) -> list[dict[str, Any]]:
    return [
        {"params": [model[0].weight, model[0].bias], "weight_decay": 0.3, "rule": "decay", **body},
        {"params": [model[2].weight], "weight_decay": 0.2, "rule": "head"},
        {"params": [model[2].bias], "weight_decay": 0.0, "rule": "no_decay"},
    ]


def train(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, schedule: FeedbackSchedule | None, scale: float = 1.0
) -> Tensor:
    """Train as the callback does: lr first, then gradients, then the multipliers, then the step."""
    random = torch.Generator().manual_seed(1)
    state: dict[str, Any] = {}
    for group in optimizer.param_groups:
        group.update(initial_weight_decay=group["weight_decay"], initial_lr=LR)
    if schedule is not None:
        schedule.check(optimizer)
    for step in range(STEPS):
        inputs = torch.randn(8, 6, generator=random, dtype=torch.float64)
        optimizer.zero_grad()
        (scale * (model(inputs) - inputs[:, :3]).square().mean()).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        if schedule is not None:
            # A checkpoint is written and read in every step
            state = json.loads(json.dumps(state))
            multipliers = schedule.multipliers(optimizer, {}, state)
            for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
                group["weight_decay"] = group["initial_weight_decay"] * multiplier
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def lr_at(step: int) -> float:
    return LR * (0.1 + 0.9 * math.cos(math.pi * step / 2 / STEPS))


def sgd(*groups: tuple[list[float], list[float], float]) -> torch.optim.SGD:
    """Make groups of one weight each from weight, gradient and weight decay."""
    parameters = []
    for weight, gradient, decay in groups:
        parameter = nn.Parameter(torch.tensor(weight))
        parameter.grad = torch.tensor(gradient)
        parameters.append({"params": [parameter], "weight_decay": decay})
    return torch.optim.SGD(parameters, lr=0.1)
