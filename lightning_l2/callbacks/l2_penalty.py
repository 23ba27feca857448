"""The L2 penalty in the objective itself, beside any optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_l2.arguments import check_at_least, check_types
from lightning_l2.convert.conversion import Conversion
from lightning_l2.decay.penalty import L2Objective, Penalised
from lightning_l2.decay.start import StartDevice, Towards, WatchedStart, check_start, expect_start
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.rules.assign import assign_rules, check_without_optimizers, resolve_rules, rules_by_parameter
from lightning_l2.rules.parameters import is_undecided
from lightning_l2.rules.rule import DecayRule, check_weight_decay
from lightning_l2.sharding import flat_shards
from lightning_l2.trainer.callback import IdleWatch
from lightning_l2.trainer.clock import ends_step, is_first_batch_of_step
from lightning_l2.trainer.length import training_setup
from lightning_l2.trainer.logging import is_logging_step, log_metrics
from lightning_l2.trainer.monitored import MonitoredCallback
from lightning_l2.trainer.optimizers import bare_optimizers, optimizers_in_use, splits_early, tell_of_gradients
from lightning_l2.trainer.restoring import before_restoring

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer


class L2Penalty(MonitoredCallback):
    r"""Train on $J(w) + \frac{\lambda}{2} \lVert w \rVert_2^2$, whatever the optimizer does with `weight_decay`.

    Or on $J(w) + \frac{\lambda}{2} \lVert w - w_0 \rVert_2^2$, with the weights $w_0$ that training began with.

    The gradient $\lambda w$ joins that of the loss once per optimizer step, however many batches a step accumulates:
    after unscaling and before clipping, which both see the whole objective. There is no autograd graph and no copy.
    The 1/2 makes $\lambda$ the one of torch's `weight_decay`; for SGD without clipping both are the same thing.

    Parameters without a gradient take no step and get no penalty. Under manual optimization it acts within
    `optimizer.step()`, so after clipping that the module does itself. Optimizers that look at the loss, as a line
    search does, get it with the penalty.

    Logged at the Trainer's cadence, and in `trainer.callback_metrics` from the first step of a fit on:

    | key | value |
    |---|---|
    | `l2_penalty/loss` | the penalty of the weights that the step starts from |
    | `l2_penalty/loss/<rule>` | its part from each rule, if several rules have one |
    | `l2_penalty/objective` | with `log_objective`: the loss of the step's batches, on this process, and the penalty |

    Args:
        weight_decay: Lambda, dimensionless, or what it follows from (`lightning_l2.convert`).
        rules: A preset's name, or rules in order: the first that matches a parameter decides.
        towards: What the penalty pulls the weights towards whose rule doesn't say: `"zero"`, or the `"start"` (L2-SP).
        start_device: As of `WeightDecay`.
        follow_schedule: Multiply lambda with the multiplier that `WeightDecayScheduler` gives the parameter's group.
        log_objective: Also log the whole objective; for automatic optimization.
        every_n_steps: Log every so many optimizer steps; None is the Trainer's `log_every_n_steps`, 0 never.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: Before the first step, if there is no gradient to join.

    Source: Hoerl, Kennard, Ridge Regression, 1970; Krogh, Hertz, A Simple Weight Decay Can Improve Generalization,
    1991.

    >>> callback = L2Penalty(1e-4, rules=[DecayRule("head", pattern=r"^head\.", multiplier=0.1), "default"])
    """

    def __init__(
        self,
        weight_decay: float | Conversion,
        *,
        rules: str | list[DecayRule | str] = "default",
        towards: Towards = "zero",
        start_device: StartDevice = "same",
        follow_schedule: bool = False,
        log_objective: bool = False,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.rules = resolve_rules(rules)
        check_types(L2Penalty, locals() | {"rules": self.rules})
        if not isinstance(weight_decay, Conversion):
            check_weight_decay(weight_decay, "L2Penalty's `weight_decay`")
        check_at_least(0, every_n_steps=every_n_steps)
        check_without_optimizers(self.rules, "L2Penalty")
        check_start(towards, self.rules, start_device)
        self.weight_decay = weight_decay
        self.towards = towards
        self.start_device = start_device
        self.follow_schedule = follow_schedule
        self.log_objective = log_objective
        self.every_n_steps = every_n_steps
        self._fit: _Fit | None = None
        self._start: WatchedStart | None = None
        # of the start, for checkpoints
        self._start_norms: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See the weights that training begins with, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._release()
        self._start_norms = {}
        if check_start(self.towards, self.rules, self.start_device):
            self._start = expect_start(pl_module, partial(before_restoring, trainer, pl_module), self.start_device)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain before the sanity check costs time."""
        if splits_early(trainer):
            raise MisconfigurationException(
                "L2Penalty can't reach the gradients, which DeepSpeed keeps to itself. Use WeightDecay instead."
            )
        if _count(trainer) > 1:
            raise MisconfigurationException(
                "The Trainer has several L2Penalty callbacks, whose penalties would add up. Keep one, with `rules`."
            )
        if not bare_optimizers(trainer):
            raise MisconfigurationException(
                "L2Penalty needs an optimizer, and `configure_optimizers` returned None. "
                "Return an optimizer, or remove the callback."
            )
        if self.log_objective and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "L2Penalty(log_objective=True) needs automatic optimization, where a step has one loss. "
                "Set log_objective=False; `l2_penalty/loss` is logged anyway."
            )
        if not is_undecided(pl_module):
            assign_rules(pl_module, self.rules, trainer.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide on every parameter; lazy ones have to wait for their shape."""
        super().on_train_start(trainer, pl_module)
        self._idle = IdleWatch(trainer)
        optimizers = optimizers_in_use(trainer)
        follow = partial(self._follow, trainer, pl_module)
        self._fit = _Fit(L2Objective(optimizers, follow_schedule=self.follow_schedule, look=follow))
        if not is_undecided(pl_module):
            self._decide(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Decide on parameters that came late; measure a logged step's weights, with which its loss is computed."""
        if self._fit is None:
            return
        self._follow(trainer, pl_module, afresh=False)
        if self._fit.is_decided and is_first_batch_of_step(trainer):
            self._prepare_step(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Decide on lazy parameters, which have a shape after the first forward pass."""
        if self._fit is not None and not self._fit.is_decided and not is_undecided(pl_module):
            self._decide_late(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Join the gradients here: they are complete and unscaled, and not clipped yet."""
        if self._fit is None:
            return
        if not self._fit.is_decided:
            self._decide_late(trainer, pl_module)
        self._follow(trainer, pl_module, afresh=False)
        tell_of_gradients(trainer, optimizer, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log once the step is done."""
        if self._fit is None:
            return
        self._idle.count(trainer, batch)
        if self._fit.is_decided and not self._fit.is_told:
            # Not earlier: every callback may write to the groups when training starts, or decide on lazy layers late.
            self._fit.is_told = True
            _warn_of_double_decay(self._fit.objective.decayed_twice())
        if not self._fit.objective.is_measured:
            return
        if self.log_objective and isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._fit.objective.add_loss(outputs["loss"])
        if ends_step(trainer):
            metrics, is_logged = self._fit.objective.metrics(), is_logging_step(trainer, self.every_n_steps)
            log_metrics(trainer, metrics if is_logged else {}, monitor=self._offer(metrics, is_logged=is_logged))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have values ready for callbacks that monitor them, also within the first accumulation window."""
        if (
            self._fit is not None
            and self._fit.objective.is_measured
            and "l2_penalty/loss" not in trainer.callback_metrics
        ):
            metrics = self._fit.objective.peek(trainer.accumulate_grad_batches)
            log_metrics(trainer, {}, monitor=self._offer(metrics, is_logged=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice that nothing of it acted."""
        if self._fit is not None:
            self._idle.end(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the norms of the start, to tell it from another one."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._start_norms:
            state = checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, {})
            state["start"] = dict(self._start_norms)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the start with that of the training that goes on."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._start is not None:
            self._start.resume(checkpoint.get("callbacks", {}).get(self.state_key, {}).get("start", {}))

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, afresh: bool = True) -> None:
        """Go over to optimizers that were set up anew, and decide on parameters that are new."""
        if (
            self._fit is not None
            and self._fit.objective.follow(optimizers_in_use(trainer, afresh=afresh)) | self._fit.is_outdated()
        ):
            self._decide(trainer, pl_module)

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is None:
            return
        optimizers = optimizers_in_use(trainer)
        groups = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
        entries = rules_by_parameter(pl_module, self.rules, trainer.model)
        if groups.keys().isdisjoint(id(param) for _, param, _ in entries):
            raise MisconfigurationException(
                "L2Penalty found none of the module's parameters in its optimizers, which would train something else. "
                "Build them in `configure_optimizers` from `self.parameters()`."
            )
        bases = [self._base(trainer, groups.get(id(param), next(iter(groups.values())))) for _, param, _ in entries]
        if isinstance(self.weight_decay, Conversion):
            values = ", ".join(f"{base:g}" for base in sorted(set(bases)))
            rank_zero_info(f"L2Penalty: {self.weight_decay} is {values}.")
        penalised = {}
        for (name, param, rule), base in zip(entries, bases, strict=True):
            weight_decay = rule.resolve(base)
            start = self._start_of(param, rule) if weight_decay and id(param) in groups else None
            penalised[id(param)] = Penalised(name, rule.name, weight_decay, start)
        if self._start is not None:
            self._start_norms = self._start.norms(pl_module, trainer.model)
        self._fit.objective.penalise(penalised, flat_shards(trainer.model or pl_module))
        self._fit.is_decided = True
        self._fit.is_outdated()

    def _decide_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decide(trainer, pl_module)
        self._prepare_step(trainer)

    def _base(self, trainer: pl.Trainer, group: dict[str, Any]) -> float:
        conversion = self.weight_decay
        return conversion(training_setup(trainer, group)) if isinstance(conversion, Conversion) else conversion

    def _start_of(self, param: Tensor, rule: DecayRule) -> Tensor | None:
        if self._start is None or (rule.towards or self.towards) != "start":
            return None
        return self._start.of(param)

    def _prepare_step(self, trainer: pl.Trainer) -> None:
        fit = self._fit
        if fit is None:
            return
        fit.steps += 1
        if fit.steps == 1:
            self._check_schedule(optimizers_in_use(trainer))
        if is_logging_step(trainer, self.every_n_steps) or (fit.steps == 1 and self.every_n_steps != 0):
            fit.objective.measure()

    def _check_schedule(self, optimizers: list[Optimizer]) -> None:
        if self.follow_schedule and not any(decay_groups(optimizer).is_scheduled for optimizer in optimizers):
            raise MisconfigurationException(
                "L2Penalty(follow_schedule=True) has nothing to follow: no parameter group has a multiplier. "
                "Add the callback WeightDecayScheduler, or set follow_schedule=False."
            )


@dataclass
class _Fit:
    """What is known of the running fit."""

    objective: L2Objective
    is_decided: bool = False
    is_told: bool = False
    steps: int = 0
    groups: tuple[int, ...] = ()

    def is_outdated(self) -> bool:
        """Return whether groups or their parameters have changed since the last call."""
        before, self.groups = self.groups, self.objective.version()
        return self.is_decided and before != self.groups

    def remove(self) -> None:
        """Leave the optimizers alone."""
        self.objective.remove()


def _warn_of_double_decay(names: list[str]) -> None:
    if names:
        rank_zero_warn(
            f"L2Penalty penalises {len(names)} parameters that their optimizer decays as well, such as "
            f"{', '.join(map(repr, names[:3]))}: they shrink twice. Set the optimizer's `weight_decay` to 0 (AdamW's "
            "default is 0.01), or give L2Penalty rules that leave them out."
        )


def _count(trainer: Any) -> int:
    return sum(isinstance(callback, L2Penalty) for callback in trainer.callbacks)
