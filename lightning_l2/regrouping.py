"""Apply rules to all optimizers of a model: the base lambda of each parameter, groups, names."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_l2.group_names import name_groups
from lightning_l2.param_groups import GroupKey, GroupSplit, base_weight_decay
from lightning_l2.rules import rules_by_parameter
from lightning_l2.summary import GroupSummary, summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_l2.rules import DecayRule, Rules

# The rule's name of parameters that an optimizer has beside the module's own; they keep their weight decay.
UNASSIGNED = "unassigned"


class Regrouping:
    """The parameter groups of a model's optimizers, split by rules.

    Args:
        model: The module that the parameters belong to.
        optimizers: Its optimizers.
        schedulers: Gives the learning-rate schedulers of all of them.
        rules: As of `assign_rules`.
        weight_decay_of: Gives the base lambda of a parameter from its name, as in `weight_decay`, its rule and its
            group.
        declared: For lists of learning-rate schedulers of other libraries, whether they hold one value a group.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> groups = Regrouping(model, [optimizer], lambda: [], "default", lambda name, rule, group: rule.resolve(0.01))
    >>> groups.split_new()
    >>> groups.weight_decay()
    {'weight': 0.01, 'bias': 0.0}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        schedulers: Callable[[], Sequence[Any]],
        rules: Rules,
        weight_decay_of: Callable[[str, DecayRule, Mapping[str, Any]], float],
        declared: Mapping[str, bool] | None = None,
        root: nn.Module | None = None,
    ) -> None:
        self._decide = partial(rules_by_parameter, model, rules, root)
        # by the `id` of a parameter, its name and its rule
        self._rules: dict[int, tuple[str, DecayRule]] = {}
        # by the `id` of a parameter, the number of the first optimizer that has it
        self._first: dict[int, int] = {}
        self._weight_decay_of = weight_decay_of
        self.splits = [GroupSplit(optimizer, schedulers, declared) for optimizer in optimizers]
        self._local = {
            index: GroupSplit(local, list) for index, local in enumerate(map(_local_part, optimizers)) if local
        }

    @property
    def has_new(self) -> bool:
        """Whether an optimizer has a group that was added since the last split."""
        return any(split.new_groups for split in self.splits)

    def split_new(self) -> None:
        """Split all groups that are new, in every optimizer, and name them.

        The rules decide anew, since a module may have got other parameters meanwhile.

        Raises:
            ValueError: If none of an optimizer's parameters belongs to the module, and as `GroupSplit.split_new` and
                `rules_by_parameter` do.
        """
        self._rules |= {id(parameter): (name, rule) for name, parameter, rule in self._decide()}
        for index, split in enumerate(self.splits):
            self._check_owner(split)
            keys = split.split_new(partial(self._key, index))
            if index in self._local:
                self._local[index].split_new(_key_within(split.groups, keys), keys)
        name_groups(self.splits)

    def align(self) -> None:
        """Give to all groups of one origin what somebody wrote to one of them."""
        for split in self.splits:
            split.align()

    def merge(self) -> None:
        """Present the user's own layout until `restore`."""
        for split in (*self.splits, *self._local.values()):
            split.merge()

    def restore(self) -> None:
        """Put the split groups back as they were when `merge` was called."""
        for split in (*self.splits, *self._local.values()):
            split.restore()

    def weight_decay(self) -> dict[str, float]:
        """Return the base lambda of each parameter that a rule decided, by name.

        One that several optimizers have is there again for each later one, as `optimizer1/<name>`.
        """
        return {
            self._label(index, parameter): base_weight_decay(group)
            for index, split in enumerate(self.splits)
            for group in split.groups
            for parameter in group["params"]
            if id(parameter) in self._rules
        }

    def summary(self) -> list[GroupSummary]:
        """Describe the groups."""
        groups = [group for split in self.splits for group in split.groups]
        return summarize(groups, self._name, _size)

    def _name(self, parameter: Tensor) -> str:
        return self._rules[id(parameter)][0] if id(parameter) in self._rules else UNASSIGNED

    def _label(self, optimizer: int, parameter: Tensor) -> str:
        name, _ = self._rules[id(parameter)]
        is_first = self._first.setdefault(id(parameter), optimizer) == optimizer
        return name if is_first else f"optimizer{optimizer}/{name}"

    def _key(self, optimizer: int, parameter: Tensor, group: Mapping[str, Any]) -> GroupKey:
        if id(parameter) not in self._rules:
            return GroupKey(UNASSIGNED, base_weight_decay(group))
        name, rule = self._rules[id(parameter)]
        weight_decay = self._weight_decay_of(self._label(optimizer, parameter), rule, group)
        return GroupKey(rule.name, weight_decay, rule.group_of(name))

    def _check_owner(self, split: GroupSplit) -> None:
        parameters = [parameter for group in split.new_groups for parameter in group["params"]]
        if parameters and not any(id(parameter) in self._rules for parameter in parameters):
            raise ValueError(
                f"None of the {len(parameters)} parameters of {type(split.optimizer).__name__} belongs to the module: "
                "it would train nothing. Was the optimizer built before the module was sharded or replaced its "
                "parameters (LightningCLI's --optimizer under FSDP2)? Build it in `configure_optimizers`."
            )


def _local_part(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer of this process's share within a ZeroRedundancyOptimizer.

    Both have the same groups, and options are copied between them in every step.
    """
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    return optimizer.optim if "ZeroRedundancyOptimizer" in kinds else None  # type: ignore[attr-defined]  # of that class


def _key_within(
    groups: Sequence[Mapping[str, Any]], keys: Sequence[Sequence[GroupKey]]
) -> Callable[[Tensor, Mapping[str, Any]], GroupKey]:
    """Return a function that gives what was decided on a parameter of the last groups, which these keys made."""
    new = [key for family in keys for key in family]
    decided = zip(new, groups[len(groups) - len(new) :], strict=True)
    known = {id(parameter): key for key, group in decided for parameter in group["params"]}
    return lambda parameter, _: known[id(parameter)]


def _size(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
