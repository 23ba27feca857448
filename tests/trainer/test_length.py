"""What lambda can follow from where several processes train; the rest is in the tests of the callbacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_l2.trainer import training_setup
from torch.utils.data import DataLoader, TensorDataset

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)
    def configure_model(self):
        pass
    def training_step(self, batch, index):
        return self.fc(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_start(self):
        setup = training_setup(self.trainer, self.trainer.optimizers[0].param_groups[0])
        print(f"<{setup.batch_size} samples a step, {setup.steps_per_epoch} steps an epoch>")

quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
trainer = pl.Trainer(strategy=STRATEGY, devices=2, accelerator="cpu", max_epochs=1, **quiet)
trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=4))
"""
# each of 16 samples is in one step of an epoch; ranks that share tensors see the same ones
FOUND = {
    "DDPStrategy(process_group_backend='gloo')": "<8 samples a step, 2 steps an epoch>",
    "ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)": "<4 samples a step, 4 steps an epoch>",
}


@pytest.mark.parametrize("strategy", FOUND)
def test_samples_of_a_step_are_those_of_the_processes_that_share_the_data(strategy: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("STRATEGY", strategy))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = [sys.executable, str(program)]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout.count(FOUND[strategy]) == 2, done.stdout + done.stderr[-2000:]
