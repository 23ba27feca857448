"""The moment before a Trainer loads a checkpoint into its module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.trainer.optimizers import on_optimizers_configured, splits_early

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl


def before_restoring(trainer: pl.Trainer, pl_module: pl.LightningModule, act: Callable[[], None]) -> Callable[[], None]:
    """Act right before weights are loaded into the module, or before that: the weights are those it was made with.

    Where a strategy loads a checkpoint once it has set the optimizers up, as FSDP does, that is when these are
    configured, with the weights cut as they will stay.

    Args:
        trainer: The Trainer, in its `setup`.
        pl_module: The module.
        act: What to do, perhaps several times; the last one counts.

    Returns:
        What ends it.

    Raises:
        MisconfigurationException: If the strategy keeps the weights that it updates to itself.
    """
    if splits_early(trainer):
        raise MisconfigurationException(
            "DeepSpeed keeps the weights that it updates to itself, so nothing can pull them towards their start. "
            "Use towards='zero', or FSDP."
        )
    if trainer.strategy.restore_checkpoint_after_setup:
        on_optimizers_configured(pl_module, lambda *_: act())
        return lambda: None
    module: Any = pl_module  # torch has no types for this
    handle = module.register_load_state_dict_pre_hook(lambda *_: act())
    return lambda: handle.remove()
