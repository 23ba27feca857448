"""Ask in two processes what a Trainer tells of its training, and write the answer as JSON."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2.trainer import training_setup
from tests.helpers import make_trainer

STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "tensor parallel": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)

    def configure_model(self) -> None:
        """Leave the module as it is, which ModelParallelStrategy asks for."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.fc(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_start(self) -> None:
        setup = training_setup(self.trainer, self.trainer.optimizers[0].param_groups[0])
        self.found = {"batch_size": setup.batch_size, "steps_per_epoch": setup.steps_per_epoch}


def work(rank: int, strategy: str, folder: Path) -> None:
    module = Module()
    trainer = make_trainer(strategy=STRATEGIES[strategy](), devices=2, accelerator="cpu")
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=4))
    (folder / f"{rank}.json").write_text(json.dumps(module.found))
