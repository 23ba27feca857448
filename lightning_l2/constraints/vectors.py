"""The vectors whose L2 norms are bounded: tensors, rows of them or groups of them, measured and scaled together."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_l2.norms.layout import at_least_fp32, wide_dtype
from lightning_l2.norms.plan import ROW
from lightning_l2.norms.squared import squared_norms
from lightning_l2.sharding import groups_within_rows, local_part, sum_over_shards, whole_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

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

    def copied(self) -> ConstrainedVectors:
        """Return vectors of the same values in memory of their own, in fp32 at least."""
        wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in self.tensors]
        copies = [
            tensor.detach().clone() if tensor.dtype == dtype else tensor.detach().to(dtype)
            for tensor, dtype in zip(self.tensors, wide, strict=True)
        ]
        return ConstrainedVectors(copies, self.per, self.counts if self.per == "group" else None, self.shards)

    @torch.no_grad()
    def add_(self, other: ConstrainedVectors, alpha: float = 1.0) -> None:
        """Add others of the same shapes and types, times a number, in place."""
        torch._foreach_add_(list(map(_local, self.tensors)), list(map(_local, other.tensors)), alpha=alpha)

    @torch.no_grad()
    def copy_(self, other: ConstrainedVectors) -> None:
        """Take over the values of others of the same shapes, rounded to the own types."""
        torch._foreach_copy_(list(map(_local, self.tensors)), list(map(_local, other.tensors)))

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
        """The type in which the vectors are scaled: float64 if one of them has that precision, else float32."""
        wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in self.tensors)
        return torch.float64 if wide else torch.float32

    @cached_property
    def margin(self) -> float | Tensor:
        """How far inside the ball, as a fraction of its radius, to aim so that rounding does not leave it.

        Once the rounding of the weights' own type, and six times that of the type their norms are computed in: more
        than norms are off by, and for fp32 less than a millionth.
        """
        margins = [
            torch.finfo(tensor.dtype).eps + 6 * torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
            for tensor in self.tensors
        ]
        return self.operand(margins if self.per == "row" else [max(part) for part in self._parts(margins)])

    @cached_property
    def sizes(self) -> float | Tensor:
        """The numbers of elements of the vectors, at least 1, since a vector may be empty."""
        if self.per == "row":
            return self.operand([max(tensor.shape[1:].numel(), 1.0) for tensor in self.tensors])
        sizes = torch.tensor([float(tensor.numel()) for tensor in self.tensors], dtype=torch.float64)
        if self.shards is not None:
            sizes = sum_over_shards(sizes.to(_local(self.tensors[0]).device), self.tensors, self.shards)
        return self.operand([max(sum(part), 1.0) for part in self._parts(sizes.tolist())])

    @property
    def rates(self) -> float | Tensor:
        r"""The multipliers' rates $\mu = 4 / n$ for n elements.

        CPR's authors bound $\|w\|^2$ instead of half of it, at the rate 1 / n; the 4 turns it into the convention here.
        """
        return 4 / self.sizes

    def operand(self, values: Sequence[float | Tensor]) -> float | Tensor:
        """Return numbers, one a tensor for "row" and one a vector else, as what meets the vectors' norms.

        Numbers on the host that are all equal stay there.
        """
        first = values[0]
        if not any(isinstance(value, Tensor) for value in values) and all(value == first for value in values):
            return first
        device = _local(self.tensors[0]).device
        kind: Any = {"dtype": wide_dtype(device)}
        if any(isinstance(value, Tensor) for value in values):
            joined = torch.stack([torch.as_tensor(value).to(device, **kind).reshape(()) for value in values])
        else:
            # non_blocking: a copy that waits would stall the host
            joined = torch.tensor(values, **kind).to(device, non_blocking=True)
        return torch.cat([joined[i].expand(n) for i, n in enumerate(self.counts)]) if self.per == "row" else joined

    def whole(self, values: Tensor) -> list[Tensor]:
        """Cut what has one entry a vector into tensors: one of all rows for each tensor, from all shards, or a vector.

        For "row" this takes a collective for each sharded tensor.
        """
        if self.per != "row":
            return list(torch.split_with_sizes(values, [1] * len(values)))
        parts = torch.split_with_sizes(values, self.counts)
        return [whole_rows(part, tensor) for part, tensor in zip(parts, self.tensors, strict=True)]

    def _parts(self, values: _T) -> list[_T]:
        """Cut what has one entry a tensor, or a row, into what belongs to each vector, or tensor."""
        ends = accumulate(self.counts)
        sequence: Any = values
        return [sequence[end - n : end] for end, n in zip(ends, self.counts, strict=True)]


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory, real and with at least one dimension."""
    local = local_part(tensor)
    local = local if local.ndim else local.view(1)
    return torch.view_as_real(local) if local.is_complex() else local


def _row_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared norms of the rows in the local shards, summed over shards that hold parts of the same row."""
    norms = [_row_norms(_local(tensor)) for tensor in tensors]
    joined = torch.cat(norms)
    squares = joined.to(wide_dtype(joined.device)).square()
    # One collective for all tensors whose rows are cut over the same processes.
    cut: dict[ProcessGroup, list[Tensor]] = {}
    for part, tensor in zip(torch.split_with_sizes(squares, list(map(len, norms))), tensors, strict=True):
        for group in groups_within_rows(tensor):
            cut.setdefault(group, []).append(part)
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
