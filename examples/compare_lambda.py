"""What lambda does: too little, about right, too much; beside L1 and dropout; and against ridge regression.

Sixty handwritten digits to learn from, six hundred to judge by, one network, trained anew for each lambda:

    python examples/compare_lambda.py --output compare_lambda.png

Sources: Goodfellow, Bengio, Courville, Deep Learning, MIT Press 2016, chapter 7; Hastie, Tibshirani, Friedman, The
Elements of Statistical Learning, Springer 2009, section 3.4 (ridge).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from compare_lambda_figure import draw
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_l2 import L2NormMonitor, WeightDecay
from lightning_l2.plots import History, read_history

Data = tuple[torch.Tensor, torch.Tensor]

LAMBDAS = (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 1e-1)
SAMPLES, HELD_OUT = 60, 600
LR, MOMENTUM = 0.1, 0.9


class Run(NamedTuple):
    """What a training leaves: its metrics by step, and all weights as one vector."""

    history: History
    weights: torch.Tensor

    def last(self, metric: str) -> float:
        """Return the last value of a metric."""
        return self.history[metric][1][-1]


class Network(pl.LightningModule):
    """Two hidden layers of 128 units, by plain stochastic gradient descent with momentum.

    Args:
        l1: Strength of an L1 penalty on the weights.
        dropout: Probability that a unit is left out of a training step.
    """

    def __init__(self, l1: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.l1 = l1
        hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 128), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Dropout(dropout), nn.Linear(128, 10))

    def weights(self) -> torch.Tensor:
        """Return all weights, without the biases, as one vector."""
        return torch.cat([layer.weight.flatten() for layer in self.layers if isinstance(layer, nn.Linear)])

    def training_step(self, batch: Data, batch_idx: int) -> torch.Tensor:
        """Return the loss, without any penalty."""
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Move weights towards 0 by a fixed amount where there is an L1 penalty, those that would cross it onto 0.

        This is proximal gradient descent, with what momentum makes of the learning rate in the long run; a penalty in
        the loss would leave weights that jump around 0.
        """
        if self.l1:
            with torch.no_grad():
                for layer in self.layers:
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(F.softshrink(layer.weight, LR / (1 - MOMENTUM) * self.l1))

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        """Log loss and error on digits that are not learned from."""
        scores = self.layers(batch[0])
        wrong = (scores.argmax(1) != batch[1]).float().mean()
        self.log_dict({"val_loss": F.cross_entropy(scores, batch[1]), "val_error": wrong})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD: here weight decay is exactly the gradient of lambda/2 ||w||^2."""
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM)


class Linear(pl.LightningModule):
    """Linear regression by gradient descent, in double precision."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.line = nn.Linear(features, 1)

    def training_step(self, batch: Data, batch_idx: int) -> torch.Tensor:
        """Return the mean squared error."""
        return F.mse_loss(self.line(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with much momentum, since the features are strongly correlated."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.95)


def load_few_digits() -> tuple[Data, Data]:
    """Return few digits to learn from and many to judge by."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    few, many = order[:SAMPLES], order[-HELD_OUT:]
    images = images.float() / 16
    return (images[few], labels[few]), (images[many], labels[many])


def train(weight_decay: float, steps: int, *, l1: float = 0.0, dropout: float = 0.0) -> Run:
    """Train the network on all samples at once, for a number of steps."""
    samples, held_out = load_few_digits()
    pl.seed_everything(0, verbose=False)
    model = Network(l1, dropout)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = [WeightDecay(weight_decay, summary=False), L2NormMonitor(per="group")]
        logger = CSVLogger(directory)
        settings = {"val_check_interval": 10, "log_every_n_steps": 10, "num_sanity_val_steps": 0}
        fit(model, [samples] * steps, [held_out], logger=logger, callbacks=callbacks, **settings)
        return Run(read_history(logger.log_dir), model.weights().detach())


def fit(model: pl.LightningModule, batches: list[Data], *held_out: list[Data], **settings: object) -> None:
    """Fit for one pass over the batches, quietly."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **quiet, **settings)
    trainer.fit(model, *(DataLoader(part, batch_size=None) for part in (batches, *held_out)))


def ridge_path(alphas: list[float], steps: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return the coefficients of ridge regression on the diabetes data, by WeightDecay and by scikit-learn.

    The mean squared error over N samples with lambda/2 ||w||^2 has the minimum of scikit-learn's sum of squared errors
    with alpha ||w||^2 where alpha = lambda N / 2.
    """
    features, target = load_diabetes(return_X_y=True, scaled=False)
    features, target = StandardScaler().fit_transform(features), (target - target.mean()) / target.std()
    batch = torch.from_numpy(features), torch.from_numpy(target)
    ours = []
    for alpha in alphas:
        model = Linear(features.shape[1])
        decay = WeightDecay(2 * alpha / len(target), summary=False)
        fit(model, [batch] * steps, callbacks=[decay], logger=False, precision="64-true")
        ours.append(model.line.weight.detach().flatten().tolist())
    return ours, [Ridge(alpha).fit(features, target).coef_.tolist() for alpha in alphas]


def main() -> None:
    """Train, print a table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="few lambdas and steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("compare_lambda.png"), help="the picture to write")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps = 40 if arguments.fast else 400
    runs = {}
    print(f"{'':>16}  train loss  held-out loss  error    ||w||")
    for weight_decay in LAMBDAS[::3] if arguments.fast else LAMBDAS:
        runs[weight_decay] = train(weight_decay, steps)
        report(f"lambda {weight_decay:g}", runs[weight_decay])
    best = min(runs, key=lambda weight_decay: runs[weight_decay].last("val_loss"))
    others = {
        "L2": runs[best],
        "L1": train(0.0, steps, l1=5e-4),
        "dropout": train(0.0, steps, dropout=0.5),
        "dropout and L2": train(best / 3, steps, dropout=0.5),
    }
    for name in list(others)[1:]:
        report(name, others[name])
    alphas = [10.0**power for power in range(-1, 5, 2 if arguments.fast else 1)]
    ours, ridge = ridge_path(alphas, 50 if arguments.fast else 1000)
    difference = max(abs(a - b) for pair in zip(ours, ridge, strict=True) for a, b in zip(*pair, strict=True))
    draw(runs, best, others, (alphas, ours, ridge)).savefig(arguments.output, dpi=150)
    print(f"Lambda {best:g} has the lowest loss on held-out digits.")
    print(f"Ridge regression: no coefficient differs from scikit-learn's by more than {difference:.0e}.")
    print(f"Picture: {arguments.output}")


def report(name: str, run: Run) -> None:
    """Print what came out of a training."""
    norm = run.weights.norm().item()
    losses = f"{run.last('train_loss'):10.4f}  {run.last('val_loss'):13.3f}"
    print(f"{name:>16}  {losses}  {run.last('val_error'):5.1%}  {norm:7.2f}")


if __name__ == "__main__":
    main()
