"""DeepSpeed's contract in one process, with a stand-in for its engine: Lightning's own strategy runs, `deepspeed` not.

What the stand-in keeps of ZeRO: the engine takes the optimizer at construction, drops empty groups in place, puts one
flat master copy per group in place of the module's parameters, which it keeps as `bit16_groups`, offers `param_groups`
of the optimizer it wraps, and lets that one step with one group after the other. `test_strategies.py` runs DeepSpeed
itself where it is installed.
"""

import sys
from collections.abc import Iterator
from math import nan
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies import deepspeed as lightnings
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

from lightning_l2 import (
    DecayRule,
    L2NormMonitor,
    L2Penalty,
    NormConstraint,
    WeightDecay,
    WeightDecayScheduler,
    weight_decay_in_force,
)
from lightning_l2.adaptive import AdaptiveDecay, StableDecay
from lightning_l2.norms import squared_norms
from lightning_l2.schedules import LinearSchedule
from lightning_l2.sharding import process_groups, whole
from tests.helpers import Net, Rows, batches, hand_grouped, make_trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You have specified an optimizer and/or scheduler within the DeepSpeed config"),
]


class ZeroOptimizer:
    """Flat master copies of each group; no torch optimizer, only in front of one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.bit16_groups: list[list[nn.Parameter]] = []
        for group in optimizer.param_groups:
            self.bit16_groups.append(group["params"])
            flat = torch.cat([p.detach().flatten() for p in group["params"]])
            group["params"] = [nn.Parameter(flat)]
        optimizer.state.clear()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:
        for members, group in zip(self.bit16_groups, self.param_groups, strict=True):
            group["params"][0].grad = torch.cat([p.grad.flatten() for p in members])
        groups = self.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        with torch.no_grad():
            for members, group in zip(self.bit16_groups, self.param_groups, strict=True):
                parts = group["params"][0].split([p.numel() for p in members])
                for p, part in zip(members, parts, strict=True):
                    p.copy_(part.view_as(p))

    def read_members(self) -> None:
        with torch.no_grad():
            for members, group in zip(self.bit16_groups, self.param_groups, strict=True):
                group["params"][0].copy_(torch.cat([p.flatten() for p in members]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in (p for members in self.bit16_groups for p in members):
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class Engine(nn.Module):
    def __init__(self, module: nn.Module, optimizer: ZeroOptimizer, lr_scheduler: Any) -> None:
        super().__init__()
        self.module, self.optimizer, self.lr_scheduler = module, optimizer, lr_scheduler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_checkpoint(self, folder: Any, client_state: dict[str, Any], **kwargs: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "checkpoint").mkdir(exist_ok=True)
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "client": client_state}
        torch.save(state, Path(folder) / "checkpoint" / "state.pt")

    def load_checkpoint(self, folder: Any, **kwargs: Any) -> tuple[str, dict[str, Any]]:
        state = torch.load(Path(folder) / "checkpoint" / "state.pt", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.read_members()
        return "checkpoint", state["client"]


def initialize(model: nn.Module, config: dict[str, Any], optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> Any:
    if optimizer is None and "optimizer" in config:
        optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])
    zero = ZeroOptimizer(optimizer)
    return Engine(model, zero, lr_scheduler), zero, None, lr_scheduler


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy as it is, but for its wish for a GPU and for processes."""

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        pass

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor


@pytest.fixture(autouse=True)
def _deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("deepspeed")
    logger = SimpleNamespace(setLevel=lambda level: None)
    module.utils = SimpleNamespace(logging=SimpleNamespace(logger=logger))
    module.initialize, module.__version__ = initialize, "0.18.0"
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setattr(lightnings, "_DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr(lightnings, "_DEEPSPEED_GREATER_EQUAL_0_16", True)
    return


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def ours() -> list[pl.Callback]:
    schedule = LinearSchedule(start=0.0, end=1.0)
    return [WeightDecay(0.3, summary=False), WeightDecayScheduler(schedule, total_steps=10), L2NormMonitor()]


class Expert(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.3 * trainer.global_step / 9


def fit(
    callbacks: list[pl.Callback],
    strategy: Any = None,
    ckpt: Path | None = None,
    epochs: int = 2,
    logger: Any = False,
    **net: Any,
) -> Any:
    torch.manual_seed(0)
    model = Net(adamw, **net)
    strategy = OnCPU(config={"zero_optimization": {"stage": 2}}) if strategy is None else strategy
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"accelerator": "cpu", "max_epochs": epochs, "enable_checkpointing": saves, "logger": logger}
    trainer = make_trainer(callbacks, strategy=strategy, **options)
    trainer.fit(model, batches(5), ckpt_path=ckpt)
    return model, trainer


def assert_close(actual: nn.Module, expected: nn.Module) -> None:
    for (name, value), other in zip(weights(actual).items(), weights(expected).values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_the_stand_in_trains_as_torch_does() -> None:
    assert_close(fit([])[0], fit([], "auto")[0])


class TimmLike(lrs.LRScheduler):
    """One base value and one warm-up step a group, and no count of them."""

    def __init__(self, optimizer: Optimizer, name: str = "warmup_steps") -> None:
        self.name = name
        setattr(self, name, [group["lr"] / 3 for group in optimizer.param_groups])
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        pairs = zip(getattr(self, self.name), self.base_lrs, strict=True)
        return [step * (self.last_epoch + 1) if self.last_epoch < 3 else base / self.last_epoch for step, base in pairs]


SCHEDULERS: dict[str, Any] = {
    "none": None,
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 6),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "one-cycle": lambda o: lrs.OneCycleLR(o, 0.02, total_steps=11),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.001, 0.02, 3, cycle_momentum=False),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 3), lrs.CosineAnnealingLR(o, 6)], [3]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, 1.0, 3), lrs.ExponentialLR(o, 0.9)]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, 5),
    "timm": TimmLike,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_groups_are_split_before_the_engine_takes_the_optimizer(scheduler: Any) -> None:
    model, trainer = fit(ours(), scheduler=scheduler)
    expected, _ = fit([Expert()], "auto", grouped=hand_grouped(0.3), scheduler=scheduler)
    assert_close(model, expected)
    assert len(trainer.optimizers[0].param_groups) == 2


