"""A script that knows nothing of the package gains callbacks through an environment variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_l2 import L2NormMonitor, WeightDecay
from lightning_l2.cli.environment import callbacks_from_environment
from tests.processes.forked import python

SCRIPT = """
import {package} as pl, torch
from torch.utils.data import DataLoader, TensorDataset
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)
    def training_step(self, batch, index):
        return (self.fc(batch[0]) * 0).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)
quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **quiet)
module = Module()
before = module.fc.weight.clone()
trainer.fit(module, DataLoader(TensorDataset(torch.ones(1, 2))))
print("ratio", (module.fc.weight / before).mean().item())
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "callbacks.yaml"
    path.write_text(
        "callbacks:\n  - class_path: lightning_l2.WeightDecay\n    init_args: {weight_decay: 0.25}\n"
        "  - lightning_l2.L2NormMonitor\n"
    )
    monkeypatch.setenv("LIGHTNING_L2_CONFIG", str(path))
    return path


@pytest.mark.usefixtures("config")
def test_the_file_gives_new_callbacks_each_time() -> None:
    first, second = callbacks_from_environment(), callbacks_from_environment()
    assert [type(callback) for callback in first] == [WeightDecay, L2NormMonitor]
    assert first[0].weight_decay == 0.25
    assert first[0] is not second[0]


@pytest.mark.parametrize(
    ("package", "is_set"), [("lightning.pytorch", True), ("pytorch_lightning", True), ("lightning.pytorch", False)]
)
def test_a_closed_script_is_decayed(package: str, is_set: bool, config: Path) -> None:
    variable = {"LIGHTNING_L2_CONFIG": str(config) if is_set else ""}
    done = python("-c", SCRIPT.format(package=package), environment=variable)
    assert f"ratio {0.75 if is_set else 1.0}" in done.stdout, done.stderr
    assert ("no_decay" in done.stdout) == is_set


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_L2_CONFIG", raising=False)
    assert callbacks_from_environment() == []


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_L2_CONFIG", "no/such.yaml")
    with pytest.raises(FileNotFoundError, match=r"LIGHTNING_L2_CONFIG names the file 'no/such.yaml'"):
        callbacks_from_environment()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("callbacks:\n  - lightning_l2.WeightDecoy\n", "Did you mean 'lightning_l2.WeightDecay'?"),
        ("callbacks:\n  - {class_path: lightning_l2.WeightDecay, weight_decay: 0.1}\n", "stand under `init_args`"),
        ("callbacks:\n  - {class_path: lightning_l2.WeightDecay, init_args: {rules: defualt}}\n", "mean 'default'?"),
        ("trainer:\n  callbacks:\n    - lightning_l2.WeightDecay\n", "'trainer.callbacks' is not accepted"),
        ("- lightning_l2.WeightDecay\n", ""),
        ("", ""),
        ("callbacks: [", "Problems parsing config: while parsing"),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(text: str, told: str, config: Path) -> None:
    config.write_text(text)
    read = "the file '.*' can't be read as `callbacks:` and the list that LightningCLI has under `trainer.callbacks`: "
    with pytest.raises(ValueError, match=read) as error:
        callbacks_from_environment()
    assert told in str(error.value)
