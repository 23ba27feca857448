"""What WeightDecayScheduler does beyond the clock: values, hand-made groups, schedules that read the training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.adaptive import AdaptiveDecay, CorrectedDecay
from lightning_l2.schedules import ConstantSchedule, FeedbackSchedule, LinearSchedule, LRSchedule, PlateauSchedule
from tests.helpers import DecayWatch, Net, Shrinking, batches, make_trainer

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
        ({"schedule": 0.1}, TypeError, r"`schedule` to be Schedule \| FeedbackSchedule, but got 0.1"),
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
