"""The parts of an optimizer's parameter groups that decay alike: what all callbacks share.

The optimizer's own groups stay the user's. Each is seen here as one or several parts, each with a base lambda, that of
its rule or the group's own, and with the multiplier that schedules give it; lambda in force is their product.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.optimizers.facts import Way, own_way, share_by, shrinking_by
from lightning_l2.optimizers.inner import updating_optimizers
from lightning_l2.optimizers.step import step_of
from lightning_l2.param_groups.names import Owner, unique_names
from lightning_l2.param_groups.parts import Acting, DecayGroup, Decision, Family, split
from lightning_l2.param_groups.update import GroupSwap

if TYPE_CHECKING:
    from lightning_l2.param_groups.bases import RuleBases


class DecayGroups:
    """The parts of one optimizer's groups, kept as long as the groups and their parameters are the same objects.

    Whatever is new is decided when it is first seen: groups that were added, parameters that were replaced. Groups that
    are gone are forgotten.

    Attributes:
        number: The optimizer's index among those of the module.
        version: How often the parts have changed, as far as anybody has looked.
        way: The way to decay that somebody has attached, None for the optimizer's own.
        is_scheduled: Whether a schedule has written multipliers.
        schedules: Which parts schedules take, by a pattern of their names, or None for all.
        plans: What gives lambda of a part at the end of such a schedule and at its largest, where that is known.
    """

    def __init__(self, optimizer: Any) -> None:
        self.number = 0
        self.version = 0
        self._siblings: Sequence[weakref.ref[DecayGroups]] = ()
        self.way: Acting | None = None
        self._own: tuple[int, Way | None] = (-1, None)
        self.is_scheduled = False
        self.schedules: list[re.Pattern[str] | None] = []
        self.plans: dict[re.Pattern[str] | None, Callable[[DecayGroup], tuple[float, float]]] = {}
        # what schedules of some parts gave last
        self._among: dict[re.Pattern[str], tuple[Sequence[float], tuple[float, float] | None]] = {}
        self._optimizer = weakref.ref(optimizer)
        self._bases: RuleBases | None = None
        self._configured: Sequence[tuple[tuple[Any, ...], float]] = ()
        self._families: dict[int, Family] = {}
        self._multiplier = 1.0
        self._absolute: tuple[float, float] | None = None
        self._fixed: Sequence[float] = ()
        self._is_told = False
        self._named_for: tuple[int, ...] = ()
        this = weakref.proxy(self)
        self._swap = GroupSwap(optimizer, lambda: this.families())
        self._holders: set[int] = set()

    @property
    def optimizer(self) -> Any:
        """The optimizer."""
        return self._optimizer()

    @property
    def siblings(self) -> list[DecayGroups]:
        """Those of all optimizers of the module, over which names are unique."""
        return [one for known in self._siblings if (one := known()) is not None] or [self]

    @property
    def groups(self) -> list[DecayGroup]:
        """The parts, in the order of the user's groups and in each of their first parameters, with their names."""
        siblings = self.siblings
        versions = tuple(one.current_version() for one in siblings)
        if self._named_for != versions:
            _name([one.families() for one in siblings])
            for one in siblings:
                one._named_for = versions
        return self.unnamed()

    def current_version(self) -> int:
        """Look, and return how often the parts have changed."""
        self.families()
        return self.version

    @property
    def is_held(self) -> bool:
        """Whether lambda is in force in the updates, in each of which the parts are looked at."""
        return bool(self._holders)

    @property
    def is_decided(self) -> bool:
        """Whether rules have decided on the base lambdas."""
        return self._bases is not None

    def unnamed(self) -> list[DecayGroup]:
        """Return the parts, whose names may be stale."""
        return [group for family in self.families() for group in family]

    def families(self) -> list[list[DecayGroup]]:
        """Return the parts of each of the user's groups; as often as every step, so it is to be cheap."""
        parents = self._swap.users or self.optimizer.param_groups
        known = self._families
        families, is_new = [], len(known) != len(parents)
        for index, parent in enumerate(parents):
            family = known.get(id(parent))
            if family is None or not family.fits(parent):
                family, is_new = self._make(index, parent), True
            elif self._bases is not None and parent.get("weight_decay") is not family.written:
                self._tell_of_writing(family)
            families.append(family)
        if is_new:
            self._families = {id(one.parent): one for one in families}
            self.version += 1
            for among, (multipliers, absolute) in self._among.items():
                _multiply([group for group in self.groups if among.search(group.name)], multipliers, absolute)
        return [family.groups for family in families]

    def share(self, group: DecayGroup, lr: float | None = None, weight_decay: float | None = None) -> float | None:
        """Return the share of its weights that decay takes of a part in a step, at most.

        Args:
            group: The part.
            lr: The learning rate, by default that of its group.
            weight_decay: Lambda, by default the one in force.

        Returns:
            The share, dimensionless; None where there is none, or a device alone knows it.
        """
        if self.way is None:
            value = group.weight_decay if weight_decay is None else weight_decay
            if self._own[0] != self.version:
                self._own = self.version, shrinking_by(self.optimizer)
            return share_by(self._own[1], group.parent, value, lr)
        share = self.way.share(group, lr, weight_decay)
        return share if isinstance(share, float) else None

    @property
    def rounds_away(self) -> bool:
        """Whether decay that is too small for the number format of the weights does nothing."""
        return own_way(self.optimizer) == "decoupled" if self.way is None else self.way.rounds_away

    def decide(self, bases: RuleBases | None, configured: Sequence[tuple[tuple[Any, ...], float]] = ()) -> None:
        """Let rules decide on the base lambdas, or, with None, take the groups as they are.

        Args:
            bases: Knows the base lambda of each parameter.
            configured: For each of the user's groups what it may say of weight decay since a checkpoint was restored,
                and the one that holds instead until somebody writes something else.
        """
        self._bases, self._configured = bases, configured
        self._families = {}
        self.version += 1

    def multiply(
        self,
        multipliers: float | Sequence[float],
        absolute: tuple[float, float] | None = None,
        among: re.Pattern[str] | None = None,
    ) -> None:
        """Set what schedules multiply lambda with.

        Args:
            multipliers: One for all parts, or one for each, the last also for those that come later.
            absolute: Lambda that stands for a base, and that base, where a schedule says that; parts follow in
                proportion to their own.
            among: Only parts with such a name; None for all.
        """
        self.is_scheduled = True
        if among is not None:
            several = [multipliers] if isinstance(multipliers, int | float) else multipliers
            self._among[among] = several, absolute
            _multiply([group for group in self.groups if among.search(group.name)], several, absolute)
            if self._fixed:
                self.write()
            return
        self._absolute = absolute
        if isinstance(multipliers, int | float):
            self._multiplier = multipliers
            for family in self._families.values():
                for group in family.groups:
                    group.multiplier, group.absolute = multipliers, absolute
        else:
            self._multiplier = multipliers[-1] if multipliers else 1.0
            _multiply(self.unnamed(), multipliers, absolute)
        if self._fixed:
            self.write()

    def foretell(self, group: DecayGroup) -> tuple[float, float]:
        """Return lambda of a part at the end of the training and at its largest, as far as that is planned."""
        for among, plan in self.plans.items():
            if among is None or among.search(group.name):
                return plan(group)
        return (float(group.weight_decay),) * 2

    def unschedule(self, among: re.Pattern[str] | None = None) -> None:
        """Forget what a schedule gave to the parts that it takes."""
        self.multiply(1.0, among=among)
        if among is not None:
            self._among.pop(among, None)
        self.is_scheduled = bool(self._among)

    def hide(self, in_step: Mapping[str, Any] | None, way: Acting | None = None) -> None:
        """Let the optimizer see other options than the groups have, wherever they have them, while it updates.

        Args:
            in_step: The options, perhaps none, of the way that decay acts in; None once there is no way attached.
            way: That way.
        """
        self.way = way
        self._swap.in_step = dict(in_step or {})

    def hold(self, holder: object, asks: str) -> None:
        """Let lambda be in force in the optimizer's updates, until `release`.

        Args:
            holder: Who asks; each releases for itself.
            asks: The same in words.

        Raises:
            TypeError: If the optimizer has no step hooks.
        """
        if not self._holders:
            step_of(self.optimizer, asks).set_layout(self._swap)
        self._holders.add(id(holder))

    def release(self, holder: object) -> None:
        """Leave the optimizer alone once nobody holds it any more, and forget what was in force."""
        if id(holder) not in self._holders:
            return
        self._holders.discard(id(holder))
        if not self._holders and self.optimizer is not None:
            step_of(self.optimizer, "DecayGroups").set_layout(None)
            self._siblings, self._multiplier, self._absolute, self.is_scheduled = (), 1.0, None, False
            self._among = {}
            self.decide(None)

    def fix(self, bases: Sequence[float]) -> None:
        """Write lambda in force into the user's own groups from now on, where a strategy leaves no other way.

        Args:
            bases: The base lambda of each group.
        """
        self._fixed = bases
        self._families = {}
        self.write()

    def write(self) -> None:
        """Write lambda in force into the groups that were fixed."""
        for group in self.unnamed():
            if "weight_decay" in group.parent:
                group.parent["weight_decay"] = group.weight_decay

    def _make(self, index: int, parent: dict[str, Any]) -> Family:
        configured = self._configured[index] if index < len(self._configured) else None
        decided: list[Decision] = []
        if self._bases is not None:
            own = float((parent.get("weight_decay") if configured is None else configured[1]) or 0.0)
            decided = [self._bases.of(self.number, parameter, parent, own) for parameter in parent["params"]]
        made = split(parent, decided, configured)
        before = [group for family in self._families.values() for group in family.groups]
        multipliers = {group.label: group.multiplier for group in before}
        names = {group.label: group.name for group in before if group.parent is parent}
        for group in made.groups:
            if index < len(self._fixed):
                group.given = self._fixed[index]
            group.name = names.pop(group.label, "")
            group.multiplier, group.absolute = multipliers.get(group.label, self._multiplier), self._absolute
        return made

    def _tell_of_writing(self, family: Family) -> None:
        written = family.parent.get("weight_decay")
        if self._is_told or not family.is_given or written == family.written:
            return
        self._is_told = True
        rank_zero_warn(
            f"`weight_decay` of a parameter group of {type(self.optimizer).__name__} was changed from "
            f"{family.written:g} to {written:g}. It has no effect, since WeightDecay gives a value: "
            f"{', '.join(f'{group.name or group.label} {group.base:g}' for group in family.groups)}. "
            "Use WeightDecay() without a value to decay as the groups say, or a WeightDecayScheduler."
        )


