"""A group for each matrix: AlphaDecay by the paper, in a Trainer, against AdamW and spectra by numpy in float64."""

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler, weight_decay_in_force
from lightning_l2.adaptive import AlphaDecay
from tests.helpers import assert_same_weights, batches, layout, make_trainer

LAMBDA, LR, PERIOD = 0.3, 0.05, 3
SHAPES = {"first.weight": (50, 60), "second.weight": (51, 50), "third.weight": (60, 51), "head.weight": (50, 60)}
MEASURED = [name for name in SHAPES if name != "head.weight"]
RULES = [DecayRule("head", pattern=r"^head\.weight", multiplier=0.5), "per_matrix"]


class Matrices(pl.LightningModule):
    """Layers that are pulled to targets of different spectra: the gradient of each weight is (w - target) / 100."""

    def __init__(self) -> None:
        super().__init__()
        random = np.random.default_rng(0)
        for index, (name, shape) in enumerate(SHAPES.items()):
            layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
            layer.weight.data = torch.tensor(random.normal(size=shape))
            nn.init.ones_(layer.bias)
            self.register_module(name.removesuffix(".weight"), layer)
            self.register_buffer(f"target{index}", torch.tensor(random.standard_t(1 + index, size=shape)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weights = [self.get_parameter(name) for name in SHAPES]
        pulls = [(w - self.get_buffer(f"target{index}")).square().sum() for index, w in enumerate(weights)]
        zero = sum((bias * 0.0).sum() for name, bias in self.named_parameters() if name.endswith("bias"))
        return sum(pulls) / 200 + zero

    def configure_optimizers(self) -> Any:
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=0.7)
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Noted(pl.Callback):
    """Lambda and lr of each group in every step, as another callback sees them."""

    def __init__(self) -> None:
        self.lambdas: list[dict[str, float]] = []
        self.lrs: list[set[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.lambdas.append(weight_decay_in_force(trainer.optimizers[0]))

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self.lrs.append({group["lr"] for group in trainer.optimizers[0].param_groups})


def fit(*extra: pl.Callback, epochs: int = 2, ckpt_path: Any = None, save: Any = None) -> Matrices:
    model = Matrices()
    schedule = WeightDecayScheduler(AlphaDecay(every_n_steps=PERIOD))
    trainer = make_trainer([WeightDecay(LAMBDA, rules=RULES, summary=False), schedule, *extra], max_epochs=epochs)
    trainer.fit(model, batches(4), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    if save is not None:
        trainer.save_checkpoint(save)
    return model


def hill(weight: np.ndarray) -> float:
    """1 + k / sum_{i=1..k} ln(l_{n-i+1} / l_{n-k}), k = n / 2, of the squared singular values l."""
    values = np.sort(np.linalg.svd(weight, compute_uv=False) ** 2)
    n, k = len(values), len(values) // 2
    return 1 + k / sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))


def by_hand(steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """AdamW with its own lambda for each matrix, those of the measured ones from their spectra."""
    model = Matrices()
    targets = {name: model.get_buffer(f"target{index}").numpy() for index, name in enumerate(SHAPES)}
    weights = {name: model.get_parameter(name).detach().numpy().copy() for name in SHAPES}
    first, second = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    lambdas, history = {"head.weight": LAMBDA / 2}, []
    for step in range(steps):
        if step % PERIOD == 0:
            alphas = {name: hill(weights[name]) for name in MEASURED}
            low, high = min(alphas.values()), max(alphas.values())
            lambdas |= {n: LAMBDA * (2 / 3 + (3 - 2 / 3) * (a - low) / (high - low)) for n, a in alphas.items()}
        history.append(dict(lambdas))
        lr = LR / (1 + step)
        for name, w in weights.items():
            g = (w - targets[name]) / 100
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            u = first[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            weights[name] = (1 - lr * lambdas[name]) * w - lr * u
    return weights, history


def test_each_matrix_decays_by_its_own_spectrum() -> None:
    noted = Noted()
    model = fit(noted)
    weights, history = by_hand(8)
    for name, expected in weights.items():
        np.testing.assert_allclose(model.get_parameter(name).detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    for seen, expected_lambdas in zip(noted.lambdas, history, strict=True):
        expected = {f"decay/{name}": expected_lambdas[name] for name in MEASURED}
        assert seen == pytest.approx(expected | {"head": LAMBDA / 2, "no_decay": 0.0}, rel=1e-9)
    spread = [max(seen.values()) / LAMBDA for seen in noted.lambdas]
    assert spread == pytest.approx([3.0] * 8), "some matrix has the lightest tail"
    assert len({tuple(sorted(seen.items())) for seen in noted.lambdas}) == 3, "measured in steps 0, 3 and 6"
    assert noted.lrs == [{LR * (1 / (1 + step))} for step in range(8)], "the lr of all groups is that of the schedule"
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in model.named_parameters() if name.endswith("bias"))


def test_a_resumed_training_goes_on_and_the_checkpoint_has_the_users_groups(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    plain = Matrices()
    plain.configure_optimizers()
    half = fit(epochs=1, save=path)
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert len(saved["params"]) == 8
    assert layout(half.optimizer, half)[0].keys() == layout(plain.optimizer, plain)[0].keys() | {"initial_lr"}
    assert_same_weights(fit(ckpt_path=path), fit())


def test_each_group_has_a_row_in_the_summary_and_a_logged_lambda(tmp_path: Path) -> None:
    callback, model = WeightDecay(LAMBDA, rules=RULES, summary=False), Matrices()
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer([callback, L2NormMonitor(every_n_steps=1)], logger=logger).fit(model, batches(1))
    names = {f"decay/{name}" for name in MEASURED} | {"head", "no_decay"}
    assert {row.group for row in callback.summary()} == names
    assert {row.names for row in callback.summary() if row.rule == "decay"} == {(name,) for name in MEASURED}
    (row,) = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    logged = {key.removeprefix("weight_decay/"): float(row[key]) for key in row if key.startswith("weight_decay/")}
    assert logged == dict.fromkeys(names, LAMBDA) | {"head": LAMBDA / 2, "no_decay": 0.0}
