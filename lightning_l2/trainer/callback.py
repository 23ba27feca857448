"""The base of all callbacks, and what they ask of each other and of the Trainer that has them."""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.optimizers.step_hook import tell_once, updates_of
from lightning_l2.trainer.both_packages import derive_from_both
from lightning_l2.trainer.optimizers import optimizers_in_use, uses_scaler

if TYPE_CHECKING:
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


def global_seed() -> int:
    """Return what `seed_everything` was given, in all processes the same; 0 where nobody has called it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


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

    What a callback knows of the running fit is in `_fit`, and in `_start` from before it, the weights that training
    began with: neither copied nor pickled, and None outside of it. However a fit ends, both are let go.
    """

    _fit: Any = None
    _start: Any = None
    # Lightning hangs methods of the module on every callback, which would keep the module, and be pickled with it.
    log = _weakly_held("log")
    log_dict = _weakly_held("log_dict")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback starts with."""
        return {key: value for key, value in vars(self).items() if key not in ("_fit", "_start", "_log", "_log_dict")}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the start of weights that nobody has asked for by now."""
        if self._start is not None:
            self._start.begin()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizers alone."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self._release()

    def _release(self) -> None:
        if self._start is not None:
            self._start.end()
            self._start = None
        if self._fit is not None:
            self._fit.remove()
            self._fit = None


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


def callbacks_of_trainer_in_the_making() -> list[Any]:
    """Return the callbacks of the Trainer whose constructor asks for more of them, by a function without arguments."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "on_trainer_init":
            return frame.f_locals["self"].trainer.callbacks  # type: ignore[no-any-return]
        frame = frame.f_back
    return []
