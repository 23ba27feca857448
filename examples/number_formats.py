"""Weight decay that a number format swallows, and how to have it all the same.

AdamW takes the share lr * weight_decay = 0.001 of the weights in each step. In bfloat16 that rounds to nothing, so
`precision="bf16-true"` trains as without decay; `WeightDecay(rounding=...)` mends it:

    python examples/number_formats.py --output number_formats.png

Source: Zamirai, Zhang, Aberger, De Sa, Revisiting BFloat16 Training, arXiv 2010.06192, 2020.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_l2 import L2NormMonitor, WeightDecay
from lightning_l2.plots import read_history
from lightning_l2.plots.style import COLOURS, new_figure, style_axes

LR = 1e-3
GREY = "#8A9099"


class Run(NamedTuple):
    """A training: how it is called in the picture, and what it does."""

    label: str
    precision: Any
    weight_decay: float
    rounding: Any
    colour: str
    style: str = "-"


PANELS = {
    "32-true, bf16-mixed: weights in fp32": (
        Run("without decay", "32-true", 0.0, "nearest", GREY),
        Run("λ = 1, 32-true", "32-true", 1.0, "nearest", COLOURS[0]),
        Run("λ = 1, bf16-mixed", "bf16-mixed", 1.0, "nearest", COLOURS[1], "--"),
    ),
    "bf16-true: weights in bfloat16": (
        Run("without decay", "bf16-true", 0.0, "nearest", GREY),
        Run("λ = 1: lost", "bf16-true", 1.0, "nearest", COLOURS[1], ":"),
        Run("λ = 1, rounding='accumulate'", "bf16-true", 1.0, "accumulate", COLOURS[0]),
        Run("λ = 1, rounding='stochastic'", "bf16-true", 1.0, "stochastic", COLOURS[2], "--"),
    ),
}


class Classifier(pl.LightningModule):
    """Two hidden layers for the digits."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.network = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.network(images.to(self.network[0].weight.dtype)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; the callback decides on its decay."""
        return torch.optim.AdamW(self.parameters(), lr=LR)


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return random batches of 64 digits."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    chosen = torch.randint(len(labels), (steps, 64), generator=torch.Generator().manual_seed(0))
    return [(images[few].float() / 16, labels[few]) for few in chosen]


def train(run: Run, steps: int) -> tuple[list[int], list[float]]:
    """Return the L2 norm of the weights that decay, and the steps at which it was logged."""
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        logger = CSVLogger(directory)
        decay = WeightDecay(run.weight_decay, rounding=run.rounding, summary=False)
        trainer = pl.Trainer(
            max_epochs=1,
            precision=run.precision,
            accelerator="cpu",
            logger=logger,
            callbacks=[decay, L2NormMonitor(per="group")],
            log_every_n_steps=max(1, steps // 60),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with warnings.catch_warnings():
            # that decay is lost is what this shows
            warnings.filterwarnings("ignore", message=".*is lost")
            trainer.fit(Classifier(), DataLoader(batches(steps), batch_size=None))
        return read_history(logger.log_dir)["l2_norm/decay"]


def draw(histories: dict[Run, tuple[list[int], list[float]]]) -> Any:
    """Return the figure: a panel for weights in fp32 and one for weights in bfloat16."""
    figure = new_figure(11, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, runs) in zip(panels, PANELS.items(), strict=True):
        for run in runs:
            axes.plot(*histories[run], run.style, color=run.colour, linewidth=2.2, label=run.label)
        style_axes(axes, title, "L2 norm of the weights" if axes is panels[0] else "")
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Train in each format, print the norms and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("number_formats.png"), help="the picture to write")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps = 60 if arguments.fast else 2000
    histories = {run: train(run, steps) for runs in PANELS.values() for run in runs}
    for run, (_, norms) in histories.items():
        print(f"{run.precision:10}  {run.label:30}  norm at the end {norms[-1]:.4f}")
    draw(histories).savefig(arguments.output, dpi=150)
    print(f"Picture: {arguments.output}")


if __name__ == "__main__":
    main()
