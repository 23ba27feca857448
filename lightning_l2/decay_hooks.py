"""What the ways to apply decay do in `optimizer.step()`, one class each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
from lightning_l2.optimizer_facts import ascent_sign, reads_loss, torch_class
from lightning_l2.step_hooks import Attached, Group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

PeakLR: TypeAlias = float | Literal["initial"] | None


def peak_of(group: Group, peak_lr: float | Literal["initial"]) -> float | Tensor:
    """Return the learning rate that a group's schedule peaks at."""
    if peak_lr != "initial":
        return peak_lr
    return number(group.get("max_lr", group.get("initial_lr", group["lr"])))


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
        # An optimizer that isn't torch's may move weights before it calls the closure, so whole weights are copied now,
        # when nobody knows which rows a sparse gradient will have.
        self._with_rows = not has_closure or torch_class(self._optimizer) is not None
        if not self._with_rows:
            self._copy(_trainable)

    def _before_update(self) -> None:
        if not self._is_complete:
            self._copy(with_gradient)  # what was not copied at the start: nothing yet, or lazy parameters
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
