"""Weight decay by rules on all optimizers of a module: what the callback does, for any training loop."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.decay.attach import Apply, attach_decay, check_groups, check_options
from lightning_l2.decay.start import Start, Towards
from lightning_l2.decay.ways import OnWeights, Way
from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.param_groups.bases import RuleBases
from lightning_l2.param_groups.decay_groups import DecayGroups, decay_groups, decay_groups_of
from lightning_l2.param_groups.resume import Resuming
from lightning_l2.param_groups.shrinkage import Shrinkage, count_shrinkage
from lightning_l2.param_groups.summary import GroupSummary, summarize
from lightning_l2.rules.assign import resolve_rules
from lightning_l2.rules.parameters import is_undecided
from lightning_l2.sharding import is_sharded

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lightning_l2.decay.rounding import Rounding
    from lightning_l2.decay.ways import OptimizersOwn, PeakLR
    from lightning_l2.rules.assign import Rules


class RuleDecay:
    r"""Give each parameter of a module its own weight decay by rules, in the steps of the module's optimizers.

    The optimizers' groups stay as they are outside of updates. Lazy parameters decay by their rules from when they have
    a shape: call `decide` before the step.

    Args:
        model: The module.
        optimizers: The optimizers that train it; see `updating_optimizers`.
        weight_decay: Base lambda, or a function that gives it from a parameter group. None keeps each group's own.
        rules: A preset's name, or rules in order: the first that matches a parameter decides.
        apply: How lambda acts; see `attach_decay`, also for the options that go with it.
        before_clipping: As of `attach_decay`.
        peak_lr: As of `attach_decay`.
        rounding: As of `attach_decay`.
        seed: As of `attach_decay`.
        towards: What weights decay towards whose rule does not say: `"zero"`, or the `"start"`.
        start: The weights that training began with, by default those of now.
        resuming: Knows what a checkpoint says.
        users: The user's optimizers, which may wrap these.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.
        look: As of `Attachments`.

    Raises:
        ValueError: If rules don't fit the module, or ask for what an optimizer can't take.
        TypeError: If an optimizer has no step hooks.
        MisconfigurationException: If there is no weight decay to keep, or no way to apply it.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> decay = RuleDecay(model, [optimizer], 0.01)
    >>> decay.weight_decay()
    {'weight': 0.01, 'bias': 0.0}
    >>> decay.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        weight_decay: float | Callable[[Mapping[str, Any]], float] | None = None,
        *,
        rules: Rules = "default",
        apply: Apply = "optimizer",
        before_clipping: bool = False,
        peak_lr: PeakLR = None,
        rounding: Rounding = "nearest",
        seed: int = 0,
        towards: Towards = "zero",
        start: Start | None = None,
        resuming: Resuming | None = None,
        users: Sequence[Optimizer] | None = None,
        root: nn.Module | None = None,
        look: Callable[[], Any] | None = None,
    ) -> None:
        check_options(apply, before_clipping, peak_lr, rounding)
        self._model = model
        self._apply = apply
        self._rounding = rounding
        self._peak_lr = peak_lr
        self._resuming = resuming or Resuming("config")
        base = weight_decay if callable(weight_decay) else lambda group: weight_decay
        own = [replace(rule, towards=rule.towards or towards) for rule in resolve_rules(rules)]
        self._make_bases = partial(RuleBases, model, own, base, self._resuming, root)
        self.start = (start or Start()) if any(rule.towards == "start" for rule in own) else None
        self._root = root or model
        self._bases: RuleBases | None = None
        self._attach = partial(
            attach_decay,
            apply=apply,
            before_clipping=before_clipping,
            peak_lr=peak_lr,
            rounding=rounding,
            seed=seed,
            start=self.start,
        )
        self._attached: Attachments[OptimizersOwn | Way] = Attachments(self._begin, look)
        self._counts: Attachments[Shrinkage] = Attachments(lambda _, optimizer: count_shrinkage(optimizer))
        self.optimizers: list[Optimizer] = []
        self._groups: list[DecayGroups] = []
        self._users: Sequence[Optimizer] = optimizers if users is None else users
        self._resuming.take_over(optimizers)
        self.decide()
        self.follow(optimizers, users)

    @property
    def is_decided(self) -> bool:
        """Whether rules have decided, for which lazy parameters need a shape."""
        return self._bases is not None

    @property
    def version(self) -> list[int]:
        """What changes when groups or their parameters do."""
        return [one.version for one in self._groups]

    def decide(self) -> bool:
        """Let rules decide, if they haven't and no parameter is lazy any more; return whether they did."""
        if self._bases is not None or is_undecided(self._model):
            return False
        self._bases = self._make_bases(optimizers=self._users)
        for number, optimizer in enumerate(self.optimizers):
            self._decide(number, optimizer)
        return True

    def follow(self, optimizers: Sequence[Optimizer], users: Sequence[Optimizer] | None = None) -> bool:
        """Go over to other optimizers, within other ones of the user's; return whether they are others."""
        known = self.optimizers
        if len(known) == len(optimizers) and all(map(operator.is_, known, optimizers)):
            return False
        self.optimizers = list(optimizers)
        self._users = optimizers if users is None else users
        if self._bases is not None:
            self._bases.follow(self._users)
        self._groups = decay_groups_of(optimizers)
        self._counts.follow(optimizers)
        return self._attached.follow(optimizers)

    def summary(self, steps: int | None = None) -> list[GroupSummary]:
        """Describe the groups, in all optimizers.

        Args:
            steps: How many steps the training has, for what decay does over it.
        """
        return summarize(self._whole(), steps)

    def weight_decay(self) -> dict[str, float]:
        """Return the base lambda of each parameter that a rule decided on, by name.

        One that several optimizers have is there again for each later one, as `optimizer1/<name>`.
        """
        return {
            decision.key: float(group.base)
            for one in self._whole()
            for group in one.unnamed()
            for decision in group.decisions
            if decision.rule is not None
        }

    def _whole(self) -> list[DecayGroups]:
        """Return the groups of all parameters, where each process updates a share of them, as ZeRO does."""
        mine = {id(p) for one in self.optimizers for group in one.param_groups for p in group["params"]}
        users = [user for user in self._users if any(user is not one for one in self.optimizers)]
        if all(id(p) in mine for user in users for group in user.param_groups for p in group["params"]):
            return decay_groups_of(self.optimizers)
        found = decay_groups_of(self._users)
        for one in found:
            one.decide(self._bases, self._resuming.configured(one.optimizer, self._users))
        return found

    def warnings(self, summary: Sequence[GroupSummary]) -> list[str]:
        """Return what may be a mistake in what `summary` has returned; what rounds away is not told again later."""
        outlooks = [row.outlook for row in summary if row.outlook is not None]
        for count in self._counts:
            count.told.update(outlook.group for outlook in outlooks if outlook.is_lost or outlook.is_distorted)
        return [text for outlook in outlooks for text in outlook.warnings()]

    def left(self) -> dict[str, float]:
        """Return what decay has left of the weights, by the names of the groups for which it is known."""
        return {name: left for count in self._counts for name, left in count.left().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, beside the optimizers' own states.

        These are `options` that the optimizers have made different within one of the user's groups, which holds one
        value for all parts; what decay has `left`; what `rounding` goes on with; and the norms of the `start`.
        """
        parts = [group for one in self._groups for group in one.groups]
        options = {group.name: options for group in parts if (options := group.options())}
        rounding = [one.rounding.state_dict() for one in self._attached if isinstance(one, OnWeights) and one.rounding]
        starts = {} if self.start is None else self.start.norms(self._model, self._root)
        state = {
            "options": options,
            "left": {name: left for count in self._counts for name, left in count.state_dict().items()},
            "rounding": rounding and {self._rounding: rounding},
            "start": starts,
        }
        return {key: value for key, value in state.items() if value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            RuntimeError: If the weights that decay pulls towards are others than before.
        """
        options = state.get("options", {})
        for group in (group for one in self._groups for group in one.groups):
            known = {key: own for key, own in options.get(group.name, {}).items() if key in group.parent}
            group.own_options.update({key: (own, group.parent[key]) for key, own in known.items()})
        for count in self._counts if "left" in state else ():
            count.go_on(state["left"])
        rounding = [one.rounding for one in self._attached if isinstance(one, OnWeights) and one.rounding]
        for one, own in zip(rounding, state.get("rounding", {}).get(self._rounding, ()), strict=False):
            one.load_state_dict(own)
        if self.start is not None:
            self.start.expect(state.get("start", {}))
            self.start.norms(self._model, self._root)

    def remove(self) -> None:
        """Leave the optimizers alone."""
        for optimizer in (*self.optimizers, *self._users):
            decay_groups(optimizer).decide(None)
        self._attached.remove()
        self._counts.remove()
        self.optimizers = []

    def _begin(self, number: int, optimizer: Optimizer) -> OptimizersOwn | Way:
        if self._bases is not None:
            self._decide(number, optimizer)
        attached = self._attach(optimizer)
        if isinstance(attached, Way):
            attached.see_starts()
        if isinstance(attached, OnWeights):
            attached.has_begun = self._resuming.has_restored
        return attached

    def _decide(self, number: int, optimizer: Optimizer) -> None:
        self._check_owner(optimizer)
        decay_groups(optimizer).decide(self._bases, self._resuming.configured(optimizer, self._users))
        self._check_takes_decay(optimizer)
        check_groups(optimizer, self._apply, self._peak_lr)

    def _check_takes_decay(self, optimizer: Optimizer) -> None:
        without = [group for group in decay_groups(optimizer).unnamed() if "weight_decay" not in group.parent]
        if without and self._apply == "optimizer":
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has no weight decay of its own. "
                "Use WeightDecay(apply='decoupled') or apply='coupled', which work with any optimizer."
            )
        decisions = [decision for group in without for decision in group.decisions if decision.base is None]
        needing = [rule.name for decision in decisions if (rule := decision.rule) is not None and rule.follows_base]
        if needing:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has no weight decay of its own to keep, which rule {needing[0]!r} goes "
                "by. Give WeightDecay a `weight_decay`, or the rule one of its own."
            )

    def _check_owner(self, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        is_owner = self._bases is None or not parameters or self._bases.owns_any(parameters)
        # modules that are kept out of sight, in a list, are no fault
        if not is_owner and any(map(is_sharded, self._model.parameters())):
            raise ValueError(
                f"None of the {len(parameters)} parameters of {type(optimizer).__name__} belongs to the module: "
                "it would train nothing. Was the optimizer built before the module was sharded or replaced its "
                "parameters (LightningCLI's --optimizer under FSDP2)? Build it in `configure_optimizers`."
            )
