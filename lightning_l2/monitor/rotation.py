r"""How far weights rotate in a step, how far they do in equilibrium, and the learning rate that normalised layers feel.

A layer that is followed by a normalisation is invariant to the scale of its weights: only their direction matters. Its
training is measured by the angle between the weights before and after a step. Weight decay shrinks the norm, gradient
steps grow it, and where both balance, all layers rotate at one expected angle a step.

Source: Kosson, Messmer, Jaggi, Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks,
arXiv 2305.17212, 2024; van Laarhoven, L2 Regularization versus Batch and Weight Normalization, arXiv 1706.05350, 2017.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_l2.decay.ways import acting
from lightning_l2.optimizers.facts import torch_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

    from lightning_l2.param_groups.parts import DecayGroup


# times the weights' length: beyond, the sums that differ by the angle alone are equal in fp32
_LONGEST = 1e6


def angular_update(square: float, squared_update: float, product: float) -> float:
    r"""Return the angle between the weights before and after a step.

    $$\angle(w, w') = \operatorname{atan2}\left(\sqrt{\lVert d \rVert^2 \lVert w \rVert^2 - \langle w, d \rangle^2},
    \lVert w \rVert^2 - \langle w, d \rangle\right), \quad d = w - w'$$

    Unlike arccos of the cosine, it keeps its accuracy for the small angles of real steps.

    Args:
        square: $\lVert w \rVert^2$ before the step.
        squared_update: $\lVert d \rVert^2$.
        product: $\langle d, w' \rangle$ with the weights after the step.

    Returns:
        The angle in radians, 0 to pi; NaN if the weights are 0 before or after the step, or were thrown so far that
        rounding hides it.

    >>> round(angular_update(square=1.0, squared_update=2.0, product=-1.0), 4)  # from (1, 0) to (0, 1)
    1.5708
    """
    if not (0 < square < math.inf and squared_update <= _LONGEST**2 * square):
        return math.nan
    # as parts of the squared length, whose own square may be more than a float holds
    inward = (product + squared_update) / square
    remaining = 1 - inward
    across = squared_update / square - inward * inward
    if math.isnan(across) or (across <= 0 and remaining == 0):
        return math.nan
    return math.atan2(math.sqrt(max(0.0, across)), remaining)


def equilibrium_angle(optimizer: Optimizer, group: DecayGroup) -> float | None:
    r"""Return the expected angle a step, in equilibrium, of scale-invariant weights in a parameter group.

    With the way in which decay acts on them, the optimizer's own or an attached one, and $s = \eta \lambda$, or what
    `independent` has in its place:

    * decoupled Adam: $\sqrt{2 s \frac{1 - \beta_1}{1 + \beta_1}}$
    * decoupled SGD with momentum $m$: $\sqrt{2 s \frac{1 - m}{1 + m}}$
    * coupled SGD with momentum $m$ and dampening $d$: $\sqrt{\frac{2 s (1 - d)}{1 + m}}$

    It is reached after about $1 / s$ steps.

    Args:
        optimizer: A bare torch optimizer.
        group: A part of its parameter groups.

    Returns:
        The root mean square of the angle in radians; None for other optimizers and ways.

    Source: Kosson, Messmer, Jaggi, arXiv 2305.17212, 2024, table 1; dampening scales gradient and coupled decay alike.

    >>> import torch
    >>> from lightning_l2.param_groups.decay_groups import decay_groups
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, weight_decay=0.01)
    >>> round(equilibrium_angle(optimizer, decay_groups(optimizer).groups[0]), 4)
    0.0324
    """
    way, strength = acting(optimizer, group)
    kind, options = torch_class(optimizer), group.parent
    if way == "decoupled" and kind in ("Adam", "AdamW"):
        momentum = float(options["betas"][0])
    elif way in ("coupled", "decoupled") and kind == "SGD" and not options["nesterov"]:
        momentum = options["momentum"]
    else:
        return None
    damped = 1 - momentum
    if way == "coupled":
        damped = 1 - options["dampening"] if momentum else 1
    return math.sqrt(2 * strength * damped / (1 + momentum))


def norm_power(optimizer: Optimizer) -> int:
    r"""Return the power $p$ in the learning rate $\eta / \lVert w \rVert^p$ that scale-invariant weights feel.

    A step of one length turns larger weights less, hence 1. Their gradient is smaller too, hence 2 for SGD, whose
    steps shrink with it; optimizers that normalise it undo that.

    >>> import torch
    >>> norm_power(torch.optim.SGD([torch.zeros(1)])), norm_power(torch.optim.AdamW([torch.zeros(1)]))
    (2, 1)
    """
    return 2 if torch_class(optimizer) == "SGD" else 1


def effective_lr(lr: float, square: float, power: int) -> float:
    r"""Return the learning rate $\eta / \lVert w \rVert^p$ that the direction of scale-invariant weights feels.

    Args:
        lr: Learning rate $\eta$.
        square: $\lVert w \rVert^2$.
        power: The optimizer's `norm_power`.

    Returns:
        The effective learning rate, infinite for weights of 0.

    Source: van Laarhoven, arXiv 1706.05350, 2017, sections 3 and 4.

    >>> effective_lr(0.1, 4.0, power=2), effective_lr(0.1, 4.0, power=1)
    (0.025, 0.05)
    """
    return lr / square ** (power / 2) if square > 0 else math.inf


def learning_rate(group: Mapping[str, Any]) -> float:
    """Return a group's learning rate, NaN where it has none.

    >>> learning_rate({"params": [], "lr": 0.1})
    0.1
    """
    return float(group.get("lr", math.nan))
