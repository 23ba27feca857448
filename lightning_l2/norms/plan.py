"""Which tensors of a list are measured by the same calls: decided once for all lists of the same shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_l2.norms.layout import BLOCK
from lightning_l2.sharding import is_zero3

# Each element that is added to a sum of fp32 squares may cost 2^-24 of it. On an x86 CPU, which keeps 8 sums side by
# side, a row of 128 gives 16 elements to each, so that its norm is off by less than 8e-7 whatever they are; rows of
# 256 and 512 are off by 1.1e-6 and 1.8e-6 where one element outweighs the others. Row norms' squares add up in float64.
ROW = 128
LONG, SHORT = 32, 8  # fewest elements in a row of what is measured in its place, and of what is copied
CELL = 64  # elements in a row of what is filled up with zeros
SMALL = 8_192  # elements up to which a call costs more than a copy, so that tensors share calls
FEW = 8  # fewest tensors alike that are worth calls of their own
PACK = 32_768  # elements that small tensors are copied by: more would need two threads, and leave a core's cache
PORTION = 2**24  # elements whose row norms are kept at a time, in 1.5 MiB

_FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_QUANTIZED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))
_USUAL = frozenset((Tensor, nn.Parameter))

# All that decides how a plain tensor is measured; None for any other.
Kind: TypeAlias = tuple[torch.dtype, torch.device, torch.Size, bool] | None
Way = Literal["packed", "in rows", "in blocks", "by foreach", "empty", "without data", "unusual"]


class Group(NamedTuple):
    """Tensors that are measured by the same calls, in rows of their own or joined one behind the other."""

    way: Way
    indices: list[int]
    rows: list[int] | int = 0  # of each tensor; a number where all have as many
    cell: int = ROW  # elements in a row
    most: int = 0  # elements of the largest tensor
    shape: tuple[int, ...] = ()  # of joined tensors from the second dimension on
    flattened: Sequence[int] = ()  # places in `indices` of what is to be joined as 1-D and isn't
    filled: Sequence[int] = ()  # zeros behind each joined tensor
    packs: Sequence[tuple[slice, int]] = ()  # what of `indices` is joined at a time, and its number of rows


class Plan(NamedTuple):
    """How a list of tensors is measured, in numbers that hold nothing of the tensors."""

    groups: list[Group]
    order: list[int] | None  # the place of each result, unless that is where it comes


KEPT = 32  # plans; `functools.lru_cache` would warn in a function that torch compiles
_decided: dict[tuple[Kind, ...], Plan] = {}


def kinds(tensors: Sequence[Tensor], plain: bool = False) -> tuple[Kind, ...]:
    """Return what decides how tensors are measured.

    Args:
        tensors: Any tensors.
        plain: Whether they are known to be plain, whatever their classes.

    >>> kinds([torch.zeros(2), torch.eye(2).to_sparse()])
    ((torch.float32, device(type='cpu'), torch.Size([2]), True), None)
    """
    strided = torch.strided
    return tuple(
        [
            (tensor.dtype, tensor.device, tensor.shape, tensor.is_contiguous())
            if plain or (type(tensor) in _USUAL and tensor.layout is strided and not is_zero3(tensor))
            else None
            for tensor in tensors
        ]
    )


def plan(of: tuple[Kind, ...]) -> Plan:
    """Return how tensors of these kinds are measured; what was decided lately is kept.

    >>> [(group.way, group.indices) for group in plan(kinds([torch.ones(3), torch.ones(256, 256), torch.ones(4)]))[0]]
    [('in rows', [1]), ('packed', [0, 2])]
    """
    found = _decided.get(of)
    if found is None:
        if len(_decided) >= KEPT:
            _decided.pop(next(iter(_decided)), None)
        found = _decided[of] = _decide(of)
    return found


def _decide(of: tuple[Kind, ...]) -> Plan:
    sizes = [kind[2].numel() if kind else 0 for kind in of]
    together: dict[tuple[Way, object, object], list[int]] = {}
    for index, kind in enumerate(of):
        together.setdefault(_alike(kind, sizes[index]), []).append(index)
    groups: list[Group] = []
    odd: dict[object, list[int]] = {}
    for (way, dtype, shape), indices in together.items():
        cell = _cell([sizes[index] for index in indices])
        if way == "in rows":
            groups += [
                Group(way, part, _counts([sizes[index] // cell for index in part]), cell, max(sizes[i] for i in part))
                for part in _portions(indices, sizes, cell)
            ]
        elif way != "packed":
            groups.append(Group(way, indices, most=max(sizes[index] for index in indices)))
        elif isinstance(shape, tuple) and len(indices) >= FEW and cell:
            groups += _packed(indices, sizes, cell, shape[1:], indices)
        else:
            odd.setdefault(dtype, []).extend(indices)
    for indices in odd.values():
        joinable = {index for index, kind in enumerate(of) if kind and len(kind[2]) == 1}
        groups += _packed(indices, sizes, _cell([sizes[index] for index in indices]) or CELL, (), joinable)
    order = [index for group in groups for index in group.indices]
    return Plan(groups, None if order == sorted(order) else order)


def _alike(kind: Kind, size: int) -> tuple[Way, object, object]:
    """Return how a tensor is measured, and what tensors have in common that are measured by the same calls."""
    if kind is None or kind[0].is_complex or kind[0] in _QUANTIZED:
        return "unusual", None, None
    dtype, device, shape, contiguous = kind
    if device.type == "meta":
        return "without data", None, None
    if size == 0:
        return "empty", device, None
    if dtype not in _FLOATS:
        return "in blocks", dtype, device
    if device.type != "cpu":
        return "by foreach", dtype, device
    cell = _cell([size])
    if size <= (SMALL if cell >= LONG else PACK):
        # contiguous tensors that differ in their first dimension alone are joined as they are
        return "packed", dtype, (shape if len(shape) == 1 else (0, *shape[1:])) if contiguous and shape else None
    in_rows = contiguous and cell >= LONG and size <= (PORTION if dtype in (torch.float32, torch.float64) else BLOCK)
    return ("in rows", dtype, cell) if in_rows else ("in blocks", dtype, device)


def _packed(
    indices: list[int], sizes: list[int], cell: int, shape: tuple[int, ...], joinable: Container[int]
) -> Iterator[Group]:
    """Join small tensors one behind the other so that no two share a row."""
    for part in _portions(indices, sizes, cell):
        rows = [-(-sizes[index] // cell) for index in part]
        filled = [-sizes[index] % cell for index in part]
        packs, start, total = [], 0, 0
        for place, count in enumerate([*rows, PACK]):
            if place > start and (total + count) * cell > PACK:
                packs.append((slice(start, place), total))
                start, total = place, 0
            total += count
        flattened = [place for place, index in enumerate(part) if index not in joinable]
        most = max(sizes[index] for index in part)
        yield Group("packed", part, _counts(rows), cell, most, shape, flattened, filled if any(filled) else (), packs)


def _cell(sizes: list[int]) -> int:
    """Return the most elements of a row that all of the tensors consist of, 0 where that is too few."""
    common = math.gcd(*sizes)
    cell = next((divisor for divisor in range(ROW, 0, -1) if common % divisor == 0), 0)
    return cell if cell >= SHORT or {cell} == set(sizes) else 0


def _counts(rows: list[int]) -> list[int] | int:
    return rows[0] if len(set(rows)) == 1 else rows


def _portions(indices: list[int], sizes: list[int], cell: int) -> Iterator[list[int]]:
    """Cut a list where so many rows come together that their norms take more than 1.5 MiB."""
    part: list[int] = []
    total = 0
    for index in indices:
        if part and total + sizes[index] > PORTION // ROW * cell:
            yield part
            part, total = [], 0
        part.append(index)
        total += sizes[index]
    yield part
