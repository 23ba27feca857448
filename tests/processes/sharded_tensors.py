"""What each of two processes makes of sharded tensors: written as JSON."""

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.sharding import (
    flat_shards,
    gradient_of,
    groups_within_rows,
    is_flat_parameter,
    is_flat_piece,
    is_sharded,
    local_part,
    local_rows,
    process_groups,
    shapes_before_flattening,
    sum_over_shards,
    whole,
    whole_rows,
)

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}


def describe(tensor):
    rows = torch.arange(5.0)
    mine = local_rows(rows, tensor)
    return {
        "local": local_part(tensor).tolist(),
        "whole": whole(tensor).tolist(),
        "local_rows": mine.tolist(),
        "whole_rows": whole_rows(mine, tensor).tolist(),
        "groups": len(process_groups(tensor)),
        "within_rows": len(groups_within_rows(tensor)),
        "is_sharded": is_sharded(tensor),
        "sum": sum_over_shards(torch.tensor([float(local_part(tensor).numel())]), [tensor]).item(),
    }


def fsdp1(use_orig_params):
    return FullyShardedDataParallel(nn.Linear(4, 5), device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def acts(weight):
    """Whether what is attached acts in a step of lr 0, where a gradient is 0 in one of the processes alone."""
    acted = []

    class Acting(StepHook):
        turn = Turn.MONITOR

        def after_update(self):
            acted.append(True)

    optimizer = torch.optim.SGD([weight], lr=0.0)
    Acting(optimizer, "The test")
    weight.grad = distribute_tensor(torch.eye(5, 4)[:, :1].expand(5, 4).contiguous(), weight.device_mesh, [Shard(0)])
    optimizer.step()
    weight.grad.zero_()
    optimizer.step()
    return acted


def nested():
    """Parameters of whole modules in sharded ones and of sharded ones in whole ones, as they are spread."""
    cut, whole = ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD
    found = []
    for outer, inner in ((cut, whole), (whole, cut)):
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        layers = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
        layers[1] = FullyShardedDataParallel(layers[1], sharding_strategy=inner, **options)
        model = FullyShardedDataParallel(layers, sharding_strategy=outer, **options)
        shards = flat_shards(model)
        found.append([id(parameter) in shards for parameter in model.parameters()])
        sizes = torch.tensor([float(parameter.numel()) for parameter in model.parameters()])
        groups = [shards.get(id(parameter)) for parameter in model.parameters()]
        found.append(sum_over_shards(sizes, list(model.parameters()), groups).tolist())
    return found


def work(rank, folder):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    tensor = torch.tensor([[float(10 * row + column) for column in range(4)] for row in range(5)])
    found = {name: describe(distribute_tensor(tensor, mesh, [how])) for name, how in PLACEMENTS.items()}
    for name, placement in {**PLACEMENTS, "partial": Partial()}.items():
        weight = nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))
        weight.grad = DTensor.from_local(tensor, mesh, [Partial()]).redistribute(placements=[placement])
        found[f"{name} gradient"] = gradient_of(weight).to_local().tolist()
    found["acts"] = acts(nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])))
    pieces = fsdp1(True)
    parameters, shards, shapes = list(pieces.parameters()), flat_shards(pieces), shapes_before_flattening(pieces)
    sizes = torch.tensor([float(p.numel()) for p in parameters])
    found["fsdp1"] = {
        "pieces": list(map(is_flat_piece, parameters)),
        "shapes": [list(shapes[id(p)]) for p in parameters],
        "sum": sum_over_shards(sizes, parameters, [shards[id(p)] for p in parameters]).tolist(),
    }
    found["nested"] = nested()
    flat = fsdp1(False)
    found["flat"] = {"parameters": list(map(is_flat_parameter, flat.parameters())), "spread": len(flat_shards(flat))}
    (folder / f"{rank}.json").write_text(json.dumps(found))
