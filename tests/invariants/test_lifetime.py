"""Callbacks copy and pickle at any time, keep nothing of a fit, and serve fit after fit."""

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_l2 import DecayRule, L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import CosineSchedule, LinearSchedule
from tests.helpers import Shrinking, ValidatedNet, assert_same_weights, batches, data, make_trainer, weights

# Penalty and decay at once shrink twice, which here is meant.
pytestmark = pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well")

MAKERS: dict[str, Callable[[], pl.Callback]] = {
    "WeightDecay": lambda: WeightDecay(0.3, summary=False),
    "WeightDecay-rules": lambda: WeightDecay(
        rules=["exempt", DecayRule("head", modules=(torch.nn.Linear,), multiplier=2.0), "default"], summary=False
    ),
    "WeightDecay-decoupled": lambda: WeightDecay(0.3, apply="decoupled", summary=False),
    "WeightDecay-cautious": lambda: WeightDecay(0.3, apply="cautious", summary=False),
    "WeightDecay-start": lambda: WeightDecay(0.3, towards="start", summary=False),
    "WeightDecayScheduler": lambda: WeightDecayScheduler(CosineSchedule(start=1.0, end=0.0)),
    "L2NormMonitor": lambda: L2NormMonitor(every_n_steps=1, gradients=True, updates=True),
    "L2Penalty": lambda: L2Penalty(0.1),
    "L2Penalty-start": lambda: L2Penalty(0.1, towards="start"),
    "NormConstraint": lambda: NormConstraint(1.0),
    "NormConstraint-lagrangian": lambda: NormConstraint(1.0, method="lagrangian"),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
COPIES = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), copy.copy], ids=["deepcopy", "pickle", "copy"]
)
HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
    "teardown",
]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def train(callbacks: list[pl.Callback], seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = ValidatedNet(adamw)
    make_trainer(callbacks, max_epochs=2, **options).fit(model, data(samples=12), data(samples=4))
    return weights(model)


@functools.cache
def by_a_new_one(make: Callable[[], pl.Callback], seed: int = 0) -> dict[str, torch.Tensor]:
    return train([make()], seed)


@COPIES
@EVERY
def test_a_copy_trains_as_the_original(make: Any, duplicate: Any) -> None:
    original = make()
    for callback in (duplicate(original), original, duplicate(original)):
        assert_same_weights(train([callback]), by_a_new_one(make))


class CopyEverywhere(pl.Callback):
    """Duplicates the callback in every hook of a fit, as tools that snapshot a Trainer do."""

    def __init__(self, original: pl.Callback, duplicate: Any) -> None:
        self.original, self.duplicate = original, duplicate
        self.copies: dict[str, pl.Callback] = {}
        for hook in HOOKS:
            setattr(self, hook, lambda *args, hook=hook, **kwargs: self.copy(hook))

    def copy(self, hook: str) -> None:
        self.copies[hook] = self.duplicate(self.original)


@COPIES
@EVERY
def test_copies_made_in_any_hook(make: Any, duplicate: Any, tmp_path: Any) -> None:
    original = make()
    copier = CopyEverywhere(original, duplicate)
    callbacks = [copier, original] if duplicate is copy.deepcopy else [original, copier]
    expected = by_a_new_one(make)
    actual = train(callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    assert_same_weights(actual, expected)
    assert copier.copies.keys() == set(HOOKS)
    for hook in ("on_fit_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_end"):
        assert_same_weights(train([copier.copies[hook]]), expected)


def without_lightnings_own(callback: pl.Callback) -> None:
    """Take away ``log`` and ``log_dict`` of the module, which Lightning hangs on every callback and leaves there."""
    for name in ("log", "log_dict"):
        vars(callback).pop(name, None)


@EVERY
def test_nothing_of_a_fit_is_kept(make: Any) -> None:
    callback = make()
    model = ValidatedNet(adamw)
    trainer = make_trainer([callback], max_epochs=2)
    trainer.fit(model, data(), data(samples=4))
    kept = {
        "trainer": weakref.ref(trainer),
        "module": weakref.ref(model),
        "parameter": weakref.ref(model.head.weight),
        "optimizer": weakref.ref(trainer.optimizers[0]),
    }
    del trainer, model
    without_lightnings_own(callback)
    gc.collect()
    assert [name for name, reference in kept.items() if reference() is not None] == []


@EVERY
def test_nothing_is_kept_after_an_exception(make: Any) -> None:
    def run(callback: pl.Callback) -> list[weakref.ref[Any]]:
        model = ValidatedNet(adamw)
        step = model.training_step
        model.training_step = lambda batch, batch_idx: step(batch, batch_idx) if batch_idx < 2 else 1 / 0
        trainer = make_trainer([callback])
        with suppress(ZeroDivisionError):
            trainer.fit(model, data(), data(samples=4))
        return [weakref.ref(trainer), weakref.ref(model), weakref.ref(trainer.optimizers[0])]

    callback = make()
    references = run(callback)
    without_lightnings_own(callback)
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_optimizer_is_left_without_hooks() -> None:
    """A step of the user's own after fit does what it did before: the hooks that apply decay are gone."""
    for apply in ("optimizer", "coupled", "decoupled", "independent", "cautious"):
        model = Shrinking(lambda params: torch.optim.SGD(params, lr=0.1))
        trainer = make_trainer([WeightDecay(0.3, apply=apply, summary=False)])
        trainer.fit(model, batches(3))
        after_fit = weights(model)
        optimizer = trainer.optimizers[0]
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        assert_same_weights(model, after_fit)


@EVERY
def test_three_fits_with_the_same_objects(make: Any) -> None:
    """Each as its own fresh callback would do it, also with another module."""
    callback = make()
    for seed in range(3):
        assert_same_weights(train([callback], seed=seed), by_a_new_one(make, seed))


def test_three_fits_of_one_trainer_module_and_scheduler() -> None:
    """A Trainer that goes on with more epochs: the second fit is as long as what the Trainer says then."""
    callbacks = [WeightDecay(0.3, summary=False), WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))]
    model = Shrinking()
    for fit in range(3):
        make_trainer(callbacks, max_epochs=1 + fit).fit(model, batches(4))
        steps = 4 * (1 + fit)
        np.testing.assert_allclose(model.watches[0].of("head.weight"), 0.3 * np.arange(steps) / (steps - 1), atol=1e-9)
        assert set(model.watches[0].of("head.bias")) == {0.0}


def test_fit_again_with_the_same_trainer() -> None:
    """``max_epochs`` raised on one Trainer: it goes on where it stopped, at the clock it had."""
    callbacks = [
        WeightDecay(0.3, summary=False),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), total_steps=12),
    ]
    model = Shrinking()
    trainer = make_trainer(callbacks, max_epochs=1)
    trainer.fit(model, batches(4))
    first = model.watches[0].of("head.weight")
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, batches(4))
    np.testing.assert_allclose(first + model.watches[0].of("head.weight"), 0.3 * np.arange(12) / 11, atol=1e-9)


def test_one_set_of_callbacks_in_two_trainers_at_once() -> None:
    """A fit inside a fit (a validation of hyperparameters, say) with copies leaves the outer one alone."""

    class Inner(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            make_trainer(copy.deepcopy([c for c in trainer.callbacks if c is not self])).fit(Shrinking(), batches(2))

    callbacks = [WeightDecay(0.3, summary=False), WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))]
    model = Shrinking()
    make_trainer([*callbacks, Inner()], max_epochs=2).fit(model, batches(4))
    np.testing.assert_allclose(model.watches[0].of("head.weight"), 0.3 * np.arange(8) / 7, atol=1e-9)
