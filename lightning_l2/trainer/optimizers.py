"""A Trainer's optimizers, which of them update, and what comes between their gradients and their steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import _configure_optimizers, _MockOptimizer

from lightning_l2.optimizers.inner import updating_optimizers, updating_optimizers_as_before
from lightning_l2.optimizers.step_hook import gradients_are_complete

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl


def bare_optimizer(optimizer: Any) -> Any:
    """Return an optimizer without Lightning's wrapper."""
    return getattr(optimizer, "_optimizer", optimizer)


def bare_optimizers(trainer: pl.Trainer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the module, without Lightning's wrapper and stand-in for none, looked up afresh."""
    return [bare for bare in map(bare_optimizer, trainer.optimizers) if not isinstance(bare, _MockOptimizer)]


def optimizers_in_use(trainer: Any, *, afresh: bool = True) -> list[torch.optim.Optimizer]:
    """Return the optimizers that update the module's parameters: of wrapped ones the innermost.

    Args:
        trainer: The Trainer.
        afresh: Whether to look through wrappers that were looked through before.
    """
    found = trainer.optimizers
    for optimizer in found:
        if not type(optimizer).__module__.startswith("torch.optim."):
            break
    else:
        return found  # type: ignore[no-any-return]  # nothing is wrapped, as nearly always; every batch asks
    bare = bare_optimizers(trainer)
    if splits_early(trainer):
        return bare
    return updating_optimizers(bare) if afresh else updating_optimizers_as_before(bare)


def tell_of_gradients(trainer: Any, optimizer: Any, teller: object, *, is_unscaled: bool = False) -> None:
    """Let all that acts before clipping act on an optimizer's gradients, if they are unscaled by now."""
    if is_unscaled or not unscales_in_step(trainer, bare_optimizer(optimizer)):
        for updating in updating_optimizers(optimizer):
            gradients_are_complete(updating, teller)


def unscales_in_step(trainer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether gradients still carry the fp16 scale before a step: a fused optimizer removes it itself."""
    # torch's own mark, which Lightning goes by too
    return uses_scaler(trainer) and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def uses_scaler(trainer: Any) -> bool:
    """Return whether a gradient scaler may skip steps, as with fp16."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def unscale(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Remove the fp16 scale from gradients before a step that would remove it itself, and then doesn't."""
    if unscales_in_step(trainer, optimizer):
        trainer.precision_plugin.scaler.unscale_(optimizer)


def splits_early(trainer: pl.Trainer) -> bool:
    """Return whether the strategy takes the optimizer over as soon as it is configured, as DeepSpeed does."""
    return any(kind.__name__ == "DeepSpeedStrategy" for kind in type(trainer.strategy).__mro__)


def on_optimizers_configured(pl_module: Any, act: Callable[[list[Any], list[Any]], None]) -> None:
    """Call `act` with the optimizers and learning-rate schedulers once `configure_optimizers` returns, one time.

    No hook comes between `configure_optimizers` and a strategy that takes the optimizer over.
    """
    own = vars(pl_module).get("configure_optimizers")
    # what a fit left behind that failed before it configured an optimizer
    own = getattr(own, "stands_for", lambda: own)()

    def configure_then_act() -> Any:
        del pl_module.configure_optimizers
        if own is not None:
            pl_module.configure_optimizers = own
        configured = pl_module.configure_optimizers()
        optimizers, schedulers, _ = _configure_optimizers(configured)
        act(optimizers, [s["scheduler"] if isinstance(s, dict) else s for s in schedulers])
        return configured

    acting: Any = configure_then_act
    acting.stands_for = lambda: own
    pl_module.configure_optimizers = acting
