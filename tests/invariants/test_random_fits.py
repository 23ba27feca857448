"""Random fits: modules, optimizers, options of the Trainer and callbacks with random valid options, in random order.

Forty seeds by default; ``LIGHTNING_L2_SEEDS=1000`` takes seeds 0 to 999, ``LIGHTNING_L2_SEEDS=300:400`` those from 300
on. What a seed is made of is in the assertion's message.
"""

from __future__ import annotations

import math
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import lr_scheduler as lrs

from lightning_l2 import (
    DecayRule,
    L2NormMonitor,
    L2Penalty,
    NormConstraint,
    NormPlots,
    WeightDecay,
    WeightDecayScheduler,
)
from lightning_l2.adaptive import AdaptiveDecay
from lightning_l2.constraints import InflectionBound, InitialBound, RmsBound, WarmupBound
from lightning_l2.schedules import CosineSchedule, LinearSchedule, LRSchedule
from tests.helpers import assert_same_weights, batches, make_trainer

FIRST, _, LAST = os.environ.get("LIGHTNING_L2_SEEDS", "40").rpartition(":")
SEEDS = range(int(FIRST or 0), int(LAST))
BATCHES, EPOCHS = 4, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)
        self.attention, self.mlp = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        words = self.words((x > 0).long())
        return self.mlp(self.norm(words + self.attention(words, words, words)[0])).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.view(-1, 2, 2))[0][:, -1]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Tanh()
    ),
    "attention": Attention,
    "recurrent": Recurrent,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh()),
    "adversaries": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **wd: torch.optim.SGD(p, lr=0.1, **wd),
    "momentum": lambda p, **wd: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **wd),
    "Adam": lambda p, **wd: torch.optim.Adam(p, lr=0.01, amsgrad=True, **wd),
    "AdamW": lambda p, **wd: torch.optim.AdamW(p, lr=0.01, **wd),
    "fused": lambda p, **wd: torch.optim.AdamW(p, lr=0.01, fused=True, **wd),
    "Adagrad": lambda p, **wd: torch.optim.Adagrad(p, lr=0.05, **wd),
    "RMSprop": lambda p, **wd: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, **wd),
    "Adafactor": lambda p, **wd: torch.optim.Adafactor(p, lr=0.01, **wd),
    "LBFGS": lambda p, **_: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}
RATES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 9),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=40, cycle_momentum=False),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "warm": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.5), lrs.ExponentialLR(o, 0.9)], [2]),
}
CLIPPING: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 0.5},
    {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
]
# closed forms, by the fraction of training
SCHEDULES: dict[str, tuple[Any, Callable[[float], float] | None]] = {
    "linear": (LinearSchedule(0.5, 2.0), lambda x: 0.5 + 1.5 * x),
    "from 0": (LinearSchedule(0.0, 1.0), lambda x: x),
    "cosine": (CosineSchedule(1.0, 0.0), lambda x: 0.5 + 0.5 * math.cos(math.pi * x)),
    "rate": (LRSchedule(), None),
    "adaptive": (AdaptiveDecay(), None),
}


