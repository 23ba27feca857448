"""Decide on sharded models in two processes: writes what each process decides as JSON."""

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_l2.rules import DecayRule, assign_rules
from lightning_l2.rules.assign import rules_by_parameter
from lightning_l2.rules.parameters import describe_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm((4, 5)))
        self.head = nn.Linear(5, 2, bias=False)
        self.head.weight.requires_grad_(True)


def decisions(model, root=None):
    ndims = {info.name: info.ndim for info in describe_parameters(model, root)}
    return {name: [rule.name, ndims[name]] for name, rule in assign_rules(model, root=root).items()}


def fsdp1(use_orig_params):
    def wrap(module):
        return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    net = Net()
    net.layers = wrap(net.layers)
    return wrap(net)


def work(rank, folder):
    dist.init_process_group("gloo")
    found = {"whole": decisions(Net()), "ddp": decisions(nn.parallel.DistributedDataParallel(Net()))}
    with_names, flat = fsdp1(True), fsdp1(False)
    found["fsdp1"], found["fsdp1_flat"] = decisions(with_names), decisions(flat)
    found["fsdp1_inner"] = decisions(with_names._fsdp_wrapped_module, root=with_names)
    decided = rules_by_parameter(with_names)
    found["identity"] = [id(p) for _, p, _ in decided] == [id(p) for p in with_names.parameters()]
    try:
        rules_by_parameter(flat)
    except ValueError as error:
        found["mixed"] = str(error)
    found["single"] = [[name, rule.name] for name, _, rule in rules_by_parameter(flat, [DecayRule("all")])]
    try:
        describe_parameters(with_names._fsdp_wrapped_module)
    except RuntimeError as error:
        found["outside"] = str(error)
    net = Net()
    for module in (net.layers, net):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    found["fsdp2"] = decisions(net)
    (folder / f"{rank}.json").write_text(json.dumps(found))
