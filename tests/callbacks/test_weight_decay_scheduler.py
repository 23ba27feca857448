"""What WeightDecayScheduler does beyond the clock: values, hand-made groups, schedules that read the training."""

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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler

import lightning_l2
from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler
from lightning_l2.adaptive import AdaptiveDecay, CorrectedDecay
from lightning_l2.schedules import (
    ConstantSchedule,
    CosineSchedule,
    FeedbackSchedule,
    LinearSchedule,
    LRSchedule,
    PlateauSchedule,
    Schedule,
)
from tests.helpers import DECAYED, DecayWatch, Net, Rows, Shrinking, batches, make_trainer, stream

HEAD, BODY = "head.weight", "body.0.weight"


class ByHand(Shrinking):
    """Groups made by hand: the body's weight decays with 0.1, the head's with 0.4, the rest not."""

    def configure_optimizers(self) -> Any:
        rest = [p for name, p in self.named_parameters() if name not in (HEAD, BODY)]
        groups = [
            {"params": [self.body[0].weight], "weight_decay": 0.1},
            {"params": [self.head.weight], "weight_decay": 0.4},
            {"params": rest, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.5)
        self.watches = [DecayWatch(self, optimizer)]
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


@pytest.mark.parametrize(
    ("values", "schedule", "head", "body"),
    [
        ("multiplier", LinearSchedule(1.0, 2.0), [0.4, 0.6, 0.8], [0.1, 0.15, 0.2]),
        ("weight_decay", LinearSchedule(0.2, 1.0), [0.2, 0.6, 1.0], [0.05, 0.15, 0.25]),
        ("weight_decay", LinearSchedule(0.0, 1.0), [0.0, 0.5, 1.0], [0.0, 0.125, 0.25]),
    ],
)
def test_values_multiply_each_base_or_name_the_strongest(values, schedule, head, body) -> None:
    model = ByHand()
    make_trainer([WeightDecayScheduler(schedule, values=values)]).fit(model, batches(3))
    assert model.watches[0].of(HEAD) == pytest.approx(head, abs=1e-12)
    assert model.watches[0].of(BODY) == pytest.approx(body, abs=1e-12)
    assert model.watches[0].of("head.bias") == [0.0, 0.0, 0.0]


def test_a_given_length_wins_and_stays_at_the_end() -> None:
    model = ByHand()
    make_trainer([WeightDecayScheduler(LinearSchedule(0.0, 2.0), total_steps=3)]).fit(model, batches(5))
    assert model.watches[0].of(HEAD) == pytest.approx([0.0, 0.4, 0.8, 0.8, 0.8], abs=1e-12)


def test_epochs_as_interval() -> None:
    model = ByHand()
    scheduler = WeightDecayScheduler(LinearSchedule(1.0, 2.0), interval="epoch")
    make_trainer([scheduler], max_epochs=3).fit(model, batches(2))
    assert model.watches[0].of(HEAD) == pytest.approx([0.4, 0.4, 0.6, 0.6, 0.8, 0.8], abs=1e-12)


def test_tied_to_the_learning_rate() -> None:
    model = ByHand(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    make_trainer([WeightDecayScheduler(LRSchedule())]).fit(model, batches(3))
    assert model.watches[0].of(HEAD) == pytest.approx([0.4, 0.2, 0.1], rel=1e-9)


class Plateau(ByHand):
    losses = (3.0, 2.0, 2.0, 2.0, 1.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.losses[self.current_epoch])


def plateau_fit(tmp_path, epochs: int, ckpt_path: str | None = None) -> list[float]:
    model = Plateau()
    schedule = PlateauSchedule("val_loss", patience=1, factor=0.5)
    callbacks = [WeightDecayScheduler(schedule), WeightDecay(summary=False)]
    trainer = make_trainer(callbacks, max_epochs=epochs, num_sanity_val_steps=1)
    trainer.fit(model, batches(1), batches(1), ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return model.watches[0].of(HEAD)


def test_a_plateau_lowers_lambda_and_resume_remembers_it(tmp_path) -> None:
    """Epochs 2 and 3 bring no improvement on epoch 1; with a patience of 1 the fifth epoch runs at half."""
    whole = plateau_fit(tmp_path, 5)
    assert whole == pytest.approx([0.4, 0.4, 0.4, 0.4, 0.2], abs=1e-12)
    first = plateau_fit(tmp_path, 4)
    assert first + plateau_fit(tmp_path, 5, str(tmp_path / "last.ckpt")) == pytest.approx(whole, abs=1e-12)


class Seldom(Plateau):
    """Validates after its second, fourth, ... epoch only."""

    losses = (9.0, 3.0, 9.0, 3.0, 9.0, 2.0, 9.0, 2.0, 9.0, 1.0)


def test_a_metric_is_observed_once_however_long_it_stands() -> None:
    """The validations bring 3, 3, 2, 2: never two in a row without an improvement, the patience of 1."""
    model = Seldom()
    trainer = make_trainer(
        [WeightDecayScheduler(PlateauSchedule("val_loss", patience=1, factor=0.5))],
        max_epochs=9,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
    )
    with pytest.warns(UserWarning, match="monitors 'val_loss', which is not among"):  # after the first epoch
        trainer.fit(model, batches(1), batches(1))
    assert model.watches[0].of(HEAD) == pytest.approx([0.4] * 9, abs=1e-12)


class Late(Plateau):
    """Adds the head's bias with a weight decay of its own in the fourth epoch."""

    losses = (1.0,) * 6

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.body[0].weight, self.head.weight], lr=0.5, weight_decay=0.4)
        self.watches = [DecayWatch(self, optimizer)]
        return optimizer

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 3:
            optimizer = self.optimizers().optimizer
            optimizer.add_param_group({"params": [self.head.bias], "weight_decay": 0.8})
            self.watches.append(DecayWatch(self, optimizer))


def test_a_group_that_comes_late_has_the_multiplier_of_the_others() -> None:
    model = Late()
    schedule = PlateauSchedule("val_loss", patience=0, factor=0.5)
    trainer = make_trainer([WeightDecayScheduler(schedule)], max_epochs=5, num_sanity_val_steps=0)
    trainer.fit(model, batches(1), batches(1))
    assert model.watches[0].of(HEAD) == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.05], abs=1e-12)
    assert model.watches[1].of("head.bias") == pytest.approx([0.2, 0.1], abs=1e-12)


