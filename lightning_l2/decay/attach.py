"""How lambda acts: coupled, decoupled, independent of the learning rate, or cautious, on any torch optimizer.

With gradient g, learning rate eta, the optimizer's direction u and lambda the `weight_decay` of a parameter's group:

=============  ===================================================  ==================================================
`apply`        one step                                             source
=============  ===================================================  ==================================================
`optimizer`    the optimizer's own way, see `own_way`               its documentation
`coupled`      g <- g + lambda w, before or after clipping          Hoerl & Kennard, Ridge Regression, 1970
`decoupled`    w <- (1 - eta lambda) w - eta u                      Loshchilov & Hutter, arXiv 1711.05101, 2019
`independent`  w <- (1 - lambda) w - eta u, or lambda eta/eta_max   Wortsman et al., arXiv 2309.14322, 2023
`cautious`     w <- w - eta (u + lambda 1[u w >= 0] w)              Chen et al., arXiv 2510.12402, 2025
=============  ===================================================  ==================================================
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from lightning_l2.decay.arithmetic import is_zero
from lightning_l2.decay.rounding import Accumulate, Rounding, Stochastic
from lightning_l2.decay.start import Start
from lightning_l2.decay.ways import Compared, Coupled, OptimizersOwn, PeakLR, Scaled, Way, peak_of
from lightning_l2.optimizers.facts import (
    DECOUPLED_FLAG,
    OWN_WAY,
    has_decoupled_flag,
    is_schedule_free,
    own_way,
    torch_class,
)
from lightning_l2.optimizers.inner import check_hookable, has_groups_of_its_own
from lightning_l2.param_groups.decay_groups import decay_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

Apply: TypeAlias = Literal["optimizer", "coupled", "decoupled", "independent", "cautious"]


# Beyond so many groups, a pass of its own over the weights takes less time than an update for each group.
FEW = 16


def attach_decay(
    optimizer: Optimizer,
    apply: Apply,
    *,
    before_clipping: bool = False,
    peak_lr: PeakLR = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    start: Start | None = None,
) -> OptimizersOwn | Way:
    """Make `optimizer.step()` apply each group's `weight_decay` in the way `apply` names, until the handle is removed.

    It acts within the step, between the last gradient and the update, on the parameters that have a gradient, with
    the lambda and the learning rate that their groups have by then. The optimizer's own decay sees 0 meanwhile.
    Where the optimizer can do it alone, by itself or by torch's `decoupled_weight_decay`, it does. Its groups are the
    user's own outside of the update. What is attached while a step runs acts from the next one on.

    * A step that a `GradScaler` skips decays nothing, also with fused optimizers, and nothing synchronises.
    * LBFGS: coupled adds lambda w to every gradient and lambda/2 ||w||^2 to every loss of the closure, so that a line
      search sees one objective; the other ways act once a step, with the weights before it.
    * Sparse gradients: only the rows in the gradient decay, once each however often they occur. SGD and Adagrad refuse
      them in their own coupled decay; `before_clipping` avoids that one.
    * Schedule-free optimizers: w is y, the weights in train mode. An optimizer that moves the weights before it asks
      for the gradient, as SAM does, decays right after its update instead of before.
    * Memory: `cautious` holds a copy of the decayed weights during the update and two of a group after it; LBFGS, and
      Adafactor with `independent`, hold one, since their directions depend on the weights; the others hold nothing.

    Args:
        optimizer: A bare torch optimizer; of a wrapper, the one that it wraps (`updating_optimizers`).
        apply: One of the ways in the table of this module.
        before_clipping: With `coupled`: lambda w joins the gradient when the caller runs the handle's
            `before_clipping()`, between unscaling and clipping. A step without that call gets it after clipping.
        peak_lr: With `independent`: eta_max, to keep the learning-rate schedule (lambda eta/eta_max); "initial" takes
            each group's `max_lr` or `initial_lr`, which torch's schedulers write. None: lambda alone.
        rounding: How decay of the weights themselves is rounded to their number format; see `decay.rounding`.
        seed: Of the random numbers of stochastic rounding.
        start: The weights that training began with, for groups whose rule decays towards them.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        ValueError: If the optimizer or the options don't go with `apply`.
        TypeError: If the optimizer has no step hooks.
        RuntimeError: If a decay is attached already.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.zeros(2)
    >>> optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=0.5)
    >>> handle = attach_decay(optimizer, "independent")
    >>> optimizer.step()
    >>> w.detach(), optimizer.param_groups[0]["weight_decay"]
    (tensor([0.5000, 0.5000]), 0.5)
    """
    check_options(apply, before_clipping, peak_lr, rounding)
    if decay_groups(optimizer).way is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__} has a decay attached already and would decay twice. "
            "Remove the first one with its handle's `remove()`."
        )
    if (rounding != "nearest" or start is not None) and not _is_attachable(optimizer):
        asked = "towards='start'" if rounding == "nearest" else f"rounding={rounding!r}"
        raise ValueError(
            f"{asked} does nothing for {type(optimizer).__name__}, which decays by itself alone. Leave it out."
        )
    if apply == "optimizer":
        _check_own(optimizer)
        if rounding == "nearest" and start is None:
            return OptimizersOwn(optimizer, {})
        apply = _own_as_ours(optimizer, rounding)
    is_few = len(decay_groups(optimizer).unnamed()) <= FEW and rounding == "nearest" and start is None
    if apply == own_way(optimizer) and not before_clipping and (is_few or not _is_attachable(optimizer)):
        return OptimizersOwn(optimizer, {})
    _check_attachable(optimizer, apply)
    check_groups(optimizer, apply, peak_lr)
    if apply in ("coupled", "decoupled") and not before_clipping and is_few and has_decoupled_flag(optimizer):
        return OptimizersOwn(optimizer, {DECOUPLED_FLAG: apply == "decoupled"})
    if apply == "coupled":
        coupled = Coupled(optimizer, before_clipping)
        coupled.start = start
        return coupled
    # these directions depend on the weights, so the weights must not have decayed before the update
    depends_on_weights = torch_class(optimizer) in ("LBFGS", "Adafactor")
    steps = Compared if apply == "cautious" or depends_on_weights else Scaled
    attached = steps(optimizer, apply, peak_lr)
    attached.start = start
    if rounding != "nearest":
        attached.rounding = Accumulate(attached.groups) if rounding == "accumulate" else Stochastic(seed)
    return attached


def check_options(apply: Apply, before_clipping: bool, peak_lr: PeakLR, rounding: Rounding = "nearest") -> None:
    """Check the options of `attach_decay`, as soon as they are known.

    Raises:
        ValueError: If an option is unknown, or doesn't go with `apply`.
    """
    if apply not in get_args(Apply):
        raise ValueError(f"Unknown apply={apply!r}. Choose one of {', '.join(map(repr, get_args(Apply)))}.")
    if before_clipping and apply != "coupled":
        raise ValueError(
            f"`before_clipping` goes with apply='coupled' only, got apply={apply!r}: no other way adds to the gradient."
        )
    if rounding not in get_args(Rounding):
        raise ValueError(f"Unknown rounding={rounding!r}. Choose one of {', '.join(map(repr, get_args(Rounding)))}.")
    if rounding != "nearest" and apply == "coupled":
        raise ValueError(
            f"rounding={rounding!r} does nothing for apply='coupled', where the gradient carries the decay. "
            "Leave it out, or choose apply='decoupled'."
        )
    if rounding == "accumulate" and apply == "cautious":
        raise ValueError(
            "rounding='accumulate' can't save up for apply='cautious', which chooses weights anew in each step. "
            "Choose rounding='stochastic'."
        )
    if peak_lr is None:
        return
    if apply != "independent":
        raise ValueError(f"`peak_lr` goes with apply='independent' only, got apply={apply!r}. Leave it out.")
    if peak_lr != "initial" and not (isinstance(peak_lr, int | float) and 0 < peak_lr < math.inf):
        raise ValueError(f"Expected `peak_lr` to be a positive number, 'initial' or None, got {peak_lr!r}.")


def _check_own(optimizer: Optimizer) -> None:
    known = torch_class(optimizer)
    if known not in OWN_WAY and (known or not all("weight_decay" in group for group in optimizer.param_groups)):
        raise ValueError(
            f"{type(optimizer).__name__} has no weight decay of its own, so apply='optimizer' would do nothing. "
            "Choose apply='coupled', 'decoupled', 'independent' or 'cautious'."
        )
    check_hookable(optimizer, "WeightDecay")
    if not has_groups_of_its_own(optimizer):
        raise TypeError(
            f"`param_groups` of {type(optimizer).__name__} is made anew each time that it is read, so lambda can't be "
            "put there. Keep the optimizers that it is made of in its attributes, or choose apply='decoupled'."
        )


def _own_as_ours(optimizer: Optimizer, rounding: Rounding) -> Apply:
    """Return the way that an optimizer decays by itself, for what it can't do by itself."""
    own = own_way(optimizer)
    if rounding != "nearest" and own != "decoupled":
        raise ValueError(
            f"rounding={rounding!r} does nothing for {type(optimizer).__name__}, which is not known to take decay from "
            "the weights themselves. Leave it out, or choose apply='decoupled'."
        )
    if own is None:
        raise ValueError(
            f"Decay towards the start needs to know how {type(optimizer).__name__} decays. Choose apply='decoupled', "
            "'coupled', 'independent' or 'cautious'."
        )
    return own