class Plan:
    """What one seed decides on; everything is made anew for each fit."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.start: dict[str, float] = {}
        pick, flip = self.random.choice, self.random.random
        self.body = pick(list(BODIES))
        # Adagrad's own state needs shapes at once
        names = [name for name in OPTIMIZERS if self.body != "lazy" or name != "Adagrad"]
        self.optimizer, self.own = pick(names), pick([0.0, 0.1])
        self.rate, self.interval = pick([None, *RATES]), pick(["step", "epoch"])
        self.manual = self.body == "adversaries"
        self.trainer = {"precision": pick(["32-true", "32-true", "bf16-mixed", "bf16-true"]), "max_epochs": EPOCHS}
        self.trainer |= {"val_check_interval": pick([1.0, 1, 2, 3]), "log_every_n_steps": pick([1, 2])}
        self.accumulate = 1 if self.manual else pick([1, 1, 2, 3])
        self.steps = math.ceil(BATCHES / self.accumulate) * EPOCHS
        if not self.manual:
            # Lightning refuses to clip for fused optimizers under mixed precision
            self.trainer |= {} if self.optimizer == "fused" else pick(CLIPPING)
            self.trainer |= {"accumulate_grad_batches": self.accumulate}
            if flip() < 0.3:
                self.steps = max(2, self.steps - 1)
                self.trainer |= {"max_steps": self.steps, "max_epochs": -1}
        self.given = 0.0 if self.optimizer == "LBFGS" else self.own  # lambda that is configured
        self.decay: dict[str, Any] | None = None
        self.schedule: tuple[Callable[[float], float] | None, dict[str, Any]] | None = None
        self.penalty: dict[str, Any] | None = None
        self.constraint: dict[str, Any] | None = None
        self.made: list[tuple[type, tuple[Any, ...], dict[str, Any]]] = []
        self._choose()
        self.random.shuffle(self.made)

    def __str__(self) -> str:
        shown = ", ".join(f"{kind.__name__}{args}{options}" for kind, args, options in self.made)
        return f"{self.body}, {self.optimizer} {self.own}, {self.rate} {self.interval}, {self.trainer}: {shown}"

    def _add(self, kind: type, *args: Any, **options: Any) -> dict[str, Any]:
        self.made.append((kind, args, options))
        return options

    def _choose(self) -> None:
        pick, flip = self.random.choice, self.random.random
        own_rules: Any = [DecayRule("head", pattern=r"head\.", multiplier=pick([0.5, 2.0])), "default"]
        if flip() < 0.7:
            apply = pick(["optimizer", "coupled", "decoupled", "independent", "cautious"])
            apply = "decoupled" if self.optimizer == "LBFGS" and flip() < 0.9 else apply
            given = pick([0.05, 0.2] if self.own == 0 or self.optimizer == "LBFGS" else [None, 0.05, 0.2])
            rounding = ["nearest", "stochastic", "accumulate"][
                : {"optimizer": 1, "coupled": 1, "cautious": 2}.get(apply)
            ]
            way = {"apply": apply, "rounding": pick(rounding), "towards": pick(["zero", "zero", "start"])}
            self.decay = self._add(WeightDecay, given, rules=pick(["default", own_rules]), summary=False, **way)
            self.given = self.own if given is None else given
        if flip() < 0.5:
            name, options = pick(list(SCHEDULES)), {}
            schedule, closed_form = SCHEDULES[name]
            if closed_form is not None:
                options = {"interval": pick(["step", "epoch"]), "values": pick(["multiplier"] * 2 + ["weight_decay"])}
            self.schedule = closed_form, options
            if self.decay and self.decay["rules"] != "default" and not self.manual and flip() < 0.5:
                self._add(WeightDecayScheduler, LinearSchedule(1.0, 0.5), groups="head$")
                self.schedule, options = (None, {}), options | {"groups": "decay$"}
            self._add(WeightDecayScheduler, schedule, **options)
        if flip() < 0.4:
            options = {
                "follow_schedule": self.schedule is not None and flip() < 0.5,
                "towards": pick(["zero", "start"]),
            }
            self.penalty = self._add(L2Penalty, 0.1, log_objective=not self.manual and flip() < 0.5, **options)
        if flip() < 0.5:
            matrices = [DecayRule("matrices", pattern=r"head\.weight"), "default"]
            bounds: list[dict[str, Any]] = [
                {"bound": 0.3, "per": pick(["parameter", "row"])},
                {"bound": InitialBound(0.9), "per": pick(["parameter", "group"])},
                {"bound": RmsBound(0.2)},
                {"bound": WarmupBound(2), "method": "lagrangian", "update_rate": 0.1},
                {"bound": InflectionBound(period=2), "method": "lagrangian", "update_rate": 0.1},
                {"bound": None, "method": "sphere", "rules": matrices},
            ]
            self.constraint = self._add(NormConstraint, **pick(bounds))
        self._add(L2NormMonitor, **({"every_n_steps": 1} if flip() < 0.5 else {}))
        if flip() < 0.6:
            extra = {"gradients": pick([False, True, "after_clipping"]), "spectra": pick([None, 2])}
            extra |= {name: flip() < 0.5 for name in ("updates", "rms", "rotation", "initial_ratio")}
            self._add(L2NormMonitor, per=pick(["parameter", "module", "group", "total"]), **extra)
        if flip() < 0.08:
            self._add(NormPlots)
        keys = ["l2_norm/total", "l2_penalty/total", *(["l2_penalty/loss"] if self.penalty else [])]
        if self.constraint and not isinstance(self.constraint["bound"], WarmupBound | InflectionBound):
            keys.append("norm_constraint/slack")
        if flip() < 0.4:
            self._add(EarlyStopping, pick(keys), patience=99, check_on_train_epoch_end=flip() < 0.5)
        if flip() < 0.4:
            self._add(ModelCheckpoint, self.folder / "kept", monitor=pick(keys), save_weights_only=True)

    def callbacks(self, *, monitors: bool = True) -> list[Any]:
        watching = (L2NormMonitor, NormPlots, EarlyStopping, ModelCheckpoint)
        return [kind(*args, **options) for kind, args, options in self.made if monitors or kind not in watching]

    def multiplier(self, step: int) -> float | None:
        """What the schedule multiplies lambda with in a step, None where no closed form says."""
        closed_form, options = self.schedule or (lambda _: 1.0, {})
        by_epoch = options.get("interval") == "epoch"
        if closed_form is None or (by_epoch and "max_steps" in self.trainer):
            return None
        place, length = (step // math.ceil(BATCHES / self.accumulate), EPOCHS) if by_epoch else (step, self.steps)
        value = closed_form(min(1.0, place / max(1, length - 1)))
        return value / self.given if options.get("values") == "weight_decay" else value

    def base(self, name: str, ndim: int) -> float:
        """Return lambda of a parameter before the schedule, as the documentation says."""
        if self.decay is not None and self.decay["rules"] != "default" and "head." in name:
            return self.given * self.decay["rules"][0].multiplier
        return self.given if ndim > 1 or self.decay is None else 0.0


class Net(pl.LightningModule):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.body, self.head, self.plan = BODIES[plan.body](), nn.Linear(4, 2), plan
        self.automatic_optimization = not plan.manual
        self.updates = 0

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.head(self.body(batch[0])).float(), batch[1].float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        batch = [part.repeat(2, 1) * torch.tensor([[1.0], [0.7]], dtype=part.dtype) for part in batch]
        if not self.plan.manual:
            return self.loss(batch)
        for sign, optimizer in zip((1, -0.1), self.optimizers(), strict=True):

            def closure(sign: float = sign, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch) * sign
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)
        for scheduler in filter(None, [self.lr_schedulers()]):
            for one in scheduler if isinstance(scheduler, list) else [scheduler]:
                one.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        parts = (self.body, self.head) if self.plan.manual else (self,)
        own = {"weight_decay": self.plan.own}
        optimizers = [OPTIMIZERS[self.plan.optimizer](list(part.parameters()), **own) for part in parts]
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self.count)
        if self.plan.rate is None:
            return optimizers
        make = RATES[self.plan.rate]
        return optimizers, [{"scheduler": make(one), "interval": self.plan.interval} for one in optimizers]

    def count(self, *_: Any) -> None:
        self.updates += 1


class Rows(DummyLogger):
    """What was logged under each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step, {}).update(metrics)