@pytest.mark.parametrize("schedule", [LRSchedule(), CorrectedDecay()])
def test_a_schedule_of_the_learning_rate_asks_for_one(schedule: FeedbackSchedule) -> None:
    class Relative(torch.optim.SGD):
        """Finds its steps itself and has None as learning rate, as Adafactor of transformers."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1, weight_decay=0.1)
            self.param_groups[0]["lr"] = None

    with pytest.raises(ValueError, match="reads the learning rate of each parameter group, but group 0 of Relative"):
        make_trainer([WeightDecayScheduler(schedule)]).fit(Net(Relative), batches(1))


def test_a_metric_that_is_not_there_warns_and_trains_on() -> None:
    model = ByHand()
    scheduler = WeightDecayScheduler(PlateauSchedule("val_los"))
    with pytest.warns(UserWarning, match=r"PlateauSchedule monitors 'val_los', which is not among the metrics \[\]"):
        make_trainer([scheduler]).fit(model, batches(2))
    assert model.watches[0].of(HEAD) == pytest.approx([0.4, 0.4], abs=1e-12)


def test_a_schedule_of_gradients_acts_in_the_same_step() -> None:
    """AWD by hand in float64: lambda_t = lambda ||g|| / ||w||, the first one unsmoothed or smoothed as documented."""
    seen = []

    class Probe(FeedbackSchedule):
        reads = "gradients"

        def check(self, optimizer: Any) -> None:
            seen.append("check")

        def multipliers(self, optimizer: Any, metrics: Any, state: dict[str, Any]) -> list[float]:
            state["calls"] = state.get("calls", 0) + 1
            assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            return [float(state["calls"])] * len(optimizer.param_groups)

    model = ByHand()
    make_trainer([WeightDecayScheduler(Probe())], accumulate_grad_batches=2).fit(model, batches(5))
    assert seen == ["check"]
    assert model.watches[0].of(HEAD) == pytest.approx([0.4, 0.8, 1.2], abs=1e-12)


def test_adaptive_decay_runs_under_a_trainer() -> None:
    model = Net(lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1))
    make_trainer([WeightDecay(summary=False), WeightDecayScheduler(AdaptiveDecay())]).fit(model, batches(3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": 0.1}, TypeError, r"Expected `schedule` to be one of `lightning_l2.schedules` or .*, got 0.1"),
        ({"schedule": ConstantSchedule(), "interval": "batch"}, ValueError, r"'step' or 'epoch', got 'batch'"),
        (
            {"schedule": ConstantSchedule(), "values": "lambda"},
            ValueError,
            r"'multiplier' or 'weight_decay', got 'lambda'",
        ),
        ({"schedule": ConstantSchedule(), "total_steps": 0}, ValueError, r"at least 1, got 0"),
        ({"schedule": LRSchedule(), "interval": "epoch"}, ValueError, r"LRSchedule reads the training itself"),
    ],
)
def test_arguments_are_checked_at_once(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        WeightDecayScheduler(**arguments)


def test_nothing_to_schedule_is_an_error_before_the_first_step() -> None:
    model = Shrinking(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(
        MisconfigurationException, match=r"the weight decay of every parameter group is 0.*WeightDecay\("
    ):
        make_trainer([WeightDecayScheduler(ConstantSchedule())]).fit(model, batches(2))
    assert model.watches[0].steps == []


def test_a_lambda_of_0_on_purpose_is_scheduled_to_0() -> None:
    model = Shrinking()
    make_trainer([WeightDecay(0.0, summary=False), WeightDecayScheduler(LinearSchedule(1.0, 2.0))]).fit(
        model, batches(2)
    )
    assert model.watches[0].of(HEAD) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -1, "max_time": "00:00:00:02"}, r"The length of the training is unknown.*`total_steps`"),
        (
            {"max_epochs": -1, "max_time": "00:00:00:02", "interval": "epoch"},
            r"The number of epochs is unknown.*`total_steps`, in epochs",
        ),
        ({"max_epochs": -1, "max_steps": 3, "interval": "epoch"}, None),
    ],
)
def test_the_length_comes_from_the_trainer_or_is_asked_for(options, message) -> None:
    interval = options.pop("interval", "step")
    model, scheduler = ByHand(), WeightDecayScheduler(LinearSchedule(1.0, 2.0), interval=interval)
    if message is None:
        make_trainer([scheduler], **options).fit(model, batches(2))
        assert model.watches[0].of(HEAD) == pytest.approx([0.4, 0.4, 0.8], abs=1e-12)
        return
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer([scheduler], **options).fit(model, batches(2))


def test_epochs_are_counted_where_steps_cannot_be() -> None:
    """Of data without a length, and the message says so."""

    def fit(interval: Any) -> list[float]:
        model, scheduler = ByHand(), WeightDecayScheduler(LinearSchedule(1.0, 2.0), interval=interval)
        make_trainer([scheduler], max_epochs=2).fit(model, stream(2))
        return model.watches[0].of(HEAD)

    with pytest.raises(MisconfigurationException, match="`total_steps`, or interval='epoch', since there are 2 epochs"):
        fit("step")
    assert fit("epoch") == pytest.approx([0.4, 0.4, 0.8, 0.8], abs=1e-12)


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


def test_a_schedule_by_epoch_over_one_epoch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Progress is 0 in all of it."""
    callbacks = [WeightDecay(0.1, summary=False), WeightDecayScheduler(LinearSchedule(2.0, 1.0), interval="epoch")]
    make_trainer(callbacks, max_epochs=1).fit(Shrinking(), batches(4))
    told = "WeightDecayScheduler(interval='epoch') has 1 epoch, so lambda stays at its first value, 2 (multiplier)."
    assert told in caplog.text
