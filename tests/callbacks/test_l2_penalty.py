"""Expected values: closed forms in float64, scikit-learn, and the loss term written by hand with autograd."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_optimizer
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2.adaptive import AdaptiveDecay
from lightning_l2.callbacks.l2_penalty import L2Penalty
from lightning_l2.callbacks.weight_decay import WeightDecay
from lightning_l2.callbacks.weight_decay_scheduler import WeightDecayScheduler
from lightning_l2.convert import GaussianPrior
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.rules import DecayRule
from lightning_l2.schedules import LinearSchedule, PlateauSchedule
from tests.helpers import ACCELERATOR, fp16

LAMBDA = 0.3
Make = Callable[[Any], Optimizer]


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class Regression(pl.LightningModule):
    """Two linear layers in float64, with a penalty written into the loss if asked, as users do it."""

    def __init__(self, make: Make = sgd, written: float = 0.0) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.double()
        self.make, self.written = make, written

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).tanh())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = mse_loss(self(batch[0]), batch[1])
        if self.written:
            loss = loss + self.written / 2 * (self.hidden.weight.square().sum() + self.head.weight.square().sum())
        self.log("train_loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Rows(pl.loggers.logger.Logger):
    """Keeps what it is sent."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, key: str) -> dict[int, float]:
        return {step: metrics[key] for step, metrics in self.rows if key in metrics}


def data(count: int = 20, batch_size: int = 2) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=batch_size)


def make_trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {
        "accelerator": ACCELERATOR,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, loader: Any = None, **options: Any) -> dict[str, Tensor]:
    make_trainer(*callbacks, **options).fit(module, data() if loader is None else loader)
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def seeded(*args: Any, **options: Any) -> Regression:
    torch.manual_seed(0)
    return Regression(*args, **options)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


# --- the gradient ---


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("make", [sgd, lambda p: torch.optim.Adam(p, lr=0.1)], ids=["SGD", "Adam"])
def test_it_is_the_term_in_the_loss(make: Make, clip: float | None) -> None:
    options = {"gradient_clip_val": clip, "gradient_clip_algorithm": "norm"}
    by_hand = fit(seeded(make, written=LAMBDA), **options)
    assert_same(fit(seeded(make), L2Penalty(LAMBDA), **options), by_hand)
    assert (by_hand["head.weight"] - fit(seeded(make), **options)["head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("clip", [False, True])
def test_sgd_weight_decay_is_the_same_thing_until_gradients_are_clipped(clip: bool) -> None:
    options = {"gradient_clip_val": 0.05} if clip else {}
    penalty = fit(seeded(), L2Penalty(LAMBDA), **options)
    decay = fit(seeded(), WeightDecay(LAMBDA, summary=False), **options)
    difference = max((penalty[name] - decay[name]).abs().max() for name in penalty)
    assert difference < 1e-12 if not clip else difference > 1e-2


def test_clipping_takes_hold_of_the_whole_gradient() -> None:
    """One step from w = (3, -4), gradient (2, 2), clipped to norm 1: the closed forms of both ways."""

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 1, bias=False, dtype=torch.float64)
            self.line.weight.data = torch.tensor([[3.0, -4.0]], dtype=torch.float64)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.line(batch[0]).mean()

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    loader = DataLoader(TensorDataset(torch.full((1, 2), 2.0, dtype=torch.float64)))
    penalty = fit(Line(), L2Penalty(LAMBDA), loader=loader, gradient_clip_val=1.0)["line.weight"][0]
    decay = fit(Line(), WeightDecay(LAMBDA, summary=False), loader=loader, gradient_clip_val=1.0)["line.weight"][0]
    w, g = np.array([3.0, -4.0]), np.array([2.0, 2.0])
    whole = g + LAMBDA * w
    np.testing.assert_allclose(penalty, w - 0.1 * whole / np.linalg.norm(whole), atol=1e-6)
    np.testing.assert_allclose(decay, w - 0.1 * (g / np.linalg.norm(g) + LAMBDA * w), atol=1e-6)


class Still(pl.LightningModule):
    """Ones under a loss whose gradient is 0: each step of SGD multiplies them by 1 - lr lambda and no more."""

    def __init__(self, make: Make = sgd, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=dtype)
        nn.init.ones_(self.layer.weight)
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer.weight * 0.0).sum() + (self.layer.bias * 0.0).sum()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def batches(count: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(count, 1)), batch_size=1)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 10), (3, 4), (4, 3), (20, 1)])
def test_once_a_step_however_many_batches_and_in_a_short_last_window(accumulate: int, steps: int) -> None:
    weights = fit(Still(), L2Penalty(LAMBDA), loader=batches(10), accumulate_grad_batches=accumulate)
    expected = torch.full((2, 2), (1 - 0.1 * LAMBDA) ** steps, dtype=torch.float64)
    torch.testing.assert_close(weights["layer.weight"], expected, rtol=1e-14, atol=0)


