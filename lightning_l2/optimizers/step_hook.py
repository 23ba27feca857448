"""What acts within an optimizer's step, in one order, whoever attached it: between last gradient and update, and after.

For each optimizer, whatever the order in which it was attached:

1. gradients are complete, unscaled and not clipped: schedules read them, then the penalty and coupled decay join them,
   then monitors read them;
2. they are clipped: the penalty and coupled decay join them here otherwise, other decay acts on the weights;
3. the optimizer updates, with its parameter groups split by weight decay;
4. the weights are new: decay that compares them with the old ones, then constraints, then monitors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from enum import IntEnum
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_l2.optimizers.facts import torch_class
from lightning_l2.optimizers.inner import check_hookable
from lightning_l2.sharding import local_part

if TYPE_CHECKING:
    from torch.optim import Optimizer

Closure: TypeAlias = Callable[[], Any]
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_Attached = TypeVar("_Attached", bound="Removable")


class Turn(IntEnum):
    """When something acts, among all that is attached to an optimizer."""

    SCHEDULE = 0
    PENALTY = 1
    DECAY = 2
    CONSTRAINT = 3
    MONITOR = 4


class Removable(Protocol):
    """What can be taken off an optimizer."""

    def remove(self) -> None:
        """Take it off."""


class Layout(Protocol):
    """Parameter groups that stand in the optimizer's list while it updates, and only then."""

    def enter(self, optimizer: Optimizer) -> None:
        """Put them there."""

    def leave(self, optimizer: Optimizer, *, has_updated: bool = False, error: BaseException | None = None) -> None:
        """Put the user's own back; harmless where they are there."""


class StepHook:
    """The base of what acts within a step; a subclass overrides the moments it acts at.

    Steps that `torch.distributed` makes of its own, to get an optimizer's state, are left alone. What is attached while
    a step runs acts from the next one on. Nothing of it is compiled with a step.

    Args:
        optimizer: One of `updating_optimizers`.
        asks: Who needs it, for the message of the error.

    Attributes:
        turn: When it acts among others.

    Raises:
        TypeError: If the optimizer has no step hooks.

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

    turn: ClassVar[Turn]

    def __init__(self, optimizer: Optimizer, asks: str) -> None:
        self.optimizer = optimizer
        step_of(optimizer, asks).add(self)

    def remove(self) -> None:
        """Take it off the optimizer."""
        step = vars(self.optimizer).get(_STEP)
        if step is not None:
            step.discard(self)

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


def gradients_are_complete(optimizer: Any, teller: object) -> None:
    """Let everything act that acts before clipping: once, however many callbacks tell it of the same gradients.

    Args:
        optimizer: One of `updating_optimizers`, its gradients unscaled.
        teller: Who tells. The second time that it does, the gradients are new.
    """
    step = vars(optimizer).get(_STEP)
    if step is not None:
        step.before_clipping(teller)


def updates_of(optimizer: Any) -> int:
    """Return how many updates an optimizer has made since something was attached to it."""
    step: _Step | None = vars(optimizer).get(_STEP)
    return 0 if step is None else step.updates


def tell_once(optimizer: Any) -> bool:
    """Return whether somebody may warn about an optimizer, which several callbacks would otherwise do."""
    step: _Step | None = vars(optimizer).get(_STEP)
    if step is None or step.is_told:
        return False
    step.is_told = True
    return True


def step_of(optimizer: Any, asks: str) -> _Step:
    """Return what knows all that acts in an optimizer's steps, attached to them from now on."""
    step: _Step | None = vars(optimizer).get(_STEP)
    if step is None:
        check_hookable(optimizer, asks)
        step = vars(optimizer)[_STEP] = _Step(optimizer)
    return step


# Kept on the optimizer, as its hooks are, and only while there are some.
_STEP = "_lightning_l2_step"


def _uncompiled(hook: _Hook) -> _Hook:
    """Keep a hook out of a compiled step, where it would be compiled anew whenever lambda changes its kind."""
    disable: Callable[[_Hook], _Hook] = torch.compiler.disable
    return disable(hook)


