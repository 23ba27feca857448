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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lightning_l2.lr_schedulers import PerGroupValues, select_per_group

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

# A tensor and how often it was changed in place.
Mark: TypeAlias = tuple[int, int]

# What a child has of its own; all other options are shared with its parent.
OWN_KEYS = frozenset(
    (
        *("name", "weight_decay", "initial_weight_decay", "weight_decay_multiplier", "rule"),
        *("decoupled_weight_decay", "param_names", "params"),
    )
)


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

    `shared` holds what all children had in common when they were aligned last, `marks` which tensors they had then.
    """

    keys: tuple[str, ...]
    own: dict[str, Any]
    names: list[str]
    shared: dict[str, Any]
    marks: dict[str, list[Mark]] = field(default_factory=dict)

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
    >>> name_groups([split])
    >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
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
            shared = {k: v for k, v in group.items() if k not in OWN_KEYS and not isinstance(v, torch.Tensor)}
            names = [key.group or key.rule for key in family]
            self._parents.append(_Parent(tuple(group), _own_values(group), names, shared))
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
                _align(siblings, parent)

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
        for number, parent in enumerate(self._parents):
            if index < parent.children:
                return number, parent.own.get("name"), parent.names[index]
            index -= parent.children
        raise IndexError(index)

    def _select_in_schedulers(self, sources: Sequence[int]) -> list[PerGroupValues]:
        return select_per_group(self._schedulers(), self.optimizer, sources, self._declared)


def _members(
    group: Mapping[str, Any], key_of: Callable[[Tensor, Mapping[str, Any]], GroupKey], keys: Iterable[GroupKey]
) -> dict[GroupKey, list[int]]:
    members: dict[GroupKey, list[int]] = {key: [] for key in keys}
    for index, parameter in enumerate(group["params"]):
        members.setdefault(key_of(parameter, group), []).append(index)
    return members


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


def _align(siblings: Sequence[dict[str, Any]], parent: _Parent) -> None:
    first, *others = siblings
    shared, marks = parent.shared, parent.marks
    for key in first.keys() - shared.keys() - marks.keys() - OWN_KEYS:
        if isinstance(first[key], torch.Tensor):
            marks[key] = _marks([sibling[key] for sibling in siblings])
        else:
            shared[key] = first[key]
    for key in marks:
        marks[key] = _align_tensors([sibling[key] for sibling in siblings], marks[key])
    values = [first.get(key) for key in shared]
    if all([other.get(key) for key in shared] == values for other in others):
        shared.update(zip(shared, values, strict=True))  # as nearly always: nobody has written, or to all of them
        return
    for key, before in shared.items():
        changed = [value for sibling in siblings if (value := sibling.get(key, before)) != before]
        if changed and all(value == changed[0] for value in changed):
            shared[key] = changed[0]
            for sibling in siblings:
                sibling[key] = changed[0]


def _align_tensors(tensors: Sequence[Tensor], before: Collection[Mark]) -> list[Mark]:
    """Do the same for values that are changed in place; to compare what they hold would wait for their device."""
    changed = [tensor for tensor, mark in zip(tensors, _marks(tensors), strict=True) if mark not in before]
    if len(changed) == 1:
        for tensor in tensors:
            if tensor is not changed[0]:
                tensor.copy_(changed[0])
    return _marks(tensors)


def _marks(tensors: Iterable[Tensor]) -> list[Mark]:
    return [(id(tensor), tensor._version) for tensor in tensors]


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


def name_groups(splits: Sequence[GroupSplit]) -> None:
    """Name every group that has no name yet by its key, prefixed where that is not unique among all optimizers.

    Args:
        splits: The splits of all optimizers of a module, in order.
    """
    owners, groups, taken = [], [], set()
    for number, split in enumerate(splits):
        for index, group in enumerate(split.groups):
            if "name" in group:
                taken.add(group["name"])
            else:
                owners.append((number, *split.origin(index)))
                groups.append(group)
    for group, name in zip(groups, unique_names(owners, taken), strict=True):
        group["name"] = name


def unique_names(owners: Sequence[tuple[int, int, str | None, str]], taken: Iterable[str] = ()) -> list[str]:
    """Return a name for each new group: what it is called, prefixed only where that is not unique.

    Args:
        owners: For each group the index of its optimizer, the index of its parent group, the parent's own name if it
            has one, and what it is called.
        taken: Names that are in use already.

    >>> unique_names([(0, 0, None, "decay"), (0, 0, None, "no_decay")])
    ['decay', 'no_decay']
    >>> unique_names([(0, 0, "backbone", "decay"), (0, 1, "head", "decay"), (0, 1, "head", "no_decay")])
    ['backbone/decay', 'head/decay', 'no_decay']
    >>> unique_names([(0, 0, None, "decay"), (1, 0, None, "decay")])
    ['optimizer0/decay', 'optimizer1/decay']
    """
    taken = set(taken)
    names: dict[int, str] = {}
    of_name: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        of_name.setdefault(owner[3], []).append(index)
    for holders in of_name.values():
        several = len({owners[index][0] for index in holders}) > 1
        parents = {owners[index][:2] for index in holders}
        for scheme in _NAME_SCHEMES if several else _NAME_SCHEMES_OF_ONE:
            proposed = [name for index in holders if (name := scheme(*owners[index]))]
            if len(proposed) == len(holders) and len(set(proposed)) == len(parents) and not taken & set(proposed):
                break
        proposed = _numbered(proposed)
        names.update(zip(holders, proposed, strict=True))
        taken.update(proposed)
    return [names[index] for index in range(len(owners))]


def _numbered(names: Sequence[str]) -> list[str]:
    """Tell apart what one rule made of one parent: a checkpoint's lambda may differ where the rule's doesn't."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"part{count}/{name}" for name, count in zip(names, counts, strict=True)]


_NameScheme = Callable[[int, int, str | None, str], str | None]
_NAME_SCHEMES_OF_ONE: tuple[_NameScheme, ...] = (
    lambda optimizer, parent, own, name: name,
    lambda optimizer, parent, own, name: own and f"{own}/{name}",
    lambda optimizer, parent, own, name: f"{own or f'group{parent}'}/{name}",
    lambda optimizer, parent, own, name: f"optimizer{optimizer}/{own or f'group{parent}'}/{name}",
)
_NAME_SCHEMES: tuple[_NameScheme, ...] = (
    *_NAME_SCHEMES_OF_ONE[:2],
    lambda optimizer, parent, own, name: f"optimizer{optimizer}/{name}",
    *_NAME_SCHEMES_OF_ONE[2:],
)
