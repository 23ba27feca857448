"""The base of what acts within an optimizer's step, and what is told and asked of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_l2.optimizers.step import known_step, step_of
from lightning_l2.optimizers.turns import Moments

if TYPE_CHECKING:
    from torch.optim import Optimizer


class StepHook(Moments):
    """The base of what acts within a step; a subclass overrides the moments it acts at.

    Steps that `torch.distributed` makes of its own, to get an optimizer's state, are left alone. What is attached while
    a step runs acts from the next one on. Nothing of it is compiled with a step.

    Args:
        optimizer: One of `updating_optimizers`.
        asks: Who needs it, for the message of the error.

    Raises:
        TypeError: If the optimizer has no step hooks.

    >>> import torch
    >>> from lightning_l2.optimizers.turns import Turn
    >>> class Count(StepHook):
    ...     turn = Turn.MONITOR
    ...     steps = 0
    ...     def after_update(self):
    ...         self.steps += 1
    >>> optimizer = torch.optim.SGD([torch.zeros(1)])
    >>> count = Count(optimizer, "Count")
    >>> optimizer.step(); count.remove(); optimizer.step()
    >>> count.steps
    1
    """

    def __init__(self, optimizer: Optimizer, asks: str) -> None:
        self.optimizer = optimizer
        step_of(optimizer, asks).add(self)

    def remove(self) -> None:
        """Take it off the optimizer."""
        step = known_step(self.optimizer)
        if step is not None:
            step.discard(self)


def gradients_are_complete(optimizer: Any, teller: object) -> None:
    """Let everything act that acts before clipping: once, however many callbacks tell it of the same gradients.

    Args:
        optimizer: One of `updating_optimizers`, its gradients unscaled.
        teller: Who tells. The second time that it does, the gradients are new.
    """
    step = known_step(optimizer)
    if step is not None:
        step.before_clipping(teller)


def updates_of(optimizer: Any) -> int:
    """Return how many updates an optimizer has made since something was attached to it."""
    step = known_step(optimizer)
    return 0 if step is None else step.updates


def tell_once(optimizer: Any) -> bool:
    """Return whether somebody may warn about an optimizer, which several callbacks would otherwise do."""
    step = known_step(optimizer)
    if step is None or step.is_told:
        return False
    step.is_told = True
    return True
