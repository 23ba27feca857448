"""L2Penalty against the term lambda/2 ||w||^2 that a person writes into `training_step`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2 import L2Penalty, WeightDecay
from tests.helpers import DECAYED, Net, data, fp16, make_trainer

LAMBDA = 0.2
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD-momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW-without-its-own": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
}


class Penalised(Net):
    """The expert's module, with the term in its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        squares = sum(p.square().sum() for name, p in self.named_parameters() if name in DECAYED)
        return super().training_step(batch, batch_idx) + LAMBDA / 2 * squares


def train(make: Any, module: type[Net] = Net, *callbacks: pl.Callback, scaled: bool = False, **options: Any) -> Net:
    torch.manual_seed(0)
    if scaled:
        options["plugins"] = [fp16(init_scale=1024.0)]
    model = module(make)
    make_trainer(callbacks, **options).fit(model, data())
    return model


def assert_close(actual: Net, expected: Net, tolerance: float = 2e-6) -> None:
    for (name, value), reference in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            value, reference, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ],
    ids=["plain", "accumulation", "clip-by-norm", "clip-by-value"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_term_in_the_loss(name: str, options: dict[str, Any]) -> None:
    """Also where it differs from an optimizer's own decay: it is clipped with the gradient."""
    make = OPTIMIZERS[name]
    actual, expected = train(make, Net, L2Penalty(LAMBDA), **options), train(make, Penalised, **options)
    assert_close(actual, expected, 1e-5)
    assert not torch.allclose(expected.head.weight, train(make, **options).head.weight, rtol=1e-3)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_regularised_objective(line_search: str | None) -> None:
    """In each of its closure calls; the line search also compares values of the loss. In float64, as it amplifies."""
    make = partial(torch.optim.LBFGS, lr=0.1, max_iter=4, line_search_fn=line_search)
    actual = train(make, Net, L2Penalty(LAMBDA), precision="64-true", max_steps=4)
    expected = train(make, Penalised, precision="64-true", max_steps=4)
    assert_close(actual, expected, 1e-8)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_sgds_own_decay_also_in_a_short_last_window(accumulate: int, momentum: float) -> None:
    """A term in the loss is divided by the length of a full window; the penalty itself isn't smaller there."""
    make = partial(torch.optim.SGD, lr=0.1, momentum=momentum)
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    actual = train(make, Net, L2Penalty(LAMBDA), **options)
    assert_close(actual, train(make, Net, WeightDecay(LAMBDA, summary=False), **options))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=str)
def test_a_gradient_scaler_changes_nothing(options: dict[str, Any]) -> None:
    make = OPTIMIZERS["SGD-momentum"]
    actual = train(make, Net, L2Penalty(LAMBDA), scaled=True, **options)
    assert_close(actual, train(make, Penalised, scaled=True, **options), 1e-3)
    assert_close(actual, train(make, Penalised, **options), 1e-2)


@pytest.mark.parametrize("raw", [False, True], ids=["lightning-optimizer", "raw-optimizer"])
@pytest.mark.parametrize("closure", [False, True], ids=["no-closure", "closure"])
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_manual_optimization(raw: bool, closure: bool, lazy: bool) -> None:
    class Manual(Net):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.automatic_optimization = False
            if lazy:
                self.start = self.head.state_dict()
                self.head = torch.nn.LazyLinear(2)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if lazy and batch_idx == 0:
                self(batch[0])
                self.head.load_state_dict(self.start)

            def evaluate() -> Tensor:
                optimizer.zero_grad()
                loss = super(Manual, self).training_step(batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer = self.optimizers(use_pl_optimizer=not raw)
            if closure:
                optimizer.step(closure=evaluate)
            else:
                evaluate()
                optimizer.step()

    make = OPTIMIZERS["Adam"]
    assert_close(train(make, Manual, L2Penalty(LAMBDA)), train(make, Penalised))


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    class Frozen(Net):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.body.requires_grad_(False)
            self.unused = torch.nn.Linear(3, 3)

    model = train(OPTIMIZERS["SGD"], Frozen, L2Penalty(LAMBDA))
    torch.manual_seed(0)
    untouched = Frozen(OPTIMIZERS["SGD"])
    assert torch.equal(model.body[0].weight, untouched.body[0].weight)
    assert not torch.equal(model.head.weight, untouched.head.weight)
