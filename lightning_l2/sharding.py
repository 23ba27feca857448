"""Parts of tensors that are spread over processes: which part is here, and sums over all of them in one collective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch.distributed import ProcessGroup

# Where DeepSpeed's optimizers keep the model's parameters by group: ZeRO-1 and 2, bf16, and fp16 or ZeRO-3.
_MEMBERS = ("bit16_groups", "bf16_groups", "fp16_groups")


def group_members(optimizer: Any) -> list[list[nn.Parameter]]:
    """Return the model's own parameters of each parameter group; DeepSpeed puts flat pieces in their place.

    It has no public record of them. In ZeRO-3 its lists are those of smaller groups.

    >>> group_members(torch.optim.SGD([torch.ones(1)]))
    [[tensor([1.])]]
    """
    if not has_flat_pieces(optimizer):
        return [group["params"] for group in optimizer.param_groups]
    lists = next(getattr(optimizer, name) for name in _MEMBERS if hasattr(optimizer, name))
    place = getattr(optimizer, "sub_group_to_group_id", {})
    members: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    for index, parameters in enumerate(lists):
        members[place.get(index, index)] += parameters
    return members


def has_flat_pieces(optimizer: Any) -> bool:
    """Return whether DeepSpeed has taken an optimizer over, whose groups then hold flat pieces of several parameters.

    >>> has_flat_pieces(torch.optim.SGD([torch.ones(1)]))
    False
    """
    return any(hasattr(optimizer, name) for name in _MEMBERS)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: the shard of a DTensor or of a ZeRO-3 parameter, or the tensor.

    A DTensor that holds unreduced partial sums is reduced first.

    >>> local_part(torch.ones(2))
    tensor([1., 1.])
    """
    if is_zero3(tensor):
        return _zero3_piece(tensor)
    if not _is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes, by a collective of its own, and any other as it is.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    if is_zero3(tensor):
        return _zero3_whole(tensor)
    if not _is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def gradient_of(param: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, distributed over the processes as the parameter is; None without one.

    Tensor parallelism leaves whole gradients of cut parameters, and partial sums.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> weight.sum().backward()
    >>> gradient_of(weight)
    tensor([1., 1.])
    """
    gradient = param.grad
    if gradient is None or not (_is_dtensor(param) and _is_dtensor(gradient)):
        return gradient
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)
    assert isinstance(gradient, DTensor)
    same = gradient.placements == param.placements
    return gradient if same else gradient.redistribute(placements=param.placements)


def process_groups(tensor: Tensor) -> list[ProcessGroup]:
    """Return the process groups a tensor is split over, one a mesh dimension; none for replicated and plain tensors.

    >>> process_groups(torch.ones(2))
    []
    """
    if is_zero3(tensor):
        return [tensor.ds_process_group]  # type: ignore[attr-defined]  # DeepSpeed's
    if not _is_dtensor(tensor):
        return []
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    split = [not (placement.is_replicate() or placement.is_partial()) for placement in tensor.placements]
    return [tensor.device_mesh.get_group(dimension) for dimension, is_split in enumerate(split) if is_split]


def groups_within_rows(tensor: Tensor) -> list[ProcessGroup]:
    """Return the process groups over which rows of a DTensor are cut; none where each row is whole somewhere.

    Args:
        tensor: Any tensor; a row is an index of dimension 0.

    >>> groups_within_rows(torch.ones(2, 2))
    []
    """
    if not _is_dtensor(tensor):
        return []
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    cut = [getattr(placement, "dim", 0) != 0 for placement in tensor.placements]
    return [tensor.device_mesh.get_group(dimension) for dimension, is_cut in enumerate(cut) if is_cut]


def whole_rows(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values of all rows of a tensor from those of the rows that are here, by a collective of its own.

    Args:
        values: One a row of the local part, 1-D.
        tensor: The tensor.

    >>> whole_rows(torch.ones(2), torch.ones(2, 3))
    tensor([1., 1.])
    """
    if not _is_dtensor(tensor):
        return values
    from torch.distributed.tensor import DTensor

    placed = _placements_of_rows(tensor)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]  # of a DTensor
    size = torch.Size([len(tensor)])
    return DTensor.from_local(values, mesh, placed, run_check=False, shape=size, stride=(1,)).full_tensor()


def local_rows(values: Tensor, tensor: Tensor) -> Tensor:
    """Return of values of all rows of a tensor those of the rows that are here.

    Args:
        values: One a row, 1-D, the same in all processes.
        tensor: The tensor.

    >>> local_rows(torch.ones(2), torch.ones(2, 3))
    tensor([1., 1.])
    """
    if not _is_dtensor(tensor):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]  # of a DTensor
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=_placements_of_rows(tensor)).to_local()


