r"""How norms are held: projection onto the ball, an augmented Lagrangian (CPR), and steps on the sphere (Hyperball).

All of it works on whole lists of tensors and reads nothing back to the host. With $w$ a constrained vector, $b$ its
bound, $u$ the optimizer's direction, $N(x) = x / \|x\|$ and $R(w) = \|w\|^2 / 2$ as everywhere in this package:

    projection    w <- w min(1, b / ||w||)
    lagrangian    Lambda <- max(0, Lambda + mu (R(w) - b^2 / 2)),   w <- w - Lambda grad R(w) = (1 - Lambda) w
    sphere        w <- b N(w - eta b N(u))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch

from lightning_l2.arguments import check_choice, check_positive, check_types

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_l2.constraints.bounds import Bound, State
    from lightning_l2.constraints.vectors import ConstrainedVectors


def ball_factors(squares: Tensor, bounds: float | Tensor, margin: float | Tensor = 0.0) -> Tensor:
    r"""Return the factors that project vectors onto the L2 ball, $\min(1, b (1 - margin) / \|w\|)$.

    A vector inside the ball, also one of norm zero, gets exactly 1; so does one whose norm is not finite.

    Args:
        squares: Squared L2 norms, 1-D.
        bounds: Largest allowed norms $b$, in the unit of the weights.
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
    r"""Return the multipliers of the coming shrinkage, $\max(0, \Lambda + \mu (\|w\|^2 - b^2) / 2)$.

    A multiplier is the fraction that the constraint takes off the weights in that step, as decoupled decay does.

    Args:
        multipliers: $\Lambda$ of the step before, 1-D, dimensionless.
        squares: Squared L2 norms after the optimizer's step, 1-D.
        bounds: Largest wanted norms $b$, in the unit of the weights; infinity where there is none yet.
        rates: $\mu$, one over the square of that unit.

    >>> lagrangian_multipliers(torch.tensor([0.1, 0.1]), torch.tensor([9.0, 1.0]), 2.0, rates=0.1)
    tensor([0.3500, 0.0000])
    """
    return (multipliers + 0.5 * rates * (squares - bounds * bounds)).clamp(min=0)


@dataclass(frozen=True)
class Update:
    """What a step of the optimizer has made of the constrained vectors.

    Args:
        squares: Their squared L2 norms, 1-D.
        bounds: Their bounds, in the unit of the weights.
        before: Copies of the vectors before it, free to be changed, for methods that ask for them.
        size: The learning rates of the step, dimensionless, for these.
        stepped: Whether the optimizer did step, 0-D, where only the device knows.
    """

    squares: Tensor
    bounds: Tensor | float
    before: ConstrainedVectors | None = None
    size: float | Tensor = 0.0
    stepped: Tensor | None = None

    def if_stepped(self, value: Tensor, otherwise: float | Tensor) -> Tensor:
        """Return a value, or another one if the optimizer did not step."""
        return value if self.stepped is None else torch.where(self.stepped, value, otherwise)


class Method(ABC):
    """What holds norms at their bounds after a step of the optimizer; derive a final, frozen dataclass.

    What a method remembers of each vector goes into the state, under a name that is logged beside the bound.

    Attributes:
        quantity: That name, empty where it remembers nothing.
        compares: Whether it asks for the weights before the step.
    """

    quantity: ClassVar[str] = ""
    compares: ClassVar[bool] = False

    @abstractmethod
    def act(self, vectors: ConstrainedVectors, update: Update, state: State) -> None:
        """Change the vectors in place, unless the optimizer did not step.

        Args:
            vectors: The constrained vectors.
            update: What the step has made of them.
            state: What was remembered before, to be changed.
        """

    def objection(
        self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float
    ) -> tuple[Tensor, str] | None:
        """Return how wrong each vector is before its first step, where 1 is too much, and how to say so."""
        return None

    def warning(self, largest: float) -> str:
        """Return what to say of the largest value of its quantity, nothing where that is fine."""
        return ""


@final
@dataclass(frozen=True)
class Projection(Method):
    r"""Project onto the ball: $w \leftarrow w \min(1, b / \|w\|)$.

    To hold in spite of rounding, what is outside ends a rounding error of its type inside the ball (1e-6 of the radius
    in fp32, 0.8 % in bf16). What is inside stays as it is, bit for bit.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
    """

    def act(self, vectors: ConstrainedVectors, update: Update, state: State) -> None:
        """Scale by min(1, b / ||w||)."""
        factors = ball_factors(update.squares, update.bounds, vectors.margin)
        vectors.scale_(update.if_stepped(factors, 1.0))


