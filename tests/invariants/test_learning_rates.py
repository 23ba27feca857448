"""The learning rate (and momentum) of every parameter follows the same path with and without the callbacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Net, batches, make_trainer

# What Lightning says when a checkpoint's callbacks aren't all there again.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

Row = dict[str, tuple[float, Any, Any]]
STEPS = 16


class WarmupCosine:
    """Stands for the schedulers of timm: no torch class, per-group lists under names of their own."""

    def __init__(self, optimizer: Optimizer, warmup_t: int = 4, warmup_lr_init: float = 0.001) -> None:
        self.optimizer, self.warmup_t = optimizer, warmup_t
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_values = [group["initial_lr"] for group in optimizer.param_groups]
        self.warmup_steps = [(value - warmup_lr_init) / warmup_t for value in self.base_values]
        self.warmup_lr_init = warmup_lr_init
        self.update([warmup_lr_init for _ in self.base_values])

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def step(self, epoch: int, metric: Any = None) -> None:
        if epoch < self.warmup_t:
            values = [self.warmup_lr_init + epoch * step for step in self.warmup_steps]
        else:
            values = [value / (1 + epoch) for value in self.base_values]
        self.update(values)

    def update(self, values: list[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            group["lr"] = value


class Recorder(pl.Callback):
    """lr, momentum and betas of each parameter in each real step."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch(pl_module, trainer.optimizers[0])

    def watch(self, module: nn.Module, optimizer: Optimizer) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        optimizer.register_step_post_hook(lambda opt, args, kwargs: self.rows.append(self.row(opt, names)))

    @staticmethod
    def row(optimizer: Optimizer, names: dict[int, str]) -> Row:
        return {
            names[id(p)]: (float(group["lr"]), group.get("momentum"), group.get("betas"))
            for group in optimizer.param_groups
            for p in group["params"]
        }


def halves(module: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(module.body.parameters()), "lr": 0.01},
        {"params": list(module.head.parameters()), "lr": 0.03},
    ]


def whole(module: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(module.parameters()), "lr": 0.02}]


def decay_by(factor: float) -> Callable[[int], float]:
    return lambda step: factor**step


SCALAR: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, decay_by(0.9)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 11]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=0.0005),
    "SWALR": lambda o: SWALR(o, 0.001, anneal_epochs=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 6)], [4]
    ),
    "SequentialLR-of-StepLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)], [4, 9]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.LambdaLR(o, decay_by(0.95))], o
    ),
    "Sequential-in-Chained": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(o, 0.5, 3),
            lr_scheduler.SequentialLR(
                o, [lr_scheduler.LambdaLR(o, decay_by(0.9)), lr_scheduler.CosineAnnealingLR(o, 5)], [4]
            ),
        ],
        o,
    ),
    "Chained-in-Chained": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(o, 0.5, 3),
            lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 4)], o),
        ],
        o,
    ),
    "timm-like": WarmupCosine,
}

# One entry for each of the user's two groups.
LISTS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [decay_by(0.9), decay_by(0.8)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.8]),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, [0.001, 0.002], [0.1, 0.3], 3, base_momentum=[0.7, 0.8], max_momentum=[0.9, 0.95]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.3], total_steps=40, base_momentum=[0.7, 0.8], max_momentum=[0.9, 0.95]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[0.0005, 0.001]),
    "SWALR": lambda o: SWALR(o, [0.001, 0.002], anneal_epochs=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LambdaLR(o, [decay_by(0.9), decay_by(0.8)]),
            lr_scheduler.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.7]),
        ],
        [5],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LambdaLR(o, [decay_by(0.9), decay_by(0.8)]), lr_scheduler.StepLR(o, 4)], o
    ),
}

CASES = [pytest.param(make, whole, id=f"{name}-one-group") for name, make in SCALAR.items()]
CASES += [pytest.param(make, halves, id=f"{name}-two-groups") for name, make in SCALAR.items()]
CASES += [pytest.param(make, halves, id=f"{name}-lists") for name, make in LISTS.items()]
MAKERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.02),
}


class Scheduled(Net):
    """Steps its scheduler with every batch; the plateau one reads a metric that falls, then stays."""

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        configured["lr_scheduler"].update(monitor="seen", strict=False)
        return configured

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("seen", 1.0 / min(self.global_step + 1, 5))
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, WarmupCosine):
            scheduler.step(self.global_step)
        elif metric is None or not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step()
        else:
            scheduler.step(metric)


def ours() -> list[pl.Callback]:
    schedule = LinearSchedule(start=1.0, end=2.0)
    return [WeightDecay(0.2, summary=False), WeightDecayScheduler(schedule, total_steps=STEPS)]


