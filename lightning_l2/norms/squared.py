"""L2 norms of parameters: accurate in every dtype, at the memory's speed, global for sharded tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_l2.norms.layout import at_least_fp32, block_size, blocks, in_order, memory_order, plain_part, wide_dtype
from lightning_l2.norms.plan import PACK, ROW, Group, kinds, plan
from lightning_l2.sharding import sum_over_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Mean square below which those of some elements may have lost digits of fp32, or are flushed to 0.
SMALLEST_SQUARE = 1e-32

_vector_norm = torch.linalg.vector_norm


@torch.no_grad()
def l2_norms(named_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Compute the L2 norm of each tensor, $\|w\|_2 = \sqrt{\sum_i w_i^2}$.

    Args:
        named_tensors: Tensors by name, as `squared_norms` takes them.

    Returns:
        One norm a name, shape `()`, float64 (float32 on devices without it). Nothing is copied to the host.

    >>> l2_norms({"weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "empty": torch.zeros(0)})
    {'weight': tensor(5., dtype=torch.float64), 'empty': tensor(0., dtype=torch.float64)}
    """
    norms = squared_norms(list(named_tensors.values())).sqrt_()
    return dict(zip(named_tensors, norms.unbind(), strict=True))


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor], shards: Sequence[ProcessGroup | None] | None = None) -> Tensor:
    r"""Compute the sum of squares of each tensor, $\sum_i w_i^2$, with one collective for all sharded ones.

    The relative error of the norm is below 1e-6 for any elements in fp32, bf16 and fp16, on a CPU up to the ends of
    their range: what leaves that of fp32 squares is measured again in float64. On an accelerator, where asking would
    wait for it, squares of elements beyond 1.8e19 are infinite, and elements below 1e-19 lose digits, to 0 from 1e-23
    on. So do, everywhere, elements of float64 beyond 1.3e154 and below 1e-154. No temporary exceeds 2 MiB on a CPU.

    Args:
        tensors: Tensors of any shape, dtype, memory layout and device, sparse ones included. A DTensor counts as the
            whole tensor that it is a part of, an empty tensor gives 0, one without data (meta, a lazy parameter) NaN.
        shards: For plain tensors that are parts of larger ones, as FSDP1's are with `use_orig_params=True`, the
            process group they are spread over (see `sharding.flat_shards`), else None; one an entry of `tensors`.

    Returns:
        Shape `(len(tensors),)`, float64 (float32 on devices without it), on the first accelerator among the tensors'
        devices. Nothing is copied to the host.

    Raises:
        TypeError: If a tensor is quantized, nested or one of MKL-DNN.

    >>> squared_norms([torch.ones(8, 8), torch.tensor([3.0, 4.0], dtype=torch.bfloat16)])
    tensor([64., 25.], dtype=torch.float64)
    """
    return sum_over_shards(local_squared_norms(tensors), tensors, shards)


