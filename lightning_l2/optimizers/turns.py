"""What may act within an optimizer's step: at which moments, between last gradient and update and after, in one order.

For each optimizer, whatever the order in which it was attached:

1. gradients are complete, unscaled and not clipped: schedules read them, then the penalty and coupled decay join them,
   then monitors read them;
2. they are clipped: the penalty and coupled decay join them here otherwise, other decay acts on the weights;
3. the optimizer updates, with its parameter groups split by weight decay;
4. the weights are new: decay that compares them with the old ones, then constraints, then monitors.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar


class Turn(IntEnum):
    """When something acts, among all that is attached to an optimizer."""

    SCHEDULE = 0
    PENALTY = 1
    DECAY = 2
    CONSTRAINT = 3
    MONITOR = 4


class Moments:
    """What acts within a step; a subclass overrides the moments it acts at.

    What changes weights or gradients there says `torch.no_grad` itself, since most of what acts computes no tensors.

    Attributes:
        turn: When it acts among others.
    """

    turn: ClassVar[Turn]

    def begin(self, *, has_closure: bool) -> None:
        """Prepare a step."""

    def before_clipping(self) -> None:
        """Act on complete, unscaled gradients; not called for steps that the trainer knows nothing of."""

    def before_closure(self) -> None:
        """Prepare a call of the closure."""

    def objective(self, loss: Any) -> Any:
        """Return the loss that the optimizer gets for the closure's own."""
        return loss

    def before_update(self) -> None:
        """Act after each call of the closure, or at once where there is none."""

    def after_update(self) -> None:
        """Act on what the update has made."""
