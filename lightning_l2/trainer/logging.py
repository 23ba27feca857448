"""When loggers get something, under which step, and by one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl


def log_step(trainer: pl.Trainer) -> int:
    """Return the step that the Trainer's own rows in a logger carry now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logging_interval(trainer: Any, every_n_steps: int | None = None) -> int:
    """Return at every how many steps loggers get something, by default at the Trainer's own cadence; 0 for never."""
    if every_n_steps is not None:
        return every_n_steps
    return 1 if trainer.fast_dev_run else int(trainer.log_every_n_steps)


def is_logging_step(trainer: Any, every_n_steps: int | None = None) -> bool:
    """Return whether the current step is one that loggers get, by default at the Trainer's own cadence."""
    interval = logging_interval(trainer, every_n_steps)
    return interval > 0 and (log_step(trainer) + 1) % interval == 0


def log_metrics(
    trainer: pl.Trainer,
    metrics: Mapping[str, float],
    monitor: Mapping[str, float] | None = None,
    step: int | None = None,
    prog_bar: Mapping[str, float] | None = None,
) -> None:
    """Send metrics to every logger in one call each, those to `monitor` to `trainer.callback_metrics`.

    Those of `prog_bar` go where Lightning's progress bars look for what `self.log(..., prog_bar=True)` gave them.

    `LightningModule.log_dict` of 200 keys costs more than a small training step, a logger's own call next to nothing.
    """
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(metrics=dict(metrics), step=log_step(trainer) if step is None else step)
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in (monitor or {}).items()})
    if prog_bar:
        trainer.progress_bar_metrics.update(prog_bar)
