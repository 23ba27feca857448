"""How long a training is, in optimizer steps and in epochs, and what else lambda can follow from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.convert.conversion import TrainingSetup

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl


def steps_per_epoch(trainer: pl.Trainer, epoch: int) -> int | None:
    """Return the number of optimizer steps in an epoch, or None where the data has no length."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    # DeepSpeed makes no step of a short last window
    whole = math.floor if trainer.strategy.handles_gradient_accumulation else math.ceil
    return whole(batches / accumulation(trainer, epoch))


def accumulation(trainer: Any, epoch: int) -> int:
    """Return over how many batches gradients accumulate in an epoch."""
    for callback in _accumulation_schedulers(trainer):
        return int(callback.get_accumulate_grad_batches(epoch))
    return int(trainer.accumulate_grad_batches)


def _accumulation_schedulers(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if hasattr(callback, "get_accumulate_grad_batches")]


def total_steps(trainer: Any) -> int:
    """Return how many optimizer steps the training has, from its first step on.

    Raises:
        MisconfigurationException: If the Trainer can't know: endless training, data without a length, or
            `max_steps` with manual optimization, which counts the steps of every optimizer.
    """
    limits: list[int] = []
    if trainer.max_steps != -1 and not trainer.fast_dev_run:
        if trainer.lightning_module is not None and not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"`max_steps={trainer.max_steps}` counts the steps of every optimizer under manual optimization, "
                "so the number of batches that step is unknown. Give `total_steps`, the number of training batches."
            )
        limits.append(trainer.max_steps)
    epochs = _max_epochs(trainer)
    if epochs is not None:
        steps = _steps_of_epochs(trainer, epochs, enough=min(limits, default=math.inf))
        if steps is not None:
            limits.append(steps)
    if not limits:
        by_epoch = "" if epochs is None else f" or interval='epoch', since there are {epochs} epochs,"
        raise MisconfigurationException(
            f"The length of the training is unknown (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
            f"batches per epoch: {trainer.num_training_batches}). Give `total_steps`,{by_epoch} or set `max_steps` or "
            "`max_epochs` on the Trainer and use data with a length."
        )
    return min(limits)


def known_steps(trainer: Any) -> int | None:
    """Return `total_steps`, or None where the Trainer can't know."""
    try:
        return total_steps(trainer)
    except MisconfigurationException:
        return None


def _steps_of_epochs(trainer: Any, epochs: int, enough: float) -> int | None:
    """Return how many steps so many epochs have, or any number from `enough` on; None where the data has no length."""
    steps = steps_per_epoch(trainer, epoch=0)
    if not steps or not _accumulation_schedulers(trainer):
        return steps and steps * epochs
    total = 0
    for epoch in range(epochs):
        if total >= enough:
            break
        total += steps_per_epoch(trainer, epoch) or 0
    return total


def total_epochs(trainer: Any) -> int:
    """Return how many epochs the training has.

    Raises:
        MisconfigurationException: If the Trainer can't know.
    """
    epochs = _max_epochs(trainer)
    if epochs is not None:
        return epochs
    steps = steps_per_epoch(trainer, epoch=0)
    if trainer.max_steps == -1 or steps is None:
        raise MisconfigurationException(
            f"The number of epochs is unknown (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}). "
            "Give `total_steps`, in epochs, or set `max_epochs` on the Trainer."
        )
    return math.ceil(int(trainer.max_steps) / steps)


def _max_epochs(trainer: Any) -> int | None:
    """Return how many epochs train at most, or None for no limit."""
    if trainer.max_epochs in (None, -1):
        return None
    return int(trainer.max_epochs) - adds_measuring_epoch(trainer)


def training_setup(trainer: Any, group: Mapping[str, Any]) -> TrainingSetup:
    """Return the plain numbers that lambda can follow from, for one parameter group.

    Raises:
        MisconfigurationException: If the group has no learning rate.
    """
    rates = [float(group[key]) for key in ("lr", "initial_lr", "max_lr") if group.get(key) is not None]
    if not rates:
        raise MisconfigurationException(
            "Lambda can't follow from the training: a parameter group has no learning rate, since its optimizer finds "
            "its steps itself, as Adafactor of transformers. Give `weight_decay` as a number."
        )
    loader = trainer.train_dataloader
    batch_size = getattr(loader, "batch_size", None)
    steps = steps_per_epoch(trainer, epoch=0)
    # not the number of processes: those that share tensors see the same samples
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    return TrainingSetup(
        lr=max(rates),
        steps_per_epoch=steps,
        epochs=_epochs(trainer, steps),
        batch_size=batch_size and batch_size * accumulation(trainer, 0) * replicas,
        samples=_length(getattr(loader, "dataset", None)),
        steps=_total_steps_if_known(trainer),
    )


def _total_steps_if_known(trainer: Any) -> int | None:
    try:
        return total_steps(trainer)
    except MisconfigurationException:
        return None


def _epochs(trainer: Any, steps: int | None) -> float | None:
    """Return the length of the training in epochs of so many steps, None where it is unknown."""
    epochs = _max_epochs(trainer)
    limits: list[float] = [] if epochs is None else [epochs]
    # under manual optimization `max_steps` counts the steps of every optimizer
    if trainer.max_steps != -1 and steps and trainer.lightning_module.automatic_optimization:
        limits.append(trainer.max_steps / steps)
    return min(limits, default=None)


def _length(dataset: Any) -> int | None:
    try:
        length: int = len(dataset)
    except (TypeError, NotImplementedError):
        return None
    return length


def adds_measuring_epoch(trainer: Any) -> bool:
    """Return whether StochasticWeightAveraging adds an epoch that only measures what batch normalisation needs."""
    return any(getattr(callback, "_model_contains_batch_norm", False) for callback in trainer.callbacks)
