"""WeightDecayScheduler over a base of 0, with metrics of every hook, and with schedules that return other numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import lightning_l2
from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import CosineSchedule, LinearSchedule, PlateauSchedule, Schedule
from tests.helpers import DECAYED, Rows, Shrinking, batches, make_trainer

ABSOLUTE = {"values": "weight_decay"}


def sgd(params: Any, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, weight_decay=weight_decay)


def decayed(params: Any) -> torch.optim.Optimizer:
    return sgd(params, 0.1)


NO_BASE: dict[str, Callable[[], list[pl.Callback]]] = {
    "the optimizer's default": lambda: [WeightDecay(summary=False)],
    "a WeightDecay of 0": lambda: [WeightDecay(0.0, summary=False)],
    "alone": lambda: [],
    "rules that leave nothing": lambda: [WeightDecay(0.1, rules=[DecayRule("all", multiplier=0.0)], summary=False)],
    "last, after the scheduler": lambda: [WeightDecay(0.0, summary=False)],
}


@pytest.mark.parametrize("case", NO_BASE)
def test_absolute_lambdas_over_nothing_are_an_error(case: str) -> None:
    """Before the first step, with the way out: a lambda for WeightDecay."""
    model, scheduler = Shrinking(sgd), WeightDecayScheduler(LinearSchedule(0.04, 0.4), **ABSOLUTE)
    callbacks = [*NO_BASE[case](), scheduler][:: -1 if "last" in case else 1]
    with pytest.raises(Exception, match=r"WeightDecay\(") as error:
        make_trainer(callbacks).fit(model, batches(2))
    assert type(error.value).__name__ in {"ValueError", "RuntimeError", "MisconfigurationException"}
    assert "0" in str(error.value)
    assert model.watches[0].steps == []


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: WeightDecayScheduler(LinearSchedule(0.0, 1.0)),
        lambda: WeightDecayScheduler(CosineSchedule(1.0, 10.0), interval="epoch"),
        lambda: WeightDecayScheduler(PlateauSchedule("loss", factor=0.5)),
    ],
    ids=["by step", "by epoch", "by a metric"],
)
def test_the_0_of_a_sweep_stays_allowed_with_multipliers(scheduler: Callable[[], WeightDecayScheduler]) -> None:
    class Logging(Shrinking):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0, on_epoch=True)
            return self.loss()

    model = Logging(decayed)
    make_trainer([WeightDecay(0.0, summary=False), scheduler()], max_epochs=2).fit(model, batches(2))
    assert all(value == 0.0 for step in model.watches[0].steps for value in step.values())
    assert len(model.watches[0].steps) == 4


PATIENCE = {"factor": 0.5, "patience": 1}


class Fed(Shrinking):
    """Feeds a scheduler of torch with the values that the module logs, whenever it has logged one for good."""

    values = (3.0, 2.0, 2.5, 2.5, 1.0, 4.0, 4.0, 4.0, 0.5, 0.5, 9.0, 9.0, 9.0, 9.0)

    def __init__(self, **options: Any) -> None:
        super().__init__(decayed)
        self.reference = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        self.plateau = lr_scheduler.ReduceLROnPlateau(self.reference, **{**PATIENCE, **options})
        self.brought, self.expected = 0, []

    def value(self) -> float:
        return self.values[self.brought]

    def observe(self) -> None:
        if not self.trainer.sanity_checking:
            self.plateau.step(self.value())
            self.brought += 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.expected.append(self.reference.param_groups[0]["lr"])
        return self.loss()


class OnTrainEpochEnd(Fed):
    def on_train_epoch_end(self) -> None:
        self.log("score", self.value())
        self.observe()


class InTraining(Fed):
    """A mean over the epoch, which is there when the epoch has ended."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("score", self.value(), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.observe()


class Validated(Fed):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", self.value())

    def on_validation_end(self) -> None:
        self.observe()


class OnValidationEpochEnd(Validated):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.value())


