"""Lambda over training, on all optimizers of a module: what the callback does, for any training loop."""

from __future__ import annotations

import copy
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn.parameter import is_lazy

from lightning_l2.decay.feedback_view import as_seen
from lightning_l2.decay.schedule_checks import check_base, check_taken, pattern_of, probe, taken, warn_of_values
from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.optimizers.step_hook import StepHook, updates_of
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import DecayGroups, decay_groups, decay_groups_of
from lightning_l2.schedules.base import Schedule
from lightning_l2.schedules.feedback import FeedbackSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from lightning_l2.param_groups.parts import DecayGroup


# At so many places of a schedule its largest value is looked for.
_SAMPLES = 200


class ScheduledDecay:
    r"""Multiply lambda of parameter groups by a schedule: $\lambda_t = \lambda_0 \cdot m(t / (T - 1))$.

    Several can stand side by side, each for groups of its own.

    Args:
        schedule: Multiplier as a function of progress, or from what training does.
        optimizers: The optimizers that train; see `updating_optimizers`.
        length: Length $T$ of the training, in what `set` counts.
        values: Whether the schedule gives multipliers, or the `"weight_decay"` that stands for the configured base;
            see `anchor`.
        groups: Regular expression searched for in the names of parameter groups: those that are scheduled; None for
            all.
        memory: What a feedback schedule remembers, by the optimizer's number; it is changed in place.
        writes: Whether lambda is written into the groups, where a strategy leaves no other way.
        look: As of `Attachments`.
        shards: As of `as_seen`.

    Raises:
        TypeError: If an optimizer has no step hooks.
        ValueError: If the schedule gives what no lambda can be, or `groups` is no regular expression.

    >>> import torch
    >>> from lightning_l2.schedules import LinearSchedule
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=0.5)
    >>> scheduled = ScheduledDecay(LinearSchedule(0.0, 1.0), [optimizer], length=3)
    >>> scheduled.set(1)
    >>> decay_groups(optimizer).groups[0].weight_decay, optimizer.param_groups[0]["weight_decay"]
    (0.25, 0.5)
    >>> scheduled.remove()
    """

    def __init__(
        self,
        schedule: Schedule | FeedbackSchedule,
        optimizers: Sequence[Optimizer],
        *,
        length: int = 1,
        values: Literal["multiplier", "weight_decay"] = "multiplier",
        groups: str | None = None,
        memory: dict[int, dict[str, Any]] | None = None,
        writes: bool = False,
        look: Callable[[], Any] | None = None,
        shards: Callable[[], Mapping[int, ProcessGroup]] | None = None,
    ) -> None:
        self.optimizers: list[Optimizer] = []
        self._schedule = schedule.over(length) if isinstance(schedule, Schedule) else schedule
        self._name = type(schedule).__name__
        self._length = length
        self._values = values
        self._among = pattern_of(groups)
        self._memory = {} if memory is None else memory
        self._shards = shards
        # DeepSpeed replaces no optimizer, and shows its groups one by one while it steps
        self._attached = Attachments(self._write if writes else self._attach, None if writes else look)
        self._groups: list[DecayGroups] = []
        self._updates: list[int] = []
        # for which index and which parts each optimizer's multipliers were set last
        self._given: dict[DecayGroups, tuple[int, list[int]]] = {}
        self._anchor: tuple[tuple[bool, ...], float] = (), 0.0
        self._readable: set[int] = set()
        if isinstance(self._schedule, Schedule):
            probe(self._schedule, length, self._name)
        self.follow(optimizers)

    def follow(self, optimizers: Sequence[Optimizer]) -> bool:
        """Go over to other optimizers; return whether they are others."""
        if not self._attached.follow(optimizers):
            return False
        self.optimizers = list(optimizers)
        self._groups = decay_groups_of(optimizers)
        self._updates = list(map(updates_of, optimizers))
        if isinstance(self._schedule, Schedule):
            for one in self._groups:
                one.plans[self._among] = self.foretell
        self._anchor, self._readable, self._given = ((), 0.0), set(), {}
        return True

    def check(self, *, is_followed: bool = False) -> bool:
        """Refuse what can't be scheduled; return whether that is known, for which lazy parameters need a shape.

        Args:
            is_followed: Whether something else, such as a penalty, follows the schedule with a lambda of its own.

        Raises:
            MisconfigurationException: If nothing is scheduled, or a group twice.
            ValueError: If a feedback schedule can't read an optimizer.
        """
        if not self.optimizers:
            raise MisconfigurationException(
                "WeightDecayScheduler needs an optimizer, and `configure_optimizers` returned none. "
                "Return an optimizer, or remove the callback."
            )
        for optimizer in self.optimizers:
            self._check_readable(optimizer)
        parents = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if any(is_lazy(parameter) for group in parents for parameter in group["params"]):
            return False
        check_taken(self._groups, self._among)
        if not self.strongest():
            check_base(self._groups, self._among, self._values, is_followed=is_followed)
        if isinstance(self._schedule, Schedule) and self._values == "multiplier":
            warn_of_values(self._name, float(self._schedule(0.0)), self.anchor())
        return True

    def strongest(self) -> float:
        """Return the largest base lambda of the groups that are scheduled."""
        return max((float(group.base) for group in self._taken()), default=0.0)

    def anchor(self) -> float:
        """Return the base that values of `"weight_decay"` stand for.

        It is the one that rules multiply, so a rule with `multiplier=2` has twice the schedule's value. Without such a
        base, as in groups made by hand, it is the largest of the groups that there are at first.
        """
        decided = tuple(one.is_decided for one in self._groups)
        if not self._anchor[1] or self._anchor[0] != decided:
            bases = [base for group in self._taken() if (base := _multiplied(group))]
            self._anchor = decided, max(bases, default=self.strongest())
        return self._anchor[1]

    def set(self, index: int, *, only_updated: bool = False) -> None:
        """Put lambda of a step, or what else is counted, in force.

        Args:
            index: How many there were before.
            only_updated: Leave alone optimizers that haven't updated since the last call.
        """
        groups = self._groups
        updates = list(map(updates_of, self.optimizers))
        if only_updated:
            groups = [one for one, now, before in zip(groups, updates, self._updates, strict=True) if now != before]
        self._updates = updates
        if isinstance(self._schedule, FeedbackSchedule):
            for one in groups:
                if self._schedule.reads == "lr":
                    self.read(one.optimizer)
                else:
                    self._repeat(one)
            return
        now = index, [one.version for one in self._groups]
        groups = [one for one in groups if self._given.get(one) != now]
        if not groups:
            return
        self._given.update(dict.fromkeys(groups, now))
        value = float(self._schedule(min(1.0, index / max(1, self._length - 1))))
        if self._values == "multiplier":
            for one in groups:
                one.multiply(value, among=self._among)
            return
        anchor = self.anchor()
        for one in groups:
            one.multiply(value / anchor if anchor else 0.0, (value, anchor), self._among)

    def foretell(self, group: DecayGroup) -> tuple[float, float]:
        """Return lambda of a group at the end of the training and at its largest; as now with a feedback schedule."""
        if isinstance(self._schedule, FeedbackSchedule):
            return (float(group.weight_decay),) * 2
        base = 1.0 if self._values == "multiplier" else self.anchor()
        unit = float(group.base) / base if base else 0.0
        values = [float(self._schedule(progress / _SAMPLES)) for progress in range(_SAMPLES + 1)]
        return values[-1] * unit, max(values) * unit

    def read(self, optimizer: Optimizer, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Ask a feedback schedule for the multipliers of an optimizer's groups, and put them in force."""
        schedule: Any = self._schedule
        view = self._check_readable(optimizer)
        if view is None:
            return
        memory = self._memory.setdefault(self._number(optimizer), {"state": {}})
        memory["multipliers"] = list(map(float, schedule.multipliers(view, metrics, memory["state"])))
        decay_groups(optimizer).multiply(memory["multipliers"], among=self._among)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Let a feedback schedule see metrics."""
        for optimizer in self.optimizers:
            self.read(optimizer, metrics)

    def state(self) -> dict[int, dict[str, Any]]:
        """Return what a feedback schedule remembers, as a copy."""
        return copy.deepcopy(self._memory)

    def remove(self) -> None:
        """Leave the optimizers alone."""
        self._attached.remove()

    def _repeat(self, one: DecayGroups) -> None:
        """Put in force what a feedback schedule gave last; 1 before it was asked, so that followers find one."""
        given = self._memory.get(self._number(one.optimizer), {}).get("multipliers") or [1.0]
        one.multiply(given, among=self._among)

    def _taken(self) -> list[DecayGroup]:
        return taken(self._groups, self._among)

    def _check_readable(self, optimizer: Optimizer) -> Any:
        """Return an optimizer as a feedback schedule sees it, once it has looked; None if it has none of the groups."""
        if not isinstance(self._schedule, FeedbackSchedule):
            return None
        view = as_seen(optimizer, self._among, self._shards)
        if view.param_groups and id(optimizer) not in self._readable:
            self._schedule.check(view)
            self._readable.add(id(optimizer))
        return view if view.param_groups else None

    def _number(self, optimizer: Optimizer) -> int:
        return next(number for number, one in enumerate(self.optimizers) if one is optimizer)

    def _attach(self, number: int, optimizer: Optimizer) -> _InForce:
        reads_gradients = isinstance(self._schedule, FeedbackSchedule) and self._schedule.reads == "gradients"
        return _Reading(self, optimizer, self._among) if reads_gradients else _InForce(optimizer, self._among)

    def _write(self, number: int, optimizer: Optimizer) -> _Written:
        return _Written(optimizer, self._among)


class _Written:
    """Knows that an optimizer's groups are scheduled, where lambda is written into them."""

    def __init__(self, optimizer: Optimizer, among: re.Pattern[str] | None) -> None:
        self._groups, self._among = decay_groups(optimizer), among
        self._groups.schedules.append(among)

    def remove(self) -> None:
        self._groups.schedules.remove(self._among)
        self._groups.plans.pop(self._among, None)
        self._groups.is_scheduled = False


class _InForce(_Written):
    """Keeps the multipliers in an optimizer's groups in force."""

    def __init__(self, optimizer: Optimizer, among: re.Pattern[str] | None) -> None:
        super().__init__(optimizer, among)
        self._groups.hold(self, "WeightDecayScheduler")

    def remove(self) -> None:
        super().remove()
        self._groups.unschedule(self._among)
        self._groups.release(self)


class _Reading(_InForce):
    """Has a feedback schedule read the gradients of an optimizer before anything joins them."""

    def __init__(self, scheduled: ScheduledDecay, optimizer: Optimizer, among: re.Pattern[str] | None) -> None:
        super().__init__(optimizer, among)
        self._hook = _ReadingHook(scheduled, optimizer)

    def remove(self) -> None:
        self._hook.remove()
        super().remove()


class _ReadingHook(StepHook):
    turn = Turn.SCHEDULE

    def __init__(self, scheduled: ScheduledDecay, optimizer: Optimizer) -> None:
        super().__init__(optimizer, "WeightDecayScheduler")
        self._scheduled = scheduled

    def before_clipping(self) -> None:
        self._scheduled.read(self.optimizer)


def _multiplied(group: DecayGroup) -> float:
    """Return the base that a rule's multiplier made a group's base from; 0 where a rule gave lambda itself."""
    if not group.decisions:
        return float(group.base)
    rule = group.decisions[0].rule
    if rule is None or not rule.follows_base:
        return 0.0
    return float(group.base) / (1.0 if rule.multiplier is None else rule.multiplier)
