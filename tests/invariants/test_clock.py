"""lambda(t) is exact at every real optimizer step, measured by what the step did to weights without a gradient.

The base is 0.1 and the schedule returns progress itself, so ten times the measured lambda is the progress: the
first step of a training of T steps sees 0, the last 1.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import Schedule
from tests.helpers import DecayWatch, Shrinking, batches, fp16, make_trainer, sgd, stream


@dataclass(frozen=True)
class Progress(Schedule):
    """The schedule that shows the clock."""

    def __call__(self, progress: float) -> float:
        return progress


def evenly(steps: int) -> np.ndarray:
    return np.arange(steps) / (steps - 1)


def callbacks(**options: Any) -> list[pl.Callback]:
    return [WeightDecay(summary=False), WeightDecayScheduler(Progress(), **options)]


def seen(watch: DecayWatch) -> np.ndarray:
    assert set(watch.of("head.bias")) <= {0.0}
    return 10 * np.array(watch.of("head.weight"))


def progress_of(trainer: pl.Trainer, loader: Any = None, model: Shrinking | None = None, **options: Any) -> np.ndarray:
    model = Shrinking() if model is None else model
    trainer.fit(model, batches(10) if loader is None else loader, **options)
    return seen(model.watches[0])


def check(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 20), (2, 10), (4, 6), (3, 8), (10, 2), (7, 4)])
def test_accumulation_with_a_short_last_window(accumulate: int, steps: int) -> None:
    trainer = make_trainer(callbacks(), max_epochs=2, accumulate_grad_batches=accumulate)
    check(progress_of(trainer), evenly(steps))


def test_accumulation_that_changes_during_training() -> None:
    """10 steps, then 5, then 3, the last of a window of two batches."""
    changing = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    check(progress_of(make_trainer([*callbacks(), changing], max_epochs=3)), evenly(10 + 5 + 3))
    changing = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    check(progress_of(make_trainer([changing, *callbacks(total_steps=18)], max_epochs=3)), evenly(18))
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    check(progress_of(make_trainer([changing, *callbacks()], max_epochs=sys.maxsize, max_steps=13)), evenly(13))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 13, "max_epochs": 5}, 13),
        ({"max_steps": 50, "max_epochs": 2}, 20),
        ({"max_steps": 7, "max_epochs": sys.maxsize}, 7),
        ({"max_steps": 5, "max_epochs": 5, "accumulate_grad_batches": 4}, 5),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 10),
        ({"max_epochs": 2, "overfit_batches": 3}, 6),
        ({"fast_dev_run": 4}, 4),
    ],
    ids=str,
)
def test_length_of_training(options: dict[str, Any], steps: int) -> None:
    check(progress_of(make_trainer(callbacks(), **options)), evenly(steps))


def test_a_single_step_sees_the_start() -> None:
    check(progress_of(make_trainer(callbacks(), max_steps=1)), [0.0])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_data_without_a_length_and_max_steps(accumulate: int) -> None:
    trainer = make_trainer(callbacks(), max_epochs=-1, max_steps=7, accumulate_grad_batches=accumulate)
    check(progress_of(trainer, stream(10)), evenly(7))


def test_data_without_a_length_and_total_steps() -> None:
    trainer = make_trainer(callbacks(total_steps=8), max_epochs=2, accumulate_grad_batches=3)
    check(progress_of(trainer, stream(10)), evenly(8))


@pytest.mark.parametrize(
    ("options", "loader"),
    [
        ({"max_time": "00:01:00:00", "max_epochs": None}, lambda: batches(10)),
        ({"max_epochs": 2}, lambda: stream(10)),
        ({"max_epochs": -1}, lambda: batches(10)),
    ],
    ids=["only-max-time", "iterable-with-max-epochs", "endless"],
)
def test_where_the_trainer_cannot_know_it_asks_for_total_steps(
    options: dict[str, Any], loader: Callable[[], Any]
) -> None:
    model = Shrinking()
    with pytest.raises(Exception, match="total_steps"):
        make_trainer(callbacks(), **options).fit(model, loader())
    assert not model.watches or not model.watches[0].steps


def test_total_steps_with_only_max_time() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    trainer = make_trainer([*callbacks(total_steps=11), Stop()], max_epochs=None, max_time="00:00:10:00")
    check(progress_of(trainer), np.arange(6) / 10)


@pytest.mark.parametrize(("total", "expected"), [(5, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]), (19, np.arange(10) / 18)])
def test_total_steps_shorter_or_longer_than_training(total: int, expected: Any) -> None:
    """Past its end a schedule stays at its last value."""
    check(progress_of(make_trainer(callbacks(total_steps=total))), expected)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_interval_epoch(accumulate: int) -> None:
    trainer = make_trainer(callbacks(interval="epoch"), max_epochs=3, accumulate_grad_batches=accumulate)
    steps = {1: 10, 4: 3}[accumulate]
    check(progress_of(trainer), np.repeat([0.0, 0.5, 1.0], steps))


def test_validation_in_between_changes_nothing() -> None:
    class Validated(Shrinking):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 0.0)

    model = Validated()
    trainer = make_trainer(callbacks(), max_epochs=2, val_check_interval=3, accumulate_grad_batches=2)
    trainer.fit(model, batches(10), batches(2))
    check(seen(model.watches[0]), evenly(10))


def test_early_stop_leaves_the_schedule_where_it_was() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    check(progress_of(make_trainer([Stop(), *callbacks()], max_epochs=2)), np.arange(4) / 19)


def test_the_rest_of_an_epoch_skipped() -> None:
    """``on_train_batch_start`` that returns -1 ends an epoch; the clock counts the steps that were taken."""

    class Skipping(Shrinking):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 4 and self.current_epoch == 0 else None

    check(progress_of(make_trainer(callbacks(), max_epochs=2), model=Skipping()), np.arange(14) / 19)


class Manual(Shrinking):
    """Two optimizers by hand: the head steps with every batch, the body with every third."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        for optimizer in [head] + [body] * (batch_idx % 3 == 1):
            optimizer = optimizer.optimizer if self.raw else optimizer
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()
            self.stepped[optimizer is head or (self.raw and optimizer is head.optimizer)].append(self.count)
        self.count += 1

    def configure_optimizers(self) -> Any:
        self.stepped: dict[bool, list[int]] = {True: [], False: []}
        self.count = 0
        optimizers = [sgd(self.body.parameters()), sgd(self.head.parameters())]
        self.watches = [DecayWatch(self, optimizer) for optimizer in optimizers]
        return optimizers


