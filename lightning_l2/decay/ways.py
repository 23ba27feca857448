"""What the ways to apply decay do in `optimizer.step()`, one class each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_l2.decay.arithmetic import (
    add_decay_gradient,
    decay_from,
    is_zero,
    read,
    real_parts,
    rows_of,
    shrink,
    start_of_rows,
    with_gradient,
    write,
)
from lightning_l2.decay.rounding import Accumulate, Share, Stochastic
from lightning_l2.decay.start import Start, squared_distances
from lightning_l2.norms.squared import squared_norms
from lightning_l2.optimizers.facts import (
    DECOUPLED_FLAG,
    ascent_sign,
    number,
    own_way,
    reads_loss,
    share_by,
    shrinking_by,
    step_size,
    torch_class,
)
from lightning_l2.optimizers.facts import (
    Way as OwnWay,
)
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import decay_groups

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_l2.param_groups.parts import DecayGroup

PeakLR: TypeAlias = float | Literal["initial"] | None


def peak_of(group: Mapping[str, Any], peak_lr: float | Literal["initial"]) -> float | Tensor:
    """Return the learning rate that a group's schedule peaks at."""
    if peak_lr != "initial":
        return peak_lr
    return number(group.get("max_lr", group.get("initial_lr", group["lr"])))


def factor_of(group: Mapping[str, Any], apply: str, peak_lr: PeakLR) -> Share:
    """Return what lambda is multiplied with in a step: the learning rate, 1 or its part of the peak if `independent`.

    >>> factor_of({"lr": 0.1}, "decoupled", None), factor_of({"lr": 0.1}, "independent", 0.4)
    (0.1, 0.25)
    """
    if apply == "independent" and peak_lr is None:
        return 1.0
    return step_size(group) / (peak_of(group, peak_lr) if apply == "independent" and peak_lr is not None else 1)


def acting(optimizer: Optimizer, group: DecayGroup) -> tuple[str | None, float]:
    """Return how decay acts on a part of an optimizer's groups, and by how much a step.

    Returns:
        "coupled", "decoupled" (`independent` is that too), "cautious" or None if it is unknown; and eta lambda, or
        lambda times what `independent` has in place of eta. NaN without a learning rate.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=0.5)
    >>> acting(optimizer, decay_groups(optimizer).groups[0])
    ('coupled', 0.05)
    """
    attached = decay_groups(optimizer).way
    apply, peak_lr = ("optimizer", None) if attached is None else (attached.apply, attached.peak_lr)
    way = own_way(optimizer) if apply == "optimizer" else apply
    has_rate = "lr" in group.parent or (apply == "independent" and peak_lr is None)
    factor = float(factor_of(group.parent, apply, peak_lr)) if has_rate else math.nan
    return "decoupled" if way == "independent" else way, factor * float(group.weight_decay)


class OptimizersOwn:
    """Lambda in force in the optimizer's own decay.

    Args:
        optimizer: The optimizer.
        in_step: Options that it sees in place of its groups' own.
    """

    def __init__(self, optimizer: Optimizer, in_step: Mapping[str, Any]) -> None:
        self._groups = decay_groups(optimizer)
        self._groups.hold(self, "WeightDecay")
        self._groups.hide(in_step, self)
        self.apply, self.peak_lr = "optimizer", None
        self.taken = None
        way: OwnWay | None = None
        if DECOUPLED_FLAG in in_step:
            self.apply = way = "decoupled" if in_step[DECOUPLED_FLAG] else "coupled"
        self._way = shrinking_by(optimizer, way)
        # whether decay that is too small for the number format of the weights does nothing
        self.rounds_away = (way or own_way(optimizer)) == "decoupled"

    def share(self, group: DecayGroup, lr: float | None = None, weight_decay: float | None = None) -> Share | None:
        """Return the share of the weights that a step takes of a group; see `share_by`."""
        value = group.weight_decay if weight_decay is None else weight_decay
        return share_by(self._way, group.parent, value, lr)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._groups.hide(None)
        self._groups.release(self)


