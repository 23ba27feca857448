"""Random fits: modules, optimizers, options of the Trainer and callbacks with random valid options, in random order.

Each is made again with the callbacks in the opposite order and resumed, which has to change nothing. Its logged totals
are those of closed forms, groups stay the user's and frozen weights as they are, and where groups made by hand can do
the same as `WeightDecay` and its schedules, they do.

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
from lightning.pytorch.callbacks import BaseFinetuning, Checkpoint, EarlyStopping, ModelCheckpoint
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
from lightning_l2.adaptive import AdaptiveDecay, AlphaDecay, AutoL2Decay, CorrectedDecay, StableDecay
from lightning_l2.constraints import InflectionBound, InitialBound, RmsBound, WarmupBound
from lightning_l2.schedules import CosineSchedule, LinearSchedule, LRSchedule, PlateauSchedule
from tests.helpers import assert_same_weights, batches, make_trainer

FIRST, _, LAST = os.environ.get("LIGHTNING_L2_SEEDS", "40").rpartition(":")
SEEDS = range(int(FIRST or 0), int(LAST))
BATCHES, EPOCHS = 4, 2
PARTS = ("body.", "head.")


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
    "linear": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.GroupNorm(1, 4), nn.Flatten(), nn.Tanh()
    ),
    "attention": Attention,
    "recurrent": Recurrent,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh()),
    "plain": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
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
DECOUPLED = {"AdamW", "fused", "Adafactor"}  # how their own decay acts; that of the others is coupled
# options of a parameter's group, by the parameter's name and number of dimensions
GROUPS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "one": lambda name, ndim: {},
    "by hand": lambda name, ndim: {} if ndim > 1 else {"weight_decay": 0.0},
    "two": lambda name, ndim: (
        {"name": "head", "lr": 0.02, "weight_decay": 0.3} if "head." in name else {"name": "body"}
    ),
}
# of the body: whether its parameters are frozen, and the optimizer has them
FROZEN = ["never", "never", "never", "always", "left out", "thawed", "finetuned"]
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
WAYS: dict[str, list[dict[str, Any]]] = {
    "optimizer": [{}],
    "coupled": [{}, {"before_clipping": True}],
    "decoupled": [{}, {"rounding": "stochastic"}, {"rounding": "accumulate"}],
    "independent": [{}, {"rounding": "stochastic"}, {"rounding": "accumulate"}, {"peak_lr": "initial"}, {"peak_lr": 1}],
    "cautious": [{}, {"rounding": "stochastic"}],
}
# closed forms, by the fraction of training
SCHEDULES: dict[str, tuple[Any, Callable[[float], float] | None]] = {
    "linear": (LinearSchedule(0.5, 2.0), lambda x: 0.5 + 1.5 * x),
    "from 0": (LinearSchedule(0.0, 1.0), lambda x: x),
    "cosine": (CosineSchedule(1.0, 0.0), lambda x: 0.5 + 0.5 * math.cos(math.pi * x)),
    "rate": (LRSchedule(), None),
    "corrected": (CorrectedDecay(), None),
    "adaptive": (AdaptiveDecay(), None),
    "stable": (StableDecay(), None),
    "alpha": (AlphaDecay(min_eigenvalues=2, every_n_steps=2), None),
    "auto": (AutoL2Decay("val_loss", patience=1), None),
    "plateau": (PlateauSchedule("val_loss", factor=0.5, patience=0), None),  # torch's own tells
}


class Plan:
    """What one seed decides on; everything is made anew for each fit."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.start: dict[str, float] = {}
        pick, flip = self.random.choice, self.random.random
        self.body = pick(list(BODIES))
        is_lazy = self.body == "lazy"
        self.manual = not is_lazy and flip() < 0.2
        # Adagrad's own state needs shapes at once
        names = [name for name in OPTIMIZERS if not is_lazy or name != "Adagrad"]
        # the second one's loss falls without end, along which LBFGS runs away
        others = [name for name in names if name != "LBFGS"]
        self.optimizers, self.own = [pick(names), *([pick(others)] * self.manual)], pick([0.0, 0.1])
        has_lbfgs = "LBFGS" in self.optimizers
        # of manual optimization: whether steps have a closure, and at which batches the second optimizer makes one
        self.closures, self.every = has_lbfgs or flip() < 0.5, pick([1, 1, 2]) if self.manual else 1
        self.groups = "one" if has_lbfgs else pick(["one", "one", "two", *([] if is_lazy else ["by hand"])])
        self.named = flip() < 0.3
        self.rate, self.interval = pick([None, *RATES]), pick(["step", "epoch"])
        self.frozen = pick(FROZEN)
        if is_lazy or (self.manual and self.frozen == "left out"):
            self.frozen = "never"
        if self.frozen == "finetuned" and (self.manual or has_lbfgs or self.rate):
            self.frozen = "thawed"
        self.named &= self.frozen != "finetuned"
        self.trainer = {"precision": pick([*["32-true"] * 3, "bf16-mixed", "bf16-true"]), "max_epochs": EPOCHS}
        self.trainer |= {"val_check_interval": pick([1.0, 1, 2, 3]), "log_every_n_steps": pick([1, 2])}
        self.accumulate = 1 if self.manual else pick([1, 1, 2, 3])
        self.steps = math.ceil(BATCHES / self.accumulate) * EPOCHS
        if not self.manual:
            # Lightning refuses to clip for fused optimizers under mixed precision; LBFGS runs away on clipped gradients
            self.trainer |= {} if self.optimizers[0] in ("fused", "LBFGS") else pick(CLIPPING)
            self.trainer |= {"accumulate_grad_batches": self.accumulate}
            if flip() < 0.3:
                self.steps = max(2, self.steps - 1)
                self.trainer |= {"max_steps": self.steps, "max_epochs": -1}
        self.given: float | None = None  # lambda that WeightDecay is given
        self.decay: dict[str, Any] | None = None
        # by the rule that they are for: closed forms, and options
        self.schedules: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.monitored, self.anchors = False, dict[str, float]()
        self.penalty: dict[str, Any] | None = None
        self.constraint: dict[str, Any] | None = None
        self.made: list[tuple[type, tuple[Any, ...], dict[str, Any]]] = []
        self._choose()
        self.random.shuffle(self.made)

    def __str__(self) -> str:
        shown = ", ".join(f"{kind.__name__}{args}{options}" for kind, args, options in self.made)
        model = f"{self.body}, {self.optimizers} {self.own}, groups: {self.groups}, frozen: {self.frozen}"
        return f"{model}, {self.rate} {self.interval}, {self.trainer}, {self.closures} {self.every}: {shown}"

    def _add(self, kind: type, *args: Any, **options: Any) -> dict[str, Any]:
        self.made.append((kind, args, options))
        return options

    def _choose(self) -> None:
        pick, flip = self.random.choice, self.random.random
        by = {"group": "^head$"} if self.groups == "two" else {"pattern": r"head\."}
        own_rules: Any = [DecayRule("head", **by, multiplier=pick([0.5, 2.0])), "default"]
        device = pick(["same", "cpu"])
        has_lbfgs = "LBFGS" in self.optimizers
        if flip() < 0.7:
            apply = pick(["optimizer", "optimizer", *WAYS])
            apply = "decoupled" if has_lbfgs and flip() < 0.9 else apply
            self.given = pick([0.05, 0.2] if self.own == 0 or has_lbfgs else [None, 0.05, 0.2])
            way = {"apply": apply, "towards": pick(["zero", "zero", "zero", "start"]), "start_device": device}
            way |= {"rules": pick(["default", own_rules]), "summary": False, **pick(WAYS[apply])}
            self.decay = self._add(WeightDecay, self.given, **way)
        if flip() < 0.5:
            rules = ["decay", "head"] if self.decay and self.decay["rules"] != "default" and flip() < 0.5 else ["all"]
            for rule in rules:
                name, options = pick(list(SCHEDULES)), {}
                schedule, closed_form = SCHEDULES[name]
                if closed_form is not None:
                    values = pick(["multiplier"] * 2 + ["weight_decay"])
                    options = {"interval": pick(["step", "epoch"]), "values": values}
                self.monitored |= name in ("auto", "plateau")
                self.schedules[rule] = name, options
                self._add(
                    WeightDecayScheduler, schedule, **options, **({} if rule == "all" else {"groups": rule + "$"})
                )
        if flip() < 0.4:
            options = {
                "follow_schedule": bool(self.schedules) and flip() < 0.5,
                "towards": pick(["zero", "start"]),
                "start_device": device,
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
        if self.frozen == "finetuned":
            self._add(Finetuning)
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

    def callbacks(self, *, monitors: bool = True, decay: bool = True) -> list[Any]:
        left_out = () if monitors else (L2NormMonitor, NormPlots, EarlyStopping, ModelCheckpoint)
        left_out += () if decay else (WeightDecay, WeightDecayScheduler)
        return [kind(*args, **options) for kind, args, options in self.made if kind not in left_out]

    def schedule(self, name: str) -> str:
        """Return the rule whose schedule a parameter has."""
        return "all" if "all" in self.schedules else "head" if "head." in name else "decay"

    def multiplier(self, step: int, name: str, observed: float) -> float | None:
        """What the schedule multiplies lambda with in a step, None where no closed form says."""
        rule = self.schedule(name)
        kind, options = self.schedules.get(rule, (None, {}))
        if kind is None or kind == "plateau":
            return 1.0 if kind is None else observed
        closed_form, by_epoch = SCHEDULES[kind][1], options.get("interval") == "epoch"
        if closed_form is None or (by_epoch and "max_steps" in self.trainer):
            return None
        place, length = (step // math.ceil(BATCHES / self.accumulate), EPOCHS) if by_epoch else (step, self.steps)
        value = closed_form(min(1.0, place / max(1, length - 1)))
        # without a base there is nothing to schedule, of which lazy parameters let nobody know before the first batch
        anchor = self.anchors[rule] if options["values"] == "weight_decay" else 1.0
        return value / anchor if anchor else None

    def configured(self, name: str, ndim: int) -> float:
        """Return lambda before rules and schedule, as the documentation says: what was given, or the group's own."""
        if self.given is not None:
            return self.given
        kind = self.optimizers[-1 if "head." in name else 0]
        return 0.0 if kind == "LBFGS" else GROUPS[self.groups](name, ndim).get("weight_decay", self.own)

    def base(self, name: str, ndim: int) -> float:
        """Return lambda of a parameter before the schedule, as the documentation says."""
        configured = self.configured(name, ndim)
        if self.decay is not None and self.decay["rules"] != "default" and "head." in name:
            return configured * self.decay["rules"][0].multiplier
        return configured if ndim > 1 or self.decay is None else 0.0

    def batches_to_save_at(self) -> list[int]:
        """Return after how many batches a checkpoint has all that Lightning needs to go on.

        It loses the gradients of an open window, the validation to come, and that its finetuning has thawed layers.
        """
        interval = self.trainer["val_check_interval"]
        validated = BATCHES if isinstance(interval, float) else interval
        end = BATCHES if self.frozen == "finetuned" else BATCHES * EPOCHS
        closed = [b for b in range(1, end) if b % BATCHES % self.accumulate == 0]
        return [b for b in closed if not self.monitored or (b - 1) % BATCHES % validated < validated - 1]

    def is_by_hand(self) -> bool:
        """Return whether groups made by hand do the same, closely enough to be compared."""
        constraint, way = self.constraint or {}, {"apply": "optimizer", "towards": "zero", **(self.decay or {})}
        own = ["decoupled" if name in DECOUPLED else "coupled" for name in self.optimizers]
        # a sphere sees what the optimizer's own step has changed, and clipping what has joined the gradient
        own = [] if constraint.get("method") == "sphere" or way.get("before_clipping") else own
        needed = [way["towards"] == "zero", self.trainer["precision"] == "32-true", constraint.get("per") != "group"]
        needed += [self.frozen != "finetuned", self.body != "lazy", "LBFGS" not in self.optimizers]
        needed += [way["apply"] in ("optimizer", kind) for kind in own or [None]]
        needed += [self.multiplier(0, rule + ".", 1.0) is not None for rule in self.schedules]
        return all(needed) and not (self.penalty or {}).get("follow_schedule")


class Finetuning(BaseFinetuning):
    """Adds the body to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.01)


class Net(pl.LightningModule):
    def __init__(self, plan: Plan, by_hand: bool) -> None:
        super().__init__()
        self.body, self.head, self.plan, self.by_hand = BODIES[plan.body](), nn.Linear(4, 2), plan, by_hand
        self.automatic_optimization = not plan.manual
        if plan.frozen != "never":
            self.body.requires_grad_(False)
        self.updates = 0

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.head(self.body(batch[0])).float(), batch[1].float())

    def on_train_epoch_start(self) -> None:
        if self.plan.frozen == "thawed" and self.trainer.current_epoch == 1:
            self.body.requires_grad_(True)

    on_train_start = on_train_epoch_start  # resumed

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        batch = [torch.cat([part.roll(shift, 1) for shift in range(4)]) for part in batch]
        if not self.plan.manual:
            return self.loss(batch)
        for every, sign, optimizer in zip((1, self.plan.every), (1, -0.1), self.optimizers(), strict=True):

            def closure(sign: float = sign, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch) * sign
                self.manual_backward(loss)
                return loss

            if batch_idx % every == 0:
                if self.plan.closures:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        for scheduler in filter(None, [self.lr_schedulers()]):
            for one in scheduler if isinstance(scheduler, list) else [scheduler]:
                one.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.plan.monitored:
            self.log("val_loss", self.loss([part.repeat(2, 1) for part in batch]))

    def configure_optimizers(self) -> Any:
        is_left_out = self.plan.frozen in ("left out", "finetuned")
        known = [(name, p) for name, p in self.named_parameters() if p.requires_grad or not is_left_out]
        parts = [[pair for pair in known if pair[0].startswith(part) or not self.plan.manual] for part in PARTS]
        own = {"weight_decay": self.plan.own}
        optimizers = [
            OPTIMIZERS[kind](self.grouped(part), **own) for kind, part in zip(self.plan.optimizers, parts, strict=False)
        ]
        self.layout = self.seen(optimizers)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self.count)
        if self.plan.rate is None:
            return optimizers
        make = RATES[self.plan.rate]
        return optimizers, [{"scheduler": make(one), "interval": self.plan.interval} for one in optimizers]

    def grouped(self, named: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
        """The user's groups, or those of an expert who knows lambda of each parameter."""
        groups: dict[Any, dict[str, Any]] = {}
        for name, p in named:
            ndim = 2 if is_lazy(p) else p.ndim
            options = GROUPS[self.plan.groups](name, ndim)
            base = {"weight_decay": self.plan.base(name, ndim)} if self.by_hand else {}
            key = (*options.values(), *base.values(), self.by_hand and self.plan.schedule(name))
            groups.setdefault(key, {**options, **base, "params": []})["params"].append((name, p))
        for group in groups.values():
            if self.by_hand:
                group["name"] = group["params"][0][0]
            elif not self.plan.named:
                group["params"] = [p for _, p in group["params"]]
        return list(groups.values())

    def seen(self, optimizers: list[Any]) -> list[Any]:
        """Return the groups as a user knows them, but for what schedulers write."""
        moved = ("lr", "initial_lr", "max_lr", "min_lr")
        groups = [
            {**group, "params": list(map(id, group["params"]))} for one in optimizers for group in one.param_groups
        ]
        return [{key: value for key, value in group.items() if key not in moved} for group in groups]

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
    """The float64 numbers that steps begin with, the norms that they end with, and a checkpoint; it ends each batch.

    Groups by hand get lambda of the coming step.
    """

    def __init__(self, plan: Plan, save: int | None) -> None:
        self.plan, self.save = plan, save
        self.steps: dict[int, dict[str, float]] = {}
        self.frozen: dict[str, Tensor] = {}
        self.squares: dict[str, float] = {}
        rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self.observed, self.plateau = rate.param_groups[0], lrs.ReduceLROnPlateau(rate, factor=0.5, patience=0)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        optimized = {id(p) for one in trainer.optimizers for group in one.param_groups for p in group["params"]}
        held = {name: p for name, p in module.named_parameters() if id(p) in optimized}
        for rule, (_, options) in self.plan.schedules.items():
            if options.get("values") == "weight_decay" and rule not in self.plan.anchors:
                taken = [self.plan.configured(name, 2) for name in held if self.plan.schedule(name) == rule]
                self.plan.anchors[rule] = max(taken, default=0.0)
        if module.by_hand:
            self.schedule(trainer, step)
            return
        self.check_layout(trainer, module)
        self.frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        shaped = {name: p.detach().double() for name, p in module.named_parameters() if not is_lazy(p)}
        if step == 0:
            self.plan.start = {name: float(p.norm()) for name, p in shaped.items()}
        if step not in self.steps:
            self.is_whole = len(shaped) == len(list(module.parameters()))
            trained = [name for name, p in held.items() if p.requires_grad and name in shaped]
            self.squares = {name: float(shaped[name].square().sum()) for name in trained}
            self.steps[step] = {"l2_norm/total": math.sqrt(math.fsum(self.squares.values()))}
        # lambda is that of the window's last batch
        multipliers = {name: self.plan.multiplier(step, name, self.observed["lr"]) for name in held}
        if self.is_whole and None not in multipliers.values():
            self.steps[step] |= self.penalties({name: shaped[name].ndim for name in self.squares}, multipliers)

    def penalties(self, ndims: dict[str, int], multipliers: dict[str, Any]) -> dict[str, float]:
        decays = [multipliers[name] * self.plan.base(name, ndims[name]) * self.squares[name] for name in ndims]
        found = {"l2_penalty/total": math.fsum(decays) / 2}
        penalty = self.plan.penalty
        if penalty and penalty["towards"] == "zero":
            matrices = [name for name in ndims if ndims[name] > 1]
            factors = [multipliers[name] if penalty["follow_schedule"] else 1.0 for name in matrices]
            terms = [factor * self.squares[name] for factor, name in zip(factors, matrices, strict=True)]
            found["l2_penalty/loss"] = 0.1 / 2 * math.fsum(terms)
        return found

    def schedule(self, trainer: pl.Trainer, step: int) -> None:
        for group in [group for one in trainer.optimizers for group in one.param_groups]:
            base = self.plan.base(group["name"], group["params"][0].ndim)
            group["weight_decay"] = base * self.plan.multiplier(step, group["name"], self.observed["lr"])

    def check_layout(self, trainer: pl.Trainer, module: Any) -> None:
        seen = module.seen(trainer.optimizers)
        assert seen[: len(module.layout)] == module.layout

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        if not module.by_hand:
            self.check_layout(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.plan.monitored and not trainer.sanity_checking:
            self.plateau.step(float(trainer.callback_metrics["val_loss"]))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, weight in self.frozen.items():
            now = module.get_parameter(name)
            # LBFGS that diverges multiplies their gradients of 0 by infinity
            assert torch.equal(now, weight) or ("LBFGS" in self.plan.optimizers and now.isnan().all()), name
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
            if (
                p.ndim < 2
                or not p.requires_grad
                or not is_known
                or (constraint.get("method") == "sphere" and name != "head.weight")
            ):
                continue
            norm = float(weight.flatten(1).norm(dim=1).max() if constraint.get("per") == "row" else weight.norm())
            if constraint.get("method") == "sphere":
                assert norm == pytest.approx(start, rel=slack), name
                continue
            of_start = 0.9 * (start or math.inf)
            bounds = {float: 0.3, RmsBound: 0.2 * math.sqrt(p.numel()), InitialBound: of_start}
            assert norm <= bounds[type(constraint["bound"])] * (1 + slack), name


Shown = tuple[Net, dict[int, dict[str, float]], dict[int, dict[str, float]]]


def fit(
    plan: Plan, callbacks: list[Any], save: int | None = None, *, resume: bool = False, by_hand: bool = False
) -> Shown:
    torch.manual_seed(0)
    module, rows, exact = Net(plan, by_hand), Rows(), Exact(plan, save)
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
    whole = fit_or_refusal(plan, save=plan.random.choice(plan.batches_to_save_at() or [None]))
    if isinstance(whole, Exception):
        # where several things are wrong, the first callback complains
        assert isinstance(fit_or_refusal(plan, -1), Exception)
        return
    module, rows, exact = whole
    for step, row in rows.items():
        for key in exact[step].keys() & row.keys():
            assert row[key] == pytest.approx(exact[step][key], rel=1e-5, abs=1e-9), (step, key)
    turned, turned_rows, _ = fit(plan, plan.callbacks()[::-1])
    assert_same_weights(turned, module)
    assert turned_rows == rows
    if plan.is_by_hand():
        by_hand, *_ = fit(plan, plan.callbacks(monitors=False, decay=False), by_hand=True)
        for name, weight in module.named_parameters():
            torch.testing.assert_close(by_hand.get_parameter(name), weight, rtol=1e-4, atol=1e-6)
    else:
        assert_same_weights(fit(plan, plan.callbacks(monitors=False))[0], module)
    if (tmp_path / "resumed.ckpt").exists():
        again = fit_or_refusal(plan, resume=True)
        if isinstance(again, Exception):
            assert "Give lazy layers their shapes before `fit`" in str(again)
            return
        assert_same_weights(again[0], module)
        # an optimizer that steps at every second batch has made no step that could be told of before
        for step, row in list(again[1].items())[plan.every - 1 :]:
            assert row == pytest.approx(rows[step], rel=1e-6, nan_ok=True), step