class LogsForIt(pl.Callback):
    """A callback of somebody else that logs the metric."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Fed) -> None:
        self.log("score", pl_module.value())


class ByAnother(Fed):
    def on_train_epoch_end(self) -> None:
        self.observe()


WITHIN = {"val_check_interval": 2, "max_epochs": 3}
EPOCHS = {"max_epochs": 8}


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize(
    ("kind", "options", "observations"),
    [
        (OnTrainEpochEnd, EPOCHS, 8),
        (InTraining, EPOCHS, 8),
        (ByAnother, EPOCHS, 8),
        (Validated, EPOCHS, 8),
        (OnValidationEpochEnd, EPOCHS, 8),
        (Validated, WITHIN, 9),
        (OnValidationEpochEnd, WITHIN, 9),
        (Validated, {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": 6}, 9),
    ],
)
def test_a_plateau_is_seen_as_torch_sees_it(
    kind: type[Fed], options: dict[str, Any], observations: int, first: bool
) -> None:
    """Six batches an epoch. Each value counts once, as soon as it is there, and one of the sanity check never."""
    model = kind()
    ours = [WeightDecayScheduler(PlateauSchedule("score", **PATIENCE)), WeightDecay(0.1, summary=False)]
    others = [LogsForIt()] if kind is ByAnother else []
    callbacks = [*ours, *others] if first else [*others, *ours]
    make_trainer(callbacks, **options).fit(model, batches(6), batches(1))
    assert model.brought == observations
    found = np.array(model.watches[0].of("head.weight")) / 0.1
    np.testing.assert_allclose(found, model.expected, rtol=1e-9)
    assert len(set(model.expected)) > 2


def test_beside_torchs_own_scheduler_in_the_trainer() -> None:
    """lr and lambda fall in the same steps by the same factor."""

    class Both(OnTrainEpochEnd):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, **PATIENCE)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "score"}}

    model = Both()
    ours = [WeightDecay(0.1, summary=False), WeightDecayScheduler(PlateauSchedule("score", **PATIENCE))]
    make_trainer(ours, max_epochs=8).fit(model, batches(2))
    watch = model.watches[0]
    np.testing.assert_allclose(np.array(watch.of("head.weight")) / 0.1, np.array(watch.lrs) / 0.1, rtol=1e-9)
    assert len(set(watch.lrs)) > 2


@dataclass(frozen=True)
class Returning(Schedule):
    """Always a half, as a number of some library."""

    half: Any

    def __call__(self, progress: float) -> Any:
        return self.half


HALVES = {
    "numpy float32": np.float32(0.5),
    "tensor": torch.tensor(0.5),
    "numpy array without dimensions": np.array(0.5),
    "fraction": Fraction(1, 2),
    "int": 2,
}


@pytest.mark.parametrize("case", HALVES)
def test_a_schedules_value_becomes_a_float(case: str, tmp_path: Path) -> None:
    """In the step, in force, in the log, and in a checkpoint that torch loads without trusting it."""
    value, seen, logger = float(HALVES[case]), [], Rows()

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(lightning_l2.weight_decay_in_force(trainer.optimizers[0]))

    model = Shrinking(decayed)
    ours = [WeightDecay(0.3, summary=False), WeightDecayScheduler(Returning(HALVES[case]))]
    trainer = make_trainer([*ours, L2NormMonitor(every_n_steps=1), Looks()], logger=logger)
    trainer.fit(model, batches(2))
    for name in DECAYED:
        assert model.watches[0].of(name) == pytest.approx([0.3 * value] * 2, rel=1e-9)
    assert seen == [{"decay": pytest.approx(0.3 * value), "no_decay": 0.0}] * 2
    assert {type(number) for row in seen for number in row.values()} == {float}
    assert logger.of("weight_decay/decay") == pytest.approx([0.3 * value] * 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_what_is_no_number_is_an_error_that_names_the_schedule() -> None:
    model = Shrinking(decayed)
    with pytest.raises(Exception, match="Returning") as error:
        make_trainer([WeightDecayScheduler(Returning("half"))]).fit(model, batches(2))
    assert type(error.value).__name__ in {"TypeError", "ValueError", "MisconfigurationException"}
    assert model.watches[0].steps == []