def _multiply(groups: Sequence[DecayGroup], multipliers: Sequence[float], absolute: tuple[float, float] | None) -> None:
    """Set one multiplier for each part, the last also for those that come later."""
    late = repeat(multipliers[-1] if multipliers else 1.0)
    for group, multiplier in zip(groups, chain(multipliers, late), strict=False):
        group.multiplier, group.absolute = multiplier, absolute


def _name(optimizers: Sequence[Sequence[Sequence[DecayGroup]]]) -> None:
    """Name the parts of the groups of optimizers."""
    owners: list[Owner] = []
    every: list[DecayGroup] = []
    for number, families in enumerate(optimizers):
        for place, family in enumerate(families):
            own = family[0].parent.get("name")
            owners += [Owner(number, place, None if own is None else str(own), group.label) for group in family]
            every += family
    known = {index: group.name for index, group in enumerate(every) if group.name and group.label is not None}
    for group, name in zip(every, unique_names(owners, known), strict=True):
        group.name = name


_KNOWN: weakref.WeakKeyDictionary[Any, DecayGroups] = weakref.WeakKeyDictionary()


def decay_groups(optimizer: Any) -> DecayGroups:
    """Return the parts of the groups of an optimizer that decay alike.

    Args:
        optimizer: One that updates by itself; see `updating_optimizers`.

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.zeros(1)], weight_decay=0.1)
    >>> [(group.name, group.weight_decay) for group in decay_groups(optimizer).groups]
    [('group0', 0.1)]
    """
    known = _KNOWN.get(optimizer)
    if known is None:
        known = _KNOWN[optimizer] = DecayGroups(optimizer)
    return known