@final
@dataclass(frozen=True)
class AugmentedLagrangian(Method):
    r"""Pull back what is outside by a decay that it finds itself (CPR): $w \leftarrow (1 - \Lambda) w$.

    Args:
        update_rate: Scale of the multipliers' rates, dimensionless, 1 in the paper.

    Source: Franke, Hefenbrock, Koehler and Hutter, "Improving Deep Learning Optimization through Constrained Parameter
    Regularization", arXiv 2311.09058, 2024.
    """

    quantity: ClassVar[str] = "multiplier"

    update_rate: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(update_rate=self.update_rate)

    def act(self, vectors: ConstrainedVectors, update: Update, state: State) -> None:
        """Scale by 1 - Lambda, with the multipliers of the coming shrinkage."""
        before = state.get(self.quantity, torch.zeros_like(update.squares))
        rates = self.update_rate * vectors.rates
        state[self.quantity] = lagrangian_multipliers(before, update.squares, update.bounds, rates)
        vectors.scale_(update.if_stepped(1 - state[self.quantity], 1.0))

    def objection(
        self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float
    ) -> tuple[Tensor, str] | None:
        """Refuse first multipliers of 1 or more, which turn weights around and let the next ones explode."""
        first = lagrangian_multipliers(torch.zeros_like(squares), squares, bounds, self.update_rate * vectors.rates)
        return first, (
            "The weights of {names} are so far outside of {bound} that the first multiplier would be {worst:.3g}, and "
            "1 or more turns them around. Use a larger bound, an update_rate {worst:.2g} times smaller, or "
            "method='projection'."
        )

    def warning(self, largest: float) -> str:
        """Tell of multipliers that turn weights around."""
        if largest < 1:
            return ""
        return (
            f"the multiplier has reached {largest:.3g}, and 1 or more turns weights around. Use a larger bound, a "
            f"smaller `update_rate` than {self.update_rate:g}, or method='projection'."
        )


@final
@dataclass(frozen=True)
class Sphere(Method):
    r"""Turn weights on a sphere (Hyperball): $w \leftarrow b N(w - \eta b N(u))$, with $N(x) = x / \|x\|$.

    The direction $u$ is read from what the step has changed, on any optimizer, so a step turns $w$ by an angle of about
    $\eta$ whatever the size of its gradient. What no step has changed stays as it is, bit for bit.

    Source: Wen, Dang, Lyu, Ma and Liang, "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
    Optimization", arXiv 2606.16899, 2026.
    """

    compares: ClassVar[bool] = True

    def act(self, vectors: ConstrainedVectors, update: Update, state: State) -> None:
        """Go the step's direction by eta b, from the sphere back to the sphere."""
        weights = update.before
        if weights is None:
            return
        step = vectors.copied()
        step.add_(weights, -1.0)
        lengths = step.squares().sqrt()
        has_moved = (lengths > 0) & lengths.isfinite()
        step.scale_(torch.where(has_moved, update.size * update.bounds / lengths, 1.0))
        _put(weights, update.bounds, has_moved)
        weights.add_(step)
        _put(weights, update.bounds, has_moved)
        vectors.copy_(weights)

    def objection(
        self, vectors: ConstrainedVectors, squares: Tensor, bounds: Tensor | float
    ) -> tuple[Tensor, str] | None:
        """Refuse weights of norm 0, which lie on no sphere."""
        return (squares == 0).to(squares.dtype), (
            "The weights of {names} have a norm of 0, in a row at least where each row has a sphere, so that there is "
            "nothing to turn. Initialise them, or exempt them by a rule with weight_decay=0."
        )


METHODS: dict[str, type[Method]] = {"projection": Projection, "lagrangian": AugmentedLagrangian, "sphere": Sphere}


def method_of(name: str, update_rate: float | None = None) -> Method:
    """Return a method by its name.

    Args:
        name: A key of `METHODS`.
        update_rate: As of `AugmentedLagrangian`, None for its default; no other method has one.

    Raises:
        ValueError: If there is none of that name, or it has no `update_rate`.

    >>> method_of("lagrangian", 0.5)
    AugmentedLagrangian(update_rate=0.5)
    """
    check_choice(tuple(METHODS), method=name)
    if update_rate is None:
        return METHODS[name]()
    if name != "lagrangian":
        raise ValueError(f"`update_rate` goes with method='lagrangian' only, got method={name!r}. Leave it out.")
    return AugmentedLagrangian(update_rate)


@torch.no_grad()
def constrain_(
    vectors: ConstrainedVectors,
    state: State,
    bound: Bound,
    method: Method,
    *,
    before: ConstrainedVectors | None = None,
    size: float | Tensor = 0.0,
    stepped: Tensor | None = None,
) -> tuple[State, Tensor]:
    """Apply a constraint in place after a step of the optimizer, then let its bound take note of the step.

    Args:
        vectors: The constrained vectors.
        state: What the bound's `start(norms)` or the last call returned.
        bound: Where the bounds come from.
        method: How norms are held there.
        before: Copies of the vectors before the step, for methods that compare; they are used up.
        size: The learning rates of the step, for these.
        stepped: Whether the optimizer did step, 0-D, where only the device knows; nothing happens if it did not.

    Returns:
        The state after the step, and the squared norms between the optimizer's step and the constraint.
    """
    squares = vectors.squares()
    after = dict(state)
    update = Update(squares, bound.bounds(state, vectors.sizes), before, size, stepped)
    method.act(vectors, update, after)
    after |= bound.advance(state, squares.sqrt())
    none = torch.zeros_like(squares)
    return {key: update.if_stepped(value, state.get(key, none)) for key, value in after.items()}, squares


def _put(vectors: ConstrainedVectors, radii: float | Tensor, where: Tensor) -> None:
    """Scale vectors to their radii where that is wanted, those of norm 0 aside."""
    norms = vectors.squares().sqrt()
    vectors.scale_(torch.where(where & (norms > 0), radii / norms, 1.0))
