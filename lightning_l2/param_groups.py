"""Split an optimizer's parameter groups by weight decay, in place, and give them back as the user made them.

The keys that a group carries are what all callbacks share:

* `name`: unique over all optimizers of a module,
* `weight_decay`: lambda in force, in the next step,
* `initial_weight_decay`: the base value that a schedule multiplies,
* `weight_decay_multiplier`: what the schedule multiplied it with,
* `rule`: the rule that made the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_l2.lr_schedulers import PerGroupValues, select_per_group
from lightning_l2.sibling_groups import OWN_KEYS, SharedOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

# The rule's name of a group that has no parameters; it keeps its weight decay.
EMPTY = "empty"


def weight_decay_in_force(group: Mapping[str, Any]) -> float:
    """Return lambda of a group's next step, 0 where the group knows none.

    >>> weight_decay_in_force({"params": [], "lr": 0.1, "weight_decay": 0.01})
    0.01
    """
    return float(group.get("weight_decay", 0.0))


def base_weight_decay(group: Mapping[str, Any]) -> float:
    """Return lambda of a group before any schedule.

    >>> base_weight_decay({"weight_decay": 0.02, "initial_weight_decay": 0.01})
    0.01
    """
    return float(group.get("initial_weight_decay", weight_decay_in_force(group)))


def multiply_weight_decay(group: dict[str, Any], multiplier: float, base: float | None = None) -> None:
    """Set lambda of a group to its base times a multiplier, and remember both; a base of 0 stays exactly 0.

    Args:
        group: The parameter group; it gets `initial_weight_decay` and `weight_decay_multiplier`.
        multiplier: Dimensionless, finite.
        base: What to multiply where it isn't the group's own base, but in proportion to it.

    >>> group = {"params": [], "weight_decay": 0.02}
    >>> multiply_weight_decay(group, 10.0)
    >>> group["weight_decay"], group["initial_weight_decay"]
    (0.2, 0.02)
    """
    initial = group.setdefault("initial_weight_decay", group["weight_decay"])
    group["weight_decay"] = multiplier * (initial if base is None else base)
    group["weight_decay_multiplier"] = group["weight_decay"] / initial if initial else multiplier


def without_multiplier(group: dict[str, Any]) -> dict[str, Any]:
    """Take the multiplier back, and return what the group's keys were, to put them there again by `update`."""
    before = {key: value for key, value in group.items() if key in OWN_KEYS}
    group["weight_decay"] = group.pop("initial_weight_decay")
    group.pop("weight_decay_multiplier", None)
    return before


@dataclass(frozen=True)
class GroupKey:
    """What parameters of one group share.

    Args:
        rule: Name of the rule.
        weight_decay: Base lambda, before any schedule.
        group: What the group is called, before any prefix; by default like the rule.
    """

    rule: str
    weight_decay: float
    group: str | None = None


@dataclass
class _Parent:
    """A group as the user made it: its keys, its own values of what children have of theirs, what these are called.

    `options` holds what all children had in common when they were aligned last.
    """

    keys: tuple[str, ...]
    own: dict[str, Any]
    names: list[str]
    options: SharedOptions

    @property
    def children(self) -> int:
        """How many there are."""
        return len(self.names)