def sum_over_shards(
    sums: Tensor, tensors: Sequence[Tensor], shards: Sequence[ProcessGroup | None] | None = None
) -> Tensor:
    """Add up, over the processes that share a tensor, the sums each made over its part: one collective for all.

    Tensors that are split over several mesh dimensions need one collective a dimension.

    Args:
        sums: One a tensor in the last dimension.
        tensors: The tensors the sums were made over.
        shards: The process group of each plain tensor that is a part of a larger one, else None.

    Returns:
        `sums`, unchanged where nothing is sharded.

    >>> sum_over_shards(torch.tensor([2.0]), [torch.ones(2)])
    tensor([2.])
    """
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    members: dict[ProcessGroup, list[int]] = {}
    for index, tensor in enumerate(tensors):
        group = shards[index] if shards is not None else None
        for process_group in [group] if group is not None else process_groups(tensor):
            members.setdefault(process_group, []).append(index)
    for process_group, indices in members.items():
        if len(indices) == sums.shape[-1]:
            dist.all_reduce(sums, group=process_group)
        else:
            places = torch.tensor(indices).to(sums.device, non_blocking=True)
            part = sums[..., places]
            dist.all_reduce(part, group=process_group)
            sums[..., places] = part
    return sums


def flat_shards(module: nn.Module) -> dict[int, ProcessGroup]:
    """Find the parameters that FSDP1 has cut into flat pieces, which nothing about the tensors themselves tells.

    Args:
        module: The outermost `FullyShardedDataParallel` module or one around it.

    Returns:
        The process group that each such parameter is spread over, by the parameter's `id`.

    >>> flat_shards(nn.Linear(2, 2))
    {}
    """
    if not dist.is_available() or not dist.is_initialized():
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    groups: dict[int, ProcessGroup | None] = {}
    for wrapped in FullyShardedDataParallel.fsdp_modules(module):  # outer ones first, and the innermost decides
        is_cut = wrapped.sharding_strategy != ShardingStrategy.NO_SHARD
        # parameters in `ignored_states` are whole
        pieces = filter(is_flat_piece, wrapped.parameters())
        groups |= {id(parameter): wrapped.process_group if is_cut else None for parameter in pieces}
    return {key: group for key, group in groups.items() if group is not None}


def is_flat_piece(tensor: Tensor) -> bool:
    """Return whether FSDP1 has put a parameter, or a piece of it, into a flat one; `flat_shards` tells which is which.

    >>> is_flat_piece(torch.ones(2))
    False
    """
    return bool(getattr(tensor, "_fsdp_flattened", False))  # torch's own mark, which has no public name


def is_flat_parameter(tensor: Tensor) -> bool:
    """Return whether FSDP1 has made one parameter of several (`use_orig_params=False`).

    >>> is_flat_parameter(torch.ones(2))
    False
    """
    return hasattr(tensor, "_param_infos")


def is_fsdp1(module: nn.Module) -> bool:
    """Return whether a module is a `FullyShardedDataParallel`.

    >>> is_fsdp1(nn.Linear(2, 2))
    False
    """
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def shapes_before_flattening(root: nn.Module) -> dict[int, torch.Size]:
    """Return, by `id`, the shapes of parameters of which FSDP1 (`use_orig_params=True`) has made flat pieces.

    It has no public record of them, only the private lists of its flat parameter.

    Args:
        root: The outermost module.

    >>> shapes_before_flattening(nn.Linear(2, 2))
    {}
    """
    shapes: dict[int, torch.Size] = {}
    for module in filter(is_fsdp1, root.modules()):
        flat: Any = getattr(module, "_flat_param", None)
        if flat is not None and flat._params is not None:
            shapes.update({id(p): shape for p, shape in zip(flat._params, flat._shapes, strict=True)})
    return shapes


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a parameter is spread over processes, or a piece of it.

    >>> is_sharded(torch.ones(2))
    False
    """
    return is_flat_piece(tensor) or bool(process_groups(tensor)) or _is_dtensor(tensor)


def show_shards(module: nn.Module) -> None:
    """Let a module that FSDP2 sharded have its shards as parameters again; these are what the optimizer has.

    After a forward without a backward, such as a validation's, the outermost sharded module still has whole parameters.

    Args:
        module: The outermost module, or one around it.

    >>> show_shards(nn.Linear(2, 2))
    """
    if dist.is_available() and dist.is_initialized():
        for part in module.modules():
            if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
                part.reshard()  # type: ignore[operator]  # of that class


def is_zero3(tensor: Tensor) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has cut a parameter, which then looks empty between its uses.

    >>> is_zero3(torch.ones(2))
    False
    """
    return hasattr(tensor, "ds_tensor")


def _zero3_piece(parameter: Any) -> Tensor:
    """Return this process's piece without the padding of the last one, whose numbers mean nothing."""
    piece: Tensor = parameter.ds_tensor.detach()
    start = piece.numel() * dist.get_rank(parameter.ds_process_group)
    return piece[: max(0, parameter.ds_numel - start)]


def _zero3_whole(parameter: Any) -> Tensor:
    pieces = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size(parameter.ds_process_group))]
    dist.all_gather(pieces, parameter.ds_tensor.detach(), group=parameter.ds_process_group)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def _placements_of_rows(tensor: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate

    # a Partial has no dimension either
    return [placement if getattr(placement, "dim", None) == 0 else Replicate() for placement in tensor.placements]


def _is_dtensor(tensor: Tensor) -> bool:
    # No import of torch.distributed.tensor, which takes a second, for a run that has no DTensors.
    return hasattr(tensor, "placements")