class Attachments(Generic[_Attached]):
    """What one callback has attached to the optimizers of a training, which may be replaced at any time.

    Args:
        attach: Attaches to an optimizer, given its index.
        look: Called before a step of any other optimizer in the process, to `follow` those that there are now: nothing
            of a step is missed by an optimizer that was set up a moment before.

    >>> sgd = torch.optim.SGD([torch.zeros(1)])
    >>> hooks = Attachments(lambda number, optimizer: Recorder(optimizer))
    >>> class Recorder(StepHook):
    ...     turn = Turn.MONITOR
    ...     def __init__(self, optimizer):
    ...         super().__init__(optimizer, "Recorder")
    >>> hooks.follow([sgd]), hooks.follow([sgd]), hooks.follow([])
    (True, False, True)
    """

    def __init__(self, attach: Callable[[int, Any], _Attached], look: Callable[[], Any] | None = None) -> None:
        self._attach = attach
        self._optimizers: list[Any] = []
        self._attached: list[_Attached] = []
        self._look = look

    def follow(self, optimizers: Sequence[Any]) -> bool:
        """Attach to the optimizers that are new, take off those that are gone; return whether there were any."""
        known = self._optimizers
        if len(known) == len(optimizers) and all(map(operator.is_, known, optimizers)):
            return False
        before = {id(one): attached for one, attached in zip(known, self._attached, strict=True)}
        kept = [before.pop(id(one), None) for one in optimizers]
        self._optimizers, self._attached = [], []
        for attached in before.values():
            attached.remove()
        try:
            for number, one in enumerate(kept):
                self._attached.append(one or self._attach(number, optimizers[number]))
        except BaseException:
            for one in (*self._attached, *kept[len(self._attached) :]):
                if one is not None:
                    one.remove()
            self._attached = []
            raise
        self._optimizers = list(optimizers)
        if self._look is not None and self not in _WATCHING:
            _WATCHING.append(self)
            _watch()
        return True

    def __iter__(self) -> Any:
        """Iterate over what is attached, in the order of the optimizers."""
        return iter(self._attached)

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
        if self._look is not None and all(one is not optimizer for one in self._optimizers):
            self._look()


_WATCHING: list[Attachments[Any]] = []
_GLOBAL: list[RemovableHandle] = []


def _watch() -> None:
    """Have all optimizers' steps watched as long as somebody wants it."""
    if _WATCHING and not _GLOBAL:
        _GLOBAL.append(register_optimizer_step_pre_hook(_uncompiled(_on_any_step)))
    elif not _WATCHING and _GLOBAL:
        _GLOBAL.pop().remove()


def _on_any_step(optimizer: Any, *_: Any) -> None:
    for attachments in list(_WATCHING):
        attachments.look_for(optimizer)
    step = vars(optimizer).get(_STEP)
    if step is not None:
        step.be_last()


