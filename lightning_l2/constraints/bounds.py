r"""Where the bound of a norm constraint comes from: a number, the size, the norm at the start, later, or at inflection.

The paper bounds $R(w)$ by $\kappa$, this package the norm itself: with $R(w) = \|w\|^2 / 2$, $\kappa = b^2 / 2$.

Source: Franke, Hefenbrock, Koehler and Hutter, "Improving Deep Learning Optimization through Constrained Parameter
Regularization", arXiv 2311.09058, 2024.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch

from lightning_l2.arguments import check_at_least, check_fraction, check_positive, check_types

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

MIN_GROWTH = 0.01
"""Growth of a norm in a period, as a fraction of it, that is too small to tell a slowdown, as in the authors' code."""


class Bound(ABC):
    """Where the bound on L2 norms comes from; one bound a constrained vector.

    Subclasses are frozen dataclasses whose methods are pure functions of tensors and read nothing back to the host.
    What a bound remembers is a dict of 1-D tensors with one entry a vector, on the vectors' device.

    Attributes:
        is_known_at_start: Whether bounds are there before the first step, and what is remembered stays as it is.
    """

    is_known_at_start: ClassVar[bool] = False

    def start(self, norms: Tensor) -> State:
        """Return what there is to remember before the first step.

        Args:
            norms: L2 norms of the vectors then, 1-D.
        """
        return {}

    @abstractmethod
    def bounds(self, state: State, sizes: float | Tensor = 1.0) -> float | Tensor:
        """Return the bounds in force, in the unit of the norms; infinity where there is none yet.

        Args:
            state: What there is to remember.
            sizes: Numbers of elements of the vectors.
        """

    def advance(self, state: State, norms: Tensor) -> State:
        """Return what there is to remember anew after a step.

        Args:
            state: What there was to remember before it.
            norms: L2 norms of the vectors after the optimizer's step, 1-D.
        """
        return {}


@final
@dataclass(frozen=True)
class FixedBound(Bound):
    r"""The same bound for all vectors: $b = norm$. The paper's `Kappa-K`, with $\kappa = norm^2 / 2$.

    Args:
        norm: Largest L2 norm, in the unit of the weights.

    >>> FixedBound(3.0).bounds({})
    3.0
    """

    is_known_at_start: ClassVar[bool] = True

    norm: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(norm=self.norm)

    def bounds(self, state: State, sizes: float | Tensor = 1.0) -> float:
        """Return the norm."""
        return self.norm


@final
@dataclass(frozen=True)
class RmsBound(Bound):
    r"""The same bound on the root mean square of all vectors: $b = c \sqrt{n}$ for n elements.

    Args:
        rms: Largest root mean square $c$, in the unit of the weights.

    >>> RmsBound(0.02).bounds({}, sizes=10_000.0)
    2.0
    """

    is_known_at_start: ClassVar[bool] = True

    rms: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(rms=self.rms)

    def bounds(self, state: State, sizes: float | Tensor = 1.0) -> float | Tensor:
        """Return the root mean square times that of the number of elements."""
        return self.rms * sizes**0.5


@final
@dataclass(frozen=True)
class InitialBound(Bound):
    r"""A multiple of the norm before the first step: $b = factor \|w_0\|$.

    The paper's `Kappa-kI0` is $k R(w_0)$; a factor on R is the square of one on the norm: $k = factor^2$.

    Args:
        factor: Multiple of the norm, dimensionless.

    >>> bound = InitialBound(2.0)
    >>> bound.bounds(bound.start(torch.tensor([1.0, 3.0])))
    tensor([2., 6.])
    """

    is_known_at_start: ClassVar[bool] = True

    factor: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(factor=self.factor)

    def start(self, norms: Tensor) -> State:
        """Remember the norms."""
        return {"reference": norms}

    def bounds(self, state: State, sizes: float | Tensor = 1.0) -> Tensor:
        """Return the multiple of the remembered norms."""
        return self.factor * state["reference"]


