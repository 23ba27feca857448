"""One optimizer's steps: who acts in them, what its groups look like meanwhile, and which steps are none of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_l2.optimizers.facts import torch_class
from lightning_l2.optimizers.inner import check_hookable
from lightning_l2.optimizers.turns import Moments
from lightning_l2.sharding import local_part, sum_over_shards

if TYPE_CHECKING:
    from torch.optim import Optimizer


Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_Hook = TypeVar("_Hook", bound=Callable[..., Any])

# Kept on the optimizer, as its hooks are, and only while there are some.
_STEP = "_lightning_l2_step"


class Layout:
    """Parameter groups that stand in the optimizer's list while it updates, and only then; here the user's own."""

    def enter(self, optimizer: Optimizer) -> None:
        """Put them there."""

    def leave(self, optimizer: Optimizer, *, has_updated: bool = False, error: BaseException | None = None) -> None:
        """Put the user's own back; harmless where they are there."""


_USERS = Layout()


def known_step(optimizer: Any) -> Step | None:
    """Return what knows all that acts in an optimizer's steps, None where nothing does."""
    step: Step | None = vars(optimizer).get(_STEP)
    return step


def step_of(optimizer: Any, asks: str) -> Step:
    """Return the same, attached to the steps from now on.

    Args:
        optimizer: One of `updating_optimizers`.
        asks: Who needs it, for the message of the error.

    Raises:
        TypeError: If the optimizer has no step hooks.
    """
    step = known_step(optimizer)
    if step is None:
        check_hookable(optimizer, asks)
        step = vars(optimizer)[_STEP] = Step(optimizer)
    return step


def uncompiled(hook: _Hook) -> _Hook:
    """Keep a hook out of a compiled step, where it would be compiled anew whenever lambda changes its kind."""
    disable: Callable[[_Hook], _Hook] = torch.compiler.disable
    return disable(hook)


