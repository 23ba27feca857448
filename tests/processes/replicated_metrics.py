"""The metrics in two processes, which save what they find beside what they should."""

import statistics

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from lightning_l2.metrics import L2Norm, L2Penalty, l2_norm, l2_penalty

STATISTICS = {"last": lambda v: v[-1], "mean": statistics.fmean, "min": min, "max": max, "std": statistics.pstdev}
REPLICATED = {"sharding_strategy": ShardingStrategy.NO_SHARD}


def net(scale):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.mul_(scale)
    return layer


def square(scale):
    return sum(p.detach().double().square().sum().item() for p in net(scale).parameters())


def fsdp2(scale):
    model = net(scale)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def fsdp1(scale):
    return FullyShardedDataParallel(net(scale), use_orig_params=True, device_id=torch.device("cpu"))


def penalty_of(model):
    return l2_penalty(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2).param_groups)


def is_refused(call):
    try:
        call()
    except ValueError as error:
        return "FSDP1 has cut the parameters" in str(error)
    return False


def work(rank, folder):
    dist.init_process_group("gloo")
    found = {}
    scales = [1.0, 3.0, 2.0]
    for kind, make in {"replicated": net, "fsdp2": fsdp2, "fsdp1": fsdp1}.items():
        for name, statistic in STATISTICS.items():
            metric = L2Norm(name)
            for scale in scales:
                metric(make(scale))
            found[f"{kind} {name}"] = [metric.compute().item(), statistic([square(s) ** 0.5 for s in scales])]
    metric = L2Penalty()
    for scale in scales:
        metric.update(torch.optim.SGD(fsdp2(scale).parameters(), lr=0.1, weight_decay=0.2).param_groups)
    found["penalty"] = [metric.compute().item(), statistics.fmean(0.1 * square(s) for s in scales)]
    large = np.random.default_rng(0).normal(1e8, 1.0, 1000)
    for name, shares in {"a large norm's std": (20, 980), "std of what one process saw": (1000, 0)}.items():
        metric = L2Norm("std")
        start = shares[0] * rank
        for value in large[start : start + shares[rank]]:
            metric.update(torch.tensor([value], dtype=torch.float64))
        found[name] = [metric.compute().item(), np.std(large).item()]
    for name, cut in {
        "norm": lambda: l2_norm(fsdp1(1.0).parameters()),
        "penalty": lambda: penalty_of(fsdp1(1.0)),
    }.items():
        found[f"fsdp1 {name} without the module"] = [float(is_refused(cut)), 1.0]
    whole = FullyShardedDataParallel(net(1.0), use_orig_params=True, device_id=torch.device("cpu"), **REPLICATED)
    found["replicated fsdp1"] = [l2_norm(whole).item(), square(1.0) ** 0.5]
    torch.save(found, f"{folder}/{rank}.pt")
