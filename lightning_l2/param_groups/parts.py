"""The parts of one of the user's parameter groups that decay alike, and what was decided on their parameters."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_l2.rules.rule import DecayRule

# What a part is called whose parameters no rule has decided on; it keeps its group's weight decay.
UNASSIGNED = "unassigned"


class Decision(NamedTuple):
    """What was decided on a parameter.

    Args:
        name: Its qualified name.
        key: The same, unique over all optimizers that have it.
        rule: The rule that matches it, None for none.
        base: Lambda before any schedule, None for what its group and the rule make of each other.
    """

    name: str
    key: str
    rule: DecayRule | None
    base: float | None

    @property
    def label(self) -> str:
        """What the part is called, before any prefix, that the parameter belongs to."""
        return UNASSIGNED if self.rule is None else self.rule.group_of(self.name)


class Acting(Protocol):
    """A way in which decay acts.

    Attributes:
        apply: As of `attach_decay`.
        peak_lr: As of `attach_decay`.
        taken: What it has taken of each part in the last step, once its turn is over; None if the optimizer takes it.
    """

    apply: str
    peak_lr: Any
    taken: Sequence[float | Tensor] | None

    @property
    def rounds_away(self) -> bool:
        """Whether decay that is too small for the number format of the weights does nothing."""

    def share(
        self, group: DecayGroup, lr: float | None = None, weight_decay: float | None = None
    ) -> float | Tensor | None:
        """Return the share of the weights that a step takes of a group, None where that is not known.

        Args:
            group: A part of the optimizer's groups.
            lr: The learning rate, by default the one that the group has.
            weight_decay: Lambda, by default the one in force.
        """


@dataclass(eq=False)
class DecayGroup:
    """Parameters of one of the user's groups that decay alike.

    Args:
        parent: The user's group, for reading.
        params: Its parameters that decay alike, in their order.
        indices: Their places in the group.
        decisions: What was decided on each, none where no rule was asked.
        configured: The parent's weight decay as a checkpoint restored it, and what holds until somebody changes that.
        given: The base, where it does not follow from the parent's weight decay.
        multiplier: What schedules multiply lambda with.
        absolute: Lambda that stands for a base and that base, where a schedule gives those.
        name: A unique name over all optimizers of a module.
        child: What stands for it while the optimizer updates: the same object each time, as compiled steps expect.
        own_options: Options that the optimizer gave to this part only, with the parent's at that time.
    """

    parent: dict[str, Any]
    params: list[Tensor]
    indices: list[int]
    decisions: list[Decision]
    configured: tuple[tuple[Any, ...], float] | None = None
    given: float | None = None
    multiplier: float = 1.0
    absolute: tuple[float, float] | None = None
    name: str = ""
    child: dict[str, Any] | None = None
    own_options: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The name of the rule that made it, or what stands for one."""
        if not self.decisions:
            return str(self.parent.get("name", "")) if self.params else "empty"  # which torch allows
        rule = self.decisions[0].rule
        return UNASSIGNED if rule is None else rule.name

    def options(self) -> dict[str, Any]:
        """Return what of its own options holds, as nobody has written to the parent since."""
        return {key: own for key, (own, then) in self.own_options.items() if self.parent.get(key) is then}

    @property
    def towards(self) -> str:
        """What its weights decay towards, `"zero"` or the `"start"`."""
        rule = self.decisions[0].rule if self.decisions else None
        return "zero" if rule is None else rule.towards or "zero"

    @property
    def label(self) -> str | None:
        """What it is called before any prefix, None where no rule was asked."""
        return self.decisions[0].label if self.decisions else None

    @property
    def base(self) -> Any:
        """Lambda before any schedule: a number, or what else the user's group holds."""
        if self.given is not None:
            return self.given
        own = self.parent.get("weight_decay", 0.0)
        if self.configured is not None and own in self.configured[0]:
            own = self.configured[1]
        rule = self.decisions[0].rule if self.decisions else None
        return own if rule is None or rule.multiplier is None else own * rule.multiplier

    @property
    def weight_decay(self) -> Any:
        """Lambda in force, in the coming step."""
        base = self.base if self.given is None else self.given  # every step asks
        if self.absolute is not None:
            value, anchor = self.absolute
            return value * (base / anchor) if anchor else 0.0
        return base * self.multiplier if self.multiplier != 1.0 else base


class Family(NamedTuple):
    """The parts of a user's group, the parameters that it had, and what it said of weight decay then."""

    groups: list[DecayGroup]
    parent: dict[str, Any]
    params: list[Tensor]
    written: Any

    def fits(self, parent: dict[str, Any]) -> bool:
        """Return whether a group is the same, with the same parameters."""
        params = parent["params"]
        return parent is self.parent and len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    @property
    def is_given(self) -> bool:
        """Whether it was decided what decays, whatever the user's group says."""
        return any(decision.base is not None for group in self.groups for decision in group.decisions)


def split(
    parent: dict[str, Any], decisions: Sequence[Decision], configured: tuple[tuple[Any, ...], float] | None
) -> Family:
    """Return the parts of a user's group, in the order of their first parameters.

    Args:
        parent: The group.
        decisions: What was decided on each of its parameters, nothing where no rule was asked.
        configured: As of `DecayGroup`.
    """
    params = parent["params"]
    members: dict[Any, list[int]] = {}
    for place in range(len(params)):
        key = (decisions[place].rule is None, decisions[place].label, decisions[place].base) if decisions else None
        members.setdefault(key, []).append(place)
    groups = []
    for places in members.values() or [[]]:
        decided = [decisions[place] for place in places if decisions]
        group = DecayGroup(parent, [params[place] for place in places], places, decided, configured)
        if decided:
            rule, base = decided[0].rule, decided[0].base
            group.given = rule.weight_decay if base is None and rule is not None else base
        groups.append(group)
    return Family(groups, parent, list(params), parent.get("weight_decay"))
