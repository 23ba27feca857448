"""Lambda over training."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lightning_l2.arguments import check_at_least, check_choice, check_types
from lightning_l2.decay.schedule_checks import pattern_of
from lightning_l2.decay.scheduled import ScheduledDecay
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.schedules.base import Schedule
from lightning_l2.schedules.feedback import FeedbackSchedule
from lightning_l2.sharding import flat_shards
from lightning_l2.trainer.callback import Callback, check_alone
from lightning_l2.trainer.clock import step_index
from lightning_l2.trainer.length import total_epochs, total_steps
from lightning_l2.trainer.metric_watch import MetricWatch
from lightning_l2.trainer.optimizers import bare_optimizer, optimizers_in_use, splits_early, tell_of_gradients, unscale

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.optim import Optimizer


class WeightDecayScheduler(Callback):
    r"""Change lambda over training, in every parameter group of every optimizer, or in some of them.

    With $\lambda_0$ a group's base value, $m$ the schedule, $t$ of $T$ optimizer steps done:

    $$\lambda_t = \lambda_0 \cdot m\left(\frac{t}{T - 1}\right)$$

    Exempt groups, whose base is 0, stay at 0 under every schedule. The first step sees progress 0, the last one 1, and
    every step after that 1. Steps count as those of learning-rate schedulers of interval `step` do: windows of batches,
    the same for all optimizers of a module. It works with `WeightDecay` and on groups made by hand, whose own
    `weight_decay` is the base and stays as it is: `weight_decay_in_force` and `L2NormMonitor` tell lambda.
    Schedules that read gradients do so in steps of `self.optimizers()`, not in those of the bare optimizers.

    A Trainer takes several, each with a schedule for `groups` of its own.

    Args:
        schedule: Multiplier of the base value as a function of progress, or from what training does.
        groups: Regular expression searched for in the names of parameter groups, as in the table and the logs: those
            that are scheduled. None for all.
        interval: Whether lambda changes each optimizer `"step"` or each `"epoch"`.
        total_steps: Length of the schedule in steps, or in epochs for `interval="epoch"`. By default the Trainer's.
        values: What the schedule's values are: a `"multiplier"` of each group's base, or the `"weight_decay"` in the
            place of the configured one, so that a rule with `multiplier=2` has twice that; of groups made by hand, and
            of absolute lambdas alone, in the place of the largest.

    Raises:
        MisconfigurationException: Before the first step, if the length of the training is unknown and `total_steps`
            isn't given, there is nothing to schedule, `groups` takes none, or two schedulers take one.

    >>> from lightning_l2.schedules import CosineSchedule
    >>> scheduler = WeightDecayScheduler(CosineSchedule(start=1.0, end=10.0))  # as DINO's 0.04 to 0.4
    >>> several = [scheduler.state_key, WeightDecayScheduler(CosineSchedule(1.0, 0.0), groups="^muon$").state_key]
    """

    def __init__(
        self,
        schedule: Schedule | FeedbackSchedule,
        *,
        groups: str | None = None,
        interval: Literal["step", "epoch"] = "step",
        total_steps: int | None = None,
        values: Literal["multiplier", "weight_decay"] = "multiplier",
    ) -> None:
        if not isinstance(schedule, Schedule | FeedbackSchedule):
            raise TypeError(
                "Expected `schedule` to be one of `lightning_l2.schedules` or `lightning_l2.adaptive`, such as "
                f"CosineSchedule(start=1.0, end=0.0), got {schedule!r}. Derive one of your own from Schedule."
            )
        check_types(WeightDecayScheduler, locals())
        pattern_of(groups)
        check_choice(("step", "epoch"), interval=interval)
        check_choice(("multiplier", "weight_decay"), values=values)
        check_at_least(1, total_steps=total_steps)
        if isinstance(schedule, FeedbackSchedule) and (values != "multiplier" or total_steps or interval != "step"):
            raise ValueError(
                f"{type(schedule).__name__} reads the training itself and gives multipliers: it takes neither "
                "`interval`, `total_steps` nor `values='weight_decay'`."
            )
        self.schedule = schedule
        self.groups = groups
        self.interval = interval
        self.total_steps = total_steps
        self.values = values
        self._fit: ScheduledDecay | None = None
        # by the optimizer's number: what the schedule remembers, and the multipliers it gave last
        self._feedback: dict[int, dict[str, Any]] = {}

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint, one for each of several schedulers."""
        return super().state_key if self.groups is None else self._generate_state_key(groups=self.groups)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; here, since states are restored after it."""
        if stage == "fit":
            callbacks: list[Any] = getattr(trainer, "callbacks", [])
            patterns = [other.groups for other in callbacks if isinstance(other, WeightDecayScheduler)]
            if None in patterns or patterns.count(self.groups) > 1:
                check_alone(trainer, self, "Keep one WeightDecayScheduler, or give each `groups` of its own.")
            self._feedback = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take down lambda where it has to be written into the groups, before states are restored."""
        if splits_early(trainer):
            for optimizer in optimizers_in_use(trainer):
                decay_groups(optimizer).fix([group.get("weight_decay", 0.0) for group in optimizer.param_groups])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set lambda of the first step, after every restore and before any callback reads it."""
        length = 1
        if isinstance(self.schedule, Schedule):
            length = self.total_steps or (total_epochs(trainer) if self.interval == "epoch" else total_steps(trainer))
            if length == 1 and self.interval == "epoch":
                rank_zero_info(
                    f"WeightDecayScheduler(interval='epoch') has 1 epoch, so lambda stays at its first value, "
                    f"{self.schedule(0.0):g} ({self.values}). Leave `interval` out to change it in each step."
                )
        reads_metric = isinstance(self.schedule, FeedbackSchedule) and self.schedule.reads == "metric"
        metric = getattr(self.schedule, "monitor", None) if reads_metric else None
        self._watch = MetricWatch(metric, type(self.schedule).__name__)
        self._is_checked = False
        self._writes = splits_early(trainer)
        self._fit = ScheduledDecay(
            self.schedule,
            optimizers_in_use(trainer),
            length=length,
            values=self.values,
            groups=self.groups,
            memory=self._feedback,
            writes=self._writes,
            look=partial(self._set, trainer),
            shards=partial(flat_shards, trainer.model or pl_module),
        )
        self._fit.set(self._index(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read a metric that the module logged when the epoch before ended, after the callbacks' own hooks."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._fit is not None and self._watch.epoch_starts(trainer):
            self._observe(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set lambda of the coming step, once learning-rate schedulers have moved, in all groups that there are."""
        if self._fit is not None:
            self._check(trainer)
            self._set(trainer, afresh=False)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain of lazy parameters without decay, too, which have a shape after the first forward pass."""
        self._check(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let schedules read gradients, which are complete and unscaled only now."""
        if self._fit is not None and isinstance(self.schedule, FeedbackSchedule) and self.schedule.reads == "gradients":
            unscale(trainer, bare_optimizer(optimizer))
            tell_of_gradients(trainer, optimizer, self, is_unscaled=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set lambda of the coming step, except where this batch's is still to come, in the module's own hook."""
        if self._fit is not None and self.interval == "step":
            # DeepSpeed's updates call no hooks, but the Trainer counts those that it makes itself
            is_counted = self._writes and pl_module.automatic_optimization
            self._fit.set(step_index(trainer), only_updated=not is_counted)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of the metric before the validation."""
        if self._fit is not None:
            self._watch.validation_starts(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read a metric that the validation brought, also within an epoch."""
        if self._fit is not None and self._watch.validation_ends(trainer):
            self._observe(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set lambda of the coming epoch, or read the metric that the epoch brought."""
        if self._fit is None:
            return
        if self.interval == "epoch":
            self._fit.set(trainer.current_epoch + 1)
        if self._watch.epoch_ends(trainer):
            self._observe(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain of a metric that never came."""
        if self._fit is not None and self._watch.training_ends(trainer):
            self._observe(trainer)

    # Not `state_dict`, of which Lightning wants one a Trainer, and says so in its own words.
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a feedback schedule remembers."""
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"feedback": copy.deepcopy(self._feedback)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what a feedback schedule remembered."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._feedback = copy.deepcopy(state.get("feedback", {}))

    def _set(self, trainer: pl.Trainer, *, afresh: bool = True) -> None:
        if self._fit is not None:
            self._fit.follow(optimizers_in_use(trainer, afresh=afresh))
            self._fit.set(self._index(trainer))

    def _index(self, trainer: pl.Trainer) -> int:
        return trainer.current_epoch if self.interval == "epoch" else step_index(trainer)

    def _check(self, trainer: Any) -> None:
        """Complain before the first step, once all callbacks have had their say about the groups."""
        if self._fit is not None and not self._is_checked:
            # a penalty that follows the schedule has a lambda of its own
            is_followed = any(getattr(callback, "follow_schedule", False) for callback in trainer.callbacks)
            self._is_checked = self._fit.check(is_followed=is_followed)

    def _observe(self, trainer: pl.Trainer) -> None:
        if self._fit is not None:
            self._fit.observe({name: float(metric) for name, metric in trainer.callback_metrics.items()})
