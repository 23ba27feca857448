"""Inner products of many pairs of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_l2.norms.layout import BLOCK, at_least_fp32, blocks, in_order, plain_part, wide_dtype

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

SMALL = 16_384  # elements up to which pairs of one shape share a call


@torch.no_grad()
def local_inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    r"""Compute $\sum_i a_i b_i$ over what this process holds of each pair of tensors of one shape.

    Args:
        left: Tensors of any floating dtype.
        right: As many, of the same shapes.

    Returns:
        Shape `(len(left),)`, float64 (float32 on devices without it).

    >>> local_inner_products([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
    tensor([11.], dtype=torch.float64)
    """
    pairs = list(zip(map(plain_part, left), map(plain_part, right), strict=True))
    together: dict[Hashable, list[int]] = {}
    for index, (a, b) in enumerate(pairs):
        together.setdefault((a.dtype, b.dtype, a.device, a.shape) if a.numel() <= SMALL else index, []).append(index)
    products = []
    for indices in together.values():
        lefts, rights = zip(*(pairs[index] for index in indices), strict=True)
        products.append(_stacked_products(lefts, rights) if len(indices) > 1 else _inner_product(*pairs[indices[0]]))
    return in_order(products, [index for indices in together.values() for index in indices])


def _stacked_products(lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Tensor:
    """Multiply small tensors of one shape, several by one call, in reused memory."""
    count = max(1, min(len(lefts), BLOCK // max(1, lefts[0].numel())))
    left, right = (torch.empty(count, *t.shape, dtype=t.dtype, device=t.device) for t in (lefts[0], rights[0]))
    products = []
    for start in range(0, len(lefts), count):
        stop = min(start + count, len(lefts))
        x = torch.stack(lefts[start:stop], out=left[: stop - start])
        y = torch.stack(rights[start:stop], out=right[: stop - start])
        x = x.mul_(y) if x.dtype == at_least_fp32(x) else x.float().mul_(y)
        products.append(x.unsqueeze(-1).flatten(1).sum(1))  # scalars too have a dimension to sum over then
    return torch.cat(products)


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    if a.stride() != b.stride():
        a, b = a.contiguous(), b.contiguous()
    dtype, wide = at_least_fp32(a), wide_dtype(a.device)
    sums = [(x.to(dtype) * y).sum().to(wide) for x, y in zip(blocks(a), blocks(b), strict=True)]
    return torch.stack(sums).sum().view(1)
