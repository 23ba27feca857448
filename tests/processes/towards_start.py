"""Trainings towards the start under one strategy, at once and resumed; beside them, written by hand, one process alone.

``python -m tests.processes.towards_start STRATEGY FOLDER``, launched as `tests.processes.worker` is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_l2 import L2Penalty, WeightDecay
from tests.processes.worker import DECAYED, Net, Runner, find

LAMBDA = 0.5
OURS: dict[str, Callable[[], pl.Callback]] = {
    "decoupled": lambda: WeightDecay(LAMBDA, apply="decoupled", towards="start", summary=False),
    "coupled": lambda: WeightDecay(LAMBDA, apply="coupled", towards="start", start_device="cpu", summary=False),
    "cautious": lambda: WeightDecay(LAMBDA, apply="cautious", towards="start", summary=False),
    "penalty": lambda: L2Penalty(LAMBDA, towards="start", every_n_steps=0),
}


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.02, weight_decay=0.0)


class ByHand(pl.Callback):
    """The formulas, in a process that has the whole weights."""

    def __init__(self, way: str) -> None:
        self.way = "coupled" if way == "penalty" else way

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: p for name, p in pl_module.named_parameters() if name in DECAYED}
        self.start = {name: p.detach().clone() for name, p in self.weights.items()}
        trainer.optimizers[0].register_step_post_hook(lambda optimizer, *_: self.after(optimizer))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        lr = optimizer.param_groups[0]["lr"]
        self.before = {name: p.detach().clone() for name, p in self.weights.items()}
        for name, p in self.weights.items():
            if self.way == "coupled":
                p.grad += LAMBDA * (p.detach() - self.start[name])
            elif self.way == "decoupled":
                p.data -= lr * LAMBDA * (p.detach() - self.start[name])

    def after(self, optimizer: Optimizer) -> None:
        lr = optimizer.param_groups[0]["lr"]
        for name, p in self.weights.items() if self.way == "cautious" else ():
            away = self.before[name] - self.start[name]
            p.data -= lr * LAMBDA * away * ((self.before[name] - p.detach()) * away >= 0)


class Elsewhere(pl.Callback):
    """Lets the module start from other weights."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with torch.no_grad():
            pl_module.head.weight.mul_(1.5)


def start_norms(runner: Runner) -> dict[str, float]:
    return {name: p.detach().norm().item() for name, p in Net(adamw).named_parameters() if name in DECAYED}


def pulled(way: str, runner: Runner) -> dict[str, Any]:
    if runner.name == "single":
        return runner.fit([ByHand(way)], adamw)[0]
    make = OURS[way]
    runner.fit([make()], adamw, epochs=1, save=way)
    callback = make()
    resumed, trainer = runner.fit([callback], adamw, resume=way)
    state: dict[str, Any] = {}
    callback.on_save_checkpoint(trainer, trainer.lightning_module, state)
    found = {"whole": runner.fit([make()], adamw)[0], "resumed": resumed, "state": state["callbacks"]}
    try:
        runner.fit([Elsewhere(), make()], adamw, resume=way)
    except RuntimeError as error:
        found["elsewhere"] = str(error)
    return found


def job(rank: int, name: str, folder: Path) -> None:
    find({"start": start_norms, **{way: partial(pulled, way) for way in OURS}}, rank, name, folder)
