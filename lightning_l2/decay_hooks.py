"""Hooks that put decay into `optimizer.step()`, one class for each way it can act."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch.nn.parameter import is_lazy

from lightning_l2.decay_math import (
    add_decay_gradient,
    decay_from,
    is_zero,
    number,
    read,
    real_parts,
    rows_of,
    scale,
    with_gradient,
    write,
)
from lightning_l2.norms import squared_norms

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Group: TypeAlias = dict[str, Any]
PeakLR: TypeAlias = float | Literal["initial"] | None
Hook = TypeVar("Hook", bound=Callable[..., Any])

# Kept on the optimizer, as its hooks are, so that both go when its attributes are put back, as after a trial training.
_MARK = "_has_attached_decay"


def torch_class(optimizer: Optimizer) -> str | None:
    """Return the name of the torch class whose step an optimizer runs, None if it runs another one."""
    if not _is_of_torch(type(optimizer).step):
        return None
    return next((cls.__name__ for cls in type(optimizer).__mro__ if _is_of_torch(cls)), None)


def reads_loss(optimizer: Optimizer) -> bool:
    """Return whether an optimizer may look at the closure's loss, as line searches do; of torch's only LBFGS does."""
    return torch_class(optimizer) in (None, "LBFGS")


def ascent_sign(optimizer: Optimizer, group: Group) -> int:
    """Return the sign with which a penalty joins the objective: -1 where the optimizer maximises it."""
    return -1 if group.get("maximize", getattr(optimizer, "maximize", False)) else 1


def uncompiled(hook: Hook) -> Hook:
    """Keep a hook out of a compiled step, where it would be compiled anew whenever lambda changes its kind."""
    disable: Callable[[Hook], Hook] = torch.compiler.disable
    return disable(hook)


def peak_of(group: Group, peak_lr: float | Literal["initial"]) -> float | Tensor:
    """Return the learning rate that a group's schedule peaks at."""
    if peak_lr != "initial":
        return peak_lr
    return number(group.get("max_lr", group.get("initial_lr", group["lr"])))


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


class Coupled(Attached):
    """g <- g + lambda w, and the closure's loss + lambda/2 ||w||^2 for optimizers that look at it."""

    def __init__(self, optimizer: Optimizer, before_clipping: bool) -> None:
        super().__init__(optimizer, {"weight_decay": 0.0})
        self._before_clipping = before_clipping
        self._coupled = False

    def couple(self) -> None:
        """Add lambda w to the gradients now instead of in the step."""
        if self._before_clipping:
            self._add()
            self._coupled = True

    def _before_update(self) -> None:
        if not self._coupled:
            self._add()
        self._coupled = False

    def _add(self) -> None:
        grad_scale = getattr(self._optimizer, "grad_scale", None)
        for group in self._optimizer.param_groups:
            strength = _lambda(group) * ascent_sign(self._optimizer, group)
            add_decay_gradient(group["params"], strength if grad_scale is None else strength * grad_scale)

    def _objective(self, loss: Any) -> Any:
        if loss is None or not reads_loss(self._optimizer):
            return loss
        for group in self._optimizer.param_groups:
            weight_decay, params = _lambda(group), with_gradient(group["params"])
            if params and not is_zero(weight_decay):
                squares = squared_norms(params).sum()
                loss = loss + ascent_sign(self._optimizer, group) * weight_decay / 2 * squares
        return loss


class _OnWeights(Attached):
    """Decay of the weights themselves, of strength eta lambda or as `independent` has it."""

    def __init__(self, optimizer: Optimizer, apply: str, peak_lr: PeakLR) -> None:
        super().__init__(optimizer, {"weight_decay": 0.0})
        self._apply = apply
        self._peak_lr = peak_lr

    def _strength(self, group: Group) -> float | Tensor:
        strength = _lambda(group)
        if self._apply != "independent" or self._peak_lr is not None:
            strength = number(group["lr"]) * strength
        if self._apply == "independent" and self._peak_lr is not None:
            strength = strength / peak_of(group, self._peak_lr)
        found_inf = getattr(self._optimizer, "found_inf", None)
        return strength if found_inf is None else (found_inf == 0) * strength


class Scaled(_OnWeights):
    """w <- (1 - strength) w before the update."""

    def _start(self, has_closure: bool) -> None:
        self._done = self._moved = False
        trusted = torch_class(self._optimizer) is not None
        self._versions = self._read_versions() if has_closure and not trusted else None

    def _read_versions(self) -> list[int]:
        return [param._version for group in self._optimizer.param_groups for param in group["params"]]

    def _before_closure(self) -> None:
        # An optimizer that has moved the weights will move them back, and lose what is done to them meanwhile.
        self._moved |= not self._done and self._versions is not None and self._versions != self._read_versions()

    def _before_update(self) -> None:
        if not self._moved:
            self._after_update()

    def _after_update(self) -> None:
        if not self._done:
            for group in self._optimizer.param_groups:
                scale(group["params"], self._strength(group))
        self._done = True


class Compared(_OnWeights):
    """w <- w - strength mask w_before after the update, with the mask of `cautious` or none."""

    def _start(self, has_closure: bool) -> None:
        self._before: dict[Tensor, Tensor] = {}
        self._is_complete = False
        # The closure of an optimizer that torch doesn't know may find moved weights; which rows get a gradient is not
        # known before it.
        self._with_rows = not has_closure or torch_class(self._optimizer) is not None
        if not self._with_rows:
            self._copy(_trainable)

    def _before_update(self) -> None:
        if not self._is_complete:
            self._copy(with_gradient)  # of those copied already none, so those that were lazy
        self._is_complete = True

    def _copy(self, select: Callable[[list[Tensor]], list[Tensor]]) -> None:
        for group in self._optimizer.param_groups:
            if not is_zero(_lambda(group)):
                params = [param for param in select(group["params"]) if param not in self._before]
                rows = [rows_of(param) if self._with_rows else None for param in params]
                for param, row, weight in zip(params, rows, read(params, rows), strict=True):
                    self._before[param] = weight.clone() if row is None else weight

    def _after_update(self) -> None:
        for group in self._optimizer.param_groups:
            params = [param for param in with_gradient(group["params"]) if param in self._before]
            rows = [rows_of(param) for param in params]
            before = [self._before.pop(param) for param in params]
            if not self._with_rows:
                before = [copy if row is None else copy[row] for copy, row in zip(before, rows, strict=True)]
            weights = read(params, rows)
            if params:
                masked = self._apply == "cautious"
                decay_from(real_parts(before), real_parts(weights), self._strength(group), masked=masked)
            write(params, rows, weights)
        self._before.clear()


def _lambda(group: Group) -> float | Tensor:
    """Return lambda of a group, 0 where it has none."""
    return number(group.get("weight_decay", 0.0))


def _trainable(params: list[Tensor]) -> list[Tensor]:
    return [param for param in params if param.requires_grad and not is_lazy(param)]


def _is_of_torch(thing: Any) -> bool:
    return f"{thing.__module__}.".startswith("torch.optim.")
