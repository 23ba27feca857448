"""Lambda by parameter, put in force without any rule, and optimizers that tell what they see in an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2 import DecayRule
from lightning_l2.param_groups.decay_groups import DecayGroups, decay_groups
from lightning_l2.param_groups.parts import Decision


class Given:
    """Base lambdas from a table; parameters that are not in it are nobody's."""

    def __init__(self, lambdas: Mapping[Tensor, float]) -> None:
        self.lambdas = dict(lambdas)
        self.names = {parameter: f"p{index}" for index, parameter in enumerate(self.lambdas)}
        self.asked: list[Tensor] = []

    def of(self, number: int, parameter: Tensor, group: Mapping[str, Any], own: float) -> Decision:
        self.asked.append(parameter)
        if parameter not in self.lambdas:
            return Decision("unassigned", "", None, None)
        value, name = self.lambdas[parameter], self.names[parameter]
        return Decision(name, name, DecayRule(f"at {value:g}", weight_decay=value), value)


def in_force(optimizer: Optimizer, lambdas: Mapping[Tensor, float], holder: object = "the test") -> DecayGroups:
    groups = decay_groups(optimizer)
    groups.decide(Given(lambdas))
    groups.hold(holder, "The test")
    return groups


class Spy(Optimizer):
    """w <- w - lr (g + lambda w), and a note of the groups that the update found and left."""

    def __init__(self, params: Any, lr: Any = 0.1, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})
        self.seen: list[list[dict[str, Any]]] = []
        self.identities: list[list[int]] = []
        self.write: Callable[[int, dict[str, Any]], None] = lambda index, group: None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.update(closure)

    @torch.no_grad()
    def update(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen.append([dict(group) for group in self.param_groups])
        self.identities.append([id(group) for group in self.param_groups])
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad + group["weight_decay"] * parameter, alpha=float(group["lr"]))
            self.write(index, group)
        return loss

    def lambdas(self) -> list[float]:
        return [group["weight_decay"] for group in self.seen[-1]]


def ones(count: int, size: int = 2) -> list[nn.Parameter]:
    """Parameters of ones whose gradient is 0."""
    made = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.zeros_like(parameter)
    return made