def test_the_default_rules_leave_biases_alone_and_own_rules_decide() -> None:
    start = seeded()
    untouched = dict(start.named_parameters())
    module = copy.deepcopy(start)
    module.training_step = lambda batch, batch_idx: sum((p * 0.0).sum() for p in module.parameters())
    rules = [
        DecayRule("hidden bias", pattern=r"^hidden\.bias", weight_decay=0.5),
        DecayRule("head", pattern=r"^head\.weight", multiplier=0.1),
        "default",
    ]
    weights = fit(module, L2Penalty(LAMBDA, rules=rules), loader=data(2))
    factors = {"hidden.weight": LAMBDA, "hidden.bias": 0.5, "head.weight": 0.1 * LAMBDA, "head.bias": 0.0}
    for name, weight_decay in factors.items():
        torch.testing.assert_close(weights[name], untouched[name].detach() * (1 - 0.1 * weight_decay))


def test_frozen_parameters_and_those_without_gradient_stay() -> None:
    module = seeded()
    module.hidden.requires_grad_(False)
    module.unused = nn.Linear(3, 3, dtype=torch.float64)
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    rows = Rows()
    weights = fit(module, L2Penalty(LAMBDA), logger=rows, log_every_n_steps=1)
    assert torch.equal(weights["hidden.weight"], before["hidden.weight"])
    assert torch.equal(weights["unused.weight"], before["unused.weight"])
    assert not torch.equal(weights["head.weight"], before["head.weight"])
    squares = sum(before[name].square().sum().item() for name in ("head.weight", "unused.weight"))
    assert rows.of("l2_penalty/loss")[0] == pytest.approx(LAMBDA / 2 * squares, rel=1e-12)


def test_maximising_penalises_too() -> None:
    class Ascending(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return -super().training_step(batch, batch_idx)

    def ascend(params: Any) -> Optimizer:
        return torch.optim.SGD(params, lr=0.1, maximize=True)

    torch.manual_seed(0)
    rows = Rows()
    weights = fit(Ascending(ascend), L2Penalty(LAMBDA, log_objective=True), logger=rows, log_every_n_steps=1)
    assert_same(weights, fit(seeded(), L2Penalty(LAMBDA)))
    losses, penalties, objectives = (rows.of(key) for key in ("train_loss", "l2_penalty/loss", "l2_penalty/objective"))
    for step, objective in objectives.items():
        assert objective == pytest.approx(-losses[step] - penalties[step], rel=1e-9)


def test_sparse_gradients_are_penalised_in_their_rows() -> None:
    class Table(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
            nn.init.ones_(self.table.weight)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.table(torch.tensor([2, 2], device=self.device)) * 0.0).sum()

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    weights = fit(Table(), L2Penalty(LAMBDA), loader=batches(2))["table.weight"]
    expected = torch.ones(4, 2, dtype=torch.float64)
    expected[2] = (1 - 0.1 * LAMBDA) ** 2
    torch.testing.assert_close(weights, expected)


# --- solutions ---


def converge(module: pl.LightningModule, x: Any, y: Any, *callbacks: pl.Callback, steps: int) -> None:
    loader = DataLoader([(torch.from_numpy(x), torch.from_numpy(y))], batch_size=None)
    fit(module, *callbacks, loader=loader, max_epochs=steps)


class Linear(pl.LightningModule):
    def __init__(self, features: int, outputs: int, loss: Any, make: Make) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs, dtype=torch.float64)
        self.loss, self.make = loss, make

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.linear(batch[0]).squeeze(1), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