class GroupSplit:
    """An optimizer's parameter groups split by weight decay, and the way back.

    Children stand next to each other in their parent's place, in the order in which their parameters first appear, and
    copy every option of the parent. Learning-rate schedulers of the optimizer that keep one value a group follow.

    Args:
        optimizer: The optimizer; its list of groups is changed in place, since wrappers share it.
        schedulers: Its learning-rate schedulers, looked up at each change, since callbacks may replace them.
        declared: Attributes of schedulers of other libraries: name to whether it holds one value a group.

    >>> weight, bias = torch.nn.Linear(2, 1).parameters()
    >>> optimizer = torch.optim.AdamW([weight, bias], lr=0.1, weight_decay=0.5)
    >>> split = GroupSplit(optimizer, lambda: [])
    >>> decay, no_decay = GroupKey("decay", 0.5), GroupKey("no_decay", 0.0)
    >>> _ = split.split_new(lambda parameter, group: decay if parameter.ndim > 1 else no_decay)
    >>> [(group["rule"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [('decay', 0.5, 1), ('no_decay', 0.0, 1)]
    >>> split.merge()
    >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [(0.5, 2)]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Callable[[], Iterable[Any]],
        declared: Mapping[str, bool] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._schedulers = schedulers
        self._declared = dict(declared or {})
        self._parents: list[_Parent] = []
        self._hidden: list[dict[str, Any]] | None = None
        self._before: list[PerGroupValues] = []

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups that were split, looked up afresh."""
        return self.optimizer.param_groups[: sum(parent.children for parent in self._parents)]

    @property
    def new_groups(self) -> list[dict[str, Any]]:
        """The groups that were added since the last split."""
        return self.optimizer.param_groups[len(self.groups) :]

    def split_new(
        self,
        key_of: Callable[[Tensor, Mapping[str, Any]], GroupKey],
        keys: Sequence[Sequence[GroupKey]] | None = None,
    ) -> list[list[GroupKey]]:
        """Split every group that is new.

        Args:
            key_of: Gives the rule and the base lambda of a parameter of a group.
            keys: For each new group the children it has to have, in order, even if they are empty.

        Returns:
            For each new group what its children are.

        Raises:
            ValueError: If the optimizer takes one group only and needs several, or if a learning-rate scheduler of an
                unknown kind holds a list that may be one value a group.
        """
        new, known = self.new_groups, len(self.groups)
        families = [_members(group, key_of, keys[index] if keys else ()) for index, group in enumerate(new)]
        if isinstance(self.optimizer, torch.optim.LBFGS) and any(len(family) > 1 for family in families):
            raise ValueError(
                f"LBFGS takes one parameter group, and the rules ask for {len(families[0])}: "
                f"{[key.rule for key in families[0]]}. Use rules that give every parameter the same "
                "weight decay, or L2Penalty, which needs no groups."
            )
        sizes = [1] * known + [len(family) for family in families]
        self._select_in_schedulers([index for index, size in enumerate(sizes) for _ in range(size)])
        children: list[dict[str, Any]] = []
        for group, family in zip(new, families, strict=True):
            names = [key.group or key.rule for key in family]
            self._parents.append(_Parent(tuple(group), _own_values(group), names, SharedOptions(group)))
            children += [_child(group, key, indices, number) for number, (key, indices) in enumerate(family.items())]
        self.optimizer.param_groups[known:] = children
        self.align()
        return [list(family) for family in families]

    def align(self) -> None:
        """Give to all children of a parent what somebody wrote to one of them, taking it for the whole group."""
        groups = iter(self.groups)
        for parent in self._parents:
            siblings = [next(groups) for _ in range(parent.children)]
            if len(siblings) > 1:
                parent.options.align(siblings)

    def merge(self) -> None:
        """Present the user's own layout until `restore`; a second call changes nothing."""
        if self._hidden is not None:
            return
        self._hidden, late = self.groups, self.new_groups
        sizes = [parent.children for parent in self._parents]
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        merged = [_merged(self._hidden[first], parent) for first, parent in zip(firsts, self._parents, strict=True)]
        self._before = self._select_in_schedulers(firsts + [len(self._hidden) + index for index in range(len(late))])
        self.optimizer.param_groups[:] = merged + late

    def restore(self) -> None:
        """Put the split groups back as they were when `merge` was called."""
        if self._hidden is None:
            return
        late = self.optimizer.param_groups[len(self._parents) :]
        self.optimizer.param_groups[:] = self._hidden + late
        for values in self._before:
            values.put_back()
        self._hidden, self._before = None, []

    def origin(self, index: int) -> tuple[int, str | None, str]:
        """Return of the group at `index` its parent's index, the name that the user gave that one, and its own."""
        parents = enumerate(self._parents)
        return [(number, parent.own.get("name"), name) for number, parent in parents for name in parent.names][index]

    def _select_in_schedulers(self, sources: Sequence[int]) -> list[PerGroupValues]:
        return select_per_group(self._schedulers(), self.optimizer, sources, self._declared)


def _members(
    group: Mapping[str, Any], key_of: Callable[[Tensor, Mapping[str, Any]], GroupKey], keys: Iterable[GroupKey]
) -> dict[GroupKey, list[int]]:
    members: dict[GroupKey, list[int]] = {key: [] for key in keys}
    for index, parameter in enumerate(group["params"]):
        members.setdefault(key_of(parameter, group), []).append(index)
    # torch allows a group without parameters, and schedulers hold a value for it
    return members or {GroupKey(EMPTY, base_weight_decay(group)): []}


def _child(group: dict[str, Any], key: GroupKey, indices: Sequence[int], number: int) -> dict[str, Any]:
    child = {**group, "params": [group["params"][index] for index in indices]}
    if number:
        # schedulers change a learning rate that is a tensor in place, once for each group that has it
        child.update({key: value.clone() for key, value in group.items() if isinstance(value, torch.Tensor)})
    if "param_names" in group:
        child["param_names"] = [group["param_names"][index] for index in indices]
    child.pop("name", None)
    child["rule"] = key.rule
    child["initial_weight_decay"] = key.weight_decay
    child["weight_decay"] = key.weight_decay * group.get("weight_decay_multiplier", 1.0)
    return child


def _own_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's own values of the keys that callbacks write, as they were before any of them."""
    own = {key: value for key, value in group.items() if key in OWN_KEYS}
    if "initial_weight_decay" in own:
        own["weight_decay"] = own.pop("initial_weight_decay")
    own.pop("weight_decay_multiplier", None)
    return own


def _merged(child: Mapping[str, Any], parent: _Parent) -> dict[str, Any]:
    values = {key: value for key, value in child.items() if key not in OWN_KEYS} | parent.own
    return {key: values[key] for key in (*parent.keys, *values) if key in values}
