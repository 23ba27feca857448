"""Decay bf16 weights in two processes, replicated and sharded.

Each process writes the weights that it ends with to the folder that is given.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_l2.decay import RuleDecay


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 65), nn.Tanh(), nn.Linear(65, 48)).bfloat16()


def replicated(rank: int, rounding: Any) -> dict[str, Tensor]:
    """Train on data of one's own under DDP, which makes the gradients equal."""
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = RuleDecay(model.module, [optimizer], 1.0, rounding=rounding, seed=2)
    torch.manual_seed(rank)
    for _ in range(20):
        optimizer.zero_grad()
        inputs = torch.randn(4, 48).bfloat16()
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
    decay.remove()
    return {name: weight.detach() for name, weight in model.module.state_dict().items()}


def sharded(rounding: Any) -> list[tuple[Tensor, Tensor]]:
    """Decay without gradients under FSDP2: the matrices now and at the start."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    starts = [weight.full_tensor().detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    RuleDecay(model, [optimizer], 1.9, rounding=rounding)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for _ in range(150):
        optimizer.step()
    pairs = zip(model.parameters(), starts, strict=True)
    return [(weight.full_tensor().detach(), start) for weight, start in pairs if weight.ndim > 1]


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        "replicated": {rounding: replicated(rank, rounding) for rounding in ("accumulate", "stochastic")},
        "sharded": {rounding: sharded(rounding) for rounding in ("accumulate", "stochastic")},
    }
    torch.manual_seed(rank)
    torch.save({**found, "random": torch.rand(4)}, folder / f"{rank}.pt")