SOLVERS: dict[str, tuple[Make, int]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), 400),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.5), 20),
    "LBFGS with line search": (lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"), 8),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_regression_converges_to_ridge(solver: str) -> None:
    """Mean squared error + lambda/2 ||w||^2, times N: Ridge's ||y - xw||^2 + alpha ||w||^2, alpha = lambda N / 2."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    y = x @ [1.0, -2.0, 0.5, 0.0] + 3.0 + 0.1 * rng.normal(size=50)
    make, steps = SOLVERS[solver]
    module = Linear(4, 1, mse_loss, make)
    converge(module, x, y, L2Penalty(LAMBDA), steps=steps)
    ridge = Ridge(alpha=LAMBDA * 50 / 2).fit(x, y)
    np.testing.assert_allclose(module.linear.weight.detach()[0], ridge.coef_, atol=1e-4)
    np.testing.assert_allclose(module.linear.bias.detach()[0], ridge.intercept_, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_logistic_regression_converges_to_that_of_scikit_learn(solver: str) -> None:
    """Mean cross entropy + lambda/2 ||w||^2, times N: C sum of cross entropies + ||w||^2/2 with C = 1/(lambda N)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = np.argmax(x @ rng.normal(size=(3, 3)) + 0.3 * rng.normal(size=(60, 3)), axis=1)
    make, steps = SOLVERS[solver]
    module = Linear(3, 3, cross_entropy, make)
    weight_decay = 0.05
    converge(module, x, y, L2Penalty(weight_decay), steps=4 * steps)
    reference = LogisticRegression(C=1 / (weight_decay * 60), tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(module.linear.weight.detach(), reference.coef_, atol=1e-4)


def test_an_optimizer_torch_does_not_know_gets_the_whole_loss() -> None:
    """ALI-G divides the loss by the squared gradient norm, so both must be of the same objective."""

    def ali_g(params: Any) -> Optimizer:
        return pytorch_optimizer.AliG(params, max_lr=0.1)

    assert_same(fit(seeded(ali_g), L2Penalty(LAMBDA)), fit(seeded(ali_g, written=LAMBDA)), 1e-9)


# --- fp16 ---


def scaled(init_scale: float) -> dict[str, Any]:
    return {"plugins": fp16(init_scale=init_scale, growth_interval=1000)}


def fused_sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1, fused=True)


@pytest.mark.parametrize("make", [sgd, fused_sgd], ids=["plain", "fused"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_the_gradient_is_unscaled_or_scaled_as_its_own(manual: bool, make: Make) -> None:
    class Manual(Still):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = (Manual if manual else Still)(make, torch.float32)
    weights = fit(module, L2Penalty(LAMBDA), loader=batches(4), **scaled(256.0))
    torch.testing.assert_close(weights["layer.weight"], torch.full((2, 2), (1 - 0.1 * LAMBDA) ** 4))


@pytest.mark.parametrize("make", [sgd, fused_sgd], ids=["plain", "fused"])
def test_a_skipped_step_penalises_nothing(make: Make) -> None:
    class Overflowing(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (
                super().training_step(batch, batch_idx) + (self.layer.weight * (math.inf if batch_idx < 2 else 0)).sum()
            )

    module = Overflowing(make, torch.float32)
    weights = fit(module, L2Penalty(LAMBDA), loader=batches(5), **scaled(256.0))
    torch.testing.assert_close(weights["layer.weight"], torch.full((2, 2), (1 - 0.1 * LAMBDA) ** 3))


# --- several optimizers, other loops ---


def test_each_parameter_once_a_step_of_its_own_optimizer() -> None:
    class Two(pl.LightningModule):
        """`fast` steps at each batch, `slow` at each third one, both by hand."""

        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.fast, self.slow = (nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(2))
            for layer in (self.fast, self.slow):
                nn.init.ones_(layer.weight)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            fast, slow = self.optimizers()
            self.manual_backward((self.fast.weight * 0.0).sum() + (self.slow.weight * 0.0).sum())
            fast.step()
            fast.zero_grad()
            if batch_idx % 3 == 2:
                slow.step()
                slow.zero_grad()

        def configure_optimizers(self) -> list[Optimizer]:
            return [sgd(self.fast.parameters()), sgd(self.slow.parameters())]

    weights = fit(Two(), L2Penalty(LAMBDA), loader=batches(9))
    for name, steps in (("fast.weight", 9), ("slow.weight", 3)):
        expected = torch.full((2, 2), (1 - 0.1 * LAMBDA) ** steps, dtype=torch.float64)
        torch.testing.assert_close(weights[name], expected, rtol=1e-14, atol=0)


def test_lazy_layers() -> None:
    class Lazy(Still):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.LazyLinear(1, bias=False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self.late(batch[0]) * 0.0).sum()

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    rows = Rows()
    module = Lazy()
    weights = fit(module, L2Penalty(LAMBDA), loader=batches(3), logger=rows, log_every_n_steps=1)
    torch.testing.assert_close(weights["layer.weight"], torch.full((2, 2), (1 - 0.1 * LAMBDA) ** 3).double())
    assert list(rows.of("l2_penalty/loss")) == [0, 1, 2]
    start = rows.of("l2_penalty/loss")[0]
    end = LAMBDA / 2 * sum(weights[name].double().square().sum().item() for name in ("layer.weight", "late.weight"))
    assert end == pytest.approx(start * (1 - 0.1 * LAMBDA) ** 6, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_where_the_module_calls_backward_itself() -> None:
    class Own(Still):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.late = nn.LazyLinear(1, bias=False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.optimizers().zero_grad()
            (self.late(batch[0]) * 0.0).sum().backward()
            self.before = self.late.weight.detach().cpu().clone()
            self.optimizers().step()

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    module = Own()
    weights = fit(module, L2Penalty(LAMBDA), loader=batches(1))
    torch.testing.assert_close(weights["late.weight"], module.before * (1 - 0.1 * LAMBDA))


def test_a_line_search_on_lazy_layers_sees_the_penalty_from_the_first_step_on() -> None:
    class Lazy(Regression):
        def __init__(self, lazy: bool) -> None:
            super().__init__(lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"))
            if lazy:
                self.hidden = nn.LazyLinear(4, dtype=torch.float64)

        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
            if batch_idx == 0:
                torch.manual_seed(3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if isinstance(self.hidden, nn.LazyLinear):
                self.hidden(batch[0])
                self.hidden.load_state_dict(start)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    eager = Lazy(lazy=False)
    start = copy.deepcopy(eager.hidden.state_dict())
    lazy = Lazy(lazy=True)
    lazy.head.load_state_dict(eager.head.state_dict())
    assert_same(fit(lazy, L2Penalty(LAMBDA), loader=data(4)), fit(eager, L2Penalty(LAMBDA), loader=data(4)))


def test_parameters_that_join_later_are_penalised_from_then_on() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.hidden)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.hidden, optimizer, lr=0.1)

    class Module(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum((p * 0.0).sum() for p in self.parameters())

        def configure_optimizers(self) -> Optimizer:
            return sgd([p for p in self.parameters() if p.requires_grad])

    torch.manual_seed(0)
    module = Module()
    start = copy.deepcopy(module)
    weights = fit(module, L2Penalty(LAMBDA), Unfreeze(), loader=data(4), max_epochs=3)
    for name, steps in (("head.weight", 6), ("hidden.weight", 4)):
        expected = start.get_parameter(name).detach() * (1 - 0.1 * LAMBDA) ** steps
        torch.testing.assert_close(weights[name], expected)


# --- the schedule ---


@pytest.mark.parametrize("first", ["penalty", "scheduler"])
@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.filterwarnings("ignore:L2Penalty penalises:UserWarning")
def test_it_follows_the_schedule_if_asked(follow: bool, first: str) -> None:
    rows = Rows()
    decay, eta = 1e-9, 0.1  # so little that only the multiplier counts
    scheduler = WeightDecayScheduler(LinearSchedule(start=0.0, end=2.0))
    penalty = L2Penalty(LAMBDA, follow_schedule=follow)
    callbacks = [scheduler, penalty] if first == "scheduler" else [penalty, scheduler]
    module = Still(lambda p: torch.optim.SGD(p, lr=eta, weight_decay=decay))
    weights = fit(module, *callbacks, loader=batches(5), logger=rows, log_every_n_steps=1)
    multipliers = [0.0, 0.5, 1.0, 1.5, 2.0] if follow else [1.0] * 5
    w = 1.0
    for step, multiplier in enumerate(multipliers):
        assert rows.of("l2_penalty/loss")[step] == pytest.approx(LAMBDA * multiplier / 2 * 4 * w**2, rel=1e-6)
        w *= 1 - eta * LAMBDA * multiplier
    torch.testing.assert_close(weights["layer.weight"], torch.full((2, 2), w).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("first", ["penalty", "scheduler"])
def test_it_follows_a_schedule_that_has_read_nothing_yet(first: str) -> None:
    class Stuck(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("level", 1.0)
            return super().training_step(batch, batch_idx)

    scheduler = WeightDecayScheduler(PlateauSchedule("level", factor=2.0, patience=0))
    penalty = L2Penalty(LAMBDA, follow_schedule=True)
    callbacks = [scheduler, penalty] if first == "scheduler" else [penalty, scheduler]
    weights = fit(Stuck(), *callbacks, loader=batches(1), max_epochs=4)
    # the first epoch sets the best value, those after it don't improve on it
    shrunk = math.prod(1 - 0.1 * LAMBDA * multiplier for multiplier in (1, 1, 2, 4))
    torch.testing.assert_close(weights["layer.weight"], torch.full((2, 2), shrunk).double(), rtol=1e-7, atol=0)


@pytest.mark.filterwarnings("ignore:L2Penalty penalises:UserWarning")
def test_a_multiplier_that_comes_with_the_gradients_is_logged_as_it_acts() -> None:
    class FromGradients(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            decay_groups(trainer.optimizers[0]).multiply(7.0)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            decay_groups(optimizer).multiply(2.0)

    rows = Rows()
    penalty = L2Penalty(LAMBDA, follow_schedule=True)
    weights = fit(Still(), FromGradients(), penalty, loader=batches(1), logger=rows, log_every_n_steps=1)
    torch.testing.assert_close(weights["layer.weight"], torch.full((2, 2), 1 - 0.1 * 2 * LAMBDA).double())
    assert rows.of("l2_penalty/loss") == {0: pytest.approx(2 * LAMBDA / 2 * 4)}


# --- the log ---


class Recorder(pl.Callback):
    """The weights that each batch is computed with, and its loss."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: param.detach().clone().double() for name, param in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logged_values(accumulate: int, dtype: torch.dtype) -> None:
    module, rows, recorder = seeded().to(dtype), Rows(), Recorder()
    rules = [DecayRule("head", pattern=r"^head\.weight", multiplier=0.1), "default"]
    loader = [[tensor.to(dtype) for tensor in batch] for batch in data()]  # 10 batches: 4 windows of 3, 3, 3 and 1
    callback = L2Penalty(LAMBDA, rules=rules, log_objective=True)
    trainer = make_trainer(callback, recorder, logger=rows, log_every_n_steps=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(loader, batch_size=None))
    steps = list(range(1, 10, 2)) if accumulate == 1 else [1, 3]
    assert list(rows.of("l2_penalty/loss")) == steps
    for step in steps:
        weights = recorder.weights[step * accumulate]
        hidden = LAMBDA / 2 * weights["hidden.weight"].square().sum().item()
        head = 0.1 * LAMBDA / 2 * weights["head.weight"].square().sum().item()
        # Lightning divides by the full window in a short one too, and that is the objective whose gradient is used.
        loss = sum(recorder.losses[step * accumulate : (step + 1) * accumulate]) / accumulate
        assert rows.of("l2_penalty/loss")[step] == pytest.approx(hidden + head, rel=1e-6)
        assert rows.of("l2_penalty/loss/decay")[step] == pytest.approx(hidden, rel=1e-6)
        assert rows.of("l2_penalty/loss/head")[step] == pytest.approx(head, rel=1e-6)
        assert rows.of("l2_penalty/objective")[step] == pytest.approx(loss + hidden + head, rel=1e-6)
    last = rows.of("l2_penalty/loss")[steps[-1]]
    assert trainer.callback_metrics["l2_penalty/loss"] == pytest.approx(last, rel=1e-6)


def test_one_rule_needs_no_key_of_its_own(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(L2Penalty(LAMBDA), logger=logger, log_every_n_steps=5)
    trainer.fit(seeded(), data())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert {key for key in header.split(",") if "penalty" in key} == {"l2_penalty/loss"}
    assert {key for key in trainer.callback_metrics if "penalty" in key} == {"l2_penalty/loss"}


@pytest.mark.parametrize(("every_n_steps", "steps"), [(0, []), (4, [3, 7]), (None, [4, 9])])
def test_cadence(every_n_steps: int | None, steps: list[int]) -> None:
    rows = Rows()
    fit(seeded(), L2Penalty(LAMBDA, every_n_steps=every_n_steps), logger=rows, log_every_n_steps=5)
    assert list(rows.of("l2_penalty/loss")) == steps


def test_it_can_be_monitored_from_the_first_step_on() -> None:
    rows = Rows()
    trainer = make_trainer(L2Penalty(LAMBDA), logger=rows, log_every_n_steps=100)
    trainer.fit(Still(), batches(3))
    assert trainer.callback_metrics["l2_penalty/loss"] == pytest.approx(LAMBDA / 2 * 4)
    assert not rows.of("l2_penalty/loss")


def test_early_stopping_can_watch_it() -> None:
    stop = EarlyStopping("l2_penalty/loss", stopping_threshold=1e-3, check_on_train_epoch_end=True)
    trainer = make_trainer(L2Penalty(5.0), stop, max_epochs=50, log_every_n_steps=1)
    trainer.fit(Still(), batches(1))
    # 4 weights of (1 - 0.5)^t: 5/2 * 4 * 0.25^t is below 1e-3 from t = 7 on, in the eighth epoch.
    assert trainer.current_epoch == 8


def test_lbfgs_logs_one_value_a_step_that_of_its_first_evaluation() -> None:
    rows, recorder = Rows(), Recorder()
    fit(seeded(SOLVERS["LBFGS"][0]), L2Penalty(LAMBDA), recorder, logger=rows, log_every_n_steps=1)
    assert len(rows.of("l2_penalty/loss")) == 10
    for step, value in rows.of("l2_penalty/loss").items():
        weights = recorder.weights[step]
        squares = weights["hidden.weight"].square().sum() + weights["head.weight"].square().sum()
        assert value == pytest.approx(LAMBDA / 2 * squares.item(), rel=1e-9)


# --- with other callbacks, again and again, from files ---


@pytest.mark.parametrize(
    ("make", "callbacks"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), []),
        (sgd, [lambda: WeightDecay(0.1, summary=False)]),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))],
        ),
    ],
    ids=["AdamW's default", "WeightDecay", "a schedule that starts at 0"],
)
def test_decay_in_both_places_is_warned_of(make: Make, callbacks: list[Any]) -> None:
    message = (
        r"L2Penalty penalises [24] parameters that their optimizer decays as well, such as 'hidden.weight', "
        r"'head.weight': they shrink twice\. Set the optimizer's `weight_decay` to 0"
    )
    with pytest.warns(UserWarning, match=message):
        fit(seeded(make), L2Penalty(LAMBDA), *[callback() for callback in callbacks])


def test_no_warning_where_rules_keep_them_apart() -> None:
    head = DecayRule("head", pattern=r"^head\.", weight_decay=0.0)
    rest = DecayRule("rest", pattern=r"^hidden\.", weight_decay=0.0)
    callbacks = [WeightDecay(0.1, rules=[rest, "default"], summary=False), L2Penalty(LAMBDA, rules=[head, "default"])]
    fit(seeded(), *callbacks)
    fit(seeded(), *reversed(callbacks))


@pytest.mark.parametrize("order", [1, -1], ids=["penalty first", "decay first"])
@pytest.mark.parametrize("twice", [False, True], ids=["apart", "twice"])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_told_of_once_all_have_decided(twice: bool, order: int) -> None:
    class Lazy(Regression):
        def __init__(self) -> None:
            super().__init__(lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1))
            self.hidden = nn.LazyLinear(4, dtype=torch.float64)

    def rules(name: str) -> list[DecayRule]:
        return [DecayRule(name, pattern=rf"^{name}\.weight"), DecayRule("others", weight_decay=0.0)]

    decay = WeightDecay(rules=rules("hidden" if twice else "head"), summary=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Lazy(), *[L2Penalty(LAMBDA, rules=rules("hidden")), decay][::order])
    texts = [str(one.message) for one in told if "L2Penalty" in str(one.message)]
    assert [text.split(", such as ")[0] for text in texts] == twice * [
        "L2Penalty penalises 1 parameters that their optimizer decays as well"
    ]


def test_it_follows_an_adaptive_schedule_where_nothing_decays_by_itself() -> None:
    """Its multiplier is the ratio of the norms of the loss's gradient and of the weights, exempt ones included."""
    rows = Rows()
    module, recorder = seeded(), GradientRatio()
    scheduler = WeightDecayScheduler(AdaptiveDecay(smoothing=0.0))
    fit(module, L2Penalty(LAMBDA, follow_schedule=True), scheduler, recorder, logger=rows, log_every_n_steps=1)
    assert list(rows.of("l2_penalty/loss").values()) == pytest.approx(recorder.penalties, rel=1e-9)
    assert min(recorder.penalties) > 0


class GradientRatio(pl.Callback):
    """Notes the penalty with lambda times |g| / |w|."""

    def __init__(self) -> None:
        self.penalties: list[float] = []

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
        squares = sum(p.detach().square().sum() for p in (module.hidden.weight, module.head.weight))
        self.penalties.append(float(gradients.norm() / weights.norm() * LAMBDA / 2 * squares))


def test_a_second_fit_copies_and_pickles() -> None:
    callback = L2Penalty(LAMBDA)
    first = fit(seeded(), callback)
    for twin in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert_same(fit(seeded(), twin), first, 0.0)
        assert twin._fit is None


def test_nothing_is_left_of_it_after_an_exception() -> None:
    module = seeded()
    optimizer = torch.optim.LBFGS(module.parameters())
    module.make = lambda params: optimizer
    module.training_step = lambda batch, batch_idx: 1 / 0
    callback = L2Penalty(LAMBDA)
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    assert callback._fit is None
    assert not optimizer._optimizer_step_pre_hooks


def test_checkpoints_know_nothing_of_it(tmp_path: Path) -> None:
    def save(*callbacks: pl.Callback) -> dict[str, Any]:
        trainer = make_trainer(*callbacks)
        trainer.fit(seeded(), data())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return torch.load(tmp_path / "last.ckpt", weights_only=True)

    ours, plain = save(L2Penalty(LAMBDA)), save()
    assert ours["callbacks"] == plain["callbacks"] == {}
    assert ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resume_in_the_middle_of_an_epoch_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1}
    save = ModelCheckpoint(tmp_path, "half", every_n_train_steps=3, save_top_k=-1)
    fit(Still(), L2Penalty(LAMBDA), save, loader=batches(10), enable_checkpointing=True, **options)
    module, rows = Still(), Rows()
    trainer = make_trainer(L2Penalty(LAMBDA), logger=rows, **options)
    trainer.fit(module, batches(10), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(module.layer.weight.detach(), torch.full((2, 2), (1 - 0.1 * LAMBDA) ** 5).double())
    expected = {step: LAMBDA / 2 * 4 * (1 - 0.1 * LAMBDA) ** (2 * step) for step in (3, 4)}
    assert rows.of("l2_penalty/loss") == pytest.approx(expected, rel=1e-12)


def test_lambda_from_a_prior(caplog: pytest.LogCaptureFixture) -> None:
    """N(0, 0.5^2) and 20 samples: lambda = 1 / (20 * 0.25)."""
    with caplog.at_level("INFO"):
        converted = fit(seeded(), L2Penalty(GaussianPrior(sigma=0.5)))
    assert_same(converted, fit(seeded(), L2Penalty(0.2)))
    assert re.search(r"L2Penalty: GaussianPrior\(sigma=0.5.*\) is 0.2\.", caplog.text)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own use
@pytest.mark.parametrize(
    "weight_decay", ["0.2", "{class_path: lightning_l2.convert.GaussianPrior, init_args: {sigma: 0.5}}"]
)
def test_from_yaml(weight_decay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_l2.callbacks.l2_penalty.L2Penalty
      init_args:
        weight_decay: {weight_decay}
        follow_schedule: false
        rules:
          - {{name: head, pattern: "^head", multiplier: 0.5}}
          - default
"""
    )

    class Module(Regression):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__()

        def train_dataloader(self) -> DataLoader[Any]:
            return data()

    cli = LightningCLI(Module, args=["fit", "--config", str(config)], save_config_callback=None)
    rules = [DecayRule("head", pattern="^head", multiplier=0.5), "default"]
    expected = fit(seeded(), L2Penalty(0.2, rules=rules))
    assert_same(dict(cli.model.named_parameters()), expected)


def test_two_processes_penalise_once() -> None:
    module = Still()
    make_trainer(L2Penalty(LAMBDA), accelerator="cpu", strategy="ddp_fork", devices=2).fit(module, batches(6))
    expected = torch.full((2, 2), (1 - 0.1 * LAMBDA) ** 3, dtype=torch.float64)
    torch.testing.assert_close(module.layer.weight.detach(), expected, rtol=1e-14, atol=0)


class Growing(Still):
    """Gets a second layer of ones in its second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.second = nn.Linear(2, 2, dtype=torch.float64, device=self.device)
            nn.init.ones_(self.second.weight)
            self.optimizers().optimizer.add_param_group({"params": list(self.second.parameters())})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + sum((p * 0.0).sum() for p in self.second.parameters()) if hasattr(self, "second") else loss


def test_it_penalises_parameters_that_a_module_gets_in_training() -> None:
    weights = fit(Growing(), L2Penalty(LAMBDA), loader=batches(3), max_epochs=2)
    expected = torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(weights["layer.weight"], expected * (1 - 0.1 * LAMBDA) ** 6, rtol=1e-14, atol=0)
    torch.testing.assert_close(weights["second.weight"], expected * (1 - 0.1 * LAMBDA) ** 3, rtol=1e-14, atol=0)


# --- misuse ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, "L2Penalty's `weight_decay` must be finite and at least 0, got -0.1."),
        ({"weight_decay": math.inf}, ValueError, "must be finite and at least 0, got inf."),
        ({"weight_decay": np.float32("nan")}, ValueError, "must be finite and at least 0, got"),
        ({"weight_decay": math.nan}, ValueError, "must be finite and at least 0, got nan."),
        ({"weight_decay": None}, TypeError, "L2Penalty needs `weight_decay` to be float | Conversion, but got None"),
        ({"weight_decay": True}, TypeError, "to be float | Conversion, but got True of type bool."),
        (
            {"weight_decay": 0.1, "every_n_steps": -1},
            ValueError,
            "Expected `every_n_steps` to be at least 0, got",
        ),
        ({"weight_decay": 0.1, "rules": "none"}, ValueError, "none"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        L2Penalty(**arguments)


def refused(module: pl.LightningModule, callback: L2Penalty, error: type[Exception], message: str) -> None:
    steps: list[int] = []
    module.training_step = lambda batch, batch_idx: steps.append(batch_idx)
    with pytest.raises(error, match=re.escape(message)):
        fit(module, callback)
    assert not steps
    assert callback._fit is None


def test_a_rule_that_matches_nothing_is_refused_before_the_first_step() -> None:
    rules = [DecayRule("tail", pattern="^tail", weight_decay=0.0), "default"]
    module = seeded()
    module.val_dataloader = data
    module.validation_step = lambda batch, batch_idx: pytest.fail("the sanity check costs time")
    refused(module, L2Penalty(LAMBDA, rules=rules), ValueError, "Rule 'tail' matched no parameter")


def test_two_of_them_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="several L2Penalty callbacks, whose penalties would add up"):
        fit(seeded(), L2Penalty(LAMBDA), L2Penalty(LAMBDA))


def test_a_schedule_that_nobody_sets_is_refused() -> None:
    message = "L2Penalty(follow_schedule=True) has nothing to follow: no parameter group has a multiplier. Add the call"
    refused(seeded(), L2Penalty(LAMBDA, follow_schedule=True), MisconfigurationException, message)


def test_no_optimizer_is_refused() -> None:
    message = "L2Penalty needs an optimizer, and `configure_optimizers` returned None. Return an optimizer, or remove"
    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        refused(seeded(lambda params: None), L2Penalty(LAMBDA), MisconfigurationException, message)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    other = nn.Linear(2, 2)
    message = "L2Penalty found none of the module's parameters in its optimizers, which would train something else."
    refused(seeded(lambda params: sgd(other.parameters())), L2Penalty(LAMBDA), MisconfigurationException, message)


def test_the_objective_of_manual_optimization_is_refused() -> None:
    module = seeded()
    module.automatic_optimization = False
    message = "L2Penalty(log_objective=True) needs automatic optimization, where a step has one loss."
    refused(module, L2Penalty(LAMBDA, log_objective=True), MisconfigurationException, message)
