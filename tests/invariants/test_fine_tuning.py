"""A small transformer that has learnt the digits 0 to 4 learns 5 to 9: towards its start it forgets less."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import DecayRule, L2Penalty, WeightDecay
from tests.helpers import make_trainer

# the new head decays towards 0, the body as the callback says
BODY = ["exempt", DecayRule("head", pattern=r"^heads\.", towards="zero"), DecayRule("body")]


class Transformer(pl.LightningModule):
    """The eight rows of an image are its tokens; one head for each task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(32, 5) for _ in range(2))
        self.task = 0

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.body(self.embed(x) + self.place).mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], self.task), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)


def images(task: int, *, held_out: bool) -> TensorDataset:
    x, y = (torch.tensor(found) for found in load_digits(return_X_y=True))
    chosen = ((y // 5) == task) & ((torch.arange(len(y)) % 3 == 0) == held_out)
    return TensorDataset(x[chosen].float().view(-1, 8, 8) / 8 - 1, y[chosen] % 5)


def train(model: Transformer, task: int, epochs: int, *callbacks: pl.Callback) -> Transformer:
    model.task = task
    loader = DataLoader(images(task, held_out=False), 32, shuffle=True, generator=torch.Generator().manual_seed(7))
    make_trainer(callbacks, max_epochs=epochs).fit(model, loader)
    return model


@torch.no_grad()
def accuracy(model: Transformer, task: int) -> float:
    x, y = images(task, held_out=True).tensors
    return (model(x, task).argmax(1) == y).double().mean().item()


def distance(model: nn.Module, start: nn.Module) -> float:
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    return sum((p - q).square().sum().item() for (name, p), q in pairs if not name.startswith("heads")) ** 0.5


class FineTuned(NamedTuple):
    """Distance to the start, and accuracy on the old task and the new one."""

    distance: float
    old: float
    new: float


@pytest.fixture(scope="module")
def pretrained() -> Transformer:
    model = train(Transformer(), 0, 12)
    assert accuracy(model, 0) > 0.97
    return model


def fine_tuned(pretrained: Transformer, *callbacks: pl.Callback) -> FineTuned:
    model = copy.deepcopy(pretrained)
    train(model, 1, 10, *callbacks)
    return FineTuned(distance(model, pretrained), accuracy(model, 0), accuracy(model, 1))


def test_towards_the_start_a_transformer_forgets_less(pretrained: Transformer) -> None:
    """The old head keeps its weights, since no gradient reaches it."""
    free = fine_tuned(pretrained)
    for weight_decay in (1.0, 5.0):
        zero, start = (
            fine_tuned(pretrained, WeightDecay(weight_decay, rules=BODY, towards=towards, summary=False))
            for towards in ("zero", "start")
        )
        assert start.distance < 0.7 * zero.distance
        assert start.old > zero.old + 0.03
        assert start.old > free.old + 0.02
        assert start.new > free.new - 0.03
    penalised = fine_tuned(pretrained, L2Penalty(0.05, rules=BODY, towards="start"))
    assert penalised.distance < 0.7 * free.distance
    assert penalised.old > free.old + 0.03
    assert penalised.new > free.new - 0.03
