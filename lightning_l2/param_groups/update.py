"""An optimizer's parameter groups, split by weight decay while it updates and only then."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from lightning_l2.optimizers.facts import torch_class
from lightning_l2.optimizers.step import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from lightning_l2.param_groups.parts import DecayGroup

# What a child has of its own; all other options are its parent's.
OWN_KEYS = frozenset(("params", "param_names", "weight_decay"))
_TELLING = ("params", "weight_decay")


class GroupSwap(Layout):
    """Puts children into `optimizer.param_groups` for the time of an update.

    A child has every option of its parent, the user's group, as it is at that moment, the parameters of one part, and
    the weight decay in force. What the update writes into children goes back to their parent. Where it made them
    different, each keeps its own until somebody writes to the parent.

    Args:
        optimizer: The optimizer.
        families: Gives the parts of each of its groups.

    Attributes:
        in_step: What the optimizer is to see in place of the options that its groups have.
        users: The user's groups while children stand in their place, else None.
    """

    def __init__(self, optimizer: Optimizer, families: Callable[[], list[list[DecayGroup]]]) -> None:
        self.in_step: dict[str, Any] = {}
        self.users: list[dict[str, Any]] | None = None
        self._families = families
        self._is_torchs = torch_class(optimizer) is not None
        self._given: list[_Given] = []
        # groups, and what they have outside of an update
        self._hidden: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def enter(self, optimizer: Optimizer) -> None:
        """Put children, one for each part, in the place of the user's groups, which stand there."""
        standing: list[dict[str, Any]] = []
        for family in self._families():
            children = self._children(family)
            standing += children
            # torch's own optimizers read all groups, and write nothing into them
            if not self._is_torchs and children[0] is not family[0].parent:
                self._given.append(_Given(family, children))
        self.users = list(optimizer.param_groups)
        optimizer.param_groups[:] = standing

    def leave(self, optimizer: Optimizer, *, has_updated: bool = False, error: BaseException | None = None) -> None:
        """Put the user's groups back, with what the update has written.

        Args:
            optimizer: The optimizer.
            has_updated: Whether the update is done.
            error: What it raised.

        Raises:
            RuntimeError: If the optimizer did not read all its groups in its first update.
        """
        users, self.users = self.users, None
        if users is None:
            return
        children = list(optimizer.param_groups)
        optimizer.param_groups[:] = users
        given, self._given = self._given, []
        while self._hidden:
            parent, values = self._hidden.pop()
            parent.update(values)
        if has_updated or isinstance(error, Exception):
            _check_all_were_read(optimizer, given, children, error)
        for one in given:
            one.take_back()

    def _hide(self, parent: dict[str, Any]) -> None:
        """Let a group have other options for the time of the update."""
        hidden = {key: parent[key] for key in self.in_step if key in parent}
        self._hidden.append((parent, hidden))
        parent.update((key, self.in_step[key]) for key in hidden)

    def _children(self, family: list[DecayGroup]) -> list[dict[str, Any]]:
        """Return what stands for a user's group: children, or itself where there is nothing to split."""
        parent, in_step = family[0].parent, self.in_step
        if "weight_decay" in in_step:
            self._hide(parent)
            return [parent]
        if "weight_decay" not in parent:
            return [parent]
        if len(family) == 1 and not in_step and family[0].weight_decay is parent["weight_decay"]:
            return [parent]
        children = []
        for group in family:
            child = group.child
            if child is None:
                child = group.child = {} if self._is_torchs else _Noting()
            elif len(child) != len(parent):
                child.clear()
            child.update(parent)
            if group.own_options:
                child.update(group.options())
            child["params"] = group.params
            if "param_names" in parent:
                child["param_names"] = [parent["param_names"][index] for index in group.indices]
            child["weight_decay"] = group.weight_decay
            if in_step:
                child.update((key, value) for key, value in in_step.items() if key in child)
            children.append(child)
        return children


def _check_all_were_read(
    optimizer: Optimizer, given: list[_Given], children: list[dict[str, Any]], error: BaseException | None
) -> None:
    """Refuse an optimizer that goes by a list of its own, as long as the user's groups, in its first update."""
    noting = [child for one in given if one.versions for child in one.children if isinstance(child, _Noting)]
    if not any(child.was_read for child in noting) and not any(one.has_moved() for one in given):
        return
    unread = [child for child in noting if not child.was_read]
    if unread:
        raise RuntimeError(
            f"{type(optimizer).__name__} updated by {len(children) - len(unread)} of {len(children)} parameter groups: "
            "it goes by a list of its own, made for the groups that it was built with. Use "
            "WeightDecay(apply='decoupled'), or another `apply`, which needs no groups."
        ) from error
    for one in given if error is None else ():
        for group in one.family:
            group.child = group.child and dict(group.child)


class _Given:
    """The children of a parent as they were when the update began."""

    __slots__ = ("children", "family", "parent", "values", "versions")

    def __init__(self, family: list[DecayGroup], children: list[dict[str, Any]]) -> None:
        self.parent, self.family, self.children = family[0].parent, family, children
        self.values = [list(dict.values(child)) for child in children]
        self.versions: list[int] = []
        if type(children[0]) is _Noting:
            self.versions = [parameter._version for parameter in self.parent["params"]]

    def has_moved(self) -> bool:
        """Return whether any of the parameters was changed in place since, as far as torch counts that."""
        versions = zip(self.versions, self.parent["params"], strict=False)
        return any(version != parameter._version for version, parameter in versions)

    def take_back(self) -> None:
        """Give the parent what was written into its children."""
        for child, values in zip(self.children, self.values, strict=True):
            if len(child) != len(values) or not all(map(operator.is_, dict.values(child), values)):
                self._take_written()
                return

    def _take_written(self) -> None:
        written: dict[str, None] = {}
        for child, values in zip(self.children, self.values, strict=True):
            now = list(dict.values(child))
            changed = [index >= len(values) or now[index] is not values[index] for index in range(len(now))]
            written.update((key, None) for key, is_new in zip(child, changed, strict=True) if is_new)
        for key in written:
            if key in OWN_KEYS:
                continue
            first = self.children[0].get(key)
            self.parent[key] = first
            differ = any(not _same(child.get(key), first) for child in self.children)
            for group, child in zip(self.family, self.children, strict=True):
                if differ:
                    group.own_options[key] = child.get(key), first
                else:
                    group.own_options.pop(key, None)


class _Noting(dict[str, Any]):
    """A group that notes whether its parameters, or how they decay, were asked for."""

    was_read = False

    def __iter__(self) -> Any:
        """Have `dict(group)` and `**group` ask for each option, as they do where this is not `dict`'s own."""
        return super().__iter__()

    def __getitem__(self, key: str) -> Any:
        self.was_read |= key in _TELLING
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.was_read |= key in _TELLING
        return super().get(key, default)

    def items(self) -> Any:
        self.was_read = True
        return super().items()

    def values(self) -> Any:
        self.was_read = True
        return super().values()


def _same(one: Any, other: Any) -> bool:
    """Return whether two options are the same; tensors only if they are one, since nobody waits for a device here."""
    if one is other or isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # as arrays of numpy
        return False
