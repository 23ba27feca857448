"""A compiled optimizer step: lambda changes with every step, the graphs don't.

Graphs are counted behind AOTAutograd, as torch's default backend sees them: it makes a constant of a float that enters
an operation as a scalar, and compiles anew when that changes.
"""

from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.utils import counters
from torch.optim import Optimizer

from lightning_l2 import L2Penalty, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Net, batches, hand_grouped, make_trainer

# Of torch's own making, as it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning"),
]
STEPS = 4
RANGES = [(0.0, 1.0), (1.0, 0.0)]


class Manual(Net):
    """Steps by hand, through a compiled function where a backend is given."""

    def __init__(self, make: Any, backend: str | None = None, **options: Any) -> None:
        super().__init__(make, **options)
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
    """As torch advises for a compiled step: with the learning rate as a tensor."""
    return torch.optim.AdamW(params, lr=torch.tensor(0.01), foreach=False)


adamw_with_a_float = partial(torch.optim.AdamW, lr=0.01, foreach=True)
sgd = partial(torch.optim.SGD, lr=0.1, weight_decay=0.0)
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (adamw, {"apply": "optimizer"}),
    "AdamW-decoupled": (adamw, {"apply": "decoupled"}),
    "AdamW-coupled": (adamw, {"apply": "coupled", "before_clipping": True}),
    "AdamW-independent": (adamw_with_a_float, {"apply": "independent"}),
    "AdamW-cautious": (adamw_with_a_float, {"apply": "cautious"}),
    "SGD-coupled": (sgd, {"apply": "coupled", "before_clipping": True}),
    "SGD-decoupled": (sgd, {"apply": "decoupled"}),
}


def train(make: Any, *callbacks: pl.Callback, backend: str | None = None, **options: Any) -> tuple[int, Manual]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = Manual(make, backend, **options)
    make_trainer(callbacks).fit(model, batches(STEPS))
    return counters["stats"]["unique_graphs"], model


def scheduled(way: str, start: float, end: float, backend: str | None = None) -> tuple[int, Manual]:
    make, options = WAYS[way]
    schedule = WeightDecayScheduler(LinearSchedule(start=start, end=end))
    return train(make, WeightDecay(0.1, summary=False, **options), schedule, backend=backend)


@cache
def graphs_of_a_constant(way: str) -> int:
    return scheduled(way, 1.0, 1.0, "aot_eager")[0]


@pytest.mark.parametrize(("start", "end"), RANGES)
@pytest.mark.parametrize("way", WAYS)
def test_few_recompiles_over_a_schedule(way: str, start: float, end: float) -> None:
    """One when lambda first changes, one when it reaches exactly 0; and the weights are those of the eager step."""
    constant = graphs_of_a_constant(way)
    graphs, model = scheduled(way, start, end, "aot_eager")
    assert constant >= 1, "nothing was compiled"
    assert graphs - constant <= 2
    _, eager = scheduled(way, start, end)
    for value, reference in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)


def test_a_penalty_recompiles_at_most_once() -> None:
    constant, _ = train(sgd, L2Penalty(0.1), backend="aot_eager")
    schedule = WeightDecayScheduler(LinearSchedule(start=0.0, end=2.0))
    graphs, _ = train(sgd, schedule, L2Penalty(0.1, follow_schedule=True), backend="aot_eager")
    assert constant >= 1
    assert graphs - constant <= 1


class Expert(pl.Callback):
    """Writes lambda into groups made by hand."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * (1 + index / (STEPS - 1))


@pytest.mark.parametrize("make", [sgd, adamw_with_a_float])
def test_elsewhere_there_are_as_many_as_by_hand(make: Any) -> None:
    """Where torch takes lambda as a scalar it compiles for each value, up to its limit, whoever writes it."""
    by_hand, _ = train(make, Expert(), backend="aot_eager", grouped=hand_grouped(0.1))
    schedule = WeightDecayScheduler(LinearSchedule(start=1.0, end=2.0))
    ours, _ = train(make, WeightDecay(0.1, summary=False), schedule, backend="aot_eager")
    assert ours == by_hand