@pytest.mark.parametrize(
    "of",
    [
        lambda o, rates: lrs.OneCycleLR(o, rates, total_steps=11),
        lambda o, rates: lrs.LambdaLR(o, [lambda step, rate=rate: (1 - rate) ** step for rate in rates]),
    ],
    ids=["one-cycle", "lambda"],
)
def test_a_list_for_the_users_groups_is_one_for_theirs(of: Any) -> None:
    """Body and head have learning rates of their own, and each is split in two."""

    def two(module: Net) -> Any:
        return [{"params": list(layer.parameters())} for layer in (module.body, module.head)]

    def four(module: Net) -> Any:
        by_ndim = [
            [p for p in group["params"] if (p.ndim > 1) is large] for group in two(module) for large in (True, False)
        ]
        return [{"params": part, "weight_decay": 0.3 * (part[0].ndim > 1)} for part in by_ndim]

    actual, _ = fit([WeightDecay(0.3, summary=False)], grouped=two, scheduler=lambda o: of(o, [0.01, 0.05]))
    expected, _ = fit([], "auto", grouped=four, scheduler=lambda o: of(o, [0.01, 0.01, 0.05, 0.05]))
    assert_close(actual, expected)


def test_a_list_of_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TimmLike has \['floors'\], as long as there are parameter groups \(1\)"):
        fit(ours(), scheduler=lambda o: TimmLike(o, "floors"))


class InForce(pl.Callback):
    """Keeps lambda of each coming step, and that its groups tell the same."""

    def __init__(self) -> None:
        self.lambdas: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.lambdas.append(weight_decay_in_force(optimizer))
        assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == self.lambdas[-1]


def test_lambda_in_force_is_that_of_the_coming_step() -> None:
    first, last, rows = InForce(), InForce(), Rows()
    fit([L2NormMonitor(every_n_steps=1), first, *ours()[:2], last], logger=rows)
    expected = [{"decay": pytest.approx(0.3 * step / 9), "no_decay": 0.0} for step in range(10)]
    assert first.lambdas == last.lambdas == expected
    assert [{name: row[f"weight_decay/{name}"] for name in ("decay", "no_decay")} for row in rows.rows] == expected


def test_resume(tmp_path: Path) -> None:
    fit([*ours(), ModelCheckpoint(tmp_path, "half")], epochs=1)
    model, _ = fit(ours(), ckpt=tmp_path / "half.ckpt")
    expected, _ = fit([Expert()], "auto", grouped=hand_grouped(0.3))
    assert_close(model, expected)


class OwnScheduled(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * trainer.global_step / 9


def test_a_schedule_of_the_optimizers_own_lambda_resumes(tmp_path: Path) -> None:
    """The checkpoint has what the schedule wrote, and not the base."""

    def ramp() -> WeightDecayScheduler:
        return WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), total_steps=10)

    fit([ramp(), ModelCheckpoint(tmp_path, "half")], epochs=1)
    model, _ = fit([ramp()], ckpt=tmp_path / "half.ckpt")
    assert_close(model, fit([OwnScheduled()], "auto")[0])


