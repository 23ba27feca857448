"""A compiled optimizer step: lambda changes with every step, the graphs don't."""

from functools import cache
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.optim import Optimizer

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Net, batches, make_trainer

# Of torch's own making, as it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning"),
]


class Manual(Net):
    """Steps by hand, through a compiled function where a backend is given."""

    def __init__(self, make: Any, backend: Any = None) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.backend = backend

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.step()

    def configure_optimizers(self) -> Optimizer:
        optimizer = super().configure_optimizers()
        self.step = torch.compile(optimizer.step, backend=self.backend) if self.backend else optimizer.step
        return optimizer


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, foreach=True)


def train(apply: str, start: float, end: float, backend: Any = None) -> Manual:
    torch.manual_seed(0)
    model = Manual(adamw, backend)
    schedule = WeightDecayScheduler(LinearSchedule(start=start, end=end))
    make_trainer([WeightDecay(0.1, apply=apply, summary=False), schedule]).fit(model, batches(12))
    return model


def frames(apply: str, start: float, end: float) -> tuple[int, Manual]:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = train(apply, start, end, counter)
    return counter.frame_count, model


@cache
def frames_of_a_constant(apply: str) -> int:
    return frames(apply, 1.0, 1.0)[0]


@pytest.mark.parametrize(
    ("apply", "start", "end"),
    [
        ("optimizer", 1.0, 2.0),
        ("optimizer", 0.0, 1.0),
        ("optimizer", 1.0, 0.0),
        ("coupled", 1.0, 0.0),
        ("decoupled", 1.0, 0.0),
        ("independent", 1.0, 0.0),
        ("cautious", 1.0, 0.0),
    ],
)
def test_few_recompiles_over_a_schedule(apply: str, start: float, end: float) -> None:
    """One when lambda first changes, one when it reaches exactly 0; and the weights are those of the eager step."""
    constant = frames_of_a_constant(apply)
    scheduled, model = frames(apply, start, end)
    assert constant >= 1, "nothing was compiled"
    assert scheduled - constant <= 2
    for value, reference in zip(model.parameters(), train(apply, start, end).parameters(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)
