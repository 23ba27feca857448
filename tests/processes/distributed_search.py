"""Searches whose trainings run on two processes, started as a script: the Trainer starts it again for rank 1.

Usage: python distributed_search.py FOLDER STRATEGY ... One search after the other, the first of which connects the
processes; with STRATEGY formula nothing is trained. Every rank writes what it got to FOLDER/rank.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import L2NormMonitor, WeightDecay
from lightning_l2.search import search_weight_decay
from tests.processes.worker import strategy_of

# Where each process is started as if it were a machine.
NODES = int(os.environ.get("LIGHTNING_L2_NODES", "1"))


class Net(pl.LightningModule):
    def __init__(self, strategy: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.strategy = strategy

    def configure_model(self) -> None:
        if self.strategy == "fsdp2-full":
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make(weight_decay: float, strategy: str = "ddp") -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 4, generator=generator), torch.randn(32, 2, generator=generator))
    trainer = pl.Trainer(
        callbacks=[WeightDecay(weight_decay, summary=False), L2NormMonitor(every_n_steps=1)],
        max_epochs=2,
        accelerator="cpu",
        devices=2 // NODES,
        num_nodes=NODES,
        strategy=strategy_of(strategy),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, Net(strategy), DataLoader(data, 4, shuffle=True), DataLoader(data, 4)


def search(folder: Path, strategy: str) -> dict[str, Any]:
    options: dict[str, Any] = {"trials": 3, "seeds": 2, "progress": False, "storage": folder / "study.db"}
    if strategy == "formula":
        found = search_weight_decay(fit=lambda run: 1 + run.weight_decay, low=0.1, high=1.0, name=strategy, **options)
        return {"search": [trial.weight_decay for trial in found.trials]}
    result = search_weight_decay(functools.partial(make, strategy=strategy), name=strategy, **options)
    monitored = ("val_loss", "l2_norm/total")
    values = [
        [trial.weight_decay, *(run.metrics[name] for name in monitored for run in trial.runs), trial.l2_norm]
        for trial in result.trials
    ]
    return {"search": values, "lr_steps": result.lr_steps}


if __name__ == "__main__":
    folder, *strategies = sys.argv[1:]
    found = {strategy: search(Path(folder), strategy) for strategy in strategies}
    Path(folder, str(torch.distributed.get_rank())).write_text(json.dumps(found))
