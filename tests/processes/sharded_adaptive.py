"""Measure gradients, second moments and spectra in two processes of FSDP2, which write their multipliers as JSON."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_l2.adaptive import AdaptiveDecay, AlphaDecay, StableDecay

OPTIONS: dict[str, dict[str, bool]] = {"plain": {}, "amsgrad": {"amsgrad": True}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 3)).double()


def multipliers_after_two_steps(model: nn.Module, options: dict[str, bool]) -> list[list[float]]:
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in model.parameters()], lr=0.1, **options)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :3]).square().sum().backward()
    schedules = [AdaptiveDecay(), StableDecay(), AlphaDecay(min_eigenvalues=2)]
    for schedule in schedules:
        schedule.check(optimizer)
    return [schedule.multipliers(optimizer, {}, {}) for schedule in schedules]


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {name: multipliers_after_two_steps(fully_shard(network(), mesh=mesh), OPTIONS[name]) for name in OPTIONS}
    (folder / f"{rank}.json").write_text(json.dumps(found))