class Step:
    """All that acts in the steps of one optimizer.

    Attributes:
        updates: How many updates were made.
        is_told: Whether somebody has warned of the optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.updates = 0
        self.is_told = False
        self._optimizer = optimizer
        self._is_torchs = torch_class(optimizer) is not None
        self._layout = _USERS
        self._hooks: list[Moments] = []
        self._acting = _Acting([])
        # what acts in each step under way, the innermost last; nothing in one that torch.distributed makes
        self._running: list[_Acting | None] = []
        self._told: set[int] = set()
        self._pre = optimizer.register_step_pre_hook(uncompiled(self._on_step))
        self._post = optimizer.register_step_post_hook(uncompiled(self._on_stepped))
        # Those that others registered find the user's groups again, as theirs do that come later.
        self._post.hooks_dict_ref().move_to_end(self._post.id, last=False)
        self._guard = _Guard(self, optimizer)

    def be_last(self) -> None:
        """Let pre-hooks that others registered since come first, so that they find the user's groups."""
        hooks = self._pre.hooks_dict_ref()
        if next(reversed(hooks)) != self._pre.id:
            hooks.move_to_end(self._pre.id)

    def add(self, hook: Moments) -> None:
        """Let something act, in its turn."""
        self._hooks = sorted([*self._hooks, hook], key=lambda one: one.turn)
        self._acting = _Acting(self._hooks)

    def discard(self, hook: Moments) -> None:
        """Let it act no more."""
        self._hooks = [one for one in self._hooks if one is not hook]
        self._acting = _Acting(self._hooks)
        self._end_if_unused()

    def set_layout(self, layout: Layout | None) -> None:
        """Let parameter groups stand in the list while the optimizer updates, or only its own."""
        self.settle()
        self._layout = layout or _USERS
        self._end_if_unused()

    def settle(self, error: BaseException | None = None) -> None:
        """Put the user's groups back after an update that raised; harmless at any other time.

        Raises:
            RuntimeError: If it raised because the groups were split.
        """
        self._running.clear()
        self._layout.leave(self._optimizer, error=error)

    def before_clipping(self, teller: object) -> None:
        """Let everything act that acts before clipping, unless somebody else has told of the same gradients."""
        if id(teller) in self._told:
            self._told.clear()
        if not self._told:
            for hook in self._hooks:
                hook.before_clipping()
        self._told.add(id(teller))

    def _end_if_unused(self) -> None:
        if not self._hooks and self._layout is _USERS:
            self._pre.remove()
            self._post.remove()
            self._guard.remove()
            vars(self._optimizer).pop(_STEP, None)

    def _on_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        # a step may call that of the class it derives from, with hooks of its own
        is_inner = 0 < self._guard.depth <= len(self._running)
        if is_inner or (closure is None and _takes_state(self._optimizer)):
            self._running.append(None)
            return None
        self._layout.leave(self._optimizer)
        acting = self._acting  # another one once a hook comes or goes
        self._running.append(acting)
        for hook in acting.begin:
            hook.begin(has_closure=closure is not None)
        if closure is None:
            self._before_update(acting)
            return None
        # An optimizer may read its groups before it asks for the gradient, or while; torch's own don't.
        if not self._is_torchs:
            self._layout.enter(self._optimizer)
        acts = functools.partial(self._evaluate, acting, closure)
        return ((args[0], acts, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": acts})

    def _evaluate(self, acting: _Acting, closure: Callable[[], Any]) -> Any:
        # Whoever runs within the closure finds the user's groups.
        self._layout.leave(self._optimizer)
        for hook in acting.before_closure:
            hook.before_closure()
        loss = closure()
        if acting.objective:
            with torch.no_grad():
                for hook in acting.objective:
                    loss = hook.objective(loss)
        self._before_update(acting)
        return loss

    def _before_update(self, acting: _Acting) -> None:
        for hook in acting.before_update:
            hook.before_update()
        self._told.clear()
        self._layout.enter(self._optimizer)

    def _on_stepped(self, *_: Any) -> None:
        acting = self._running.pop() if self._running else _Acting([])
        if acting is None:
            return
        self.updates += 1
        self._layout.leave(self._optimizer, has_updated=True)
        for hook in acting.after_update:
            if hook in self._hooks:
                hook.after_update()


class _Acting:
    """What acts in a step, by the moments at which it does anything."""

    def __init__(self, hooks: Sequence[Moments]) -> None:
        self.begin, self.before_closure, self.objective, self.before_update, self.after_update = (
            [hook for hook in hooks if getattr(type(hook), moment) is not getattr(Moments, moment)]
            for moment in ("begin", "before_closure", "objective", "before_update", "after_update")
        )


class _Guard:
    """Puts things right when an optimizer's step raises, which no hook of torch's tells.

    Attributes:
        depth: How many steps are under way, one within the closure of another.
    """

    def __init__(self, acting: Step, optimizer: Any) -> None:
        self.depth = 0
        self._optimizer = optimizer
        self._own = vars(optimizer).get("step")  # as learning-rate schedulers put one there
        step = optimizer.step

        @functools.wraps(step)
        def guarded(_: Any, *args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                return step(*args, **kwargs)
            except BaseException as error:
                acting.settle(error)
                raise
            finally:
                self.depth -= 1

        # a method, as those expect who wrap it once more
        skip: Callable[..., Any] = torch.compiler.disable
        self._method = optimizer.step = MethodType(skip(guarded, recursive=False), optimizer)

    def remove(self) -> None:
        """Take it off, unless somebody wrapped it since, whom it then does no harm."""
        if vars(self._optimizer).get("step") is self._method:
            if self._own is None:
                del self._optimizer.step
            else:
                self._optimizer.step = self._own


def _takes_state(optimizer: Any) -> bool:
    """Return whether a step is one that `torch.distributed` makes to have an optimizer's state: nothing may join it.

    It has a learning rate of 0 and gradients of 0 everywhere, and there is no state yet.
    """
    if optimizer.state:
        return False
    for group in optimizer.param_groups:
        lr = group.get("lr", 0.0)
        # it puts a 0 on the host in place of a tensor on a device
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0:
            return False
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    if not gradients or len(gradients) < len(parameters):
        return not parameters
    # all processes decide alike, whatever their parts are
    found = [local_part(gradient).any().to(gradients[0].device, torch.float32) for gradient in gradients]
    return not sum_over_shards(torch.stack(found), gradients).any()
