"""What can't be scheduled, told before it costs a training, and what is only suspected."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.arguments import check_pattern
from lightning_l2.rules.closest import as_glob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_l2.param_groups.decay_groups import DecayGroups
    from lightning_l2.param_groups.parts import DecayGroup
    from lightning_l2.schedules.base import Schedule

_Among = re.Pattern[str] | None


def pattern_of(groups: str | None) -> _Among:
    """Return a regular expression of names of groups, None for all.

    Raises:
        ValueError: If it is none.
    """
    check_pattern(groups=groups)
    return None if groups is None else re.compile(groups)


def taken(groups: Sequence[DecayGroups], among: _Among) -> list[DecayGroup]:
    """Return the groups of a name that is searched for."""
    if among is None:
        return [group for one in groups for group in one.unnamed()]
    return [group for one in groups for group in one.groups if among.search(group.name)]


def check_taken(groups: Sequence[DecayGroups], among: _Among) -> None:
    """Refuse a pattern that no group has, and groups that decay which two schedules take.

    Raises:
        MisconfigurationException: If there is one.
    """
    if among is not None and not taken(groups, among):
        names = [group.name for one in groups for group in one.groups]
        raise MisconfigurationException(
            f"WeightDecayScheduler(groups={among.pattern!r}) takes no parameter group. "
            + (as_glob(among.pattern, names) or f"The groups are {', '.join(map(repr, names))}.")
        )
    decaying = [(group.name, one.schedules) for one in groups for group in one.groups if group.base]
    for name, schedules in decaying:
        takers = [other and other.pattern for other in schedules if other is None or other.search(name)]
        if len(takers) > 1:
            raise MisconfigurationException(
                f"{len(takers)} schedules take the parameter group {name!r}, by "
                f"{' and '.join(f'groups={pattern!r}' for pattern in takers)}. Let one of them take it: patterns are "
                "searched for, so '^decay$' takes 'decay' alone."
            )


def check_base(groups: Sequence[DecayGroups], among: _Among, values: str, *, is_followed: bool) -> None:
    """Refuse to schedule what is 0 throughout.

    Args:
        groups: Those of all optimizers.
        among: Which of them are scheduled.
        values: What the schedule's values are.
        is_followed: Whether something else follows the schedule with a lambda of its own.

    Raises:
        MisconfigurationException: If nobody can have meant that; the base may be 0 on purpose, as in a sweep, where
            rules would let it decay.
    """
    which = "every parameter group" if among is None else f"every parameter group that {among.pattern!r} takes"
    if values == "weight_decay":
        raise MisconfigurationException(
            "WeightDecayScheduler(values='weight_decay') gives lambda in the place of the base, but the base weight "
            f"decay of {which} is 0. Give a base, such as WeightDecay(1.0), to say which groups decay."
        )
    rules = [group.decisions[0].rule for group in taken(groups, among) if group.decisions]
    if not is_followed and not any(rule is not None and rule.resolve(1.0) for rule in rules):
        way_out = "Give the optimizer a weight_decay, or add the callback WeightDecay(weight_decay=...)."
        raise MisconfigurationException(
            f"WeightDecayScheduler has nothing to schedule: the weight decay of {which} is 0. "
            + ("Rules exempt all of them." if rules else way_out)
        )


def warn_of_values(name: str, start: float, base: float) -> None:
    """Tell of multipliers that seem to be weight decays, since they start at the base.

    Args:
        name: What the schedule is called.
        start: Its first value.
        base: The base weight decay.
    """
    if base not in (0.0, 1.0) and math.isclose(start, base, rel_tol=1e-6):
        rank_zero_warn(
            f"{name} starts at a multiplier of {start:g}, and the base weight decay is {base:g}, so lambda starts at "
            f"{start:g} * {base:g} = {start * base:g}. If its values are weight decays, set values='weight_decay'."
        )


def probe(schedule: Schedule, length: int, name: str) -> None:
    """Refuse a schedule that would give what no lambda can be.

    Args:
        schedule: The schedule.
        length: Of the training, in steps.
        name: What the schedule is called.

    Raises:
        ValueError: If one of its values is negative or not finite.
    """
    points = min(length, 1000)
    for index in range(points):
        progress = index / max(1, points - 1)
        value = schedule(progress)
        try:
            is_multiplier = 0 <= float(value) < math.inf
        except (TypeError, ValueError):
            is_multiplier = False
        if not is_multiplier:
            raise ValueError(
                f"{name} gives {value!r} at progress {progress:.3g}; "
                "a multiplier of weight decay has to be finite and at least 0."
            )