@pytest.mark.parametrize("raw", [False, True], ids=["lightning-optimizer", "raw-optimizer"])
def test_two_manual_optimizers_follow_one_clock(raw: bool) -> None:
    model = Manual(raw)
    make_trainer(callbacks(), max_epochs=2).fit(model, batches(10))
    body, head = model.watches
    assert len(body.steps) == 6
    check(10 * np.array(head.of("head.weight")), evenly(20))
    check(10 * np.array(body.of("body.0.weight")), evenly(20)[model.stepped[False]])
    assert set(head.of("head.bias") + body.of("body.1.weight")) == {0.0}


def test_several_steps_within_a_batch_share_one_lambda() -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                super().training_step(batch, batch_idx)
                self.count -= 1
            self.count += 1

    model = Twice()
    make_trainer(callbacks()).fit(model, batches(10))
    check(10 * np.array(model.watches[1].of("head.weight")), np.repeat(evenly(10), 2))


class DecayedLBFGS(torch.optim.LBFGS):
    """LBFGS, which has no decay of its own, with the gradient of the penalty added in each closure call."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, max_iter=4)
        self.param_groups[0]["weight_decay"] = 0.1
        self.used: list[list[float]] = []

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        self.used.append([])

        def with_decay() -> Tensor:
            loss = closure()
            self.used[-1].append(self.param_groups[0]["weight_decay"])
            return loss

        return super().step(with_decay)


def test_lbfgs_keeps_one_lambda_through_all_closure_calls_of_a_step() -> None:
    class Quadratic(Shrinking):
        def loss(self) -> Tensor:
            return sum(p.square().sum() + p.pow(4).sum() for p in self.parameters())

        def configure_optimizers(self) -> Any:
            self.optimizer = DecayedLBFGS(self.parameters())
            return self.optimizer

    model = Quadratic()
    make_trainer([WeightDecayScheduler(Progress())], max_epochs=2).fit(model, batches(5))
    used = model.optimizer.used
    assert max(len(calls) for calls in used) > 1, "the closure was to be called several times a step"
    assert all(len(set(calls)) == 1 for calls in used)
    check([10 * calls[0] for calls in used], evenly(10))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_fp16_steps_advance_the_clock_and_decay_nothing(accumulate: int) -> None:
    """As lr schedules do. The gradient of two windows is infinite; GradScaler leaves their steps out."""
    bad = (3, 4) if accumulate == 1 else (6, 9)

    class Overflowing(Shrinking):
        def __init__(self) -> None:
            super().__init__()
            self.float()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss() * (float("inf") if batch_idx in bad else 1.0)

    model = Overflowing()
    trainer = make_trainer(callbacks(), plugins=[fp16(init_scale=4.0)], accumulate_grad_batches=accumulate)
    trainer.fit(model, batches(10 * accumulate))
    watch = model.watches[0]
    skipped = [index // accumulate for index in bad]
    assert len(watch.steps) == 8
    np.testing.assert_allclose(seen(watch), np.delete(evenly(10), skipped), atol=1e-4)
    everything = np.prod([1 - 0.1 * 0.1 * p for i, p in enumerate(evenly(10)) if i not in skipped])
    np.testing.assert_allclose(model.head.weight.detach(), everything, rtol=1e-6)


@pytest.mark.parametrize("order", ["rules-first", "scheduler-first", "scheduler-alone"])
def test_order_of_the_callbacks(order: str) -> None:
    both = {
        "rules-first": callbacks(),
        "scheduler-first": callbacks()[::-1],
        "scheduler-alone": callbacks()[1:],
    }[order]
    model = Shrinking()
    make_trainer(both).fit(model, batches(10))
    check(10 * np.array(model.watches[0].of("head.weight")), evenly(10))
    exempt = evenly(10) if order == "scheduler-alone" else 0.0
    check(10 * np.array(model.watches[0].of("head.bias")), exempt)


def test_each_optimizer_keeps_its_own_base() -> None:
    class Bases(Manual):
        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            optimizers[0].param_groups[0]["weight_decay"] = 0.3
            return optimizers

    model = Bases()
    make_trainer(callbacks()).fit(model, batches(10))
    check(10 * np.array(model.watches[1].of("head.weight")), evenly(10))
    check(10 * np.array(model.watches[0].of("body.0.weight")), 3 * evenly(10)[model.stepped[False]])


def test_max_steps_of_several_optimizers_is_no_length() -> None:
    model = Manual(raw=False)
    with pytest.raises(MisconfigurationException, match=r"`max_steps=7` counts the steps of every optimizer.*total_st"):
        make_trainer(callbacks(), max_steps=7, max_epochs=-1).fit(model, batches(10))
    assert not model.watches[0].steps


def test_interval_epoch_without_an_end_asks_for_total_steps() -> None:
    with pytest.raises(MisconfigurationException, match=r"number of epochs is unknown.*Give `total_steps`, in epochs"):
        make_trainer(callbacks(interval="epoch"), max_epochs=-1).fit(Shrinking(), batches(10))
