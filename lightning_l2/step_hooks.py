"""Hooks on `optimizer.step()` that hide values of its groups from it, and act on its closure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer

Group: TypeAlias = dict[str, Any]
Hook = TypeVar("Hook", bound=Callable[..., Any])

# Kept on the optimizer, as its hooks are, so that both go when its attributes are put back, as after a trial training.
_MARK = "_has_attached_decay"


def uncompiled(hook: Hook) -> Hook:
    """Keep a hook out of a compiled step, where it would be compiled anew whenever lambda changes its kind."""
    disable: Callable[[Hook], Hook] = torch.compiler.disable
    return disable(hook)


def wrap_closure(
    args: tuple[Any, ...], kwargs: Group, wrap: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[tuple[Any, ...], Group] | None:
    """Return the arguments of a step with its closure replaced, None where it has none.

    Args:
        args: Positional arguments as a pre-hook gets them, the optimizer first.
        kwargs: Keyword arguments.
        wrap: What to make of the closure.
    """
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and args[1] is not None:
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None


class DecayHandle:
    """What `attach_decay` returns; this one, where the optimizer decays by itself, has nothing to do.

    Attributes:
        is_paused: Whether steps are left alone. torch.distributed makes one with a learning rate of 0 when it takes an
            optimizer's state without gradients at hand, also in the middle of another step.
    """

    is_paused: bool = False

    def remove(self) -> None:
        """Take the hooks off the optimizer and leave its groups as they were."""

    def restore(self) -> None:
        """Give the groups back what a step that raised still hides; harmless at any other time."""

    def couple(self) -> None:
        """With `before_clipping`: add lambda w to the gradients now, once for each time they are taken.

        Call it with unscaled gradients only, so not for a fused optimizer that unscales them in its own step; there
        the step adds it, and clipping is impossible anyway.
        """


class Attached(DecayHandle):
    """Hooks on a step that hide some values of the groups from it; subclasses act between gradient and update.

    Args:
        optimizer: The optimizer.
        in_step: The values that the groups' keys have while the optimizer updates.
    """

    def __init__(self, optimizer: Optimizer, in_step: Group) -> None:
        if getattr(optimizer, _MARK, False):
            raise RuntimeError(
                f"{type(optimizer).__name__} has a decay attached already and would decay twice. "
                "Remove the first one with its handle's `remove()`."
            )
        self._optimizer = optimizer
        self._in_step = in_step
        self._hidden: list[tuple[Group, Group]] = []
        self._is_running = False
        self._hooks = [
            optimizer.register_step_pre_hook(uncompiled(self._on_step)),
            optimizer.register_step_post_hook(uncompiled(self._on_stepped)),
        ]
        # A checkpoint that is written because a step raised must not hold the hidden values.
        with contextlib.suppress(AttributeError):
            self._hooks.append(optimizer.register_state_dict_pre_hook(lambda _: self.restore()))
        setattr(optimizer, _MARK, True)

    def remove(self) -> None:
        """Take the hooks off the optimizer and leave its groups as they were."""
        self.restore()
        while self._hooks:
            self._hooks.pop().remove()
        vars(self._optimizer).pop(_MARK, None)

    def restore(self) -> None:
        """Give the groups back what a step hides from the optimizer."""
        while self._hidden:
            group, values = self._hidden.pop()
            group.update(values)

    def _hide(self) -> None:
        self.restore()
        for group in self._optimizer.param_groups:
            values = {key: group[key] for key in self._in_step if key in group}
            self._hidden.append((group, values))
            group.update({key: self._in_step[key] for key in values})

    @torch.no_grad()
    def _on_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: Group) -> tuple[tuple[Any, ...], Group] | None:
        if self.is_paused:
            return None
        self._is_running = True
        self.restore()
        with_closure = wrap_closure(args, kwargs, self._wrapped)
        self._start(with_closure is not None)
        if with_closure is None:
            self._before_update()
        self._hide()
        return with_closure

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            # Whoever runs within the closure finds the lambda in force in the groups.
            self.restore()
            self._before_closure()
            loss = closure()
            with torch.no_grad():
                loss = self._objective(loss)
                self._before_update()
            self._hide()
            return loss

        return evaluate

    @torch.no_grad()
    def _on_stepped(self, *_: Any) -> None:
        if self.is_paused:
            return
        self.restore()
        if self._is_running:  # False in the step that it was attached within
            self._after_update()
        self._is_running = False

    def _start(self, has_closure: bool) -> None:
        """Prepare a step."""

    def _before_closure(self) -> None:
        """Prepare a call of the closure."""

    def _objective(self, loss: Any) -> Any:
        """Return the loss that the optimizer gets for the closure's own."""
        return loss

    def _before_update(self) -> None:
        """Act after each call of the closure, or at once where there is none."""

    def _after_update(self) -> None:
        """Act on what the update has made."""
