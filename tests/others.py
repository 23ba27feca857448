"""Modules that treat their optimizers as they like, and what has to come out of them beside the callbacks.

The expectations are those of a run without the callbacks, or closed forms for weights that have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2 import L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import (
    DECAYED,
    EXEMPT,
    Shrinking,
    assert_same_weights,
    batches,
    make_trainer,
    plain,
    record_rates,
)

LR, LAMBDA, STEPS = 0.1, 0.3, 6


class TwoGroups(Shrinking):
    """Two groups with names, a loss that pulls on the weights (or has no gradient), and each step's learning rates."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, pull: float = 0.0) -> None:
        super().__init__()
        self.pull = pull

    def loss(self) -> Tensor:
        return sum((self.pull * (parameter - 0.5)).square().sum() for parameter in self.parameters())

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(part.parameters())} for part in (self.body, self.head)]
        groups[0]["name"], groups[1]["name"] = "body", "head"
        optimizer = torch.optim.SGD(groups, **{"lr": LR, "momentum": 0.9 if self.pull else 0.0, **self.options})
        self.groups = optimizer.param_groups
        self.kept = list(optimizer.param_groups)
        self.rates = record_rates(self, optimizer)
        return self.scheduled(optimizer)

    def scheduled(self, optimizer: Optimizer) -> Any:
        return optimizer


class Acting(TwoGroups):
    """Does something to its optimizer in one of its hooks, before whatever the hook usually does."""

    def __init__(self, hook: str, act: Callable[[Any], None], pull: float = 0.0) -> None:
        super().__init__(pull)
        before(self, hook, act)


def before(model: pl.LightningModule, hook: str, act: Callable[[Any], None]) -> None:
    usual = getattr(model, hook)

    @wraps(usual)
    def acting(*args: Any, **kwargs: Any) -> Any:
        act(model)
        return usual(*args, **kwargs)

    setattr(model, hook, acting)


class Saves(pl.Callback):
    """A checkpoint after the last batch, and what it says of the optimizers."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.states = path, None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path is not None and trainer.current_epoch == trainer.max_epochs - 1:
            trainer.save_checkpoint(self.path)
            self.states = plain(torch.load(self.path, weights_only=False)["optimizer_states"])


def fit(model: TwoGroups, *callbacks: pl.Callback, **options: Any) -> TwoGroups:
    make_trainer(callbacks, **options).fit(model, batches(STEPS))
    return model


def assert_undisturbed(make: Callable[[float], TwoGroups], path: Path | None = None, **options: Any) -> None:
    """The same rates, weights and optimizers as without the callback; with a lambda, decay by these rates alone.

    Args:
        make: Makes the module anew, with or without a pull on its weights.
        path: Where a checkpoint goes that is compared as well.
        options: Of the Trainer.
    """
    saves, saves_beside = Saves(path), Saves(path)
    bare = fit(make(1.0), saves, **options)
    beside = fit(make(1.0), WeightDecay(0.0, summary=False), saves_beside, **options)
    assert beside.rates == bare.rates
    assert len(bare.rates) == STEPS * bare.trainer.max_epochs
    assert_same_weights(beside, bare)
    assert saves_beside.states == saves.states
    states = [plain([optimizer.state_dict() for optimizer in model.trainer.optimizers]) for model in (beside, bare)]
    assert states[0] == states[1]
    decayed = fit(make(0.0), WeightDecay(LAMBDA, summary=False), **options)
    assert decayed.rates == bare.rates
    for name, weight in decayed.named_parameters():
        left = np.prod([1 - LAMBDA * row.get(name, 0.0) for row in bare.rates]) if name in DECAYED else 1.0
        np.testing.assert_allclose(weight.detach(), left, rtol=1e-12, err_msg=name)


class Way(NamedTuple):
    """Callbacks that act on weights, and what is left of ones: a function of steps (without gradient) and elements."""

    callbacks: Callable[[], list[pl.Callback]]
    left: Callable[[int, int], float]


class Growing(pl.Callback):
    """Doubles the matrices before each batch, so that a bound has something to do in each step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.mul_(2.0 if parameter.ndim > 1 else 1.0)


def decay(apply: str, **options: Any) -> Callable[[], list[pl.Callback]]:
    return lambda: [WeightDecay(LAMBDA, apply=apply, summary=False, **options)]


def ramp() -> list[pl.Callback]:
    return [WeightDecay(LAMBDA, summary=False), WeightDecayScheduler(LinearSchedule(0.0, 1.0))]


WAYS: dict[str, Way] = {
    "optimizer": Way(decay("optimizer"), lambda steps, size: (1 - LR * LAMBDA) ** steps),
    "coupled": Way(decay("coupled"), lambda steps, size: (1 - LR * LAMBDA) ** steps),
    "before clipping": Way(decay("coupled", before_clipping=True), lambda steps, size: (1 - LR * LAMBDA) ** steps),
    "decoupled": Way(decay("decoupled"), lambda steps, size: (1 - LR * LAMBDA) ** steps),
    "independent": Way(decay("independent"), lambda steps, size: (1 - LAMBDA) ** steps),
    "schedule": Way(ramp, lambda steps, size: float(np.prod(1 - LR * LAMBDA * np.linspace(0, 1, steps)))),
    "penalty": Way(lambda: [L2Penalty(LAMBDA)], lambda steps, size: (1 - LR * LAMBDA) ** steps),
    "constraint": Way(lambda: [NormConstraint(1.0), Growing()], lambda steps, size: size**-0.5),
}


def assert_left(model: nn.Module, way: str, steps: int, rtol: float = 1e-9) -> None:
    """The closed form for the weights that decay; the exempt ones are exactly where they were, at 1."""
    for name, parameter in model.named_parameters():
        left = WAYS[way].left(steps, parameter.numel()) if name in DECAYED else 1.0
        assert name in DECAYED | EXEMPT
        np.testing.assert_allclose(parameter.detach(), left, rtol=rtol if name in DECAYED else 0, err_msg=name)
