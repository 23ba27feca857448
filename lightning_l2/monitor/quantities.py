"""The quantities that are logged, a line each: key, function, what it reads, and the options that ask for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_l2.decay.start import local_squared_distances
from lightning_l2.monitor.histograms import Histogram, count_weights, histogram
from lightning_l2.monitor.measurement import WEIGHTS, Reading
from lightning_l2.monitor.rotation import angular_update, effective_lr, equilibrium_angle, learning_rate, norm_power
from lightning_l2.monitor.spectra import extreme_singular_values, reduced
from lightning_l2.norms.inner_products import local_inner_products
from lightning_l2.norms.squared import local_squared_norms
from lightning_l2.param_groups.shrinkage import left_of
from lightning_l2.sharding import local_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from lightning_l2.monitor.measurement import Step
    from lightning_l2.monitor.options import NormOptions


def norms(step: Step, of: Reading) -> dict[str, float]:
    """Return the norm of each layer, from sums of squares."""
    return {name: math.sqrt(square) for name, square in step.layers(of).items()}


def ratios(step: Step, of: Reading, over: Reading) -> dict[str, float]:
    """Return the root of the ratio of two sums of each layer; none where there is no first or the second is 0."""
    squares = step.layers(of)
    return {name: math.sqrt(squares[name] / n) for name, n in step.layers(over).items() if n and name in squares}


def penalties(step: Step, squares: Reading, lambdas: Reading) -> dict[str, float]:
    r"""Return the penalty $\frac{\lambda}{2} \lVert w \rVert_2^2$ of each parameter group."""
    sums = step.watched.by_group(step.values[squares])
    # lambda 0 of weights that overflowed is no penalty, not NaN
    found = [value and value / 2 * square for value, square in zip(step.groups[lambdas], sums, strict=True)]
    return {**dict(zip(step.watched.group_names, found, strict=True)), "total": sum(found)}


def of_groups(step: Step, of: Reading) -> dict[str, float]:
    """Return what was read of each parameter group."""
    return dict(zip(step.watched.group_names, step.groups[of], strict=True))


def of_known_groups(step: Step, of: Reading) -> dict[str, float]:
    """Return what was read of each parameter group of which it is known."""
    return {name: value for name, value in of_groups(step, of).items() if value is not None}


def angles(step: Step, squares: Reading, moves: Reading, products: Reading) -> dict[str, float]:
    """Return the angle that each layer's weights turned, in radians."""
    moved, along = step.layers(moves), step.layers(products)
    return {
        name: angular_update(square, moved[name], along[name])
        for name, square in step.layers(squares).items()
        if square
    }


def equilibria(step: Step, squares: Reading, expected: Reading) -> dict[str, float]:
    """Return the angle that each layer's weights turn in equilibrium, of layers with parameters that have one."""
    known = {index: angle for index, angle in step.owners(expected).items() if angle}
    turned = step.watched.by_layer({index: angle**2 * step.values[squares][index] for index, angle in known.items()})
    layers = step.layers(squares)
    return {name: math.sqrt(square / layers[name]) for name, square in turned.items() if known and layers[name]}


def effective_lrs(step: Step, squares: Reading, lrs: Reading, powers: Reading) -> dict[str, float]:
    """Return the learning rate that the weights of each layer before a normalisation feel."""
    watched, rates, power = step.watched, step.owners(lrs), step.owners(powers)
    normalised = {index: square for index, square in step.values[squares].items() if watched.normalised[index]}
    sums = watched.by_layer(normalised)
    return {
        layer: effective_lr(rates[index], sums[layer], power[index])
        for index in normalised
        if (layer := watched.layers[index]) is not None and index in rates
    }


def spectral_norms(step: Step, values: Reading) -> dict[str, float]:
    """Return the largest singular value of each weight matrix."""
    return {step.watched.names[index]: largest for index, (largest, _) in step.values[values].items()}


def stable_ranks(step: Step, squares: Reading, values: Reading) -> dict[str, float]:
    """Return the squared L2 (Frobenius) norm of each weight matrix over its squared spectral norm."""
    largest, sums = step.values[values], step.values[squares]
    return {step.watched.names[i]: sums[i] / one / one for i, (one, _) in largest.items() if one}


def condition_numbers(step: Step, values: Reading) -> dict[str, float]:
    """Return the ratio of the extreme singular values of each weight matrix."""
    return {
        step.watched.names[index]: largest / smallest if smallest else math.inf
        for index, (largest, smallest) in step.values[values].items()
        if largest
    }


