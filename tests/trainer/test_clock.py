"""The clock against windows of batches counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_l2.trainer.clock import ends_step, is_first_batch_of_step, step_index
from tests.helpers import Shrinking, batches, make_trainer


class Seen(pl.Callback):
    """What the clock says at both ends of each batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.opens: list[bool] = []
        self.closes: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(step_index(trainer))
        self.opens.append(is_first_batch_of_step(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.closes.append(ends_step(trainer))


def test_windows_of_two_epochs_each_with_a_short_last_one() -> None:
    seen = Seen()
    make_trainer([seen], accumulate_grad_batches=3, max_epochs=2).fit(Shrinking(), batches(4))
    assert seen.steps == [0, 0, 0, 1, 2, 2, 2, 3]
    assert seen.opens == [True, False, False, True] * 2
    assert seen.closes == [False, False, True, True] * 2


class TwoOptimizers(Shrinking):
    """Stepped by hand, once each a batch."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss())
        for optimizer in self.optimizers():
            optimizer.step()


def test_batches_count_where_several_optimizers_are_stepped_by_hand() -> None:
    seen = Seen()
    trainer = make_trainer([seen])
    trainer.fit(TwoOptimizers(), batches(3))
    assert seen.steps == [0, 1, 2]
    assert trainer.global_step == 6, "which counts each optimizer's"


def test_a_resumed_training_goes_on_counting(tmp_path: Path) -> None:
    for kind in (Shrinking, TwoOptimizers):
        seen, path = Seen(), tmp_path / f"{kind.__name__}.ckpt"
        trainer = make_trainer()
        trainer.fit(kind(), batches(2))
        trainer.save_checkpoint(path)
        make_trainer([seen], max_epochs=2).fit(kind(), batches(2), ckpt_path=path, weights_only=True)
        assert seen.steps == [2, 3]