def _is_attachable(optimizer: Optimizer) -> bool:
    return not is_schedule_free(optimizer) and not any(group.get("differentiable") for group in optimizer.param_groups)


def _check_attachable(optimizer: Optimizer, apply: Apply) -> None:
    name = type(optimizer).__name__
    check_hookable(optimizer, f"apply={apply!r}")
    if is_schedule_free(optimizer) and apply != "coupled":
        raise ValueError(
            f"{name} keeps weights besides the ones it is given, which apply={apply!r} would not reach. "
            "Choose apply='optimizer' or 'coupled'."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{name}(differentiable=True) records its step, and apply={apply!r} changes weights in place. "
            "Choose apply='optimizer'."
        )


def check_groups(optimizer: Optimizer, apply: Apply, peak_lr: PeakLR = None) -> None:
    """Check what `attach_decay` will read from the groups, again where they have changed since.

    Raises:
        ValueError: If the learning rates don't go with `apply`.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    needs_lr = apply in ("decoupled", "cautious") or peak_lr is not None
    if needs_lr and any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"apply={apply!r} needs an `lr` in every group of {name}. Choose apply='independent' without `peak_lr`."
        )
    if peak_lr == "initial" and any(is_zero(peak_of(group, peak_lr)) for group in groups):
        raise ValueError(
            f"peak_lr='initial' finds no learning rate above 0 in a group of {name}. Give the peak as a number."
        )
