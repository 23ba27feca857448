"""Lambda over training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_l2.arguments import check_types
from lightning_l2.callbacks.trainer_access import (
    Callback,
    bare_optimizer,
    bare_optimizers,
    check_alone,
    optimizer_number,
    step_index,
    unscale,
)
from lightning_l2.callbacks.training_length import total_epochs, total_steps
from lightning_l2.param_groups import base_weight_decay, multiply_weight_decay, without_multiplier
from lightning_l2.schedules import FeedbackSchedule, Schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer


class WeightDecayScheduler(Callback):
    r"""Change lambda over training, in every parameter group of every optimizer.

    With $\lambda_0$ a group's base value (`initial_weight_decay`), $m$ the schedule, $t$ of $T$ optimizer steps done:

    $$\lambda_t = \lambda_0 \cdot m\left(\frac{t}{T - 1}\right)$$

    Exempt groups, whose base is 0, stay at 0 under every schedule. The first step sees progress 0, the last one 1, and
    every step after that 1. Steps count as those of learning-rate schedulers of interval `step` do: windows of batches,
    the same for all optimizers of a module. It works on groups made by `WeightDecay` and on groups made by hand.
    Schedules that read gradients do so in steps of `self.optimizers()`, not in those of the bare optimizers.

    Args:
        schedule: Multiplier of the base value as a function of progress, or from what training does.
        interval: Whether lambda changes each optimizer `"step"` or each `"epoch"`.
        total_steps: Length of the schedule in steps, or in epochs for `interval="epoch"`. By default the Trainer's.
        values: What the schedule's values are: a `"multiplier"` of each group's base, or the `"weight_decay"` of the
            group with the strongest base, which the other groups follow in proportion.

    Raises:
        MisconfigurationException: Before the first step, if the length of the training is unknown and `total_steps`
            isn't given, or if there is nothing to schedule.

    >>> from lightning_l2.schedules import CosineSchedule
    >>> scheduler = WeightDecayScheduler(CosineSchedule(start=1.0, end=10.0))  # as DINO's 0.04 to 0.4
    """

    def __init__(
        self,
        schedule: Schedule | FeedbackSchedule,
        *,
        interval: Literal["step", "epoch"] = "step",
        total_steps: int | None = None,
        values: Literal["multiplier", "weight_decay"] = "multiplier",
    ) -> None:
        check_types(WeightDecayScheduler, locals())
        if interval not in ("step", "epoch"):
            raise ValueError(f"Expected `interval` to be 'step' or 'epoch', got {interval!r}.")
        if values not in ("multiplier", "weight_decay"):
            raise ValueError(f"Expected `values` to be 'multiplier' or 'weight_decay', got {values!r}.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"Expected `total_steps` to be at least 1 or None, got {total_steps!r}.")
        if isinstance(schedule, FeedbackSchedule) and (values != "multiplier" or total_steps or interval != "step"):
            raise ValueError(
                f"{type(schedule).__name__} reads the training itself and gives multipliers: it takes neither "
                "`interval`, `total_steps` nor `values='weight_decay'`."
            )
        self.schedule = schedule
        self.interval = interval
        self.total_steps = total_steps
        self.values = values
        # by the optimizer's number: what the schedule remembers, and the multipliers it gave last
        self._feedback: dict[int, dict[str, Any]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; here, since states are restored after it."""
        if stage == "fit":
            check_alone(trainer, self)
            self._feedback = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set lambda of the first step, after every restore and before any callback reads it."""
        length = 1
        if isinstance(self.schedule, Schedule):
            length = self.total_steps or (total_epochs(trainer) if self.interval == "epoch" else total_steps(trainer))
            _probe(self.schedule, length)
        self._fit = _Fit(bare_optimizers(trainer), length)
        if isinstance(self.schedule, FeedbackSchedule) and self.schedule.reads == "lr":
            self._check_schedule(trainer)  # others read later, when all callbacks have had their say about the groups
        self._apply(trainer, self._index(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set lambda once learning-rate schedulers of interval `epoch` have moved and groups may have been added."""
        self._apply(trainer, self._index(trainer))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set lambda again: other callbacks may have written to the groups meanwhile."""
        if not self._fit.checked:
            self._check(trainer)
        self._apply(trainer, self._index(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Set lambda of schedules that read gradients, which are complete and unscaled only now, and of new groups."""
        if self._fit.waits_for_groups or _has_new(bare_optimizer(optimizer)):
            self._apply(trainer, self._index(trainer))
            self._fit.waits_for_groups = False
        if isinstance(self.schedule, FeedbackSchedule) and self.schedule.reads == "gradients":
            number = optimizer_number(trainer, optimizer)
            if number is not None:
                unscale(trainer, bare_optimizer(optimizer))
                self._read(number, bare_optimizer(optimizer))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set lambda of the coming step, so that whoever reads it at the next batch's start sees it."""
        if self.interval == "step":
            self._apply(trainer, step_index(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set lambda of the coming epoch, or read the metric that the epoch brought."""
        if self.interval == "epoch":
            self._apply(trainer, trainer.current_epoch + 1)
        if isinstance(self.schedule, FeedbackSchedule) and self.schedule.reads == "metric":
            self._observe(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the groups as the user made them."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the groups as the user made them."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return what a feedback schedule remembers; the optimizers' states are taken next, in the user's layout."""
        if self._fit is not None:
            self._fit.hide()
        return {"feedback": copy.deepcopy(self._feedback)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a feedback schedule remembered."""
        self._feedback = copy.deepcopy(state_dict["feedback"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put lambda back, now that the optimizers' states are taken."""
        if self._fit is not None:
            self._fit.show()

    def _release(self) -> None:
        if self._fit is not None:
            self._fit.hide()
            self._fit = None

    def _index(self, trainer: pl.Trainer) -> int:
        return trainer.current_epoch if self.interval == "epoch" else step_index(trainer)

    def _check(self, trainer: Any) -> None:
        """Complain before the first step, once all callbacks have had their say about the groups."""
        optimizers = bare_optimizers(trainer)
        if not optimizers:
            raise MisconfigurationException(
                "WeightDecayScheduler needs an optimizer, and `configure_optimizers` returned none. "
                "Return an optimizer, or remove the callback."
            )
        self._check_schedule(trainer)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        undecided = any(is_lazy(parameter) for group in groups for parameter in group["params"])
        # a rule may say 0 on purpose, as in a sweep; a penalty that follows the schedule has a lambda of its own
        asked_for = any("rule" in group for group in groups)
        asked_for |= any(getattr(callback, "follow_schedule", False) for callback in trainer.callbacks)
        if not undecided and not asked_for and not any(base_weight_decay(group) for group in groups):
            raise MisconfigurationException(
                "WeightDecayScheduler has nothing to schedule: the weight decay of every parameter group is 0. "
                "Give the optimizer a weight_decay, or add the callback WeightDecay(weight_decay=...)."
            )
        self._fit.checked, self._fit.waits_for_groups = True, undecided

    def _check_schedule(self, trainer: pl.Trainer) -> None:
        if isinstance(self.schedule, FeedbackSchedule):
            for optimizer in bare_optimizers(trainer):
                self.schedule.check(optimizer)

    def _apply(self, trainer: pl.Trainer, index: int) -> None:
        if isinstance(self.schedule, FeedbackSchedule):
            for number, optimizer in enumerate(bare_optimizers(trainer)):
                if self.schedule.reads == "lr":
                    self._read(number, optimizer)
                else:
                    self._write_multipliers(number, optimizer)
            return
        value = self.schedule(min(1.0, index / max(1, self._fit.length - 1)))
        groups = [
            group
            for optimizer in bare_optimizers(trainer)
            for group in optimizer.param_groups
            if "weight_decay" in group
        ]
        if self.values == "multiplier":
            for group in groups:
                multiply_weight_decay(group, value)
            return
        strongest = max(map(base_weight_decay, groups), default=0.0)
        for group in groups:
            multiply_weight_decay(group, value, base_weight_decay(group) / strongest if strongest else 0.0)

    def _observe(self, trainer: pl.Trainer) -> None:
        """Let a schedule that reads a metric see the value that the epoch brought, if it brought one."""
        schedule: Any = self.schedule
        value = trainer.callback_metrics.get(schedule.monitor)
        if value is None:
            rank_zero_warn(
                f"{type(schedule).__name__} monitors {schedule.monitor!r}, which is not among the metrics "
                f"{sorted(trainer.callback_metrics)}. Weight decay stays as it is."
            )
            return
        if value is self._fit.observed:
            return  # no validation since: the Trainer keeps the tensor of the last one
        self._fit.observed = value
        metrics = {name: float(metric) for name, metric in trainer.callback_metrics.items()}
        for number, optimizer in enumerate(bare_optimizers(trainer)):
            self._read(number, optimizer, metrics)

    def _read(self, number: int, optimizer: Optimizer, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Ask a feedback schedule for the multipliers of an optimizer's groups, and write them."""
        schedule: Any = self.schedule
        memory = self._feedback.setdefault(number, {"state": {}})
        memory["multipliers"] = schedule.multipliers(optimizer, metrics, memory["state"])
        self._write_multipliers(number, optimizer)

    def _write_multipliers(self, number: int, optimizer: Optimizer) -> None:
        """Write what the schedule gave last.

        A group added since has what the last one has until the schedule is asked again. Where it was not asked yet all
        have 1, so that whoever follows the multipliers finds one.
        """
        multipliers = self._feedback.get(number, {}).get("multipliers") or [1.0]
        late = multipliers[-1:] * (len(optimizer.param_groups) - len(multipliers))
        for group, multiplier in zip(optimizer.param_groups, [*multipliers, *late], strict=False):
            if "weight_decay" in group:
                multiply_weight_decay(group, multiplier)


def _has_new(optimizer: Optimizer) -> bool:
    """Return whether groups were added since the last multiplier was written; they come at the end."""
    last = optimizer.param_groups[-1]
    return "weight_decay" in last and "weight_decay_multiplier" not in last


def _probe(schedule: Schedule, length: int) -> None:
    """Refuse a schedule that would give what no lambda can be, before it costs a training."""
    points = min(length, 1000)
    for index in range(points):
        progress = index / max(1, points - 1)
        value = schedule(progress)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{type(schedule).__name__} gives {value!r} at progress {progress:.3g}; "
                "a multiplier of weight decay has to be finite and at least 0."
            )


@dataclass
class _Fit:
    """What is known of the running fit.

    The schedule's length, whether groups are still to come once lazy parameters have their shape, the value of a metric
    that was read last, and what is hidden while a checkpoint is taken.
    """

    optimizers: list[Optimizer]
    length: int
    checked: bool = False
    waits_for_groups: bool = False
    observed: Tensor | None = None
    hidden: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def hide(self) -> None:
        """Present groups made by hand as the user made them; those made by a rule are presented by who made them."""
        self.show()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "initial_weight_decay" in group and "rule" not in group:
                    self.hidden.append((group, without_multiplier(group)))

    def show(self) -> None:
        """Undo `hide`."""
        for group, keys in self.hidden:
            group.update(keys)
        self.hidden = []
