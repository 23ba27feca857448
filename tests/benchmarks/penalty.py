"""What the penalty costs: a training step with it over one with native weight decay, and the autograd snippet beside.

Extra memory is what a variant allocates between the end of the forward pass and the optimizer's step.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_l2.decay.penalty import L2Objective, Penalised
from tests.benchmarks.timing import now, table, wait

LAMBDA = 1e-2
VARIANTS = ("no decay", "native", "L2Penalty", "autograd snippet")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "200 small tensors": lambda: nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(100)]),
    "4 large matrices": lambda: nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, weight_decay: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=weight_decay),
    "Adam": lambda p, weight_decay: torch.optim.Adam(p, lr=1e-3, weight_decay=weight_decay),
}


class Allocated(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.bytes += tensor.nbytes
        return result


def variant(
    name: str, make_model: Callable[[], nn.Module], make_optimizer: Any, device: torch.device
) -> tuple[Callable[[], None], int]:
    """Return one training step of a variant, and the bytes it allocates over a step without any decay."""
    torch.manual_seed(0)
    model = make_model().to(device)
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    native = LAMBDA if name == "native" else 0.0
    optimizer = make_optimizer([{"params": weights, "weight_decay": native}, {"params": rest}], weight_decay=0.0)
    objective = L2Objective([optimizer])
    objective.penalise({id(p): Penalised("", "", LAMBDA) for p in weights})
    x = torch.randn(64, weights[0].shape[1], device=device)

    def loss() -> Tensor:
        value = model(x).square().mean()
        if name == "autograd snippet":
            value = value + LAMBDA / 2 * sum(w.norm() ** 2 for w in weights)
        return value

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        if name == "L2Penalty":
            objective.join_gradients(optimizer)
        optimizer.step()

    step()
    with Allocated() as allocated:
        step()
    return step, allocated.bytes


def measure(
    make_model: Callable[[], nn.Module], make_optimizer: Any, rounds: int, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Return the seconds of each variant's step, and the bytes it allocates over a step without any decay."""
    steps, allocated = zip(*(variant(name, make_model, make_optimizer, device) for name in VARIANTS), strict=True)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    contenders = list(zip(VARIANTS, steps, strict=True))
    for _ in range(rounds):
        random.shuffle(contenders)  # what ran just before leaves its mark in the caches
        for name, step in contenders:
            wait(device)
            start = now()
            step()
            wait(device)
            seconds[name].append(now() - start)
    return {
        name: (statistics.median(seconds[name]), total - allocated[0])
        for name, total in zip(VARIANTS, allocated, strict=True)
    }


def penalties(device: torch.device, rounds: int = 100) -> None:
    """Time over that of native decay, and memory, by model and optimizer."""
    torch.set_flush_denormal(True)  # gradients that vanish would slow down whoever adds nothing to them
    rows = []
    for model_name, make_model in MODELS.items():
        for optimizer_name, make_optimizer in OPTIMIZERS.items():
            found = measure(make_model, make_optimizer, rounds, device)
            native = found["native"][0]
            rows.append(
                [
                    f"{model_name}, {optimizer_name}",
                    f"{native * 1e3:.1f} ms",
                    *(f"{seconds / native:.3f}, {extra / 2**20:+.1f} MiB" for seconds, extra in found.values()),
                ]
            )
    torch.set_flush_denormal(False)
    head = ["model", "native step", *VARIANTS]
    table("The penalty in the loss: time over native decay, allocated over no decay", head, rows)
