"""Measure gradients, second moments and spectra in two processes of FSDP2; run by test_adaptive.py.

Each process writes its multipliers as JSON to the folder that is given.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
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


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {name: multipliers_after_two_steps(fully_shard(network(), mesh=mesh), OPTIONS[name]) for name in OPTIONS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked processes needn't import torch again; none of its threads has started yet.
    multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
