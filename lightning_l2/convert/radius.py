"""The radius of an L2 ball that does what weight decay does; what is not exact is named heuristic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_l2.convert.formulas import check_not_negative, check_positive


def ridge_radius(weight_decay: float, *, curvatures: Sequence[float], optimum: Sequence[float]) -> float:
    """Return the norm at the minimum of a quadratic loss with weight decay: the radius of the equivalent ball.

    For `J(w) = 1/2 (w - w*)^T H (w - w*)` the minimum of `J(w) + weight_decay / 2 * ||w||^2` has the coordinates
    `h_i w*_i / (h_i + weight_decay)` along the eigenvectors of `H`. Its norm is the radius for which
    `min J(w) subject to ||w|| <= radius` has the same solution. Exact for linear regression, for nothing else.

    Args:
        weight_decay: At least 0.
        curvatures: Eigenvalues `h_i` of the Hessian `H`, at least 0.
        optimum: Coordinates `w*_i` of the minimum without weight decay along the eigenvectors, in the weights' unit.

    Returns:
        The radius `||w||`, in the weights' unit; a bound on `||w||^2` is its square.

    Raises:
        ValueError: If a curvature or weight decay is negative or not finite, or the lengths differ.

    >>> ridge_radius(1.0, curvatures=[1.0, 3.0], optimum=[6.0, 16 / 3])
    5.0
    """
    check_not_negative(weight_decay=weight_decay)
    if len(curvatures) != len(optimum):
        raise ValueError(
            f"Expected as many `curvatures` as coordinates in `optimum`, but got {len(curvatures)} and {len(optimum)}."
        )
    coordinates = []
    for index, (curvature, coordinate) in enumerate(zip(curvatures, optimum, strict=True)):
        check_not_negative(**{f"curvatures[{index}]": curvature})
        coordinates.append(coordinate * curvature / (curvature + weight_decay) if curvature > 0.0 else 0.0)
    return math.hypot(*coordinates)


def prior_to_radius(sigma: float, *, parameters: float) -> float:
    """Return the root mean squared norm of weights drawn from a Gaussian prior: `sigma * sqrt(parameters)`.

    With many weights nearly all of the prior lies at this radius.

    Args:
        sigma: Standard deviation of each weight, in the weights' unit, above 0.
        parameters: Number of weights, above 0.

    Returns:
        The radius `||w||`, in the weights' unit; a bound on `||w||^2` is its square.

    Raises:
        ValueError: If an argument is not finite and above 0.

    >>> prior_to_radius(0.02, parameters=10_000)
    2.0
    """
    check_positive(sigma=sigma, parameters=parameters)
    return sigma * math.sqrt(parameters)


def heuristic_equilibrium_radius(weight_decay: float, *, lr: float, parameters: float) -> float:
    """Estimate the norm at which AdamW keeps a scale-invariant layer: `sqrt(lr * parameters / (2 * weight_decay))`.

    A heuristic: it takes each coordinate of Adam's direction for noise of size 1 and the weights for settled, after
    some `1 / (lr * weight_decay)` steps. Meant for layers that a normalisation layer follows.

    Args:
        weight_decay: Decoupled weight decay, above 0.
        lr: Learning rate, above 0.
        parameters: Number of weights in the layer, above 0.

    Returns:
        The radius `||w||`, in the weights' unit; a bound on `||w||^2` is its square.

    Raises:
        ValueError: If an argument is not finite and above 0.

    Source: Kosson, Messmer and Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural
    Networks", arXiv 2305.17212, 2023.

    >>> heuristic_equilibrium_radius(0.1, lr=1e-3, parameters=20_000)
    10.0
    """
    check_positive(weight_decay=weight_decay, lr=lr, parameters=parameters)
    return math.sqrt(lr * parameters / (2.0 * weight_decay))
