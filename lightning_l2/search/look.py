"""How strong a training is: the peak of its learning rate times its optimizer steps, read before it starts."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_l2.trainer.both_packages import derive_from_both

# Steps of a learning-rate schedule that are tried out; a second or two of them.
MOST_STEPS = 50_000


class Look(pl.Callback):
    """Reads the learning rate and the length of a training in the moment before it starts, and lets it end there."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read here: optimizers and data are set up, and nothing has trained or been validated yet."""
        steps, peak = _steps(trainer), _peak_lr(trainer)
        # The one way for a number out of a Trainer that runs in a process of its own.
        trainer.callback_metrics["lr_steps"] = torch.tensor(peak * steps, dtype=torch.float64)
        trainer.limit_train_batches = 0
        trainer.limit_val_batches = 0
        trainer.num_sanity_val_steps = 0


derive_from_both(Look)


def look(trainer: Any, module: Any, *data: Any, **fit_options: Any) -> dict[str, float]:
    """Set a Trainer up as for a training and return `lr_steps`; nothing where it can't be known.

    The Trainer and the module are of no use afterwards. Loggers see nothing of it.
    """
    trainer.callbacks.append(Look())
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the training come with the first trial
        if trainer.loggers:
            # The first takes any call; callbacks that read their metrics back ask for one with files.
            trainer.loggers = [DummyLogger(), CSVLogger(folder)]
        trainer.fit(module, *data, **fit_options)
    lr_steps = float(trainer.callback_metrics.get("lr_steps", math.nan))
    return {"lr_steps": lr_steps} if 0 < lr_steps < math.inf else {}


def _steps(trainer: Any) -> float:
    """Return the optimizer steps of the training, nan where they aren't known."""
    with suppress(MisconfigurationException):  # accumulation that changes between epochs
        steps = trainer.estimated_stepping_batches
        return float(steps) if steps > 0 else math.nan
    return math.nan


def _peak_lr(trainer: Any) -> float:
    """Return the largest learning rate of any group, over the whole schedule."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if any(getattr(callback, "apply", None) == "independent" for callback in trainer.callbacks):
        return 1.0  # a step takes lambda of the weights, whatever the learning rate
    peak = _largest(groups)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            continue
        steps, per_epoch = _steps(trainer), max(trainer.num_training_batches / trainer.accumulate_grad_batches, 1.0)
        count = steps if config.interval == "step" else math.ceil(steps / per_epoch)
        with warnings.catch_warnings(), suppress(Exception):
            warnings.simplefilter("ignore")  # that no optimizer stepped
            for _ in range(int(min((count - 1) / config.frequency, MOST_STEPS))):
                config.scheduler.step()
                peak = max(peak, _largest(groups))
    return peak


def _largest(groups: list[dict[str, Any]]) -> float:
    return max((float(group["lr"]) for group in groups if group.get("lr") is not None), default=math.nan)
