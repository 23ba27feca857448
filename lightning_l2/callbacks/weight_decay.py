"""Weight decay per parameter group, on an unmodified module and its own optimizers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_l2.arguments import check_choice, check_types
from lightning_l2.convert.conversion import Conversion
from lightning_l2.decay.attach import Apply, check_options
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.decay.early import EarlySplit
from lightning_l2.decay.rounding import Rounding
from lightning_l2.decay.start import StartDevice, Towards, WatchedStart, check_start, expect_start
from lightning_l2.param_groups.resume import OnResume, Resuming
from lightning_l2.param_groups.summary import GroupSummary, print_table, table, write_csv
from lightning_l2.rules.assign import decayed_exemptions, resolve_rules
from lightning_l2.rules.parameters import is_undecided
from lightning_l2.rules.rule import DecayRule, check_weight_decay
from lightning_l2.trainer.callback import Callback, IdleWatch, check_alone, global_seed
from lightning_l2.trainer.length import known_steps, training_setup
from lightning_l2.trainer.optimizers import (
    bare_optimizers,
    on_optimizers_configured,
    optimizers_in_use,
    splits_early,
    tell_of_gradients,
)
from lightning_l2.trainer.restoring import before_restoring

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import lightning.pytorch as pl
    from torch.optim import Optimizer


class WeightDecay(Callback):
    r"""Give each parameter its own weight decay by rules, whatever optimizer the module has.

    Minimises $J(w) + \frac{\lambda}{2} \lVert w \rVert_2^2$ or one of its relatives (`apply`). The 1/2 makes $\lambda$
    exactly torch's `weight_decay`: the gradient is $\lambda w$. A loss term $\lambda \lVert w \rVert^2$ has twice that.

    `optimizer.param_groups` stays as the user made it, in every hook and every checkpoint; lambda is put into it while
    the optimizer updates, and only then. `weight_decay_in_force` and the logs of `L2NormMonitor` tell it.

    Args:
        weight_decay: Base lambda, or what it follows from (`lightning_l2.convert`). None keeps each group's own.
        rules: A preset's name, or rules in order: the first that matches a parameter decides.
        apply: How lambda acts: the `"optimizer"`'s own way, `"coupled"`, `"decoupled"`, `"independent"` of the learning
            rate, or `"cautious"`; see `lightning_l2.decay`.
        rounding: How decay is rounded to the number format of the weights: to the `"nearest"`, as torch does, or so
            that small decay is not lost in bf16 and fp16, `"accumulate"` or `"stochastic"`; see
            `lightning_l2.decay.rounding`. Random numbers are seeded with that of `seed_everything`.
        towards: What the weights decay towards whose rule doesn't say: `"zero"`, or the `"start"`, those that training
            began with (L2-SP). They are copied, and found again after a resume if the module is made as it was.
        start_device: Where the copy is: on the `"same"` device as the weights, or on the `"cpu"`.
        on_resume: Whose lambda holds after a resume: that of the `"config"` or of the `"checkpoint"`; or an `"error"`
            if they differ.
        summary: Print a table of the groups when training starts, or of all `"parameters"`.
        summary_file: CSV file to write the table of all parameters to.
        before_clipping: For `apply="coupled"`: let lambda w join the gradient before it is clipped.
        peak_lr: For `apply="independent"`: keep the shape of the learning-rate schedule, lambda * lr / peak_lr;
            `"initial"` takes each group's own peak.

    Raises:
        ValueError: If an argument is out of its range; before the first step, if rules don't fit the module, or ask for
            what the optimizer can't take.
        TypeError: Before the first step, if an optimizer's steps can't be reached.
        MisconfigurationException: Before the first step, if there is nothing to decay, or no way to.

    Source: Loshchilov, Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, 2019; for `towards="start"` Li,
    Grandvalet, Davoine, Explicit Inductive Bias for Transfer Learning, arXiv 1802.01483, 2018.

    >>> callback = WeightDecay(0.05, rules=[DecayRule("head", pattern=r"^head\.", weight_decay=0.1), "default"])
    """

    def __init__(
        self,
        weight_decay: float | Conversion | None = None,
        *,
        rules: str | list[DecayRule | str] = "default",
        apply: Apply = "optimizer",
        rounding: Rounding = "nearest",
        towards: Towards = "zero",
        start_device: StartDevice = "same",
        on_resume: OnResume = "config",
        summary: bool | Literal["parameters"] = True,
        summary_file: str | Path | None = None,
        before_clipping: bool = False,
        peak_lr: float | Literal["initial"] | None = None,
    ) -> None:
        self.rules = resolve_rules(rules)
        check_types(WeightDecay, locals() | {"rules": self.rules})
        if weight_decay is not None and not isinstance(weight_decay, Conversion):
            check_weight_decay(weight_decay, "WeightDecay's `weight_decay`")
        check_choice((True, False, "parameters"), summary=summary)
        check_start(towards, self.rules, start_device)
        check_options(apply, before_clipping, peak_lr, rounding)
        self.weight_decay = weight_decay
        self.apply = apply
        self.rounding = rounding
        self.towards = towards
        self.start_device = start_device
        self.on_resume = on_resume
        self.print_summary = summary
        self.summary_file = summary_file
        self.before_clipping = before_clipping
        self.peak_lr = peak_lr
        self._fit: RuleDecay | None = None
        self._start: WatchedStart | None = None
        self._early: EarlySplit | None = None
        self._summary: list[GroupSummary] | None = None
        self._version: list[int] = []
        self._resuming = Resuming(on_resume)
        # of a checkpoint, and for checkpoints that are made after a fit, what `RuleDecay` needs
        self._restored: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
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
        check_alone(trainer, self, "Keep one, and put both into one list of rules: WeightDecay(rules=[...]).")
        self._release()
        self._resuming, self._restored, self._state = Resuming(self.on_resume), {}, {}
        if check_start(self.towards, self.rules, self.start_device):
            self._start = expect_start(pl_module, partial(before_restoring, trainer, pl_module), self.start_device)
        if splits_early(trainer):
            on_optimizers_configured(pl_module, partial(self._split_early, trainer, pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complain about rules before the sanity check costs time."""
        if splits_early(trainer):
            self._check_early()
            return
        optimizers = optimizers_in_use(trainer)
        self._resuming.take_down(bare_optimizers(trainer))
        if not optimizers:
            raise MisconfigurationException(
                "WeightDecay needs an optimizer, and `configure_optimizers` returned none. "
                "Return an optimizer, or remove the callback."
            )
        if not is_undecided(pl_module):
            _warn_of_decayed(decayed_exemptions(pl_module, self.rules, trainer.model, bare_optimizers(trainer)))
        if self.weight_decay and not any(rule.follows_base for rule in self.rules):
            given = ", ".join(f"{rule.resolve(0.0):g} by {rule.name!r}" for rule in self.rules)
            rank_zero_info(
                f"WeightDecay's weight_decay={self.weight_decay} acts on nothing, since no rule multiplies it. They "
                f"give {given}."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide after every restore; lazy parameters have to wait for their shape."""
        if self._early is not None:
            self._early.begin(bare_optimizers(trainer))
            self._summary = None
            return
        self._fit = RuleDecay(
            pl_module,
            optimizers_in_use(trainer),
            self._base(trainer),
            rules=self.rules,
            apply=self.apply,
            before_clipping=self.before_clipping,
            peak_lr=self.peak_lr,
            rounding=self.rounding,
            seed=global_seed(),
            towards=self.towards,
            start=self._start,
            resuming=self._resuming,
            users=bare_optimizers(trainer),
            root=trainer.model,
            look=partial(self._follow, trainer),
        )
        self._fit.load_state_dict(self._restored)
        self._idle = IdleWatch(trainer)
        self._summary, self._version = None, self._fit.version

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what was decided, now that all schedules have begun."""
        super().on_train_epoch_start(trainer, pl_module)
        decided = self._early or self._fit
        if self._summary is None and decided is not None and decided.is_decided:
            self._show(trainer, decided)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Follow optimizers that were set up anew, and groups that changed since."""
        self._follow(trainer, afresh=False)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Decide on lazy parameters, which have a shape after the first forward pass."""
        if self._fit is not None and not self._fit.is_decided:
            self._follow(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Couple before clipping; decide on lazy parameters where a module calls `backward` itself."""
        if self._fit is None:
            return
        if not self._fit.is_decided:
            self._follow(trainer)
        if self.before_clipping:
            tell_of_gradients(trainer, optimizer, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notice that nothing of it acts, as where a wrapper never steps the optimizer that was found in it."""
        if self._fit is not None:
            self._idle.count(trainer, batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice the same at the end of a short training, and say what decay has left."""
        if self._fit is None:
            return
        self._idle.end(trainer)
        left = {name: left for name, left in self._fit.left().items() if left != 1}
        if self.print_summary and left:
            shares = ", ".join(f"{left:.3g} of {name!r}" for name, left in left.items())
            rank_zero_info(f"Weight decay by itself has left of the weights: {shares}.")

    # Not `state_dict`, of which Lightning wants one a Trainer, and says so in its own words.
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the base lambdas, and what else a resumed training needs."""
        if self._fit is not None and self._fit.is_decided:
            self._weight_decay = self._fit.weight_decay()
        state = self._state if self._fit is None else self._fit.state_dict()
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"weight_decay": dict(self._weight_decay), **state}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the checkpoint's base lambdas, for `on_resume`, if it was made with this callback."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        self._resuming.has_restored = True
        self._resuming.restored = None if state is None else dict(state["weight_decay"])
        self._restored = state or {}
        if self._start is not None:
            self._start.resume()

    def _follow(self, trainer: pl.Trainer, *, afresh: bool = True) -> None:
        if self._fit is None:
            return
        decided = not self._fit.is_decided and self._fit.decide()
        has_others = self._fit.follow(optimizers_in_use(trainer, afresh=afresh), bare_optimizers(trainer))
        if (has_others or decided or self._fit.version != self._version) and self._fit.is_decided:
            self._show(trainer, self._fit)

    def _show(self, trainer: pl.Trainer, decided: RuleDecay | EarlySplit) -> None:
        """Say what was decided, if it is something else than before."""
        self._weight_decay, summary = decided.weight_decay(), decided.summary(known_steps(trainer))
        self._version = decided.version
        self._tell_differences()
        known, self._summary = self._summary, summary
        if not trainer.is_global_zero or known == summary:
            return
        for text in decided.warnings(summary):
            rank_zero_warn(text)
        if self.print_summary:
            print_table(*table(summary, per_parameter=self.print_summary == "parameters"))
            for row in summary:
                if row.outlook is not None and (remark := row.outlook.remark()):
                    rank_zero_info(remark)
        if self.summary_file is not None:
            _write(self.summary_file, summary)

    def _base(self, trainer: pl.Trainer) -> float | Callable[[Mapping[str, Any]], float] | None:
        conversion = self.weight_decay
        if isinstance(conversion, Conversion):
            return lambda group: conversion(training_setup(trainer, group))
        return conversion

    def _split_early(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizers: list[Optimizer],
        schedulers: list[Any],
    ) -> None:
        """Split the groups for good before the strategy takes the optimizer over."""
        if self.apply != "optimizer":
            raise MisconfigurationException(
                f"WeightDecay(apply={self.apply!r}) can't reach the step of an optimizer that DeepSpeed takes over. "
                "Use apply='optimizer' with an optimizer that decays in the way you want."
            )
        base = self._base(trainer)
        given = base if callable(base) else lambda group: base
        self._early = EarlySplit(pl_module, optimizers, given, self.rules, self._resuming, schedulers)

    def _check_early(self) -> None:
        if self._early is None:
            raise MisconfigurationException(
                "DeepSpeed did not ask for `configure_optimizers`, since its own configuration has a section "
                "'optimizer', and WeightDecay can't reach the parameter groups of that one. Remove the section."
            )

    def _tell_differences(self) -> None:
        """Say or refuse that the configuration differs from the checkpoint."""
        message = self._resuming.differences()
        if message and self.on_resume == "error":
            raise MisconfigurationException(f"{message}. Set on_resume to 'config' or 'checkpoint' to say whose holds.")
        if message:
            rank_zero_info(f"{message}. The {self.on_resume}'s holds (on_resume={self.on_resume!r}).")

    def _release(self) -> None:
        self._early = None
        if self._fit is not None:
            self._state = self._fit.state_dict()
        super()._release()


def _warn_of_decayed(names_by_rule: Mapping[str, list[str]]) -> None:
    if names_by_rule:
        told = [f"{rule!r} ({len(names)}, such as {names[0]!r})" for rule, names in names_by_rule.items()]
        rank_zero_warn(
            f"{sum(map(len, names_by_rule.values()))} parameters that the default exempts decay by the rules "
            f"{', '.join(told)}. Put the preset 'exempt' before them, rules=['exempt', ...], to leave biases and "
            "normalisations alone."
        )


def _write(path: str | Path, summary: list[GroupSummary]) -> None:
    try:
        write_csv(path, summary)
    except OSError as error:
        raise MisconfigurationException(
            f"WeightDecay can't write its `summary_file` {str(path)!r} ({error}). Give the path of a file."
        ) from error
