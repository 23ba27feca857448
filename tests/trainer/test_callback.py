"""The base of all callbacks: what a copy starts with, what it holds, and whether it may have company."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2 import WeightDecay
from lightning_l2.trainer.callback import MANY_WINDOWS, Callback, check_alone
from tests.helpers import Shrinking, batches, make_trainer


class Fit:
    removed = 0

    def remove(self) -> None:
        Fit.removed += 1


class Mine(Callback):
    def __init__(self) -> None:
        self.setting, self.seen = 3, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._fit = Fit()
        self.log("mine", 1.0)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen = [copy.deepcopy(self), pickle.loads(pickle.dumps(self))]


def test_a_copy_has_the_settings_and_nothing_of_the_fit() -> None:
    Fit.removed, callback = 0, Mine()
    make_trainer([callback]).fit(Shrinking(), batches(1))
    assert callback._fit is None
    assert Fit.removed == 1
    assert [(type(copied), vars(copied)) for copied in callback.seen] == [(Mine, {"setting": 3, "seen": []})] * 2


def test_a_module_that_logs_by_a_callback_is_not_kept_by_it() -> None:
    callback, module = Mine(), Shrinking()
    make_trainer([callback]).fit(module, batches(1))
    assert callback.log == module.log
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None
    assert callback.log is None


def test_another_of_the_kind_is_refused_by_its_number_also_a_derived_one() -> None:
    derived = type("Derived", (Mine,), {})
    trainer = SimpleNamespace(callbacks=[Mine(), derived()])
    for callback in trainer.callbacks:
        with pytest.raises(MisconfigurationException, match=r"The Trainer has 2 Mine callbacks.*Keep one\."):
            check_alone(trainer, callback, "Keep one.")
    check_alone(SimpleNamespace(callbacks=[Mine(), Callback()]), Mine(), "Keep one.")


class KeptToItself(Shrinking):
    """Returns an optimizer, and steps another one on the same parameters."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.other = torch.optim.SGD(self.parameters(), lr=0.1)
        self.other.step()


@pytest.mark.parametrize("windows", [3, MANY_WINDOWS + 3])
def test_optimizers_that_never_update_are_told_with_the_windows_that_went_by(windows: int) -> None:
    with pytest.warns(UserWarning, match=rf"^{min(windows, MANY_WINDOWS)} windows of batches went by, and SGD has not"):
        make_trainer([WeightDecay(0.1, summary=False)]).fit(KeptToItself(), batches(windows))


class StepsNone(Shrinking):
    """Never steps its optimizer, as one that scales another does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()


def test_a_window_is_what_gradients_accumulate_over() -> None:
    trainer = make_trainer([WeightDecay(0.1, summary=False)], accumulate_grad_batches=4)
    with pytest.warns(UserWarning, match=r"^2 windows of batches went by, and SGD has not updated once"):
        trainer.fit(StepsNone(), batches(8))
