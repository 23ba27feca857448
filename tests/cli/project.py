"""A project that trains by LightningCLI: its classes, its configuration, and what its own command builds."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import WeightDecay

PROJECT = "tests.cli.project"
BASE = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False},
    "model": {"class_path": f"{PROJECT}.Model", "init_args": {"hidden": 4}},
    "data": {"class_path": f"{PROJECT}.Data"},
}


class Model(pl.LightningModule):
    """A small network.

    Args:
        inputs: number of inputs.
        hidden: number of hidden units.
        lr: learning rate.
        weight_decay: the optimizer's.
    """

    def __init__(self, inputs: int = 4, hidden: int = 8, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.lr, self.weight_decay = lr, weight_decay

    def on_train_start(self) -> None:
        """Interrupt the third training, as by Ctrl-C, where a variable names a file to count them in."""
        if "INTERRUPT_BY" in os.environ:
            count = Path(os.environ["INTERRUPT_BY"])
            count.write_text(count.read_text() + "1" if count.exists() else "1")
            if count.read_text() == "111":
                os.kill(os.getpid(), signal.SIGINT)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Data(pl.LightningDataModule):
    """Random numbers.

    Args:
        inputs: number of inputs.
        batch_size: samples a batch.
    """

    def __init__(self, inputs: int = 4, batch_size: int = 8) -> None:
        super().__init__()
        self.inputs, self.batch_size = inputs, batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.dataset(), self.batch_size)

    def dataset(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        return TensorDataset(*(torch.randn(32, columns, generator=generator) for columns in (self.inputs, 2)))


class PlainCLI(LightningCLI):
    """Has an argument of its own and leaves the classes to the program, as most projects do."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--note", default="none")


class LinkedCLI(LightningCLI):
    """Links the number of inputs, has an argument of its own, and does something after a training."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--note", default="none")
        parser.link_arguments("data.init_args.inputs", "model.init_args.inputs")

    def after_fit(self) -> None:
        raise AssertionError("the search trains later")


def write(name: str, *parts: dict[str, Any]) -> str:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            merged[key] = {**merged.get(key, {}), **value}
    Path(name).write_text(yaml.safe_dump(merged))
    return name


def fit_cli(*arguments: str, **classes: Any) -> LightningCLI:
    """What the project's own command would build."""

    class BuildOnly(LightningCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_args(args)

    return BuildOnly(
        **classes, args=list(arguments), run=False, save_config_callback=None, seed_everything_default=False
    )


def lambdas(cli: LightningCLI) -> list[float]:
    return [callback.weight_decay for callback in cli.trainer.callbacks if isinstance(callback, WeightDecay)]
