"""Bounded L2 norms: projection onto the ball, and an augmented Lagrangian (CPR).

All of it works on whole lists of tensors and reads nothing back to the host. With `w` a constrained vector, `b` its
bound and `R(w) = ||w||^2 / 2` as everywhere in this package:

    projection    w <- w min(1, b / ||w||)
    lagrangian    Lambda <- max(0, Lambda + mu (R(w) - b^2 / 2)),   w <- w - Lambda grad R(w) = (1 - Lambda) w

Sources: Nitish Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014
(max-norm); Jörg K. H. Franke, Michael Hefenbrock, Gregor Koehler and Frank Hutter, "Improving Deep Learning
Optimization through Constrained Parameter Regularization", arXiv 2311.09058, 2024 (CPR).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from lightning_l2.constraints.vectors import ConstrainedVectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_l2.constraints.bounds import Bound, State
    from lightning_l2.constraints.vectors import Per


@torch.no_grad()
def project_(
    tensors: Sequence[Tensor], bound: float | Tensor, *, per: Per = "parameter", counts: Sequence[int] | None = None
) -> Tensor:
    """Project tensors onto the L2 ball in place, w <- w min(1, b / ||w||).

    What is inside stays as it is, bit for bit; projecting twice is projecting once. To hold in spite of rounding,
    what is outside ends a rounding error of its type inside the ball (1e-6 of the radius in fp32, 0.8 % in bf16).

    Args:
        tensors: Floating-point tensors of one device, sharded ones (`DTensor`) included.
        bound: Largest L2 norm `b`, in the unit of the weights; one number, or one entry a vector.
        per: "parameter", "row" or "group"; see `ConstrainedVectors`.
        counts: How many tensors form each vector, for "group".

    Returns:
        The norms before the projection, 1-D.

    >>> w = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> project_([w], 1.0)
    tensor([5.], dtype=torch.float64)
    >>> w
    tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    vectors = ConstrainedVectors(tensors, per, counts)
    squares = vectors.squares()
    vectors.scale_(ball_factors(squares, bound, vectors.margin))
    return squares.sqrt()


def ball_factors(squares: Tensor, bounds: float | Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """Return the factors that project vectors onto the L2 ball, min(1, b (1 - margin) / ||w||).

    A vector inside the ball, also one of norm zero, gets exactly 1; so does one whose norm is not finite.

    Args:
        squares: Squared L2 norms, 1-D.
        bounds: Largest allowed norms `b`, in the unit of the weights.
        margin: Fraction of the radius that a vector from outside ends below it.

    >>> ball_factors(torch.tensor([25.0, 1.0, 0.0]), 2.0)
    tensor([0.4000, 1.0000, 1.0000])
    """
    norms = squares.sqrt()
    outside = (norms > bounds) & norms.isfinite()
    return torch.where(outside, bounds * (1 - margin) / norms, 1.0)


def lagrangian_multipliers(
    multipliers: Tensor, squares: Tensor, bounds: float | Tensor, rates: float | Tensor
) -> Tensor:
    """Return the multipliers of the coming shrinkage, max(0, Lambda + mu (||w||^2 - b^2) / 2).

    A multiplier is the fraction that the constraint takes off the weights in that step, as decoupled decay does.

    Args:
        multipliers: `Lambda` of the step before, 1-D, dimensionless.
        squares: Squared L2 norms after the optimizer's step, 1-D.
        bounds: Largest wanted norms `b`, in the unit of the weights; infinity where there is none yet.
        rates: `mu`, one over the square of that unit.

    >>> lagrangian_multipliers(torch.tensor([0.1, 0.1]), torch.tensor([9.0, 1.0]), 2.0, rates=0.1)
    tensor([0.3500, 0.0000])
    """
    return (multipliers + 0.5 * rates * (squares - bounds * bounds)).clamp(min=0)


class Method(ABC):
    """What holds norms at their bounds after a step of the optimizer; derive a final, frozen dataclass.

    What a method remembers of each vector goes into the state, under a name that is logged beside the bound.

    Attributes:
        quantity: That name, empty where it remembers nothing.
    """

    quantity: ClassVar[str] = ""

    @abstractmethod
    def factors(self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float, state: State) -> Tensor:
        """Return what each vector is scaled with, 1-D, and put into `state` what the coming step goes by.

        Args:
            vectors: The constrained vectors.
            squares: Their squared L2 norms, 1-D.
            bounds: Largest norms, in the unit of the weights.
            state: What was remembered before, to be changed.
        """

    def first(self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float) -> Tensor | None:
        """Return which share of each vector the first step would take away, None where that can't be too much."""
        return None


@final
@dataclass(frozen=True)
class Projection(Method):
    """Project onto the ball: w <- w min(1, b / ||w||)."""

    def factors(self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float, state: State) -> Tensor:
        """Return min(1, b / ||w||)."""
        return ball_factors(squares, bounds, vectors.margin)


@final
@dataclass(frozen=True)
class AugmentedLagrangian(Method):
    """Pull back what is outside by a decay that it finds itself (CPR): w <- (1 - Lambda) w.

    Args:
        update_rate: Scale of the multipliers' rates, dimensionless, 1 in the paper.
    """

    quantity: ClassVar[str] = "multiplier"

    update_rate: float = 1.0

    def factors(self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float, state: State) -> Tensor:
        """Return 1 - Lambda, with the multipliers of the coming shrinkage."""
        before = state.get(self.quantity, torch.zeros_like(squares))
        state[self.quantity] = lagrangian_multipliers(before, squares, bounds, self.update_rate * vectors.rates)
        return 1 - state[self.quantity]

    def first(self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float) -> Tensor | None:
        """Return the first multipliers; 1 or more turns weights around, and lets the next ones explode."""
        return lagrangian_multipliers(torch.zeros_like(squares), squares, bounds, self.update_rate * vectors.rates)


@torch.no_grad()
def constrain_(
    vectors: ConstrainedVectors, state: State, bound: Bound, method: Method, *, stepped: Tensor | None = None
) -> tuple[State, Tensor]:
    """Apply a constraint in place after a step of the optimizer, then let its bound take note of the step.

    Args:
        vectors: The constrained vectors.
        state: `bound.start(norms)`, or what the last call returned.
        bound: Where the bounds come from.
        method: How norms are held there.
        stepped: Whether the optimizer did step, 0-D, where only the device knows; nothing happens if it did not.

    Returns:
        The state after the step, and the squared norms between the optimizer's step and the constraint.
    """
    squares = vectors.squares()
    after = dict(state)
    factors = method.factors(vectors, squares, bound.bounds(state), after)
    after |= bound.advance(state, squares.sqrt())
    if stepped is not None:
        factors = torch.where(stepped, factors, 1.0)
        none = torch.zeros_like(squares)
        after = {key: torch.where(stepped, value, state.get(key, none)) for key, value in after.items()}
    vectors.scale_(factors)
    return after, squares
