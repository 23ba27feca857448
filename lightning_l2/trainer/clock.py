"""The training's own clock: windows of batches that led to a step, as the Trainer counts, saves and restores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


def step_index(trainer: pl.Trainer) -> int:
    """Return how many optimizer steps the training has done, the clock that schedules follow.

    Windows of batches that led to a step count, as for learning-rate schedulers of interval `step`, also where a fp16
    step was skipped. With manual optimization these are batches, the same for all optimizers: there,
    `trainer.global_step` counts the steps of every optimizer. Both are the Trainer's progress, saved and restored.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)


def is_first_batch_of_step(trainer: pl.Trainer) -> bool:
    """Return whether, in `on_train_batch_start`, the batch opens an accumulation window."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return (ready - 1) % trainer.accumulate_grad_batches == 0


def ends_step(trainer: pl.Trainer) -> bool:
    """Return whether, in `on_train_batch_end`, the batch closed an accumulation window."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()
