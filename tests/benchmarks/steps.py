"""Training steps with and without a monitor, in one fit whose steps take turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from torch import nn

from lightning_l2 import L2NormMonitor
from tests.benchmarks.models import MODELS, Trained, loader
from tests.benchmarks.timing import now, robust, table, wait

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class TakeTurns(pl.Callback):
    """Give each step to the next contender, and measure from its start to the start of the next step."""

    def __init__(self, contenders: dict[str, pl.Callback | None], warm_up: int) -> None:
        self.contenders = contenders
        self.names = list(contenders)
        self.warm_up = warm_up
        self.times: dict[str, list[float]] = {name: [] for name in contenders}
        self.hooks: dict[str, list[float]] = {name: [] for name in contenders}
        self.active: str | None = None
        self.started = self.spent = 0.0

    def _forward(self, hook: str, *args: Any) -> None:
        callback = self.contenders[self.active] if self.active else None
        if callback is not None:
            start = now()
            getattr(callback, hook)(*args)
            self.spent += now() - start

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for callback in self.contenders.values():
            if callback is not None:
                callback.on_train_start(trainer, module)

    def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        wait(module.device)
        moment = now()
        if self.active is not None and batch_idx > self.warm_up * len(self.names):
            self.times[self.active].append(moment - self.started)
            self.hooks[self.active].append(self.spent)
        # what a contender logged by `self.log` would be written again in the steps of the others
        trainer._results.clear()
        self.active = self.names[batch_idx % len(self.names)]
        wait(module.device)
        self.spent = 0.0
        self.started = now()
        self._forward("on_train_batch_start", trainer, module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        self._forward("on_before_optimizer_step", trainer, module, optimizer)

    def on_train_batch_end(self, trainer: Any, module: pl.LightningModule, *args: Any) -> None:
        self._forward("on_train_batch_end", trainer, module, *args)


class GradNorm(pl.Callback):
    """What Lightning's documentation shows: `self.log_dict(grad_norm(...))`."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class ItemLoop(pl.Callback):
    """What people write: one `.item()` a parameter, and one call of the logger."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        metrics = {f"norm/{name}": p.detach().norm().item() for name, p in pl_module.named_parameters()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


class FourEach(pl.Callback):
    """As Composer's monitor is described: norms of gradient, weight, moment and update, four `.item()` a parameter."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        metrics, group = {}, optimizer.param_groups[0]
        for name, p in pl_module.named_parameters():
            state = optimizer.state.get(p)
            if p.grad is None or not state or "exp_avg" not in state:
                continue
            moment, variance = state["exp_avg"], state["exp_avg_sq"]
            update = moment / (variance.sqrt() + group["eps"]) * group["lr"]
            for key, tensor in (("grad", p.grad), ("param", p.detach()), ("moment", moment), ("update", update)):
                metrics[f"l2_norm/{key}/{name}"] = torch.linalg.vector_norm(tensor).item()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def run(
    network: nn.Module,
    sample: Any,
    contenders: dict[str, pl.Callback | None],
    turns: int,
    device: torch.device,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the time of a step with each contender, and of its hooks alone, in seconds."""
    turn_taking = TakeTurns(contenders, warm_up=2)
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            logger=CSVLogger(Path(folder), flush_logs_every_n_steps=10**9),
            log_every_n_steps=1,
            callbacks=[turn_taking],
            max_epochs=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        steps = (turns + 3) * len(contenders)
        trainer.fit(Trained(network, optimizer), loader(sample, steps))
    steps, hooks = turn_taking.times.items(), turn_taking.hooks.items()
    return {name: robust(times) for name, times in steps}, {name: robust(times) for name, times in hooks}


def monitors(device: torch.device, quick: bool) -> None:
    """Ours beside the others, on each model."""
    rows = []
    for name, make in MODELS.items():
        if quick and "120" in name:
            continue
        contenders: dict[str, pl.Callback | None] = {
            "bare": None,
            "unlogged": L2NormMonitor(every_n_steps=10**9),
            "every step": L2NormMonitor(every_n_steps=1),
            "+ gradients": L2NormMonitor(every_n_steps=1, gradients=True),
            "+ updates": L2NormMonitor(every_n_steps=1, gradients=True, updates=True, rotation=True),
            "grad_norm + log_dict": GradNorm(),
            ".item() loop": ItemLoop(),
            "four .item() each": FourEach(),
        }
        turns = {"M": 60, "R": 12, "t": 6 if "120" in name else 12}[name[0]]
        found, hooks = run(*make(), contenders, turns, device)
        bare = found["bare"]
        # what an unlogged step costs drowns in the noise of whole steps, so its hooks are measured alone
        default = bare + hooks["unlogged"] + (found["every step"] - bare) / 50
        ratios = [found[key] / bare for key in contenders if key not in ("bare", "unlogged")]
        rows.append([name, f"{bare * 1e3:.1f} ms", f"{default / bare:.4f}", *(f"{ratio:.2f}" for ratio in ratios)])
    head = ["model", "bare step", "default (50)", "every step", "+ gradients", "+ updates, rotation"]
    others = ["grad_norm + log_dict", ".item() loop", "four .item() each"]
    table("A step with a monitor, over the bare step", [*head, *others], rows)
