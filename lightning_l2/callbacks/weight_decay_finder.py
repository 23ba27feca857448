"""Choose lambda by short trials before the training."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_l2.arguments import check_types
from lightning_l2.callbacks.trainer_access import (
    DATA_IN_USE,
    Callback,
    bare_optimizers,
    state_of_training,
    step_index,
)
from lightning_l2.parameters import is_undecided
from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.run import Outcome, TrialRun
from lightning_l2.search.study import run_search
from lightning_l2.search.target import hide_summaries, set_weight_decay
from lightning_l2.search.training import TrainingRecorder
from lightning_l2.snapshot import Snapshot, data_holders, random_state_kept, working_on_copies

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_l2.search.result import SearchResult

# They watch, print, save or stop; a trial is without them.
BYSTANDERS = {
    *("BatchSizeFinder", "Checkpoint", "DeviceStatsMonitor", "EarlyStopping", "LearningRateFinder"),
    *("LearningRateMonitor", "ModelSummary", "ProgressBar", "ThroughputMonitor", "Timer"),
    *("L2NormMonitor", "NormPlots", "WeightDecayFinder"),
}
SHARDED = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}


class WeightDecayFinder(Callback):
    """Try several lambdas for a few steps each before the training, set the suggested one, and train.

    Every trial starts from the state that the training starts from, and that state is back before the next one:
    weights, buffers, gradients, optimizers, learning-rate schedulers, random numbers, data, loops and callbacks. The
    training then is, bit for bit, the one that would have been started with that lambda. A trial is the beginning of
    that training: its schedules have their full length.

    Lambda is that of the Trainer's `WeightDecay` callback, else of `L2Penalty`, else of the optimizer's groups in
    proportion to what they have. Trials are without callbacks that only watch, save or stop, such as checkpoints,
    early stopping and progress bars; the others, copied, take part.

    Weight decay acts slowly, over about 1/(lr * lambda) steps, so short trials tell apart only lambdas that act within
    them. `lightning_l2.search_weight_decay` compares whole trainings.

    Args:
        low: Smallest lambda, dimensionless.
        high: Largest lambda.
        first: Lambda of the first trial; the middle of the range on the log scale where it lies outside of it.
        trials: Number of lambdas.
        steps: Optimizer steps of a trial; it ends with a validation.
        seeds: Trainings for each lambda: the first with the random numbers that the training will have, others with
            different ones, from the same weights. With one, the suggestion is the plain best.
        monitor: The metric that decides, by the name it is logged under.
        mode: Whether a small ("min") or a large ("max") value of it is good.
        method: How lambdas are chosen, as for `search_weight_decay`.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: When training starts, if the metric doesn't appear in a trial, there is no lambda
            to set, or the strategy shards the weights.
        ModuleNotFoundError: If Optuna isn't installed.

    >>> finder = WeightDecayFinder(low=1e-4, high=1.0, trials=6, steps=200)
    """

    def __init__(
        self,
        low: float = 1e-5,
        high: float = 1e-1,
        *,
        first: float = 1e-3,
        trials: int = 8,
        steps: int = 100,
        seeds: int = 1,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        method: Literal["grid", "tpe"] | None = None,
    ) -> None:
        check_types(WeightDecayFinder, locals())
        if steps < 1:
            raise ValueError(f"Expected `steps` to be at least 1, got {steps!r}.")
        self.plan = SearchPlan(
            monitor=monitor, mode=mode, low=low, high=high, first=first, trials=trials, seeds=seeds, method=method,
            prune=False,
        )  # fmt: skip
        self.steps = steps
        self.result: SearchResult | None = None
        self._found: float | None = None

    def on_fit_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Search here: the model is in place and nothing has begun; a resumed training keeps what was found."""
        if trainer.ckpt_path is not None:
            rank_zero_info("WeightDecayFinder: the training is resumed, so nothing is searched.")
        elif trainer.fast_dev_run:
            rank_zero_info("WeightDecayFinder: nothing is searched under `fast_dev_run`.")
        else:
            self._check(trainer, pl_module)
            snapshot = Snapshot(pl_module, (weight for group in _groups(trainer) for weight in group["params"]))

            def fit(run: TrialRun) -> Outcome:
                try:
                    with random_state_kept():
                        return self._train(trainer, pl_module, snapshot, run)
                finally:
                    snapshot.restore()

            self.result = run_search(fit, self.plan, progress=trainer.is_global_zero and _shows_progress(trainer))
            self._found = self.result.weight_decay
            where = set_weight_decay(trainer.callbacks, _groups(trainer), self._found)
            rank_zero_info(
                f"WeightDecayFinder tried {len(self.result.trials)} lambdas for {self.steps} steps each:\n"
                f"{self.result.table()}\nIt set weight_decay={self._found:g} on {where}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the lambda that was set."""
        return {"weight_decay": self._found}

    def on_load_checkpoint(self, trainer: Any, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the lambda that was found before; here, where all callbacks are at hand and none has used theirs."""
        self._found = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("weight_decay")
        if self._found is not None:
            where = set_weight_decay(trainer.callbacks, [], self._found)
            rank_zero_info(f"WeightDecayFinder set weight_decay={self._found:g}, found before, on {where}.")

    def _check(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        if names := {kind.__name__ for kind in type(trainer.strategy).__mro__} & SHARDED:
            raise MisconfigurationException(
                f"WeightDecayFinder can't put back weights that {names.pop()} shards. "
                "Use lightning_l2.search_weight_decay, which builds a new Trainer for each trial."
            )
        if is_undecided(pl_module):
            raise MisconfigurationException(
                "WeightDecayFinder can't keep lazy parameters, which have no values yet. "
                "Run the model once on a batch before the training, or use lightning_l2.search_weight_decay."
            )
        set_weight_decay(copy.copy(trainer.callbacks), [dict(group) for group in _groups(trainer)], None)

    def _train(self, trainer: Any, pl_module: pl.LightningModule, snapshot: Snapshot, run: TrialRun) -> Outcome:
        state, sources, shallow = state_of_training(trainer)
        data = data_holders([*sources, list(vars(pl_module).values())], skip=DATA_IN_USE)
        data += [source for source in sources if source is trainer.datamodule]
        with working_on_copies(
            state, data=data, shallow=shallow, shared=snapshot.tensors, overrides=DATA_IN_USE
        ) as memo:
            place = trainer.callbacks.index(self)
            before, after = (
                [copy.deepcopy(callback, memo) for callback in callbacks if _takes_part(callback)]
                for callbacks in (trainer.callbacks[:place], trainer.callbacks[place:])
            )
            recorder = TrainingRecorder(self.plan.monitor, None)
            trainer.callbacks = [*before, *after, _StopAfter(step_index(trainer) + self.steps), recorder]
            trainer.logger = DummyLogger() if trainer.loggers else None
            trainer.check_val_every_n_epoch = 1
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
            set_weight_decay(trainer.callbacks, _groups(trainer), run.weight_decay)
            hide_summaries(trainer.callbacks)
            _seed(run.seed - self.plan.seed)
            for callback in after:
                callback.on_fit_start(trainer, pl_module)
            pl_module.on_fit_start()
            trainer.fit_loop.run()
            trainer.fit_loop.teardown()
            outcome: Outcome = trainer.strategy.broadcast(recorder.outcome(trainer))
            return outcome


class _StopAfter(Callback):
    """Ends a trial; stopping the Trainer like this makes it validate first."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop once the step is done."""
        if step_index(trainer) >= self.step:
            trainer.should_stop = True


def _groups(trainer: Any) -> list[dict[str, Any]]:
    return [group for optimizer in bare_optimizers(trainer) for group in optimizer.param_groups]


def _takes_part(callback: Any) -> bool:
    return not any(kind.__name__ in BYSTANDERS for kind in type(callback).__mro__)


def _shows_progress(trainer: Any) -> bool:
    return trainer.progress_bar_callback is not None


def _seed(offset: int) -> None:
    """Leave the random numbers as they are for the first seed, and start others for the rest."""
    if offset:
        random.seed(offset)
        np.random.seed(offset)
        torch.manual_seed(offset)
