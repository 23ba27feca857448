"""Views of tensors in the order of memory and in blocks, the dtypes to add up in, and results put in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_l2.sharding import local_part

if TYPE_CHECKING:
    from collections.abc import Iterator

# by kind of tensor without elements that can be read: the method that returns some with them
READABLE = {"quantized": "dequantize", "nested": "unbind", "mkldnn": "to_dense"}
BLOCK = 262_144  # elements that are worked on at a time: 1 MiB of fp32 stays in a core's cache


def memory_order(tensor: Tensor) -> Tensor | None:
    """View a dense tensor as 1-D in the order of its memory, whatever its strides; None if it has gaps or overlaps.

    >>> memory_order(torch.tensor([[1, 2], [3, 4]]).t())
    tensor([1, 2, 3, 4])
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return tensor.view(-1) if tensor.is_contiguous() else None


def block_size(tensor: Tensor) -> int:
    """Return how many elements of a tensor are worked on at a time.

    >>> block_size(torch.zeros(3))
    262144
    """
    return BLOCK if tensor.is_cpu else 64 * BLOCK


def blocks(tensor: Tensor, dense: int = 1) -> Iterator[Tensor]:
    """Cut a tensor of any layout into views of a size that is worked on in cache (of 64 times that on a GPU).

    Args:
        tensor: A plain tensor.
        dense: How many times larger the views may be where memory has no gaps.

    >>> [block.shape for block in blocks(torch.zeros(1000, 1000)[:, ::2])]
    [torch.Size([500, 500]), torch.Size([500, 500])]
    """
    size = block_size(tensor)
    flat = memory_order(tensor)
    if flat is not None:
        yield from torch.split(flat, dense * size)
    elif tensor.numel() <= size:
        yield tensor
    else:
        for half in tensor.chunk(2, dim=max(range(tensor.ndim), key=tensor.size)):
            yield from blocks(half)


def unreadable(tensor: Tensor) -> str | None:
    """Return "quantized", "nested" or "mkldnn" of a tensor whose elements can't be read, None of any other.

    >>> unreadable(torch.ones(1).to_mkldnn()), unreadable(torch.ones(1))
    ('mkldnn', None)
    """
    return next((kind for kind in READABLE if getattr(tensor, f"is_{kind}")), None)


def plain_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of any kind of tensor as a plain, real one; without data (lazy) on `meta`.

    Raises:
        TypeError: If the tensor is quantized, nested or one of MKL-DNN, which have no elements that can be read.

    >>> plain_part(torch.tensor([3 + 4j]))
    tensor([[3., 4.]])
    """
    if is_lazy(tensor):
        return torch.empty(0, device="meta")
    if kind := unreadable(tensor):
        raise TypeError(
            f"Expected `tensors` to be dense or sparse, got a tensor that is {kind}. Leave it out, or measure what its "
            f"`{READABLE[kind]}()` returns."
        )
    tensor = local_part(tensor)
    if tensor.layout is not torch.strided:
        tensor = (tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor).values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    """Return the dtype to square elements in: fp32, float64 for float64.

    >>> at_least_fp32(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without it.

    >>> wide_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def in_order(numbers: list[Tensor], order: list[int] | None) -> Tensor:
    """Bring numbers together on one device, the one at place i to place `order[i]`, or as they come.

    >>> in_order([torch.ones(2), torch.zeros(1)], [0, 2, 1])
    tensor([1., 0., 1.], dtype=torch.float64)
    """
    if not numbers:
        return torch.zeros(0, dtype=torch.float64)
    devices = [values.device for values in numbers]
    device = next((device for device in devices if device.type != "cpu"), devices[0])
    # non_blocking: a waiting copy to an accelerator would stall the host, and none goes from it to the host
    moved = [values.to(device, wide_dtype(device), non_blocking=True) for values in numbers]
    together = moved[0] if len(moved) == 1 else torch.cat(moved)
    if order is None:
        return together
    places = torch.tensor(order).to(device, non_blocking=True)
    return torch.empty_like(together).index_copy_(0, places, together)
