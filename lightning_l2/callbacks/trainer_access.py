"""What the callbacks need to know of a Trainer; the one file that touches private names of Lightning."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import _configure_optimizers, _MockOptimizer

from lightning_l2.both_packages import derive_from_both

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _weakly_held(name: str) -> property:
    key = f"_{name}"

    def get(callback: Any) -> Any:
        method = vars(callback).get(key)
        return method and method()

    def put(callback: Any, method: Any) -> None:
        vars(callback)[key] = weakref.WeakMethod(method)

    return property(get, put)


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


def check_alone(trainer: Any, callback: Callback) -> None:
    """Refuse a second callback of a kind that has to be alone, since both would write to the same groups.

    Raises:
        MisconfigurationException: If the Trainer has one; those of derived classes are of the same kind.
    """
    kind = next(base for base in reversed(type(callback).__mro__) if issubclass(base, Callback) and base != Callback)
    count = sum(isinstance(other, kind) for other in trainer.callbacks)
    if count > 1:
        name = kind.__name__
        raise MisconfigurationException(
            f"The Trainer has {count} {name} callbacks, and each would undo what the other does. Keep one {name}."
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


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float], monitor: Mapping[str, float] | None = None) -> None:
    """Send metrics to every logger in one call each, and those to `monitor` to `trainer.callback_metrics`.

    `LightningModule.log_dict` of 200 keys costs more than a small training step, a logger's own call next to nothing.
    """
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(dict(metrics), step=log_step(trainer))
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in (monitor or {}).items()})


def bare_optimizer(optimizer: Any) -> Any:
    """Return an optimizer without Lightning's wrapper."""
    return getattr(optimizer, "_optimizer", optimizer)


def optimizer_number(trainer: pl.Trainer, optimizer: Any) -> int | None:
    """Return the index of an optimizer among `bare_optimizers`, None for one that is not the module's."""
    bare = bare_optimizer(optimizer)
    return next((number for number, other in enumerate(bare_optimizers(trainer)) if other is bare), None)


def bare_optimizers(trainer: pl.Trainer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the module, without Lightning's wrapper and stand-in for none, looked up afresh."""
    return [bare for bare in map(bare_optimizer, trainer.optimizers) if not isinstance(bare, _MockOptimizer)]


def unscales_in_step(trainer: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether gradients still carry the fp16 scale before a step: a fused optimizer removes it itself."""
    # torch's own mark, which Lightning goes by too
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    return scales and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def unscale(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Remove the fp16 scale from gradients before a step that would remove it itself, and then doesn't."""
    if unscales_in_step(trainer, optimizer):
        trainer.precision_plugin.scaler.unscale_(optimizer)


def lr_schedulers(trainer: Any) -> list[Any]:
    """Return what holds learning rates of all optimizers' groups, looked up afresh."""
    averaging = [callback for callback in trainer.callbacks if isinstance(getattr(callback, "_swa_lrs", None), list)]
    rates = [_RatesOfAveraging(*pair) for pair in zip(averaging, bare_optimizers(trainer), strict=False)]
    return [*(config.scheduler for config in trainer.lr_scheduler_configs), *rates]


class _RatesOfAveraging:
    """Stands for the scheduler that StochasticWeightAveraging makes in a later epoch, of one rate a group."""

    def __init__(self, callback: Any, optimizer: torch.optim.Optimizer) -> None:
        self._callback, self.optimizer = callback, optimizer
        self.base_lrs = callback._swa_lrs

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "base_lrs":
            self._callback._swa_lrs = value


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


def remember_groups_in_finetuning(trainer: Any, pl_module: pl.LightningModule) -> None:
    """Let finetuning callbacks store the optimizers' groups as they are now.

    BaseFinetuning stores groups when an epoch begins and puts them back on resume, before the optimizers' states come.
    """
    for callback in trainer.callbacks:
        for number in getattr(callback, "_internal_optimizer_metadata", {}):
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            groups = bare_optimizers(trainer)[number].param_groups
            metadata = callback._apply_mapping_to_param_groups(groups, names)
            callback._internal_optimizer_metadata[number] = metadata


def state_of_training(trainer: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the objects whose attributes are the state of a training, besides weights and random numbers.

    Returns:
        Those that change with what they hold; those that bring the data; and those that only get other attributes.
    """
    loop = trainer.fit_loop
    loops = [loop, loop.epoch_loop, loop.epoch_loop.val_loop]
    own = [*trainer.lightning_module.modules(), *bare_optimizers(trainer), *lr_schedulers(trainer)]
    sources = [trainer.datamodule] if trainer.datamodule is not None else []
    sources += [one._data_source.instance for one in (loop, loop.epoch_loop.val_loop)]
    return [*loops, *own, trainer._logger_connector, trainer.precision_plugin], sources, [trainer, trainer.strategy]


# What the loops fetch data with; a training of its own gets its own.
DATA_IN_USE = {"_combined_loader": None, "_data_fetcher": None, "_iterator": None}


def adds_measuring_epoch(trainer: Any) -> bool:
    """Return whether StochasticWeightAveraging adds an epoch that only measures what batch normalisation needs."""
    return any(getattr(callback, "_model_contains_batch_norm", False) for callback in trainer.callbacks)