@torch.no_grad()
def local_squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the sums of squares of what this process holds of each tensor; see `squared_norms`.

    >>> local_squared_norms([torch.ones(2, 2)])
    tensor([4.], dtype=torch.float64)
    """
    return _measured(tensors)


def _measured(tensors: Sequence[Tensor], plain: bool = False) -> Tensor:
    try:
        groups, order = plan(kinds(tensors, plain))
    except RuntimeError:  # a nested tensor has no shape to tell
        for tensor in tensors:
            plain_part(tensor)
        raise
    return in_order([_of_group(group, [tensors[index] for index in group.indices]) for group in groups], order)


def _of_group(group: Group, tensors: list[Tensor]) -> Tensor:
    match group.way:
        case "packed":
            return _seen_again(_packed(group, tensors), group, tensors)
        case "in rows":
            return _seen_again(_in_rows(group, tensors), group, tensors)
        case "in blocks":
            return _seen_again(torch.stack([_in_blocks(t, at_least_fp32(t)) for t in tensors]), group, tensors)
        case "by foreach":
            return _squares(torch.stack(torch._foreach_norm(tensors, 2.0, at_least_fp32(tensors[0]))))
        case "empty":
            return torch.zeros(len(tensors), device=tensors[0].device)
        case "without data":
            return torch.full((len(tensors),), torch.nan)
        case "unusual":  # sharded, sparse, complex, lazy
            return _measured([plain_part(tensor) for tensor in tensors], plain=True)


def _packed(group: Group, tensors: list[Tensor]) -> Tensor:
    """Measure small tensors copied one behind the other, by short rows (cells) that no two tensors share."""
    first, tensors = tensors[0], list(tensors)
    for place in group.flattened:
        tensors[place] = tensors[place].reshape(-1)
    dtype = at_least_fp32(first)
    buffer = joined = torch.empty(max(rows for _, rows in group.packs), group.cell, dtype=first.dtype)
    out = joined.view(-1, *group.shape)
    norms = []
    for pack, rows in group.packs:
        if rows != len(joined):
            joined = buffer[:rows]
            out = joined.view(-1, *group.shape)
        torch.cat(_filled(tensors[pack], group.filled[pack]), out=out)
        norms.append(_vector_norm(joined, 2.0, 1, dtype=dtype))
    return _sums(torch.cat(norms), group)


def _filled(tensors: list[Tensor], rests: Sequence[int]) -> list[Tensor]:
    """Return tensors with so many zeros behind each."""
    if not rests:
        return tensors
    zeros = torch.zeros(max(rests), dtype=tensors[0].dtype)
    fillings = {rest: zeros[:rest] for rest in set(rests)}
    # no empty ones, which would make joining five times slower
    pairs = zip(tensors, rests, strict=True)
    return [part for tensor, rest in pairs for part in ((tensor, fillings[rest]) if rest else (tensor,))]


def _in_rows(group: Group, tensors: list[Tensor]) -> Tensor:
    """Measure contiguous tensors where they lie."""
    dtype = at_least_fp32(tensors[0])
    return _sums(torch.cat([_vector_norm(t.view(-1, group.cell), 2.0, 1, dtype=dtype) for t in tensors]), group)


def _in_blocks(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Measure a tensor of any size and layout block by block, each in `dtype`."""
    as_it_lies = tensor.dtype == dtype and memory_order(tensor) is not None
    buffer = torch.empty(
        0 if as_it_lies else min(tensor.numel(), block_size(tensor)), dtype=dtype, device=tensor.device
    )
    norms = []
    for block in blocks(tensor, 16 if as_it_lies else 1):
        flat = block if as_it_lies else _copied(block, buffer[: block.numel()])
        whole = flat.numel() - flat.numel() % ROW
        rows = _vector_norm(flat[:whole].view(-1, ROW), 2.0, 1)
        rest = _vector_norm(flat[whole:], 2.0, 0, keepdim=True)
        norms.append(_vector_norm(torch.cat([rows, rest]), dtype=wide_dtype(tensor.device)))
    return torch.stack(norms).square_().sum()


def _copied(block: Tensor, to: Tensor) -> Tensor:
    to.view(block.shape).copy_(block)
    return to


def _sums(norms: Tensor, group: Group) -> Tensor:
    """Return the sums of the squares of each tensor's row norms."""
    squares = _squares(norms)
    if isinstance(group.rows, int):
        return squares if group.rows == 1 else squares.view(-1, group.rows).sum(1)
    sums: Tensor = torch.segment_reduce(squares, "sum", lengths=torch.tensor(group.rows))
    return sums


def _squares(norms: Tensor) -> Tensor:
    return norms.to(wide_dtype(norms.device), copy=True).square_()


def _seen_again(squares: Tensor, group: Group, tensors: list[Tensor]) -> Tensor:
    """Measure again, in float64, tensors on the host whose squares left the range of fp32."""
    if not squares.is_cpu or tensors[0].dtype == torch.float64 or type(squares) is not Tensor:  # it may be a fake one
        return squares
    floor = SMALLEST_SQUARE * group.most
    low, high = map(float, torch.aminmax(squares))
    if not (low > floor and high < math.inf):  # nor if they are NaN
        places = ((squares <= floor) | (squares == math.inf)).nonzero().view(-1).tolist()
        small = [place for place in places if tensors[place].numel() <= PACK]
        if small:  # of which whole copies in float64 do no harm
            norms = torch._foreach_norm([tensors[place] for place in small], 2.0, torch.float64)
            squares[small] = torch.stack(norms).square_()
        for place in set(places).difference(small):
            squares[place] = _in_blocks(tensors[place], torch.float64)
    return squares
