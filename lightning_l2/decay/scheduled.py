"""Lambda over training, on all optimizers of a module: what the callback does, for any training loop."""

from __future__ import annotations

import copy
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.optimizers.step_hook import StepHook, updates_of
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import DecayGroups, decay_groups, decay_groups_of
from lightning_l2.schedules.base import Schedule
from lightning_l2.schedules.feedback import FeedbackSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer


class ScheduledDecay:
    r"""Multiply lambda of every parameter group by a schedule: $\lambda_t = \lambda_0 \cdot m(t / (T - 1))$.

    Args:
        schedule: Multiplier as a function of progress, or from what training does.
        optimizers: The optimizers that train; see `updating_optimizers`.
        length: Length $T$ of the training, in what `set` counts.
        values: Whether the schedule gives multipliers, or the `"weight_decay"` of groups with the strongest base.
        memory: What a feedback schedule remembers, by the optimizer's number; it is changed in place.
        writes: Whether lambda is written into the groups, where a strategy leaves no other way.
        look: As of `Attachments`.

    Raises:
        TypeError: If an optimizer has no step hooks.
        ValueError: If the schedule gives what no lambda can be.

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
        memory: dict[int, dict[str, Any]] | None = None,
        writes: bool = False,
        look: Callable[[], Any] | None = None,
    ) -> None:
        self.optimizers: list[Optimizer] = []
        self._schedule = schedule
        self._length = length
        self._values = values
        self._memory = {} if memory is None else memory
        # DeepSpeed replaces no optimizer, and shows its groups one by one while it steps
        self._attached = Attachments(_Written if writes else self._attach, None if writes else look)
        self._groups: list[DecayGroups] = []
        self._updates: list[int] = []
        if isinstance(schedule, Schedule):
            probe(schedule, length)
        self.follow(optimizers)

    def follow(self, optimizers: Sequence[Optimizer]) -> bool:
        """Go over to other optimizers; return whether they are others."""
        if not self._attached.follow(optimizers):
            return False
        self.optimizers = list(optimizers)
        self._groups = decay_groups_of(optimizers)
        self._updates = list(map(updates_of, optimizers))
        return True

    def check(self) -> None:
        """Refuse optimizers that a feedback schedule can't read.

        Raises:
            ValueError: If there is one.
        """
        if isinstance(self._schedule, FeedbackSchedule):
            for optimizer in self.optimizers:
                self._schedule.check(_view(optimizer))

    def strongest(self) -> float:
        """Return the largest base lambda."""
        return max((float(g.base) for o in self.optimizers for g in decay_groups(o).unnamed()), default=0.0)

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
                    self._repeat(one.optimizer)
            return
        value = float(self._schedule(min(1.0, index / max(1, self._length - 1))))
        if self._values == "multiplier":
            for one in groups:
                one.multiply(value)
            return
        strongest = self.strongest()
        for one in groups:
            one.multiply(value / strongest if strongest else 0.0, (value, strongest))

    def read(self, optimizer: Optimizer, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Ask a feedback schedule for the multipliers of an optimizer's groups, and put them in force."""
        schedule: Any = self._schedule
        memory = self._memory.setdefault(self._number(optimizer), {"state": {}})
        memory["multipliers"] = list(map(float, schedule.multipliers(_view(optimizer), metrics, memory["state"])))
        decay_groups(optimizer).multiply(memory["multipliers"])

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

    def _repeat(self, optimizer: Optimizer) -> None:
        """Put in force what a feedback schedule gave last; 1 before it was asked, so that followers find one."""
        decay_groups(optimizer).multiply(self._memory.get(self._number(optimizer), {}).get("multipliers") or [1.0])

    def _number(self, optimizer: Optimizer) -> int:
        return next(number for number, one in enumerate(self.optimizers) if one is optimizer)

    def _attach(self, number: int, optimizer: Optimizer) -> _InForce:
        reads_gradients = isinstance(self._schedule, FeedbackSchedule) and self._schedule.reads == "gradients"
        return _Reading(self, optimizer) if reads_gradients else _InForce(optimizer)


class _InForce:
    """Keeps the multipliers in an optimizer's groups in force."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups: DecayGroups = decay_groups(optimizer)
        self._groups.hold(self, "WeightDecayScheduler")

    def remove(self) -> None:
        self._groups.multiply(1.0)
        self._groups.is_scheduled = False
        self._groups.release(self)


class _Written:
    """Stands for it where lambda is written into the groups."""

    def __init__(self, number: int, optimizer: Optimizer) -> None:
        self._groups = decay_groups(optimizer)

    def remove(self) -> None:
        self._groups.is_scheduled = False


class _Reading(_InForce):
    """Has a feedback schedule read the gradients of an optimizer before anything joins them."""

    def __init__(self, scheduled: ScheduledDecay, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
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


class _View:
    """An optimizer as feedback schedules see it: with a group for each part that decays alike."""

    # Values of the class, so that these are found before properties of the optimizer's, such as DeepSpeed's have.
    param_groups: Sequence[dict[str, Any]] = ()
    state: Mapping[Any, Any] = MappingProxyType({})
    defaults: Mapping[str, Any] = MappingProxyType({})


_VIEWS: dict[type, Any] = {}


def _view(optimizer: Any) -> Any:
    kind: Any = type(optimizer)
    if kind not in _VIEWS:
        _VIEWS[kind] = type(kind.__name__, (_View, kind), {})  # schedules ask of what class it is
    view = object.__new__(_VIEWS[kind])
    vars(view).update(
        state=optimizer.state,
        defaults=getattr(optimizer, "defaults", {}),
        param_groups=[
            {
                **group.parent,
                "params": group.params,
                "name": group.name,
                **({"rule": group.rule} if group.decisions else {}),
                "weight_decay": group.weight_decay,
                "initial_weight_decay": group.base,
            }
            for group in decay_groups(optimizer).groups
        ],
    )
    vars(view).update(vars(optimizer) | vars(view))  # DeepSpeed's have more that tells what they are
    return view


def probe(schedule: Schedule, length: int) -> None:
    """Refuse a schedule that would give what no lambda can be, before it costs a training.

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
                f"{type(schedule).__name__} gives {value!r} at progress {progress:.3g}; "
                "a multiplier of weight decay has to be finite and at least 0."
            )
