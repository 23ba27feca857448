"""Measure gradients, second moments and spectra in two processes of FSDP2, which write their multipliers as JSON.

Of FSDP1 they write the weights after a training, or why there was none.
"""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.adaptive import AdaptiveDecay, AlphaDecay, StableDecay
from lightning_l2.schedules import FeedbackSchedule
from tests.processes import worker

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


SCHEDULES = {"awd": AdaptiveDecay(), "swd": StableDecay()}


def weights_after_a_fit(schedule: FeedbackSchedule, strategy: Any = "auto", devices: int = 1) -> dict[str, list[float]]:
    """Return what WeightDecay with a schedule makes of the weights; every process has all of the data."""
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(torch.randn(16, 4, generator=generator), torch.ones(16, 3)), batch_size=4)
    collect, decay = worker.Collect(), WeightDecay(0.02, summary=False)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "strategy": strategy, "devices": devices}
    callbacks = [decay, WeightDecayScheduler(schedule), collect]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **options)
    trainer.fit(worker.Net(worker.adamw), loader)
    return {name: weight.flatten().tolist() for name, weight in collect.last.items()}


def work_under_fsdp1(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, schedule in SCHEDULES.items():
        for sharding in ("NO_SHARD", "FULL_SHARD"):
            strategy = worker.CPUFSDPStrategy(sharding_strategy=sharding, auto_wrap_policy={nn.Linear})
            try:
                found[f"{name} {sharding}"] = weights_after_a_fit(schedule, strategy, devices=2)
            except ValueError as error:
                found[f"{name} {sharding}"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
