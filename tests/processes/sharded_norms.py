"""Norms in two processes: writes what each process finds, and what it should, as JSON."""

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_l2.monitor import NormOptions, NormTracker
from lightning_l2.norms import squared_norms
from lightning_l2.sharding import flat_shards


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))


def whole(module):
    return [p.detach().double().square().sum().item() for p in module.parameters()]


def measure(tensors, shards=None):
    """Squared norms, and how many collectives they took."""
    with CommDebugMode() as communication:
        squares = squared_norms(tensors, shards)
    return squares.tolist(), communication.get_total_counts()


def fsdp1(strategy, use_orig_params=True):
    model = net()
    ignored = model[3].weight
    options = {"device_id": torch.device("cpu"), "sharding_strategy": strategy, "use_orig_params": use_orig_params}
    model[0] = FullyShardedDataParallel(model[0], **options)
    return FullyShardedDataParallel(model, ignored_states=[ignored] if use_orig_params else None, **options)


def of_fsdp1(strategy, use_orig_params=True):
    model = fsdp1(strategy, use_orig_params)
    shards = flat_shards(model)
    parameters = list(model.parameters())
    found, count = measure(parameters, [shards.get(id(p)) for p in parameters])
    return (found, whole(net()), count) if use_orig_params else ([sum(found)], [sum(whole(net()))], count)


def of_fsdp2():
    model = net()
    for module in (model[0], model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    x = torch.ones(2, 7)
    model(x).sum().backward()
    plain = net()
    plain(x).sum().backward()
    expected = whole(net()) + [p.grad.double().square().sum().item() for p in plain.parameters()]
    return *measure([*model.parameters(), *(p.grad for p in model.parameters())])[:1], expected, 1


OPTIONS = {"rms": True, "gradients": True, "updates": True, "rotation": True, "initial_ratio": True}


def track(model, root=None):
    """Three steps of SGD, all that the tracker says of the last, and the collectives of its fetch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.2)
    tracker = NormTracker(NormOptions(per="total", **OPTIONS), {})
    with torch.no_grad():  # as a validation does, after which FSDP2's outermost module keeps whole parameters
        (root or model)(torch.ones(2, 7))
    for step in range(3):
        tracker.begin(step, model, [optimizer], root, step)
        optimizer.zero_grad()
        before = flat(model)
        (root or model)(torch.full((2, 7), 0.1 * step)).square().sum().backward()
        tracker.before_clipping(0, optimizer)
        optimizer.step()
        with CommDebugMode() as communication:
            metrics = tracker.observe().metrics
    return metrics, communication.get_total_counts(), (before, flat(model))


def flat(model):
    return torch.cat(
        [p.detach().double().flatten() for p in model.parameters() if not isinstance(p, DTensor)] or [torch.ones(1)]
    )


def tracked():
    """The same by one process, DDP, FSDP1 and FSDP2."""
    single, count, (before, after) = track(net())
    closed = {
        "l2_rms/total": before.square().mean().sqrt().item(),
        "update_rms/total": (after - before).square().mean().sqrt().item(),
        "l2_norm/total": before.norm().item(),
    }
    found = {"tracked": ([single[key] for key in closed], list(closed.values()), count + 1)}
    sharded, mesh = net(), init_device_mesh("cpu", (2,))
    for module in (sharded[0], sharded):
        fully_shard(module, mesh=mesh)
    flat = fsdp1(ShardingStrategy.FULL_SHARD)
    replicated = nn.parallel.DistributedDataParallel(net())
    for name, model, root in (
        ("fsdp2", sharded, None),
        ("fsdp1", flat.module, flat),
        ("ddp", replicated.module, replicated),
    ):
        metrics, count, _ = track(model, root)
        assert metrics.keys() == single.keys(), (metrics.keys(), single.keys())
        found[f"tracked {name}"] = list(metrics.values()), list(single.values()), count + (name == "ddp")
    return found


def work(rank, folder):
    dist.init_process_group("gloo")
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    big = torch.randn(300, 1001, generator=torch.Generator().manual_seed(0))
    expected = big.double().square().sum().item()
    cases = {"whole": ([big], [expected])}
    cases["rows"] = [distribute_tensor(big, line, [Shard(0)])], [expected]
    cases["columns"] = [distribute_tensor(big, line, [Shard(1)])], [expected]
    cases["uneven"] = [distribute_tensor(big[:1], line, [Shard(0)])], [big[0].double().square().sum().item()]
    cases["half"] = [distribute_tensor(big.half(), line, [Shard(0)])], [big.half().double().square().sum().item()]
    cases["replicated"] = [distribute_tensor(big, line, [Replicate()])], [expected]
    cases["hybrid"] = [distribute_tensor(big, square, [Replicate(), Shard(0)])], [expected]
    cases["mesh"] = [distribute_tensor(big, square, [Shard(1), Shard(0)])], [expected]
    cases["partial"] = [DTensor.from_local(big / 2, line, [Partial()])], [expected]
    mixed = [big, distribute_tensor(big, line, [Shard(0)]), torch.ones(2), distribute_tensor(big, line, [Replicate()])]
    cases["mixed"] = [*mixed, distribute_tensor(big[:3], line, [Shard(1)])], [expected, expected, 2.0, expected]
    cases["mixed"][1].append(big[:3].double().square().sum().item())
    found = {}
    for name, (tensors, squares) in cases.items():
        measured, count = measure(tensors)
        found[name] = measured, squares, count
    found["fsdp1"] = of_fsdp1(ShardingStrategy.FULL_SHARD)
    found["fsdp1 flat"] = of_fsdp1(ShardingStrategy.FULL_SHARD, use_orig_params=False)
    replicated = of_fsdp1(ShardingStrategy.NO_SHARD)
    found["replicated fsdp1"] = *replicated[:2], replicated[2] + 1
    found["fsdp2"] = of_fsdp2()
    found |= tracked()
    (folder / f"{rank}.json").write_text(json.dumps(found))