def decay_groups_of(optimizers: Sequence[Any]) -> list[DecayGroups]:
    """Return `decay_groups` of all optimizers of a module, with names that are unique over them."""
    found = [decay_groups(optimizer) for optimizer in optimizers]
    for number, one in enumerate(found):
        one.number, one._siblings = number, [weakref.ref(sibling) for sibling in found]
    return found


def weight_decay_in_force(optimizer: Any) -> dict[str, float]:
    """Return lambda of the coming step by the name of the parameter group, as in tables and logs.

    The groups in `optimizer.param_groups` stay as the user made them, so they don't tell.

    Args:
        optimizer: An optimizer, also a wrapped one; one without weight decay has 0.

    Raises:
        TypeError: If it is none.

    >>> import torch
    >>> groups = [{"params": [torch.zeros(1)], "name": "head"}, {"params": [torch.zeros(1)], "weight_decay": 0.0}]
    >>> weight_decay_in_force(torch.optim.AdamW(groups, weight_decay=0.1))
    {'head': 0.1, 'group1': 0.0}
    """
    updating = updating_optimizers(optimizer)
    if not all(hasattr(one, "param_groups") for one in updating):
        raise TypeError(f"Expected `optimizer` to be one, such as `trainer.optimizers[0]`, got {optimizer!r}.")
    found = [decay_groups(one) for one in updating]
    if any(len(one.siblings) < len(found) for one in found):
        found = decay_groups_of([one.optimizer for one in found])
    return {group.name: float(group.weight_decay) for one in found for group in one.groups}
