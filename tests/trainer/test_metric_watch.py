"""When a metric has a new value; that it is as torch's scheduler sees it is tested with the callback."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_l2.trainer.metric_watch import MetricWatch


def test_each_value_is_new_once() -> None:
    trainer = SimpleNamespace(callback_metrics={})
    watch = MetricWatch("loss", "PlateauSchedule")
    assert not watch.epoch_starts(trainer)
    trainer.callback_metrics["loss"] = torch.tensor(1.0)
    assert watch.epoch_ends(trainer)
    assert not watch.epoch_ends(trainer)
    assert not watch.epoch_starts(trainer)
    # equal, but logged again
    trainer.callback_metrics["loss"] = torch.tensor(1.0)
    assert watch.training_ends(trainer)
    assert not watch.training_ends(trainer)


def test_a_validation_brings_only_what_it_logs() -> None:
    trainer = SimpleNamespace(callback_metrics={"loss": torch.tensor(1.0)})
    watch = MetricWatch("loss", "PlateauSchedule")
    watch.validation_starts(trainer)
    assert not watch.validation_ends(trainer)
    watch.validation_starts(trainer)
    trainer.callback_metrics["loss"] = torch.tensor(2.0)
    assert watch.validation_ends(trainer)
    # the Trainer puts the same value away as another object
    trainer.callback_metrics["loss"] = torch.tensor(2.0)
    assert not watch.epoch_ends(trainer)


def test_a_metric_that_never_comes_is_told() -> None:
    trainer = SimpleNamespace(callback_metrics={"acc": torch.tensor(1.0)})
    watch = MetricWatch("loss", "PlateauSchedule")
    assert not watch.epoch_starts(trainer)
    message = r"PlateauSchedule monitors 'loss', which is not among the metrics \['acc'\]\. Weight decay stays"
    with pytest.warns(UserWarning, match=message):
        assert not watch.epoch_starts(trainer)
    with pytest.warns(UserWarning, match=message):
        assert not watch.training_ends(trainer)


def test_without_a_metric_there_is_never_a_value() -> None:
    trainer = SimpleNamespace(callback_metrics={"loss": torch.tensor(1.0)})
    watch = MetricWatch(None, "CosineSchedule")
    watch.validation_starts(trainer)
    assert not any([watch.epoch_starts(trainer), watch.validation_ends(trainer), watch.epoch_ends(trainer)])
    assert not watch.training_ends(trainer)