class Way(StepHook, ABC):
    """Decay that is put into the steps of an optimizer, whose own sees a lambda of 0; subclasses act."""

    turn = Turn.DECAY

    def __init__(self, optimizer: Optimizer, apply: str, peak_lr: PeakLR = None) -> None:
        super().__init__(optimizer, f"apply={apply!r}")
        self.groups = decay_groups(optimizer)
        self.apply, self.peak_lr = apply, peak_lr
        self.taken: Sequence[Share] | None = None
        self.start: Start | None = None
        self._started: tuple[int, dict[Tensor, Tensor]] = (-1, {})
        self.groups.hold(self, f"apply={apply!r}")
        self.groups.hide({"weight_decay": 0.0}, self)

    @property
    @abstractmethod
    def rounds_away(self) -> bool:
        """Whether decay that is too small for the number format of the weights does nothing."""

    @abstractmethod
    def share(self, group: DecayGroup, lr: float | None = None, weight_decay: float | None = None) -> Share | None:
        """Return the share of the weights that a step takes of a group, None where that is not known.

        Args:
            group: A part of the optimizer's groups.
            lr: The learning rate, by default the one that the group has.
            weight_decay: Lambda, by default the one in force.
        """

    def begin(self, *, has_closure: bool) -> None:
        """See what new parameters start from, before the optimizer moves them."""
        self.see_starts()

    def see_starts(self) -> Mapping[Tensor, Tensor]:
        """Return what parameters started from, of those that decay towards it."""
        if self.start is None:
            return {}
        version = self.groups.current_version()
        if self._started[0] != version:
            groups = [one for one in self.groups.unnamed() if one.towards == "start" and not is_zero(one.base)]
            pulled = [param for group in groups for param in group.params if not is_lazy(param)]
            self._started = version, {param: self.start.of(param) for param in pulled}
        return self._started[1]

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
        self._shrinking = shrinking_by(optimizer, "coupled")

    @property
    def rounds_away(self) -> bool:
        """Whether small decay does nothing; the gradient carries it here."""
        return False

    def share(self, group: DecayGroup, lr: float | None = None, weight_decay: float | None = None) -> Share | None:
        """Return that of the optimizer's own coupled decay."""
        value = group.weight_decay if weight_decay is None else weight_decay
        return share_by(self._shrinking, group.parent, value, lr)

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
                squares = self._squares(params)
                loss = loss + ascent_sign(self.optimizer, group.parent) * weight_decay / 2 * squares
        return loss

    def _squares(self, params: list[Tensor]) -> Tensor:
        starts = self.see_starts()
        if not starts:
            return squared_norms(params).sum()
        moved = [param for param in params if param in starts]
        others = [param for param in params if param not in starts]
        squares = squared_distances(moved, [starts[param] for param in moved]).sum()
        return squares + squared_norms(others).sum() if others else squares

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
            strength = strength if grad_scale is None else strength * grad_scale
            add_decay_gradient(group.params, strength, self.see_starts())


class OnWeights(Way):
    """Decay of the weights themselves, by the share eta lambda or as `independent` has it."""

    def __init__(self, optimizer: Optimizer, apply: str, peak_lr: PeakLR) -> None:
        super().__init__(optimizer, apply, peak_lr)
        self.rounding: Accumulate | Stochastic | None = None
        # whether a step was made before, perhaps in the training that this one resumes
        self.has_begun = False
        self._is_told = False

    @property
    def rounds_away(self) -> bool:
        """Whether decay that is too small for the number format does nothing."""
        return self.rounding is None

    def share(self, group: DecayGroup, lr: float | None = None, weight_decay: float | None = None) -> Share | None:
        """Return the share of the weights that a step takes of a group, of the ones that decay if only some do."""
        value = group.weight_decay if weight_decay is None else weight_decay
        return self._limited(self._factor(group.parent, lr) * number(value))

    def before_update(self) -> None:
        """Refuse an `independent` lambda above 1, at which a schedule arrives only after the first step."""
        if self.apply != "independent" or self._is_told:
            return
        ways = [self] if self.has_begun else self._of_all_optimizers()
        self.has_begun = any(way.has_begun for way in ways)
        lambdas = [number(group.weight_decay) for way in ways for group in way.groups.unnamed()]
        largest = max((value for value in lambdas if isinstance(value, float)), default=0.0)
        if largest > 1 and not self.has_begun:
            raise ValueError(
                f"apply='independent' scales weights by 1 - weight_decay each step, got weight_decay={largest:g}. "
                "Give a value of at most 1; without the factor lr it is usually 1e-6 to 1e-3."
            )
        self.has_begun = True
        if largest > 1:
            self._is_told = True
            rank_zero_warn(
                f"The schedule has driven lambda to {largest:g}, and apply='independent' scales weights by 1 - lambda "
                "each step: no step takes more than all of them. Give a smaller base, or another schedule."
            )

    def _of_all_optimizers(self) -> list[OnWeights]:
        ways = [self, *(one.way for one in self.groups.siblings if one is not self.groups)]
        return [way for way in ways if isinstance(way, OnWeights) and way.apply == self.apply]

    def _limited(self, share: Share) -> Share:
        if self.apply != "independent":
            return share
        return share.clamp(max=1.0) if isinstance(share, torch.Tensor) else min(share, 1.0)

    @property
    def _stochastic(self) -> Stochastic | None:
        return self.rounding if isinstance(self.rounding, Stochastic) else None

    def _shares(self) -> list[tuple[list[Tensor], Share]]:
        """Return what this step takes of which parameters."""
        groups = self.groups.unnamed()
        shares: list[Share] = []
        parent: Mapping[str, Any] | None = None
        factor: Share = 0.0  # what all parts of one of the user's groups have in common
        for group in groups:
            if group.parent is not parent:
                parent, factor = group.parent, self._factor(group.parent)
            value = group.weight_decay
            shares.append(factor * (value if type(value) is float else number(value)))
        if self.apply == "independent":
            shares = list(map(self._limited, shares))
        self.taken = shares
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None:
            shares = [(found_inf == 0) * share for share in shares]
        if isinstance(self.rounding, Accumulate):
            return self.rounding.due(shares)
        return [(group.params, share) for group, share in zip(groups, shares, strict=True)]

    def _factor(self, parent: Mapping[str, Any], lr: float | None = None) -> Share:
        return factor_of(parent if lr is None else {**parent, "lr": lr}, self.apply, self.peak_lr)