def test_a_piece_of_a_parameter_ends_where_its_padding_begins() -> None:
    """ZeRO-3 cuts a parameter into equal pieces, and what the last one has too much holds anything."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parameter = nn.Parameter(torch.zeros(0))
        parameter.ds_tensor, parameter.ds_numel = torch.tensor([1.0, 2.0, 4.0, 2.0, nan]), 4
        parameter.ds_shape, parameter.ds_process_group = torch.Size([2, 2]), dist.group.WORLD
        assert squared_norms([parameter]).tolist() == [25.0]
        assert whole(parameter).tolist() == [[1.0, 2.0], [4.0, 2.0]]
        assert process_groups(parameter) == [dist.group.WORLD]
    finally:
        dist.destroy_process_group()


class WeightsBefore(pl.Callback):
    """Keeps the squares that the last step started from."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.squares = {name: float(p.detach().double().square().sum()) for name, p in pl_module.named_parameters()}


def test_norms_are_those_of_the_module() -> None:
    """Not of the flat copies too, which the optimizer holds instead."""
    before = WeightsBefore()
    _, trainer = fit([WeightDecay(0.3, summary=False), L2NormMonitor(every_n_steps=1), before])
    total = sum(before.squares.values())
    decayed = before.squares["body.0.weight"] + before.squares["head.weight"]
    assert float(trainer.callback_metrics["l2_norm/total"]) == pytest.approx(total**0.5, rel=1e-6)
    assert float(trainer.callback_metrics["l2_penalty/total"]) == pytest.approx(0.3 / 2 * decayed, rel=1e-6)


def test_gradients_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)gradients.*DeepSpeed keeps to itself.*Leave the option"):
        fit([L2NormMonitor(gradients=True)])


@pytest.mark.parametrize(
    ("callback", "way_out"),
    [
        (WeightDecay(0.3, apply="decoupled"), "Use apply='optimizer'"),
        (L2Penalty(0.3), "Use WeightDecay instead"),
        (NormConstraint(1.0), "DeepSpeed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_reach_the_step_is_refused(callback: Any, way_out: str) -> None:
    with pytest.raises(MisconfigurationException, match=way_out):
        fit([callback])


@pytest.mark.parametrize("schedule", [StableDecay(), AdaptiveDecay()])
def test_adaptive_decay_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"sums over whole tensors, but DeepSpeed has flattened"):
        fit([WeightDecay(0.3, summary=False), WeightDecayScheduler(schedule)])


@pytest.mark.parametrize(("policy", "second"), [("config", 0.1), ("checkpoint", 0.3)])
def test_an_edited_lambda_follows_the_policy(policy: Any, second: float, tmp_path: Path) -> None:
    fit([WeightDecay(0.3, summary=False), ModelCheckpoint(tmp_path, "half")], epochs=1)
    callback = WeightDecay(0.1, on_resume=policy, summary=False)
    _, trainer = fit([callback], ckpt=tmp_path / "half.ckpt")
    assert {g["name"]: g["weight_decay"] for g in trainer.optimizers[0].param_groups} == {
        "decay": second,
        "no_decay": 0.0,
    }
    assert {row.group: row.weight_decay for row in callback.summary()} == {"decay": second, "no_decay": 0.0}


def test_a_difference_can_be_an_error(tmp_path: Path) -> None:
    fit([WeightDecay(0.3, summary=False), ModelCheckpoint(tmp_path, "half")], epochs=1)
    with pytest.raises(MisconfigurationException, match=r"0\.1 is configured, 0\.3 in the checkpoint"):
        fit([WeightDecay(0.1, on_resume="error", summary=False)], ckpt=tmp_path / "half.ckpt")


def test_a_group_that_mixes_the_checkpoints_lambdas_is_refused(tmp_path: Path) -> None:
    """The rules are others, and the groups only look the same, since their sizes are."""

    def decay(pattern: str, **options: Any) -> WeightDecay:
        rules = [DecayRule("some", pattern=pattern, weight_decay=0.3), DecayRule("rest", weight_decay=0.1)]
        return WeightDecay(0.3, rules=rules, summary=False, **options)

    fit([decay(r"body\.0\.bias|body\.1\.weight"), ModelCheckpoint(tmp_path, "half")], epochs=1)
    with pytest.raises(ValueError, match=r"several weight decays.*'body.1.weight': 0.3.*on_resume"):
        fit([decay(r"body\.0\.bias|body\.1\.bias", on_resume="checkpoint")], ckpt=tmp_path / "half.ckpt")


def test_an_optimizer_in_deepspeeds_own_configuration_is_refused() -> None:
    """``configure_optimizers`` isn't called then, so nobody can split the groups in time."""
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 2}}
    with pytest.raises(Exception, match=r"(?s)optimizer.*configure_optimizers|configure_optimizers.*optimizer"):
        fit([WeightDecay(0.3, summary=False)], OnCPU(config=config))


def test_a_second_fit_with_the_same_objects() -> None:
    callbacks = ours()
    fit(callbacks)
    model, _ = fit(callbacks)
    assert_close(model, fit(ours())[0])
