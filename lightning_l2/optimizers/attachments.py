"""What a callback has attached to the optimizers of a training, which may be replaced at any time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_l2.optimizers.step import known_step, uncompiled

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_Attached = TypeVar("_Attached", bound="Removable")


class Removable(Protocol):
    """What can be taken off an optimizer."""

    def remove(self) -> None:
        """Take it off."""


class Attachments(Generic[_Attached]):
    """What one callback has attached to the optimizers of a training.

    Args:
        attach: Attaches to an optimizer, given its index.
        look: Called before a step of any other optimizer in the process, to `follow` those that there are now: nothing
            of a step is missed by an optimizer that was set up a moment before.

    >>> import torch
    >>> from lightning_l2.optimizers.step_hook import StepHook
    >>> from lightning_l2.optimizers.turns import Turn
    >>> class Recorder(StepHook):
    ...     turn = Turn.MONITOR
    >>> sgd = torch.optim.SGD([torch.zeros(1)])
    >>> hooks = Attachments(lambda number, optimizer: Recorder(optimizer, "Recorder"))
    >>> hooks.follow([sgd]), hooks.follow([sgd]), hooks.follow([])
    (True, False, True)
    """

    def __init__(self, attach: Callable[[int, Any], _Attached], look: Callable[[], Any] | None = None) -> None:
        self._attach = attach
        self._optimizers: list[Any] = []
        self._attached: list[_Attached] = []
        self._look = look

    def __iter__(self) -> Iterator[_Attached]:
        """Iterate over what is attached, in the order of the optimizers."""
        return iter(self._attached)

    def follow(self, optimizers: Sequence[Any]) -> bool:
        """Attach to the optimizers that are new, take off those that are gone; return whether there were any."""
        known = self._optimizers
        if len(known) == len(optimizers) and all(map(operator.is_, known, optimizers)):
            return False
        before = {id(one): attached for one, attached in zip(known, self._attached, strict=True)}
        kept = [before.pop(id(one), None) for one in optimizers]
        for attached in before.values():
            attached.remove()
        self._optimizers, self._attached = list(optimizers), [one for one in kept if one is not None]
        try:
            for number, one in enumerate(optimizers):
                if kept[number] is None:
                    self._attached.insert(number, self._attach(number, one))
        except BaseException:
            self.remove()
            raise
        if self._look is not None and self not in _WATCHING:
            _WATCHING.append(self)
            _watch()
        return True

    def remove(self) -> None:
        """Take everything off."""
        if self in _WATCHING:
            _WATCHING.remove(self)
            _watch()
        for attached in self._attached:
            attached.remove()
        self._optimizers, self._attached = [], []

    def look_for(self, optimizer: Any) -> None:
        """Follow the optimizers that there are now, if this one is none of those before."""
        for one in self._optimizers:
            if one is optimizer:
                return
        if self._look is not None:
            self._look()


_WATCHING: list[Attachments[Any]] = []
_GLOBAL: list[RemovableHandle] = []


def _watch() -> None:
    """Have all optimizers' steps watched as long as somebody wants it."""
    if _WATCHING and not _GLOBAL:
        _GLOBAL.append(register_optimizer_step_pre_hook(uncompiled(_on_any_step)))
    elif not _WATCHING and _GLOBAL:
        _GLOBAL.pop().remove()


def _on_any_step(optimizer: Any, *_: Any) -> None:
    for attachments in list(_WATCHING):
        attachments.look_for(optimizer)
    step = known_step(optimizer)
    if step is not None:
        step.be_last()
