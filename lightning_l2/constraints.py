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

from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_l2.memory_layout import at_least_fp32, wide_dtype
from lightning_l2.norms import ROW, squared_norms
from lightning_l2.sharding import local_part, sum_over_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

    from lightning_l2.bounds import Bound, State

Per = Literal["parameter", "row", "group"]
_T = TypeVar("_T")


class ConstrainedVectors:
    """The vectors whose L2 norms are bounded: tensors, their rows, or groups of tensors.

    Args:
        tensors: Floating-point tensors of one device, sharded ones (`DTensor`) included.
        per: "parameter": each tensor is a vector. "row": each row of a tensor, which is one index of dimension 0 and
            all of the others; one element of a 1-D tensor. "group": consecutive tensors form a vector.
        counts: How many tensors form each vector, in order; for "group" only. Default: all of them form one.
        shards: The process group of each plain tensor that is a flat part of a larger one, else None; see
            `norms.squared_norms`. Such parts have no rows.

    Example:
        >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> ConstrainedVectors([w], per="row").squares().sqrt()
        tensor([5.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        per: Per = "parameter",
        counts: Sequence[int] | None = None,
        shards: Sequence[ProcessGroup | None] | None = None,
    ) -> None:
        self.tensors = list(tensors)
        self.per = per
        self.shards = shards
        if per == "row":
            self.counts = [len(_local(tensor)) for tensor in self.tensors]
        else:
            self.counts = [1] * len(self.tensors) if per == "parameter" else list(counts or [len(self.tensors)])

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Return each vector's squared L2 norm as a 1-D tensor; for "row", of the rows in the local shards."""
        if self.per == "row":
            return _row_squares(self.tensors)
        squares = squared_norms(self.tensors, self.shards)
        return torch.stack([part.sum() for part in self._parts(squares)]) if self.per == "group" else squares

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply each vector by its factor, in place.

        Args:
            factors: 1-D, one entry a vector, in the order of `squares()`, dimensionless.
        """
        if factors.device.type == "cpu" and bool((factors == 1).all()):
            return  # Asking costs nothing here, and inside the ball is where most steps end.
        tensors = [_local(tensor) for tensor in self.tensors]
        # Factors that have a dimension take part in type promotion: bf16 weights times fp32 factors are rounded once.
        factors = factors.to(self.precision)
        if self.per == "row":
            parts = zip(self._parts(factors), tensors, strict=True)
            spread = [part.view(-1, *[1] * (tensor.ndim - 1)) for part, tensor in parts]
        else:
            ones = torch.split_with_sizes(factors, [1] * len(factors))
            spread = [part for part, n in zip(ones, self.counts, strict=True) for _ in range(n)]
        torch._foreach_mul_(tensors, spread)

    @cached_property
    def precision(self) -> torch.dtype:
        """The type in which the vectors are scaled: float64 if one of them is, else float32."""
        wide = any(tensor.dtype == torch.float64 for tensor in self.tensors)
        return torch.float64 if wide else torch.float32

    @cached_property
    def margin(self) -> float | Tensor:
        """How far inside the ball, as a fraction of its radius, to aim so that rounding does not leave it.

        Once the rounding of the weights' own type, and eight times that of the type their norms are computed in.
        """
        margins = [
            torch.finfo(tensor.dtype).eps + 8 * torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
            for tensor in self.tensors
        ]
        if len(set(margins)) == 1:
            return margins[0]
        if self.per == "row":
            return self._operand([m for m, n in zip(margins, self.counts, strict=True) for _ in range(n)])
        return self._operand([max(part) for part in self._parts(margins)])

    @cached_property
    def rates(self) -> float | Tensor:
        """The multipliers' rates `mu` = 4 / n for n elements; for "parameter" and "group" only.

        CPR's authors bound ||w||^2 instead of half of it, at the rate 1 / n; the 4 turns it into the convention here.
        """
        sizes = torch.tensor([float(tensor.numel()) for tensor in self.tensors], dtype=torch.float64)
        if self.shards is not None:
            sizes = sum_over_shards(sizes.to(_local(self.tensors[0]).device), self.tensors, self.shards)
        return self._operand([4 / sum(part) for part in self._parts(sizes.tolist())])

    def _parts(self, values: _T) -> list[_T]:
        """Cut what has one entry a tensor, or a row, into what belongs to each vector, or tensor."""
        ends = accumulate(self.counts)
        sequence: Any = values
        return [sequence[end - n : end] for end, n in zip(ends, self.counts, strict=True)]

    def _operand(self, values: list[float]) -> float | Tensor:
        if len(set(values)) == 1:
            return values[0]
        device = _local(self.tensors[0]).device
        # non_blocking: a copy that waits would stall the host
        return torch.tensor(values, dtype=wide_dtype(device)).to(device, non_blocking=True)


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

    Example:
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

    Example:
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

    Example:
        >>> lagrangian_multipliers(torch.tensor([0.1, 0.1]), torch.tensor([9.0, 1.0]), 2.0, rates=0.1)
        tensor([0.3500, 0.0000])
    """
    return (multipliers + 0.5 * rates * (squares - bounds**2)).clamp(min=0)


