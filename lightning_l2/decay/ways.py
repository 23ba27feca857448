"""What the ways to apply decay do in `optimizer.step()`, one class each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch.nn.parameter import is_lazy

from lightning_l2.decay.arithmetic import (
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
from lightning_l2.norms.squared import squared_norms
from lightning_l2.optimizers.facts import ascent_sign, reads_loss, torch_class
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.param_groups.parts import DecayGroup

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

PeakLR: TypeAlias = float | Literal["initial"] | None


def peak_of(group: Mapping[str, Any], peak_lr: float | Literal["initial"]) -> float | Tensor:
    """Return the learning rate that a group's schedule peaks at."""
    if peak_lr != "initial":
        return peak_lr
    return number(group.get("max_lr", group.get("initial_lr", group["lr"])))


def step_size(group: Mapping[str, Any]) -> float | Tensor:
    """Return the factor of a group's update: its learning rate, times the scale that Prodigy and D-Adaptation find.

    >>> step_size({"lr": 1.0, "d": 1e-6})
    1e-06
    """
    lr = number(group["lr"])
    return lr * number(group["d"]) if "d" in group else lr


class OptimizersOwn:
    """Lambda in force in the optimizer's own decay.

    Args:
        optimizer: The optimizer.
        in_step: Options that it sees in place of its groups' own.
    """

    def __init__(self, optimizer: Optimizer, in_step: Mapping[str, Any]) -> None:
        self._groups = decay_groups(optimizer)
        self._groups.hold(self, "WeightDecay")
        self._groups.hide(in_step)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._groups.hide(None)
        self._groups.release(self)


class Way(StepHook):
    """Decay that is put into the steps of an optimizer, whose own sees a lambda of 0; subclasses act."""

    turn = Turn.DECAY

    def __init__(self, optimizer: Optimizer, apply: str) -> None:
        super().__init__(optimizer, f"apply={apply!r}")
        self.groups = decay_groups(optimizer)
        self.groups.hold(self, f"apply={apply!r}")
        self.groups.hide({"weight_decay": 0.0})

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self.groups.hide(None)
        self.groups.release(self)
        super().remove()


class Coupled(Way):
    """g <- g + lambda w, and the closure's loss + lambda/2 ||w||^2 for optimizers that look at it."""

    def __init__(self, optimizer: Optimizer, before_clipping: bool) -> None:
        super().__init__(optimizer, "coupled")
        self._before_clipping = before_clipping
        self._has_joined = False

    def before_clipping(self) -> None:
        """Join the gradients now instead of in the step."""
        if self._before_clipping:
            self._join()
            self._has_joined = True

    def objective(self, loss: Any) -> Any:
        """Add the penalty for optimizers that look at the loss."""
        if loss is None or not reads_loss(self.optimizer):
            return loss
        for group in self.groups.unnamed():
            weight_decay, params = number(group.weight_decay), with_gradient(group.params)
            if params and not is_zero(weight_decay):
                squares = squared_norms(params).sum()
                loss = loss + ascent_sign(self.optimizer, group.parent) * weight_decay / 2 * squares
        return loss

    def before_update(self) -> None:
        """Join the gradients, clipped as they are."""
        if not self._has_joined:
            self._join()
        self._has_joined = False

    @torch.no_grad()
    def _join(self) -> None:
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        for group in self.groups.unnamed():
            strength = number(group.weight_decay) * ascent_sign(self.optimizer, group.parent)
            add_decay_gradient(group.params, strength if grad_scale is None else strength * grad_scale)


