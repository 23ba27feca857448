"""Weight decay per parameter group, on an unmodified module and its own optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_l2.arguments import check_types
from lightning_l2.callbacks.trainer_access import (
    Callback,
    bare_optimizer,
    bare_optimizers,
    check_alone,
    lr_schedulers,
    on_optimizers_configured,
    remember_groups_in_finetuning,
    splits_early,
    unscales_in_step,
)
from lightning_l2.callbacks.training_length import training_setup
from lightning_l2.convert import Conversion
from lightning_l2.decay import Apply, attach_decay, check_groups, check_options
from lightning_l2.decay_in_force import DecayInForce
from lightning_l2.decay_rule import check_weight_decay
from lightning_l2.param_groups import base_weight_decay
from lightning_l2.parameters import is_undecided
from lightning_l2.regrouping import Regrouping
from lightning_l2.resuming import OnResume, Resuming, rewrite
from lightning_l2.rules import DecayRule, assign_rules, resolve_rules
from lightning_l2.summary import GroupSummary, print_table, table, write_csv

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import lightning.pytorch as pl
    from torch.optim import Optimizer


class WeightDecay(Callback):
    r"""Give each parameter its own weight decay by rules, whatever optimizer the module has.

    Minimises $J(w) + \frac{\lambda}{2} \lVert w \rVert_2^2$ or one of its relatives (`apply`). The 1/2 makes $\lambda$
    exactly torch's `weight_decay`: the gradient is $\lambda w$. A loss term `lambda * norm ** 2` is twice as strong.

    The optimizer's groups are split in place when training starts and given back when it ends; checkpoints keep the
    user's own layout, so they resume with and without this callback.

    Args:
        weight_decay: Base lambda, or what it follows from (`lightning_l2.convert`). None keeps each group's own.
        rules: A preset's name, or rules in order: the first that matches a parameter decides.
        apply: How lambda acts: the `"optimizer"`'s own way, `"coupled"`, `"decoupled"`, `"independent"` of the learning
            rate, or `"cautious"`; see `lightning_l2.decay`.
        on_resume: Whose lambda holds after a resume: that of the `"config"` or of the `"checkpoint"`; or an `"error"`
            if they differ.
        summary: Print a table of the groups when training starts, or of all `"parameters"`.
        summary_file: CSV file to write the table of all parameters to.
        before_clipping: For `apply="coupled"`: let lambda w join the gradient before it is clipped.
        peak_lr: For `apply="independent"`: keep the shape of the learning-rate schedule, lambda * lr / peak_lr;
            `"initial"` takes each group's own peak.
        lr_scheduler_attributes: For lists of learning-rate schedulers of other libraries, by attribute: whether they
            hold one value a parameter group.

    Raises:
        ValueError: If an argument is out of its range; before the first step, if rules don't fit the module, or ask for
            what the optimizer or a learning-rate scheduler can't take.
        MisconfigurationException: Before the first step, if there is nothing to decay, or no way to.

    Source: Loshchilov, Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, 2019.

    >>> callback = WeightDecay(0.05, rules=[DecayRule("head", pattern=r"^head\.", weight_decay=0.1), "default"])
    """

    def __init__(
        self,
        weight_decay: float | Conversion | None = None,
        *,
        rules: str | list[DecayRule | str] = "default",
        apply: Apply = "optimizer",
        on_resume: OnResume = "config",
        summary: bool | Literal["parameters"] = True,
        summary_file: str | Path | None = None,
        before_clipping: bool = False,
        peak_lr: float | Literal["initial"] | None = None,
        lr_scheduler_attributes: dict[str, bool] | None = None,
    ) -> None:
        self.rules = resolve_rules(rules)
        check_types(WeightDecay, locals() | {"rules": self.rules})
        if weight_decay is not None and not isinstance(weight_decay, Conversion):
            check_weight_decay(weight_decay, "WeightDecay's `weight_decay`")
        if summary not in (True, False, "parameters"):
            raise ValueError(f"Expected `summary` to be True, False or 'parameters', got {summary!r}.")
        check_options(apply, before_clipping, peak_lr)
        self.weight_decay = weight_decay
        self.apply = apply
        self.on_resume = on_resume
        self.print_summary = summary
        self.summary_file = summary_file
        self.before_clipping = before_clipping
        self.peak_lr = peak_lr
        self.lr_scheduler_attributes = dict(lr_scheduler_attributes or {})
        self._summary: list[GroupSummary] | None = None
        self._resuming = Resuming(on_resume)
        # base lambda by parameter name
        self._weight_decay: dict[str, float] = {}

    def summary(self) -> list[GroupSummary]:
        """Return what was decided in the last fit, one entry a parameter group.

        Raises:
            RuntimeError: If no fit has begun.
        """
        if self._summary is None:
            raise RuntimeError(
                "WeightDecay knows the parameter groups once a fit has begun. To see what rules decide on a module "
                "before, use lightning_l2.assign_rules."
            )
        return self._summary

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the checkpoint of an earlier fit; here, since states are restored after it."""
        if stage != "fit":
            return
        check_alone(trainer, self)
        self._release()
        self._resuming = Resuming(self.on_resume)
        if splits_early(trainer):
            on_optimizers_configured(pl_module, lambda *configured: self._begin_early(trainer, pl_module, *configured))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain about rules before the sanity check costs time."""
        if splits_early(trainer):
            self._check_early()
            return
        optimizers = bare_optimizers(trainer)
        self._resuming.take_down(optimizers)
        if not optimizers:
            raise MisconfigurationException(
                "WeightDecay needs an optimizer, and `configure_optimizers` returned none. "
                "Return an optimizer, or remove the callback."
            )
        if not is_undecided(pl_module):
            assign_rules(pl_module, self.rules, trainer.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Split the groups after every restore; lazy parameters have to wait for their shape."""
        if splits_early(trainer):
            self._reassert(trainer)
        else:
            self._begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow what was done to the groups before anyone reads them, as LearningRateMonitor does."""
        self._follow(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Follow what callbacks that come later did to the groups when the epoch started."""
        self._follow(trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Split groups of lazy parameters, which have a shape after the first forward pass."""
        if self._fit.groups is None and not is_undecided(pl_module):
            self._decide_late(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Couple before clipping; split what a batch added, and lazy groups where a module calls `backward` itself."""
        if self._fit.groups is None:
            self._decide_late(trainer, pl_module)
        self._fit.show()
        if self._fit.groups.has_new:
            self._split(trainer)
        # a fused optimizer unscales gradients in its own step, and adds lambda w there
        if self.before_clipping and not unscales_in_step(trainer, bare_optimizer(optimizer)):
            self._fit.couple(bare_optimizer(optimizer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizers as the user made them."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as the user made them."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the base lambdas; the optimizers' states are taken next, in the user's own layout."""
        if self._fit is not None:
            self._fit.hide()
        return {"weight_decay": dict(self._weight_decay)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the checkpoint's base lambdas, for `on_resume`; the optimizers' states come next.

        Tuners restore in the middle of a fit, too, and the states are in the user's own layout.
        """
        if self._fit is not None and self._fit.is_given_back:
            self._release()
        self._resuming.restored = dict(state_dict["weight_decay"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Put the groups back, now that the optimizers' states are taken."""
        if self._fit is not None:
            self._fit.show()

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit = DecayInForce(lambda: remember_groups_in_finetuning(trainer, pl_module))
        if not is_undecided(pl_module):
            self._decide(trainer, pl_module, bare_optimizers(trainer), lambda: lr_schedulers(trainer))
        # In any case now: what is attached within a step acts from the next one on.
        for optimizer in bare_optimizers(trainer) if self.apply != "optimizer" else ():
            handle = attach_decay(optimizer, self.apply, before_clipping=self.before_clipping, peak_lr=self.peak_lr)
            self._fit.attach(optimizer, handle)

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Split groups that were added late, and let siblings share what was written to one, as finetuning does.

        Split all of them again where a tuner restored the optimizer in the middle of a fit.
        """
        if self._fit is None:
            self._begin(trainer, pl_module)
        if self._fit.groups is None:
            return
        self._fit.show()
        self._fit.groups.align()
        if self._fit.groups.has_new:
            self._split(trainer)

    def _decide(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizers: list[Optimizer],
        schedulers: Callable[[], list[Any]],
    ) -> None:
        def weight_decay_of(name: str, rule: DecayRule, group: Mapping[str, Any]) -> float:
            base: float | Conversion = base_weight_decay(group) if self.weight_decay is None else self.weight_decay
            base = base(training_setup(trainer, group)) if isinstance(base, Conversion) else base
            return self._resuming.choose(name, rule.resolve(base))

        self._fit.groups = Regrouping(
            pl_module, optimizers, schedulers, self.rules, weight_decay_of, self.lr_scheduler_attributes, trainer.model
        )
        self._resuming.undo_restored(optimizers)
        for optimizer in optimizers:
            self._check_takes_decay(optimizer)
        self._split(trainer)
        self._tell_differences()

    def _decide_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decide(trainer, pl_module, bare_optimizers(trainer), lambda: lr_schedulers(trainer))
        for optimizer in bare_optimizers(trainer):
            check_groups(optimizer, self.apply, self.peak_lr)

    def _begin_early(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizers: list[Optimizer], schedulers: list[Any]
    ) -> None:
        """Split the groups before the strategy takes the optimizer over; it keeps them so, in checkpoints too."""
        if self.apply != "optimizer":
            raise MisconfigurationException(
                f"WeightDecay(apply={self.apply!r}) can't reach the step of an optimizer that DeepSpeed takes over. "
                "Use apply='optimizer' with an optimizer that decays in the way you want."
            )
        self._fit = DecayInForce(lambda: remember_groups_in_finetuning(trainer, pl_module), is_given_back=False)
        self._decide(trainer, pl_module, optimizers, lambda: schedulers)

    def _check_early(self) -> None:
        if self._fit is None:
            raise MisconfigurationException(
                "DeepSpeed did not ask for `configure_optimizers`, since its own configuration has a section "
                "'optimizer', and WeightDecay can't reach the parameter groups of that one. Remove the section."
            )

    def _reassert(self, trainer: pl.Trainer) -> None:
        """Write lambda again: a strategy that took the optimizer over restores it with the checkpoint's values."""
        self._weight_decay = {name: self._resuming.choose(name, value) for name, value in self._weight_decay.items()}
        self._tell_differences()
        groups = [group for optimizer in bare_optimizers(trainer) for group in optimizer.param_groups]
        self._summary = rewrite(groups, self.summary(), self._weight_decay)

    def _split(self, trainer: pl.Trainer) -> None:
        self._fit.groups.split_new()
        self._weight_decay = self._fit.groups.weight_decay()
        self._summary = self._fit.groups.summary()
        if trainer.is_global_zero:
            if self.print_summary:
                print_table(*table(self._summary, per_parameter=self.print_summary == "parameters"))
            if self.summary_file is not None:
                _write(self.summary_file, self._summary)

    def _check_takes_decay(self, optimizer: Optimizer) -> None:
        missing = any("weight_decay" not in group for group in optimizer.param_groups)
        if missing and self.apply == "optimizer":
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has no weight decay of its own. "
                "Use WeightDecay(apply='decoupled') or apply='coupled', which work with any optimizer."
            )
        if missing and self.weight_decay is None:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has no weight decay of its own to keep. Give WeightDecay a `weight_decay`."
            )

    def _tell_differences(self) -> None:
        """Say or refuse that the configuration differs from the checkpoint."""
        message = self._resuming.differences()
        if message and self.on_resume == "error":
            raise MisconfigurationException(f"{message}. Set on_resume to 'config' or 'checkpoint' to say whose holds.")
        if message:
            rank_zero_info(f"{message}. The {self.on_resume}'s holds (on_resume={self.on_resume!r}).")

    def _release(self) -> None:
        if self._fit is not None:
            self._fit.release()
            self._fit = None


def _write(path: str | Path, summary: list[GroupSummary]) -> None:
    try:
        write_csv(path, summary)
    except OSError as error:
        raise MisconfigurationException(
            f"WeightDecay can't write its `summary_file` {str(path)!r} ({error}). Give the path of a file."
        ) from error
