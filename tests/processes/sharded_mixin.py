"""Measure a module under FSDP1 in two processes, which write norms and penalties as JSON."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_l2.mixin import WeightDecayMixin


class Net(WeightDecayMixin, pl.LightningModule):
    weight_decay = 0.2

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 3)


def fsdp1(module):
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def work(rank, folder):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Net()
    found = {"whole": [float(model.l2_norm()), float(model.l2_penalty())]}
    model.body = fsdp1(model.body)
    # as a strategy does it: the module is wrapped itself, and knows of it through its Trainer only
    model.trainer = SimpleNamespace(strategy=SimpleNamespace(model=fsdp1(model)), callbacks=[])
    found["sharded"] = [float(model.l2_norm()), float(model.l2_penalty())]
    found["groups"] = [[group["name"], len(group["params"])] for group in model.decay_param_groups()]
    (folder / f"{rank}.json").write_text(json.dumps(found))
