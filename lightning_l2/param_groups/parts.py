"""A part of one of the user's parameter groups that decays alike, and what was decided on its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_l2.rules.rule import DecayRule

# What a part is called whose parameters no rule has decided on; it keeps its group's weight decay.
UNASSIGNED = "unassigned"
# What stands for the rule of a group without parameters, which torch allows.
EMPTY = "empty"


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


class Bases(Protocol):
    """Knows the base lambda of each parameter."""

    def of(self, number: int, parameter: Tensor, group: Mapping[str, Any], own: float) -> Decision:
        """Return what is decided on a parameter.

        Args:
            number: The index of the optimizer.
            parameter: One of its parameters.
            group: The user's group that has it.
            own: That group's own weight decay, 0 where it has none.
        """


class Acting(Protocol):
    """A way in which decay acts.

    Attributes:
        apply: As of `attach_decay`.
        peak_lr: As of `attach_decay`.
    """

    apply: str
    peak_lr: Any

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
            return str(self.parent.get("name", "")) if self.params else EMPTY
        rule = self.decisions[0].rule
        return UNASSIGNED if rule is None else rule.name

    @property
    def towards(self) -> str:
        """What its weights decay towards, `"zero"` or the `"start"`."""
        rule = self.decisions[0].rule if self.decisions else None
        return "zero" if rule is None else rule.towards or "zero"

    @property
    def label(self) -> str | None:
        """What it is called before any prefix, None where no rule was asked."""
        if not self.decisions:
            return None
        name, _, rule, _ = self.decisions[0]
        return UNASSIGNED if rule is None else rule.group_of(name)

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