class _OnWeights(Way):
    """Decay of the weights themselves, of strength eta lambda or as `independent` has it."""

    def __init__(self, optimizer: Optimizer, apply: str, peak_lr: PeakLR) -> None:
        super().__init__(optimizer, apply)
        self._apply = apply
        self._peak_lr = peak_lr

    def _strengths(self, groups: Sequence[DecayGroup]) -> list[float | Tensor]:
        strengths: list[float | Tensor] = []
        parent: Mapping[str, Any] | None = None
        factor: float | Tensor = 0.0  # what all parts of one of the user's groups have in common
        for group in groups:
            if group.parent is not parent:
                parent, factor = group.parent, self._factor(group.parent)
            value = group.weight_decay
            strengths.append(factor * (value if type(value) is float else number(value)))
        return strengths

    def _factor(self, parent: Mapping[str, Any]) -> float | Tensor:
        factor: float | Tensor = 1.0
        if self._apply != "independent" or self._peak_lr is not None:
            factor = step_size(parent)
        if self._apply == "independent" and self._peak_lr is not None:
            factor = factor / peak_of(parent, self._peak_lr)
        found_inf = getattr(self.optimizer, "found_inf", None)
        return factor if found_inf is None else (found_inf == 0) * factor


class Scaled(_OnWeights):
    """w <- (1 - strength) w before the update, or after that of an optimizer which moves weights to and fro."""

    def begin(self, *, has_closure: bool) -> None:
        """Take note of the weights, to see whether anybody moves them before the update."""
        self._done = self._moved = False
        trusted = torch_class(self.optimizer) is not None
        self._versions = self._read_versions() if has_closure and not trusted else None

    def before_closure(self) -> None:
        """See whether the optimizer has moved weights, which it will move back, losing what is done to them now."""
        self._moved |= not self._done and self._versions is not None and self._versions != self._read_versions()

    def before_update(self) -> None:
        """Scale."""
        if not self._moved:
            self.after_update()

    def after_update(self) -> None:
        """Scale once a step."""
        if not self._done:
            groups = self.groups.unnamed()
            scale((group.params for group in groups), self._strengths(groups))
        self._done = True

    def _read_versions(self) -> list[int]:
        return [param._version for group in self.optimizer.param_groups for param in group["params"]]


class Compared(_OnWeights):
    """w <- w - strength mask w_before after the update, with the mask of `cautious` or none."""

    def begin(self, *, has_closure: bool) -> None:
        """Copy weights that may move before the closure is called."""
        self._before: dict[Tensor, Tensor] = {}
        self._is_complete = False
        # An optimizer that isn't torch's may move weights before it calls the closure, so whole weights are copied now,
        # when nobody knows which rows a sparse gradient will have.
        self._with_rows = not has_closure or torch_class(self.optimizer) is not None
        if not self._with_rows:
            self._copy(_trainable)

    def before_update(self) -> None:
        """Copy what was not copied at the start: nothing yet, or lazy parameters."""
        if not self._is_complete:
            self._copy(with_gradient)
        self._is_complete = True

    def after_update(self) -> None:
        """Decay from the copies."""
        groups = self.groups.unnamed()
        for group, strength in zip(groups, self._strengths(groups), strict=True):
            params = [param for param in with_gradient(group.params) if param in self._before]
            rows = [rows_of(param) for param in params]
            before = [self._before.pop(param) for param in params]
            if not self._with_rows:
                before = [copy if row is None else copy[row] for copy, row in zip(before, rows, strict=True)]
            weights = read(params, rows)
            if params:
                masked = self._apply == "cautious"
                decay_from(real_parts(before), real_parts(weights), strength, masked=masked)
            write(params, rows, weights)
        self._before.clear()

    def _copy(self, select: Callable[[list[Tensor]], list[Tensor]]) -> None:
        for group in self.groups.unnamed():
            if not is_zero(number(group.weight_decay)):
                params = [param for param in select(group.params) if param not in self._before]
                rows = [rows_of(param) if self._with_rows else None for param in params]
                for param, row, weight in zip(params, rows, read(params, rows), strict=True):
                    self._before[param] = weight.clone() if row is None else weight


def _trainable(params: list[Tensor]) -> list[Tensor]:
    return [param for param in params if param.requires_grad and not is_lazy(param)]