class _Step:
    """All that acts in the steps of one optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.layout: Layout | None = None
        self.updates = 0
        self.is_told = False
        self._is_torchs = torch_class(optimizer) is not None
        self._optimizer = optimizer
        self._hooks: list[StepHook] = []
        # what acts in each step under way, the innermost last; nothing in one that torch.distributed makes
        self._running: list[list[StepHook] | None] = []
        self._told: set[int] = set()
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(_uncompiled(self._on_step)),
            optimizer.register_step_post_hook(_uncompiled(self._on_stepped)),
        ]
        # Those that others registered find the user's groups again, as theirs do that come later.
        hooks = self._handles[1].hooks_dict_ref()
        if hooks is not None and hasattr(hooks, "move_to_end"):
            hooks.move_to_end(self._handles[1].id, last=False)
        self.depth = 0
        self._guard = _Guard(self, optimizer)

    def be_last(self) -> None:
        """Let pre-hooks that others registered since come first, so that they find the user's groups."""
        hooks = self._handles[0].hooks_dict_ref()
        if hooks is not None and next(reversed(hooks)) != self._handles[0].id:
            hooks[self._handles[0].id] = hooks.pop(self._handles[0].id)

    def add(self, hook: StepHook) -> None:
        self._hooks = sorted([*self._hooks, hook], key=lambda one: one.turn)

    def discard(self, hook: StepHook) -> None:
        self._hooks = [one for one in self._hooks if one is not hook]
        self._end_if_unused()

    def set_layout(self, layout: Layout | None) -> None:
        self.settle()
        self.layout = layout
        self._end_if_unused()

    def settle(self, error: BaseException | None = None) -> None:
        """Put the user's groups back after an update that raised; harmless at any other time.

        Raises:
            RuntimeError: If it raised because the groups were split.
        """
        self._running.clear()
        if self.layout is not None:
            self.layout.leave(self._optimizer, error=error)

    def before_clipping(self, teller: object) -> None:
        if id(teller) in self._told:
            self._told.clear()
        if not self._told:
            for hook in self._hooks:
                hook.before_clipping()
        self._told.add(id(teller))

    def _end_if_unused(self) -> None:
        if not self._hooks and self.layout is None:
            while self._handles:
                self._handles.pop().remove()
            self._guard.remove()
            vars(self._optimizer).pop(_STEP, None)

    def _on_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        # a step may call that of the class it derives from, with hooks of its own
        is_inner = 0 < self.depth <= len(self._running)
        if is_inner or (closure is None and _takes_state(self._optimizer)):
            self._running.append(None)
            return None
        if self.layout is not None:
            self.layout.leave(self._optimizer)
        acting = self._hooks  # another list once one comes or goes
        self._running.append(acting)
        if acting:
            with torch.no_grad():
                for hook in acting:
                    hook.begin(has_closure=closure is not None)
        if closure is None:
            self._before_update(acting)
            return None
        # An optimizer may read its groups before it asks for the gradient, or while; torch's own don't.
        if self.layout is not None and not self._is_torchs:
            self.layout.enter(self._optimizer)
        acts = functools.partial(self._evaluate, acting, closure)
        return ((args[0], acts, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": acts})

    def _evaluate(self, acting: list[StepHook], closure: Closure) -> Any:
        # Whoever runs within the closure finds the user's groups.
        if self.layout is not None:
            self.layout.leave(self._optimizer)
        for hook in acting:
            hook.before_closure()
        loss = closure()
        if acting:
            with torch.no_grad():
                for hook in acting:
                    loss = hook.objective(loss)
        self._before_update(acting)
        return loss

    def _before_update(self, acting: list[StepHook]) -> None:
        if acting:
            with torch.no_grad():
                for hook in acting:
                    hook.before_update()
        self._told.clear()
        if self.layout is not None:
            self.layout.enter(self._optimizer)

    def _on_stepped(self, *_: Any) -> None:
        acting = self._running.pop() if self._running else []
        if acting is None:
            return
        self.updates += 1
        if self.layout is not None:
            self.layout.leave(self._optimizer, has_updated=True)
        if acting:
            with torch.no_grad():
                for hook in acting:
                    if hook in self._hooks:
                        hook.after_update()


class _Guard:
    """Puts things right when an optimizer's step raises, which no hook of torch's tells."""

    def __init__(self, state: _Step, optimizer: Any) -> None:
        self._optimizer = optimizer
        own = vars(optimizer).get("step")  # as learning-rate schedulers put one there
        step = optimizer.step

        @functools.wraps(step)
        def guarded(_: Any, *args: Any, **kwargs: Any) -> Any:
            state.depth += 1
            try:
                return step(*args, **kwargs)
            except BaseException as error:
                state.settle(error)
                raise
            finally:
                state.depth -= 1

        self._own = own
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
    return all(p.grad is not None and not p.grad.is_sparse and not local_part(p.grad).any() for p in parameters)
