"""A program may import this package before `pytorch_lightning` or after it."""

import pytest

from tests.processes.forked import python

PROGRAM = """
import {first}
import {second}
import pytorch_lightning as pl
import torch
from lightning_l2 import L2NormMonitor, WeightDecay
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)
    def setup(self, stage):
        self.before = self.fc.weight.detach().clone()
    def training_step(self, batch, index):
        return (self.fc(batch[0]) * 0).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(1, 2)))
    def ratio(self):
        return round((self.fc.weight / self.before).mean().item(), 6)

quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
for callbacks in (WeightDecay(0.25), [WeightDecay(0.25), L2NormMonitor(), L2NormMonitor(per="total")]):
    module = Module()
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet).fit(module)
    print("ratio", module.ratio())
options = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", *(f"--trainer.{{key}}=false" for key in quiet)]
callback = ["--trainer.callbacks+=lightning_l2.WeightDecay", "--trainer.callbacks.weight_decay=0.25"]
print("ratio", LightningCLI(Module, args=["fit", *options, *callback], save_config_callback=None).model.ratio())
"""


@pytest.mark.parametrize(
    ("first", "second"), [("lightning_l2", "pytorch_lightning"), ("pytorch_lightning", "lightning_l2")]
)
def test_trainer_and_cli_of_the_other_package_take_the_callbacks(first: str, second: str) -> None:
    done = python("-c", PROGRAM.format(first=first, second=second))
    assert done.stdout.count("ratio 0.75") == 3, done.stdout + done.stderr[-2000:]


def test_a_look_whether_the_other_package_is_there_changes_nothing() -> None:
    code = (
        "import importlib.util, sys, lightning_l2; importlib.util.find_spec('pytorch_lightning');"
        "import pytorch_lightning; sys.exit(not issubclass(lightning_l2.WeightDecay, pytorch_lightning.Callback))"
    )
    assert python("-c", code).returncode == 0


def test_an_import_of_the_other_package_that_failed_can_be_repeated() -> None:
    code = """if True:
        import sys, lightning_l2
        sys.modules["torchmetrics"] = None  # which it needs
        try:
            import pytorch_lightning
        except ImportError:
            del sys.modules["torchmetrics"]
        for name in [name for name in sys.modules if name.startswith(("pytorch_lightning", "torchmetrics"))]:
            del sys.modules[name]
        import pytorch_lightning
        sys.exit(not issubclass(lightning_l2.WeightDecay, pytorch_lightning.Callback))
    """
    assert python("-c", code).returncode == 0


def test_the_other_package_is_not_imported() -> None:
    code = "import sys, lightning_l2; lightning_l2.WeightDecay(0.1); sys.exit('pytorch_lightning' in sys.modules)"
    assert python("-c", code).returncode == 0
