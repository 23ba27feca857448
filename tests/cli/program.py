"""A training script as users write it, run once for many command lines.

``python -m tests.cli.program PACKAGE FILE`` reads a JSON list of argument lists and answers with what each of them did.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2.param_groups.decay_groups import decay_groups

PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def module_of(package: Any, seen: dict[str, list[float]]) -> type:
    """An ordinary module of either package; ``seen`` gets the weight decay of each parameter in each step."""

    class Model(package.LightningModule):
        def __init__(self, width: int = 4, optimizer_weight_decay: float = 0.3) -> None:
            super().__init__()
            self.weight_decay = optimizer_weight_decay
            self.embedding = nn.Embedding(10, width)
            self.body = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
            self.head = nn.Linear(width, 2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.body(self.embedding(batch[0]))), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=self.weight_decay)
            names = {id(p): name for name, p in self.named_parameters()}

            def note(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                for part in decay_groups(opt).groups:
                    for p in part.params:
                        seen.setdefault(names[id(p)], []).append(part.weight_decay)

            optimizer.register_step_post_hook(note)
            return optimizer

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.arange(8), torch.arange(8) % 2), batch_size=2)

    return Model


def run(package: Any, cli: Any, arguments: list[str]) -> dict[str, Any]:
    seen: dict[str, list[float]] = {}
    out, err, code, error = io.StringIO(), io.StringIO(), 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli(module_of(package, seen), args=arguments, save_config_kwargs={"overwrite": True})
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except Exception as raised:
            code, error = 1, f"{type(raised).__name__}: {raised}"
    return {"code": code, "out": out.getvalue(), "err": err.getvalue() + error, "seen": seen}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    chosen, lines = PACKAGES[sys.argv[1]], json.loads(Path(sys.argv[2]).read_text())
    del sys.argv[1:]
    package, cli = importlib.import_module(chosen), importlib.import_module(f"{chosen}.cli").LightningCLI
    answers = [run(package, cli, arguments) for arguments in lines]
    print("ANSWERS" + json.dumps(answers))