def histograms(step: Step, of: Reading) -> dict[str, Histogram]:
    """Return the histogram of each weight."""
    return {step.watched.names[index]: found for index, found in step.values[of].items()}


def sizes(parameters: Sequence[Tensor]) -> Tensor:
    """Return how many elements this process holds of each parameter.

    >>> sizes([torch.ones(2, 3)])
    tensor([6.], dtype=torch.float64)
    """
    return torch.tensor([local_part(parameter).numel() for parameter in parameters], dtype=torch.float64)


START = Reading("start", local_squared_norms)
SIZES = Reading("weights", sizes)
GRADIENTS = Reading("gradients", local_squared_norms)
MOVES = Reading("moves", lambda moved, _: local_squared_norms(moved))
PRODUCTS = Reading("moves", local_inner_products)
SINGULAR_VALUES = Reading("wholes", reduced, extreme_singular_values)
COUNTS = Reading("wholes", count_weights, histogram)
LAMBDAS = Reading("groups", lambda _, part: float(part.weight_decay))
LEFT = Reading("groups", left_of)
DISTANCES = Reading("distances", local_squared_distances)
ANGLES = Reading("groups", equilibrium_angle)
LRS = Reading("groups", lambda _, part: learning_rate(part.parent))
POWERS = Reading("groups", lambda optimizer, _: norm_power(optimizer))


@dataclass(frozen=True)
class Quantity:
    """A logged quantity.

    Args:
        key: What its keys begin with.
        function: Takes what a step has shown and the readings, and returns numbers or histograms by name.
        reads: The readings.
        options: The options that ask for it, all of them. One that is a number says at every how many logged steps.
    """

    key: str
    function: Callable[..., dict[str, Any]]
    reads: tuple[Reading, ...]
    options: tuple[str, ...] = ()

    def is_wanted(self, options: NormOptions, order: int | None) -> bool:
        """Return whether it is to be measured in a step before which `order` were logged, None if it won't be."""
        asked = [getattr(options, name) for name in self.options]
        return all(order is not None and order % one == 0 if type(one) is int else bool(one) for one in asked)


QUANTITIES = (
    Quantity("l2_penalty", penalties, (WEIGHTS, LAMBDAS)),
    Quantity("weight_decay", of_groups, (LAMBDAS,)),
    Quantity("weight_decay_left", of_known_groups, (LEFT,)),
    Quantity("l2_norm", norms, (WEIGHTS,)),
    Quantity("l2_rms", ratios, (WEIGHTS, SIZES), ("rms",)),
    Quantity("norm_ratio", ratios, (WEIGHTS, START), ("initial_ratio",)),
    Quantity("distance", norms, (DISTANCES,), ("distance",)),
    Quantity("grad_norm", norms, (GRADIENTS,), ("gradients",)),
    Quantity("update_norm", norms, (MOVES,), ("updates",)),
    Quantity("update_rms", ratios, (MOVES, SIZES), ("updates", "rms")),
    Quantity("update_ratio", ratios, (MOVES, WEIGHTS), ("updates",)),
    Quantity("angular_update", angles, (WEIGHTS, MOVES, PRODUCTS), ("rotation",)),
    Quantity("angular_equilibrium", equilibria, (WEIGHTS, ANGLES), ("rotation",)),
    Quantity("effective_lr", effective_lrs, (WEIGHTS, LRS, POWERS), ("rotation",)),
    Quantity("spectral_norm", spectral_norms, (SINGULAR_VALUES,), ("spectra",)),
    Quantity("stable_rank", stable_ranks, (WEIGHTS, SINGULAR_VALUES), ("spectra",)),
    Quantity("condition_number", condition_numbers, (SINGULAR_VALUES,), ("spectra",)),
    Quantity("weights", histograms, (COUNTS,), ("histograms",)),
)


def wanted(options: NormOptions, order: int | None) -> list[Quantity]:
    """Return the quantities to measure in a step, before which `order` were logged, None if it won't be."""
    return [quantity for quantity in QUANTITIES if quantity.is_wanted(options, order)]


def logged(step: Step, quantities: Iterable[Quantity]) -> dict[str, Any]:
    """Return the quantities by key, of those whose readings were made."""
    return {
        f"{quantity.key}/{name}": value
        for quantity in quantities
        if step.has(quantity.reads)
        for name, value in quantity.function(step, *quantity.reads).items()
    }