@torch.no_grad()
def constrain_(
    vectors: ConstrainedVectors,
    state: State,
    bound: Bound,
    *,
    update_rate: float | None = None,
    stepped: Tensor | None = None,
) -> tuple[State, Tensor]:
    """Apply a constraint in place after a step of the optimizer, then let its bound take note of the step.

    Args:
        vectors: The constrained vectors.
        state: `bound.start(norms)`, with zeros as "multiplier" for the Lagrangian, or what the last call returned.
        bound: Where the bounds come from.
        update_rate: Scale of the multipliers' rates, 1 in the paper; None: project instead.
        stepped: Whether the optimizer did step, 0-D, where only the device knows; nothing happens if it did not.

    Returns:
        The state after the step, and the squared norms between the optimizer's step and the constraint.
    """
    squares = vectors.squares()
    bounds = bound.bounds(state)
    after = dict(state)
    if update_rate is None:
        factors = ball_factors(squares, bounds, vectors.margin)
    else:
        rates = update_rate * vectors.rates
        after["multiplier"] = lagrangian_multipliers(state["multiplier"], squares, bounds, rates)
        factors = 1 - after["multiplier"]
    after |= bound.advance(state, squares.sqrt())
    if stepped is not None:
        factors = torch.where(stepped, factors, 1.0)
        after = {key: torch.where(stepped, value, state[key]) for key, value in after.items()}
    vectors.scale_(factors)
    return after, squares


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory, with at least one dimension."""
    local = local_part(tensor)
    return local if local.ndim else local.view(1)


def _row_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared norms of the rows in the local shards, summed over shards that hold parts of the same row."""
    norms = [_row_norms(_local(tensor)) for tensor in tensors]
    joined = torch.cat(norms)
    squares = joined.to(wide_dtype(joined.device)).square()
    # One collective for all tensors whose rows are cut over the same processes.
    cut: dict[ProcessGroup, list[Tensor]] = {}
    for part, tensor in zip(torch.split_with_sizes(squares, list(map(len, norms))), tensors, strict=True):
        sharded: Any = tensor
        for dim, placement in enumerate(getattr(sharded, "placements", ())):
            if getattr(placement, "dim", 0) != 0:
                cut.setdefault(sharded.device_mesh.get_group(dim), []).append(part)
    for group, parts in cut.items():
        sums = torch.cat(parts)
        dist.all_reduce(sums, group=group)
        torch._foreach_copy_(parts, torch.split_with_sizes(sums, list(map(len, parts))))
    return squares


def _row_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each row of a plain tensor."""
    if tensor.ndim == 1:
        return tensor.abs()
    dtype = at_least_fp32(tensor)
    length = tensor[:1].numel()
    if length <= ROW:
        norms: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), dtype=dtype)
        return norms
    # In the order of memory, so that a row of any dense layout is one line of it.
    lines = tensor.permute(0, *sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)).flatten(1)
    whole = length - length % ROW
    chunks = torch.linalg.vector_norm(torch.unflatten(lines[:, :whole], 1, (-1, ROW)), dim=2, dtype=dtype)
    rest = torch.linalg.vector_norm(lines[:, whole:], dim=1, keepdim=True, dtype=dtype)
    return torch.cat([chunks, rest], 1).to(wide_dtype(tensor.device)).square().sum(1).sqrt()
