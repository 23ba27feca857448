"""The quantities that are logged, one function each, from sums of squares on the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_l2.monitor.rotation import angular_update, effective_lr
from lightning_l2.monitor.spectra import extreme_singular_values

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from lightning_l2.monitor.layers import Watched
    from lightning_l2.monitor.measurement import GroupValues


def roots(squares: Mapping[str, float]) -> dict[str, float]:
    """Return the norm of each layer.

    >>> roots({"head": 9.0, "total": 25.0})
    {'head': 3.0, 'total': 5.0}
    """
    return {name: math.sqrt(square) for name, square in squares.items()}


def norms(prefix: str, squares: Mapping[str, float]) -> dict[str, float]:
    """Return the norm of each layer under its key.

    >>> norms("l2_norm", {"head": 9.0, "total": 25.0})
    {'l2_norm/head': 3.0, 'l2_norm/total': 5.0}
    """
    return {f"{prefix}/{name}": norm for name, norm in roots(squares).items()}


def ratios(prefix: str, squares: Mapping[str, float], of: Mapping[str, float]) -> dict[str, float]:
    """Return the ratio of two norms of each layer; none where there is no first or the second is 0.

    >>> ratios("update_ratio", {"head": 1.0, "zero": 1.0}, {"head": 4.0, "zero": 0.0})
    {'update_ratio/head': 0.5}
    """
    return {
        f"{prefix}/{name}": math.sqrt(squares[name] / square)
        for name, square in of.items()
        if square and name in squares
    }


def penalties(watched: Watched, squares: Mapping[int, float], groups: Sequence[GroupValues]) -> dict[str, float]:
    r"""Return the penalty $\frac{\lambda}{2} \lVert w \rVert_2^2$ and lambda of each parameter group.

    Args:
        watched: The parameters and their groups.
        squares: Sums of squares by the parameter's index.
        groups: What is in force in each group.
    """
    lambdas = [group.weight_decay for group in groups]
    # lambda 0 of weights that overflowed is no penalty, not NaN
    penalty = [value and value / 2 * square for value, square in zip(lambdas, watched.by_group(squares), strict=True)]
    logged = {f"l2_penalty/{name}": value for name, value in zip(watched.group_names, penalty, strict=True)}
    logged["l2_penalty/total"] = sum(penalty)
    return logged | {f"weight_decay/{name}": value for name, value in zip(watched.group_names, lambdas, strict=True)}


def angular_updates(
    squares: Mapping[str, float], updates: Mapping[str, float], products: Mapping[str, float]
) -> dict[str, float]:
    """Return the angle that each layer's weights turned, in radians.

    >>> angular_updates({"head": 1.0}, {"head": 2.0}, {"head": -1.0})
    {'angular_update/head': 1.5707963267948966}
    """
    return {
        f"angular_update/{name}": angular_update(square, updates[name], products[name])
        for name, square in squares.items()
        if square
    }


def squared_equilibria(
    watched: Watched, squares: Mapping[int, float], groups: Sequence[GroupValues]
) -> dict[int, float]:
    r"""Return $\theta^2 \lVert w \rVert^2$, the squared update of equilibrium, of parameters that have a known one."""
    angles = {index: groups[owner].angle for index, owner in enumerate(watched.owners) if owner is not None}
    return {index: angle**2 * squares[index] for index, angle in angles.items() if angle}


def effective_lrs(
    watched: Watched, squares: Mapping[int, float], groups: Sequence[GroupValues], layers: Container[str]
) -> dict[str, float]:
    """Return the learning rate that the weights of each normalised layer feel, of those layers that are to be shown."""
    normalised = {index: squares[index] for index in squares if watched.normalised[index]}
    sums = watched.by_layer(normalised)
    logged = {}
    for index in normalised:
        layer, owner = watched.layers[index], watched.owners[index]
        if layer is not None and owner is not None and layer in layers:
            group = groups[owner]
            logged[f"effective_lr/{layer}"] = effective_lr(group.lr, sums[layer], group.power)
    return logged


def spectral(name: str, entries: Sequence[float], square: float) -> dict[str, float]:
    """Return the spectral norm, stable rank and condition number of a weight matrix.

    Args:
        name: The weight's name.
        entries: The flattened bidiagonal matrix of `spectra.bidiagonal`.
        square: Its squared L2 (Frobenius) norm.

    >>> spectral("w", [4.0, 2.0, 0.0, 0.0], 20.0)
    {'spectral_norm/w': 4.0, 'stable_rank/w': 1.25, 'condition_number/w': 2.0}
    """
    half = len(entries) // 2
    largest, smallest = extreme_singular_values([entries[:half], entries[half:]])
    logged = {f"spectral_norm/{name}": largest}
    if largest:
        logged[f"stable_rank/{name}"] = square / largest**2
        logged[f"condition_number/{name}"] = largest / smallest if smallest else math.inf
    return logged


def strongest(count: int, squares: Mapping[str, float], previous: Mapping[str, float] | None = None) -> set[str]:
    """Return the layers with the largest norms, or whose norms have changed by the largest factor.

    Args:
        count: How many.
        squares: Squared norm of each layer.
        previous: The same at the previous logged step, to choose by change.

    >>> sorted(strongest(1, {"a": 4.0, "b": 9.0, "total": 13.0}))
    ['b']
    >>> sorted(strongest(1, {"a": 4.0, "b": 9.0, "total": 13.0}, {"a": 1.0, "b": 9.0}))
    ['a']
    """

    def key(name: str) -> float:
        now = squares[name]
        if previous is None:
            return now if now < math.inf else math.inf
        before = previous.get(name, now)
        if 0 < before < math.inf and 0 < now < math.inf:
            return abs(math.log(now / before))
        return 0.0 if now == before else math.inf

    return set(sorted((name for name in squares if name != "total"), key=key, reverse=True)[:count])
