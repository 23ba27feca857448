"""What the callbacks need to know of a Trainer; the one file that touches private names of Lightning."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import _configure_optimizers, _MockOptimizer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.both_packages import derive_from_both
from lightning_l2.optimizers.inner import updating_optimizers, updating_optimizers_as_before
from lightning_l2.optimizers.step_hook import gradients_are_complete, tell_once, updates_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType


# Windows of batches without an update after which something must be wrong.
MANY_WINDOWS = 100


def _weakly_held(name: str) -> property:
    key = f"_{name}"

    def get(callback: Any) -> Any:
        method = vars(callback).get(key)
        return method and method()

    def put(callback: Any, method: Any) -> None:
        # a module may put something else in its method's place, such as a partial
        vars(callback)[key] = (weakref.WeakMethod if hasattr(method, "__func__") else weakref.ref)(method)

    return property(get, put)


class IdleWatch:
    """Notices that no optimizer updates through its hooks, so that nothing of what is attached to them acts.

    Args:
        trainer: The Trainer at the start of training.
    """

    def __init__(self, trainer: Any) -> None:
        self._windows = 0
        self._steps = trainer.global_step
        self._has_updated = False

    def count(self, trainer: Any, batch: Any) -> None:
        """Count a batch that has ended, if it closed a window that led to a step."""
        if self._has_updated:
            return
        automatic, steps = trainer.lightning_module.automatic_optimization, self._steps
        self._steps = trainer.global_step
        if self._steps == steps if automatic else batch is None:
            return
        self._windows += 1
        self._has_updated = any(updates_of(optimizer) for optimizer in optimizers_in_use(trainer))
        if self._windows == MANY_WINDOWS:
            self._warn(trainer)

    def end(self, trainer: Any) -> None:
        """Look once more at the end of a short training; a scaler may have skipped all of its steps."""
        if 0 < self._windows < MANY_WINDOWS and not uses_scaler(trainer):
            # a module may step in its own hook at a batch's end
            self._has_updated |= any(updates_of(optimizer) for optimizer in optimizers_in_use(trainer))
            self._warn(trainer)

    def _warn(self, trainer: Any) -> None:
        optimizers = optimizers_in_use(trainer)
        if not self._has_updated and all([tell_once(optimizer) for optimizer in optimizers]):
            rank_zero_warn(
                f"{self._windows} windows of batches went by, and {', '.join(type(o).__name__ for o in optimizers)} "
                "has not updated once through `step()`, so nothing that was attached to it has acted. Is there another "
                "optimizer that updates the parameters, which the one that `configure_optimizers` returns keeps to "
                "itself?"
            )


class Callback(pl.Callback):
    """The base of all callbacks here, at home in `lightning` and, where it is imported, `pytorch_lightning`.

    What a callback knows of the running fit is in `_fit`, which is neither copied nor pickled and None outside of it.
    """

    _fit: Any = None
    # Lightning hangs methods of the module on every callback, which would keep the module, and be pickled with it.
    log = _weakly_held("log")
    log_dict = _weakly_held("log_dict")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback starts with."""
        return {key: value for key, value in vars(self).items() if key not in ("_fit", "_log", "_log_dict")}


derive_from_both(Callback)


def check_alone(trainer: Any, callback: Callback, way_out: str) -> None:
    """Refuse a second callback of a kind that has to be alone, since both would decide on the same groups.

    Raises:
        MisconfigurationException: If the Trainer has one; those of derived classes are of the same kind.
    """
    kind = next(base for base in reversed(type(callback).__mro__) if issubclass(base, Callback) and base != Callback)
    count = sum(isinstance(other, kind) for other in trainer.callbacks)
    if count > 1:
        name = kind.__name__
        raise MisconfigurationException(
            f"The Trainer has {count} {name} callbacks, and each would undo what the other does. {way_out}"
        )


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


def log_step(trainer: pl.Trainer) -> int:
    """Return the step that the Trainer's own rows in a logger carry now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_first_batch_of_step(trainer: pl.Trainer) -> bool:
    """Return whether, in `on_train_batch_start`, the batch opens an accumulation window."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return (ready - 1) % trainer.accumulate_grad_batches == 0


def ends_step(trainer: pl.Trainer) -> bool:
    """Return whether, in `on_train_batch_end`, the batch closed an accumulation window."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


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
) -> None:
    """Send metrics to every logger in one call each, and those to `monitor` to `trainer.callback_metrics`.

    `LightningModule.log_dict` of 200 keys costs more than a small training step, a logger's own call next to nothing.
    """
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(metrics=dict(metrics), step=log_step(trainer) if step is None else step)
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in (monitor or {}).items()})


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
    if all(type(optimizer).__module__.startswith("torch.optim.") for optimizer in found):
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


def callbacks_of_trainer_in_the_making() -> list[Any]:
    """Return the callbacks of the Trainer whose constructor asks for more of them, by a function without arguments."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "on_trainer_init":
            return frame.f_locals["self"].trainer.callbacks  # type: ignore[no-any-return]
        frame = frame.f_back
    return []


def adds_measuring_epoch(trainer: Any) -> bool:
    """Return whether StochasticWeightAveraging adds an epoch that only measures what batch normalisation needs."""
    return any(getattr(callback, "_model_contains_batch_norm", False) for callback in trainer.callbacks)