def fit(
    make: Any, grouped: Any, optimizer: str, callbacks: list[pl.Callback], epochs: int, ckpt_path: Any = None
) -> tuple[list[Row], pl.Trainer]:
    torch.manual_seed(0)
    model = Scheduled(MAKERS[optimizer], make, grouped=grouped)
    recorder = Recorder()
    trainer = make_trainer([recorder, *callbacks], max_epochs=epochs)
    trainer.fit(model, batches(STEPS // 2), ckpt_path=ckpt_path)
    return recorder.rows, trainer


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step\\(\\)`:UserWarning")
@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize(("make", "grouped"), CASES)
def test_first_fit_and_resume(make: Any, grouped: Any, optimizer: str, tmp_path: Path) -> None:
    expected, _ = fit(make, grouped, optimizer, [], epochs=2)
    actual, _ = fit(make, grouped, optimizer, ours(), epochs=2)
    assert len(expected) == STEPS
    assert actual == expected
    assert len({row["head.weight"] for row in expected}) > 1, "the scheduler was to change something"

    for first, second in (([], ours()), (ours(), []), (ours(), ours())):
        path = tmp_path / f"{len(first)}{len(second)}.ckpt"
        before, trainer = fit(make, grouped, optimizer, first, epochs=1)
        trainer.save_checkpoint(path)
        after, _ = fit(make, grouped, optimizer, second, epochs=2, ckpt_path=path)
        assert before + after == expected


FROM_TRANSFORMERS: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, 4),
    "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 4, 20),
    "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 4, 20),
    "restarts": lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 4, 20, 3),
    "polynomial": lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, 4, 20),
    "root": lambda o: transformers.get_inverse_sqrt_schedule(o, 4),
    "stable": lambda o: transformers.get_wsd_schedule(o, 3, 5, num_training_steps=20),
}


@pytest.mark.parametrize("name", FROM_TRANSFORMERS)
def test_schedules_of_transformers(name: str, tmp_path: Path) -> None:
    test_first_fit_and_resume(FROM_TRANSFORMERS[name], halves, "AdamW", tmp_path)


@pytest.mark.parametrize(("interval", "frequency"), [("epoch", 1), ("epoch", 2), ("step", 2)])
@pytest.mark.parametrize("name", ["CosineAnnealingWarmRestarts", "CyclicLR", "ReduceLROnPlateau", "SequentialLR"])
def test_intervals_and_frequencies(name: str, interval: str, frequency: int) -> None:
    class Sometimes(Scheduled):
        def configure_optimizers(self) -> Any:
            configured = super().configure_optimizers()
            configured["lr_scheduler"].update(interval=interval, frequency=frequency, monitor="mean")
            return configured

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("mean", 1.0, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def run(callbacks: list[pl.Callback]) -> list[Row]:
        torch.manual_seed(0)
        recorder = Recorder()
        model = Sometimes(MAKERS["SGD"], SCALAR[name], grouped=halves)
        trainer = make_trainer([recorder, *callbacks], max_epochs=8, accumulate_grad_batches=2)
        trainer.fit(model, batches(5))
        return recorder.rows

    expected = run([])
    assert run(ours()) == expected
    assert len({row["head.weight"] for row in expected}) > 1, "the scheduler was to change something"


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "ExponentialLR", "SequentialLR", "OneCycleLR"])
def test_a_rate_that_is_a_tensor(name: str) -> None:
    def run(callbacks: list[pl.Callback]) -> list[Row]:
        torch.manual_seed(0)
        recorder = Recorder()
        model = Scheduled(lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.02)), SCALAR[name])
        make_trainer([recorder, *callbacks], max_epochs=2).fit(model, batches(STEPS // 2))
        return recorder.rows

    expected = run([])
    assert run(ours()) == expected
    assert len({row["head.weight"] for row in expected}) > 1, "the scheduler was to change something"


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} <= {name.split("-")[0] for name in SCALAR}


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_several_fits_of_one_optimizer_and_scheduler(interval: str) -> None:
    """As LightningCLI does it: the objects are made once and used by every fit."""

    def run(callbacks: list[pl.Callback]) -> list[Row]:
        torch.manual_seed(0)
        model = Net(interval=interval)
        optimizer = MAKERS["SGD"](model.parameters())
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 40)
        model.make_optimizer = lambda params: optimizer
        model.make_scheduler = lambda opt: scheduler
        recorder = Recorder()
        recorder.watch(model, optimizer)
        for _ in range(3):
            make_trainer(callbacks, max_epochs=2).fit(model, batches(4))
        return recorder.rows

    assert run(ours()) == run([])
