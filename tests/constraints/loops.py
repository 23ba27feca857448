"""A tiny module in a bare torch loop, with a constraint on its matrices."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2.constraints import AttachedConstraint, Bound, FixedBound


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def matrices(module: nn.Module) -> dict[Tensor, str | None]:
    return {p: name if p.ndim > 1 else None for name, p in module.named_parameters()}


def attach(optimizer: Any, module: nn.Module, bound: float | Bound, **options: Any) -> AttachedConstraint:
    bound = bound if isinstance(bound, Bound) else FixedBound(bound)
    return AttachedConstraint(optimizer, lambda: matrices(module), bound, **options)


def set_gradients(module: nn.Module, value: float = 1.0) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)