class Exact(Checkpoint):
    """The float64 numbers that steps begin with, the norms that they end with, and a checkpoint; it ends each batch."""

    def __init__(self, plan: Plan, save: int | None) -> None:
        self.plan, self.save = plan, save
        self.steps: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if step in self.steps:
            return
        known = {name: p.detach().double() for name, p in module.named_parameters() if not is_lazy(p)}
        squares = {name: float(p.square().sum()) for name, p in known.items()}
        found = {"l2_norm/total": math.sqrt(math.fsum(squares.values()))}
        multiplier, penalty = self.plan.multiplier(step), self.plan.penalty
        is_whole = len(known) == len(list(module.parameters()))
        if multiplier is not None and is_whole:
            decays = [self.plan.base(name, p.ndim) * squares[name] for name, p in known.items()]
            found["l2_penalty/total"] = multiplier / 2 * math.fsum(decays)
            if penalty and penalty["towards"] == "zero":
                factor = multiplier if penalty["follow_schedule"] else 1.0
                matrices = [squares[name] for name, p in known.items() if p.ndim > 1]
                found["l2_penalty/loss"] = factor * 0.1 / 2 * math.fsum(matrices)
        self.steps[step] = found
        if step == 0 and is_whole:
            self.plan.start = {name: float(p.norm()) for name, p in known.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.check_bounds(module)
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.save:
            trainer.save_checkpoint(self.plan.folder / "resumed.ckpt")

    def check_bounds(self, module: Any) -> None:
        constraint, slack = self.plan.constraint, 2e-2 if self.plan.trainer["precision"] == "bf16-true" else 1e-5
        if constraint is None or constraint.get("method") == "lagrangian" or constraint.get("per") == "group":
            return
        for name, p in module.named_parameters():
            weight, start = p.detach().double(), self.plan.start.get(name)
            is_known = start is not None or isinstance(constraint["bound"], float | RmsBound)
            if p.ndim < 2 or not is_known or (constraint.get("method") == "sphere" and name != "head.weight"):
                continue
            norm = float(weight.flatten(1).norm(dim=1).max() if constraint.get("per") == "row" else weight.norm())
            if constraint.get("method") == "sphere":
                assert norm == pytest.approx(start, rel=slack), name
                continue
            of_start = 0.9 * (start or math.inf)
            bounds = {float: 0.3, RmsBound: 0.2 * math.sqrt(p.numel()), InitialBound: of_start}
            assert norm <= bounds[type(constraint["bound"])] * (1 + slack), name


Shown = tuple[Net, dict[int, dict[str, float]], dict[int, dict[str, float]]]


def fit(plan: Plan, callbacks: list[Any], save: int | None = None, resume: bool = False) -> Shown:
    torch.manual_seed(0)
    module, rows, exact = Net(plan), Rows(), Exact(plan, save)
    logger = [rows, CSVLogger(plan.folder)] if NormPlots in map(type, callbacks) else rows
    trainer = make_trainer([*callbacks, exact], logger=logger, enable_checkpointing=True, **plan.trainer)
    path = plan.folder / "resumed.ckpt" if resume else None
    trainer.fit(module, batches(BATCHES), batches(1), ckpt_path=path)
    return module, rows.rows, exact.steps


def fit_or_refusal(plan: Plan, order: int = 1, **options: Any) -> Exception | Shown:
    """Return what a fit has shown, or why we refused it before any update."""
    try:
        return fit(plan, plan.callbacks()[::order], **options)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [frame.f_locals["module"] for frame in frames if isinstance(frame.f_locals.get("module"), Net)]
        is_ours = frames[-1].f_globals["__name__"].startswith("lightning_l2.")
        if not is_ours or any(module.updates for module in modules) or not 20 < len(str(error)) < 500:
            raise
        return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_fit(seed: int, tmp_path: Path) -> None:
    plan = Plan(seed, tmp_path)
    print(f"seed {seed}: {plan}")
    # Lightning itself loses the gradients of an open window
    closed = [b for b in range(1, BATCHES * EPOCHS) if b % BATCHES % plan.accumulate == 0]
    whole = fit_or_refusal(plan, save=plan.random.choice(closed))
    if isinstance(whole, Exception):
        assert type(fit_or_refusal(plan, -1)) is type(whole)
        return
    module, rows, exact = whole
    for step, row in rows.items():
        for key in exact[step].keys() & row.keys():
            assert row[key] == pytest.approx(exact[step][key], rel=1e-5, abs=1e-9), (step, key)
    turned, turned_rows, _ = fit(plan, plan.callbacks()[::-1])
    assert_same_weights(turned, module)
    assert turned_rows == rows
    assert_same_weights(fit(plan, plan.callbacks(monitors=False))[0], module)
    if (tmp_path / "resumed.ckpt").exists():
        again = fit_or_refusal(plan, resume=True)
        if isinstance(again, Exception):
            assert "Give lazy layers their shapes before `fit`" in str(again)
            return
        assert_same_weights(again[0], module)
        for step, row in again[1].items():
            assert row == pytest.approx(rows[step], rel=1e-6, nan_ok=True), step