@final
@dataclass(frozen=True)
class WarmupBound(Bound):
    r"""A multiple of the norm after some steps, none before: $b = factor \|w_{steps}\|$. The paper's `Kappa-WS`.

    Args:
        steps: Number of optimizer steps without a bound.
        factor: Multiple of the norm, dimensionless.

    >>> bound = WarmupBound(steps=2)
    >>> state = bound.start(torch.tensor([1.0]))
    >>> for norm in (1.5, 1.8, 2.4):
    ...     state = bound.advance(state, torch.tensor([norm]))
    ...     print(bound.bounds(state))
    tensor([inf])
    tensor([1.8000])
    tensor([1.8000])
    """

    steps: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_at_least(1, steps=self.steps)
        check_positive(factor=self.factor)

    def start(self, norms: Tensor) -> State:
        """Begin without a bound."""
        return {"reference": torch.full_like(norms, math.inf), "steps": torch.zeros_like(norms, dtype=torch.int64)}

    def bounds(self, state: State, sizes: float | Tensor = 1.0) -> Tensor:
        """Return the multiple of the remembered norms."""
        return self.factor * state["reference"]

    def advance(self, state: State, norms: Tensor) -> State:
        """Remember the norms of the last step of the warm-up."""
        steps = state["steps"] + 1
        return {"reference": torch.where(steps == self.steps, norms, state["reference"]), "steps": steps}


@final
@dataclass(frozen=True)
class InflectionBound(Bound):
    r"""A multiple of the norm where its growth begins to slow down, none before. The paper's `Kappa-IP`.

    The norm, smoothed by an exponential average, is sampled once a period. Where it grew by a smaller fraction than in
    the period before, yet by more than 1 %, its growth has passed the inflection point, and the bound becomes
    $b = factor \|w\|$. A norm that never slows down so, or shrinks, is never bounded. The first possible step is
    4 `period`.

    Args:
        period: Number of optimizer steps between samples.
        smoothing: Weight of the past in the exponential average, 0 to 1.
        factor: Multiple of the norm, dimensionless.

    >>> bound = InflectionBound(period=1, smoothing=0.0)
    >>> state = bound.start(torch.tensor([1.0]))
    >>> for norm in (1.0, 1.1, 1.5, 2.0, 2.1):
    ...     state = bound.advance(state, torch.tensor([norm]))
    ...     print(bound.bounds(state).item())
    inf
    inf
    inf
    2.0
    2.0
    """

    period: int = 200
    smoothing: float = 0.99
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_at_least(1, period=self.period)
        check_positive(factor=self.factor)
        check_fraction(smoothing=self.smoothing)

    def start(self, norms: Tensor) -> State:
        """Begin without a bound, a sample or a growth."""
        return {
            "reference": torch.full_like(norms, math.inf),
            "steps": torch.zeros_like(norms, dtype=torch.int64),
            "smoothed": torch.zeros_like(norms),
            "sample": torch.zeros_like(norms),
            "growth": torch.zeros_like(norms),
        }

    def bounds(self, state: State, sizes: float | Tensor = 1.0) -> Tensor:
        """Return the multiple of the remembered norms."""
        return self.factor * state["reference"]

    def advance(self, state: State, norms: Tensor) -> State:
        """Smooth the norms, sample them once a period, and remember those past their inflection point."""
        steps = state["steps"] + 1
        smoothed = torch.where(steps < self.period, norms, torch.lerp(norms, state["smoothed"], self.smoothing))
        sampled = steps % self.period == 0
        growth = (smoothed - state["sample"]) / smoothed
        slower = (growth < state["growth"]) & (growth > MIN_GROWTH)
        return {
            "reference": torch.where(sampled & slower & state["reference"].isinf(), norms, state["reference"]),
            "steps": steps,
            "smoothed": smoothed,
            "sample": torch.where(sampled, smoothed, state["sample"]),
            # The sample at 2 `period` is the first that counts: it has none before it to have grown from.
            "growth": torch.where(sampled & (steps > 2 * self.period), growth, state["growth"]),
        }
