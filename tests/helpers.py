"""What several tests need: tiny modules, a quiet Trainer, and probes that watch an optimizer from outside.

Nothing here imports the package under test, so no expectation can come from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

# LIGHTNING_L2_ACCELERATOR=gpu trains on a GPU what else trains on the CPU
ACCELERATOR = os.environ.get("LIGHTNING_L2_ACCELERATOR", "cpu")
DEVICE = "cuda" if ACCELERATOR == "gpu" else "cpu"

DECAYED = {"body.0.weight", "head.weight"}
EXEMPT = {"body.0.bias", "body.1.weight", "body.1.bias", "head.bias"}

MakeOptimizer = Callable[[Any], Optimizer]


def sgd(params: Any, **options: Any) -> Optimizer:
    return torch.optim.SGD(params, **{"lr": 0.1, "weight_decay": 0.1, **options})


class Net(pl.LightningModule):
    """Two linear layers around a LayerNorm; optimizer and LR scheduler are handed in."""

    def __init__(
        self,
        optimizer: MakeOptimizer = sgd,
        scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "step",
        grouped: Callable[[Net], Any] | None = None,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, 2)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.interval, self.grouped = interval, grouped

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.grouped(self) if self.grouped else self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class ValidatedNet(Net):
    """The same with the steps of every other loop."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class Shrinking(pl.LightningModule):
    """Float64 ones under a loss whose gradient is exactly 0: what moves them is weight decay and nothing else."""

    def __init__(self, optimizer: MakeOptimizer = sgd, scheduler: Callable[[Optimizer], Any] | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 2)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.watches: list[DecayWatch] = []

    def loss(self) -> Tensor:
        return sum((parameter * 0.0).sum() for parameter in self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss()

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        self.watches = [DecayWatch(self, optimizer)]
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


class DecayWatch:
    """Measure lambda from what a real SGD step did to weights that had no gradient: lambda = (1 - w'/w) / lr."""

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.named = {name: p for name, p in module.named_parameters() if id(p) in mine}
        self.steps: list[dict[str, float]] = []
        self.lrs: list[float] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in self.named.items()}

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        lr = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        self.steps.append(
            {
                name: ((1.0 - p.detach() / self.weights[name]) / lr[id(p)]).flatten()[0].item()
                for name, p in self.named.items()
            }
        )

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def record_rates(module: nn.Module, optimizer: Optimizer) -> list[dict[str, float]]:
    """The learning rate of each parameter, by name, in every step that the optimizer makes from here on."""
    rates: list[dict[str, float]] = []

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        rates.append(
            {names[id(p)]: float(g["lr"]) for g in optimizer.param_groups for p in g["params"] if id(p) in names}
        )

    optimizer.register_step_post_hook(note)
    return rates


class Rows(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append(dict(metrics))
        self.steps.append(step)

    def of(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]

    def by_step(self, key: str) -> dict[int | None, Any]:
        return {step: row[key] for step, row in zip(self.steps, self.rows, strict=True) if key in row}


def parser_of(kind: Any) -> Any:
    """A parser of one value of a type, as LightningCLI has for the arguments of a callback."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def through_yaml(kind: Any, given: object) -> tuple[Any, str]:
    """What a YAML file's value becomes, and how it is printed, from which the same comes again."""
    parser = parser_of(kind)
    printed = parser.dump(parser.parse_object({"value": given}))
    again = parser.parse_string(printed)
    assert parser.dump(again) == printed
    return parser.instantiate(again).value, printed


def plain(value: Any) -> Any:
    """The value with lists for tensors and arrays, so that ``==`` compares it bit for bit."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def data(samples: int = 32, batch_size: int = 4, inputs: int = 4, outputs: int = 2) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, inputs, generator=generator)
    return DataLoader(TensorDataset(x, torch.randn(samples, outputs, generator=generator)), batch_size=batch_size)


class _Repeated(Dataset[tuple[Tensor, Tensor]]):
    """One sample over and over: a resumed run then sees what an uninterrupted one sees."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.sample = torch.randn(4, generator=generator), torch.randn(2, generator=generator)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample


class _Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """A data set that doesn't know its length."""

    def __init__(self, length: int) -> None:
        self.repeated = _Repeated(length)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.repeated[i] for i in range(self.repeated.length))


def batches(count: int) -> DataLoader[Any]:
    """``count`` equal batches."""
    return DataLoader(_Repeated(count), batch_size=1)


def stream(count: int) -> DataLoader[Any]:
    """``count`` equal batches of an iterable data set."""
    return DataLoader(_Stream(count), batch_size=1)


def make_trainer(callbacks: Iterable[Any] = (), **options: Any) -> pl.Trainer:
    """A Trainer that prints and writes nothing unless it is asked to."""
    defaults: dict[str, Any] = {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "logger": False,
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fp16(**scaler: Any) -> MixedPrecision:
    """fp16 with a GradScaler of these options, which Lightning's own flag gives on GPUs only."""
    return MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, **scaler))


def hand_grouped(decay: float, exempt: float = 0.0) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """How an expert writes the groups of `Net` and `Shrinking`: the weight matrices decay, the rest doesn't."""

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        named = dict(module.named_parameters())
        return [
            {"params": [p for name, p in named.items() if name in DECAYED], "weight_decay": decay, "name": "decay"},
            {"params": [p for name, p in named.items() if name in EXEMPT], "weight_decay": exempt, "name": "no_decay"},
        ]

    return groups


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def assert_same_weights(actual: nn.Module | dict[str, Tensor], expected: nn.Module | dict[str, Tensor]) -> None:
    """Bit for bit."""
    actual = weights(actual) if isinstance(actual, nn.Module) else actual
    expected = weights(expected) if isinstance(expected, nn.Module) else expected
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def layout(optimizer: Optimizer, module: nn.Module) -> list[dict[str, Any]]:
    """The groups as a user sees them: the keys in their order, the values, and the parameters by name."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [
        {key: [names[id(p)] for p in value] if key == "params" else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]