class Scaled(OnWeights):
    """w <- (1 - s) w before the update, or after that of an optimizer which moves weights to and fro."""

    def begin(self, *, has_closure: bool) -> None:
        """Take note of the weights, to see whether anybody moves them before the update."""
        super().begin(has_closure=has_closure)
        self._done = self._moved = False
        trusted = torch_class(self.optimizer) is not None
        self._versions = self._read_versions() if has_closure and not trusted else None

    def before_closure(self) -> None:
        """See whether the optimizer has moved weights, which it will move back, losing what is done to them now."""
        self._moved |= not self._done and self._versions is not None and self._versions != self._read_versions()

    def before_update(self) -> None:
        """Scale."""
        super().before_update()
        if not self._moved:
            self.after_update()

    def after_update(self) -> None:
        """Scale once a step."""
        if not self._done:
            shrink(self._shares(), self._stochastic, self.see_starts())
        self._done = True

    def _read_versions(self) -> list[int]:
        return [param._version for group in self.optimizer.param_groups for param in group["params"]]


class Compared(OnWeights):
    """w <- w - s mask w_before after the update, with the mask of `cautious` or none."""

    def begin(self, *, has_closure: bool) -> None:
        """Copy weights that may move before the closure is called."""
        super().begin(has_closure=has_closure)
        self._before: dict[Tensor, Tensor] = {}
        self._is_complete = False
        # An optimizer that isn't torch's may move weights before it calls the closure, so whole weights are copied now,
        # when nobody knows which rows a sparse gradient will have.
        self._with_rows = not has_closure or torch_class(self.optimizer) is not None
        if not self._with_rows:
            self._copy(_trainable)

    def before_update(self) -> None:
        """Copy what was not copied at the start: nothing yet, or lazy parameters, whose own start this is."""
        super().before_update()
        self.see_starts()
        if not self._is_complete:
            self._copy(with_gradient)
        self._is_complete = True

    @torch.no_grad()
    def after_update(self) -> None:
        """Decay from the copies."""
        for family, share in self._shares():
            params = [param for param in with_gradient(family) if param in self._before]
            rows = [rows_of(param) for param in params]
            before = [self._before.pop(param) for param in params]
            if not self._with_rows:
                before = [copy if row is None else copy[row] for copy, row in zip(before, rows, strict=True)]
            weights = read(params, rows)
            if params:
                decay_from(
                    real_parts(before),
                    real_parts(weights),
                    share,
                    masked=self.apply == "cautious",
                    rounding=self._stochastic,
                    starts=self._starts_of(params, rows),
                )
            write(params, rows, weights)
        self._before.clear()

    def _starts_of(self, params: list[Tensor], rows: list[Tensor | None]) -> list[Tensor] | None:
        """Return what parameters of one group started from, None where they decay towards 0."""
        starts = self.see_starts()
        if not starts or params[0] not in starts:
            return None
        return real_parts([start_of_rows(starts[p], row, p) for p, row in zip(params, rows, strict=True)])

    @torch.no_grad()
    def _copy(self, select: Callable[[list[Tensor]], list[Tensor]]) -> None:
        for group in self.groups.unnamed():
            if not is_zero(number(group.weight_decay)):
                params = [param for param in select(group.params) if param not in self._before]
                rows = [rows_of(param) if self._with_rows else None for param in params]
                for param, row, weight in zip(params, rows, read(params, rows), strict=True):
                    self._before[param] = weight.clone() if row is None else weight


def _trainable(params: list[Tensor]) -> list[Tensor]:
    return [param for param in params if param.requires_grad and not is_lazy(param)]
