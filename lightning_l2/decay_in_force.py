"""Weight decay as it is in force on the optimizers of a training, out of sight while a checkpoint is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from lightning_l2.regrouping import Regrouping
    from lightning_l2.step_hooks import DecayHandle


class DecayInForce:
    """The groups of a training's optimizers, once they are decided, and the decay that is attached to their steps.

    Args:
        on_hidden: Called each time that the optimizers have the user's own layout again.
        is_given_back: Whether they get it at all; not where a strategy took them over with the groups they had.

    Attributes:
        groups: None until rules have decided, which lazy parameters put off.
    """

    def __init__(self, on_hidden: Callable[[], None], *, is_given_back: bool = True) -> None:
        self.groups: Regrouping | None = None
        self.is_given_back = is_given_back
        self._on_hidden = on_hidden
        # by the `id` of an optimizer
        self._handles: dict[int, DecayHandle] = {}

    def attach(self, optimizer: Optimizer, handle: DecayHandle) -> None:
        """Take charge of a decay that was attached to an optimizer."""
        self._handles[id(optimizer)] = handle

    def couple(self, optimizer: Optimizer) -> None:
        """Let lambda w join the gradients of an optimizer now, before they are clipped."""
        self._handles[id(optimizer)].couple()

    def hide(self) -> None:
        """Present the optimizers as the user made them, and leave their steps alone, until `show`."""
        self._pause(True)
        if self.groups is not None and self.is_given_back:
            self.groups.merge()
            self._on_hidden()

    def show(self) -> None:
        """Undo `hide`; harmless at any other time."""
        if self.groups is not None:
            self.groups.restore()
        self._pause(False)

    def release(self) -> None:
        """Leave the optimizers as the user made them, for good."""
        self.show()
        for handle in self._handles.values():
            handle.remove()
        if self.groups is not None and self.is_given_back:
            self.groups.merge()

    def _pause(self, is_paused: bool) -> None:
        for handle in self._handles.values():
            handle.is_paused = is_paused
