"""Inner products of many pairs of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_l2.norms.layout import BLOCK, at_least_fp32, block_size, blocks, in_order, plain_part, wide_dtype

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

SMALL = 16_384  # elements up to which pairs of one shape share a call


@torch.no_grad()
def local_inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    r"""Compute $\sum_i a_i b_i$ over what this process holds of each pair of tensors of one shape.

    The error is below 1e-6 of $\|a\| \|b\|$. Products of fp32 elements beyond 3e38 overflow, and below 1e-38 they lose
    digits. No temporary exceeds 2 MiB on a CPU.

    Args:
        left: Tensors of any dtype; of complex ones the real part of $\bar{a}_i b_i$ counts.
        right: As many, of the same shapes, each of any dtype.

    Returns:
        Shape `(len(left),)`, float64 (float32 on devices without it).

    Raises:
        ValueError: If the shapes of a pair differ.

    >>> local_inner_products([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
    tensor([11.], dtype=torch.float64)
    """
    pairs = [_plain_pair(a, b) for a, b in zip(left, right, strict=True)]
    together: dict[Hashable, list[int]] = {}
    for index, (a, b) in enumerate(pairs):
        alike = (a.dtype, b.dtype, a.device, a.shape) if a.numel() <= SMALL else index
        together.setdefault(alike, []).append(index)
    products = []
    for indices in together.values():
        lefts, rights = zip(*(pairs[index] for index in indices), strict=True)
        products.append(_stacked_products(lefts, rights) if len(indices) > 1 else _inner_product(*pairs[indices[0]]))
    order = [index for indices in together.values() for index in indices]
    return in_order(products, None if order == sorted(order) else order)


def _plain_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_complex() != b.is_complex():
        a, b = (tensor.to(torch.promote_types(a.dtype, b.dtype)) for tensor in (a, b))
    a, b = (plain_part(tensor.to_dense() if tensor.is_sparse else tensor) for tensor in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"Expected `right` to have the shapes of `left`, got {tuple(b.shape)} for {tuple(a.shape)}.")
    return a, b


def _stacked_products(lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Tensor:
    """Multiply small tensors of one shape, several by one call, in reused memory."""
    count = max(1, min(len(lefts), BLOCK // max(1, lefts[0].numel())))
    left, right = (torch.empty(count, *t.shape, dtype=t.dtype, device=t.device) for t in (lefts[0], rights[0]))
    dtype = _common_dtype(left, right)
    products = []
    for start in range(0, len(lefts), count):
        stop = min(start + count, len(lefts))
        x = torch.stack(lefts[start:stop], out=left[: stop - start]).to(dtype)
        y = torch.stack(rights[start:stop], out=right[: stop - start])
        products.append(x.mul_(y).unsqueeze(-1).flatten(1).sum(1))  # scalars too have a dimension to sum over then
    return torch.cat(products)


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    dtype, wide = _common_dtype(a, b), wide_dtype(a.device)
    sums = [(x.to(dtype) * y).sum().to(wide) for x, y in _paired_blocks(a, b)]
    return torch.stack(sums).sum().view(1)


def _common_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(at_least_fp32(a), at_least_fp32(b))


def _paired_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of one shape into views of the same elements, whatever their layouts."""
    if a.stride() == b.stride():
        yield from zip(blocks(a), blocks(b), strict=True)
    elif a.numel() <= block_size(a):
        yield a, b
    else:
        longest = max(range(a.ndim), key=a.size)
        for x, y in zip(a.chunk(2, longest), b.chunk(2, longest), strict=True):
            yield from _paired_blocks(x, y)
