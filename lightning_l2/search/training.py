"""A training of a search: looked at before it starts, then fitted and recorded, by a Trainer that the user built."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_l2.norms.squared import squared_norms
from lightning_l2.search.trials import Fit, Outcome, TrialRun
from lightning_l2.sharding import flat_shards
from lightning_l2.trainer.both_packages import derive_from_both

Make = Callable[..., tuple[Any, ...]]
# What a Trainer shows and keeps of one training drowns the search, fills the disk and stands in the place of another's.
LEFT_OUT = {"Checkpoint", "ModelSummary", "ProgressBar"}
# Steps of a learning-rate schedule that are tried out; a second or two of them.
MOST_STEPS = 50_000


class TrainingRecorder(Checkpoint):
    """Records every metric once an epoch and stops a training that the search calls hopeless.

    It is a `Checkpoint` because the Trainer calls those last, after the module's own `on_train_epoch_end`, so that
    metrics logged there belong to their epoch.

    Args:
        monitor: The metric that decides.
        report: Takes an epoch and a value and returns whether the training is hopeless.
    """

    def __init__(self, monitor: str, report: Callable[[int, float], bool] | None) -> None:
        self._monitor = monitor
        self._report = report
        self._is_validated = self._is_checked = False
        self.curves: dict[str, list[float]] = {}
        self.l2_norm: float | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice here that validation metrics have had their chance to appear."""
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record here: training and validation metrics of the epoch are complete."""
        for name, value in scalars(trainer).items():
            self.curves.setdefault(name, []).append(value)
        if self._report is not None and self._is_validated and not self._is_checked:
            self._is_checked = True
            self._warn_if_missing()
        if self._report is not None and _in_second_half(trainer):
            value = self.curves.get(self._monitor, [math.nan])[-1]
            # Only rank 0 has the study open; all ranks have to stop together.
            hopeless = trainer.is_global_zero and not math.isnan(value) and self._report(trainer.current_epoch, value)
            if trainer.strategy.broadcast(hopeless):
                trainer.should_stop = True

    def _warn_if_missing(self) -> None:
        """Spare who gave a wrong name the rest of the first training, which may take hours."""
        if self._monitor not in self.curves:
            rank_zero_warn(
                f"The metric monitor={self._monitor!r} has not appeared in the first epoch with a validation. Those "
                f"that did: {', '.join(sorted(self.curves)) or 'none'}. Unless it comes later, stop this search and "
                "give one of them as monitor."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the weights here, while they are on their devices: all that train, so that trials are alike."""
        weights = [weight for weight in pl_module.parameters() if weight.requires_grad]
        shards = flat_shards(trainer.strategy.model or pl_module)
        self.l2_norm = float(squared_norms(weights, [shards.get(id(weight)) for weight in weights]).sum().sqrt())

    def outcome(self, trainer: Any) -> Outcome:
        """Return what was recorded once a training has ended.

        Raises:
            MisconfigurationException: If the monitored metric never appeared.
        """
        curves = copy.deepcopy(self.curves)
        for name, value in scalars(trainer).items():
            # Metrics that appear only when training ends, and all of them where it ran in another process.
            curves.setdefault(name, [value])[-1] = value
        if self._monitor not in curves:
            without = "" if any(trainer.num_val_batches) else " No validation data was seen in this training."
            raise MisconfigurationException(
                f"The metric monitor={self._monitor!r} never appeared in a training. Those that did: "
                f"{', '.join(sorted(curves)) or 'none'}.{without} Give one of them as monitor, or log it with "
                "`self.log`."
            )
        return curves if self.l2_norm is None else {**curves, "l2_norm": self.l2_norm}


derive_from_both(TrainingRecorder, "Checkpoint")


def scalars(trainer: pl.Trainer) -> dict[str, float]:
    """Return the metrics of a Trainer as numbers, without those of single steps where the epoch's are there."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if not name.endswith("_step")}


def fit_from(make: Make, monitor: str) -> Fit:
    """Turn a function that builds a Trainer, a module and data into one that does a training.

    Args:
        make: Called as `make(weight_decay, **others)`; returns `(trainer, module)` or `(trainer, module, data)` or
            `(trainer, module, train_dataloaders, val_dataloaders)`, all new each time.
        monitor: The metric that decides.
    """

    def fit(run: TrialRun) -> Outcome:
        with isolate_rng():
            pl.seed_everything(run.seed, workers=True, verbose=False)
            trainer, module, *data = _checked(make(run.weight_decay, **run.others))
            return train(trainer, module, *data, monitor=monitor, run=run)

    return fit


def train(trainer: Any, module: Any, *data: Any, monitor: str, run: TrialRun, **fit_options: Any) -> Outcome:
    """Fit a Trainer and return the metrics of all epochs and the norm of the weights; or only look at it.

    It shows no progress and no summary and writes no checkpoint.

    Raises:
        MisconfigurationException: If the monitored metric never appeared.
    """
    kept = [item for item in trainer.callbacks if LEFT_OUT.isdisjoint(kind.__name__ for kind in type(item).__mro__)]
    for callback in kept:
        if hasattr(callback, "print_summary"):  # WeightDecay's table of groups
            callback.print_summary, callback.summary_file = False, None
    trainer.callbacks = kept
    if run.only_looks:
        return look(trainer, module, *data, **fit_options)
    recorder = TrainingRecorder(monitor, None if _spawns(trainer) else run.report)
    trainer.callbacks.append(recorder)
    trainer.fit(module, *data, **fit_options)
    return recorder.outcome(trainer)


def _checked(parts: Any) -> tuple[Any, ...]:
    if not (isinstance(parts, tuple | list) and len(parts) >= 2 and hasattr(parts[0], "fit")):
        raise MisconfigurationException(
            "Expected make to return (trainer, module), (trainer, module, data) or (trainer, module, "
            f"train_dataloaders, val_dataloaders) but got {type(parts).__name__}: {parts!r:.80}."
        )
    was_looked_at = any(isinstance(callback, Look) for callback in parts[0].callbacks)
    if parts[0].global_step or parts[0].current_epoch or was_looked_at:
        raise MisconfigurationException(
            f"The Trainer that make returned was in use before (global_step={parts[0].global_step}). "
            "Build a new Trainer and a new module in each call of make."
        )
    return tuple(parts)


def _in_second_half(trainer: pl.Trainer) -> bool:
    progress = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        progress.append((trainer.current_epoch + 1) / trainer.max_epochs)
    if trainer.max_steps > 0:
        progress.append(trainer.global_step / trainer.max_steps)
    return bool(progress) and max(progress) >= 0.5


def _spawns(trainer: Any) -> bool:
    """Whether a training runs in processes of its own, from which only metrics come back."""
    return "MultiProcessing" in type(trainer.strategy.launcher).__name__


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
