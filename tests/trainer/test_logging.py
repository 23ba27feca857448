"""What loggers get, against what the Trainer's own rows are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from lightning_l2.trainer.clock import ends_step
from lightning_l2.trainer.logging import is_logging_step, log_metrics, log_step, logging_interval
from tests.helpers import Rows, Shrinking, batches, make_trainer


@pytest.mark.parametrize(
    ("every_n_steps", "fast_dev_run", "expected"), [(None, 0, 50), (None, 1, 1), (5, 0, 5), (5, 1, 5), (0, 0, 0)]
)
def test_an_own_cadence_goes_before_the_trainers(every_n_steps: int | None, fast_dev_run: int, expected: int) -> None:
    trainer = SimpleNamespace(log_every_n_steps=50, fast_dev_run=fast_dev_run)
    assert logging_interval(trainer, every_n_steps) == expected


class Logging(Shrinking):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("one", 1.0)
        return self.loss()


class Seen(pl.Callback):
    """The steps in which it is time to log, by the Trainer's cadence and never."""

    def __init__(self) -> None:
        self.due: list[int] = []
        self.never: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        for steps, cadence in ((self.due, None), (self.never, 0)):
            if ends_step(trainer) and is_logging_step(trainer, cadence):
                steps.append(log_step(trainer))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_the_trainers_own_rows(accumulate: int) -> None:
    seen, logger = Seen(), Rows()
    options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 2, "max_epochs": 2}
    make_trainer([seen], logger=logger, **options).fit(Logging(), batches(5))
    assert seen.due == list(logger.by_step("one"))
    assert len(seen.due) >= 3
    assert seen.never == []


def test_each_logger_is_called_once_and_the_monitored_is_where_callbacks_look() -> None:
    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            log_metrics(trainer, {"a": 1.0, "b": 2.0}, monitor={"c": 0.1})
            log_metrics(trainer, {"d": 3.0}, step=7)
            log_metrics(trainer, {}, monitor={"e": 5.0})

    loggers = [Rows(), Rows()]
    trainer = make_trainer([Log()], logger=loggers)
    trainer.fit(Shrinking(), batches(2))
    for logger in loggers:
        assert logger.rows == [{"a": 1.0, "b": 2.0}, {"d": 3.0}] * 2
        assert logger.steps == [0, 7, 1, 7]
    assert {key: value.item() for key, value in trainer.callback_metrics.items()} == pytest.approx({"c": 0.1, "e": 5.0})
