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

    groups: dict[int, ProcessGroup] = {}
    for wrapped in FullyShardedDataParallel.fsdp_modules(module):
        if wrapped.sharding_strategy != ShardingStrategy.NO_SHARD:
            for parameter in wrapped.parameters():
                # parameters in `ignored_states` are whole
                if is_flat_piece(parameter) and wrapped.process_group is not None:
                    groups[id(parameter)] = wrapped.process_group
    return groups


def is_flat_piece(tensor: Tensor) -> bool:
    """Return whether FSDP1 has put a parameter, or a piece of it, into a flat one; `flat_shards` tells which is which.

    >>> is_flat_piece(torch.ones(2))
    False
    """
    return bool(getattr(tensor, "_fsdp_flattened", False))  # torch's own mark, which has no public name


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


def _is_dtensor(tensor: Tensor) -> bool:
    # No import of torch.distributed.tensor, which takes a second, for a run that has no DTensors.
    return hasattr(tensor, "placements")
