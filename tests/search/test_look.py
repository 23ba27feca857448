"""The peak of the learning rate times the optimizer steps, read from a Trainer before it trains."""

import functools
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_l2 import WeightDecay
from lightning_l2.search import search_weight_decay
from lightning_l2.search.look import look
from tests.helpers import Net, ValidatedNet, batches, data, make_trainer, stream


def noam(step: int) -> float:
    """The Transformer's: 10 steps of warm-up to 0.05, then the inverse square root, of a base of 1."""
    return 0.05 * min((step + 1) / 10, math.sqrt(10 / (step + 1)))


@pytest.mark.parametrize(
    ("trainer", "module", "loader", "expected"),
    [
        ({"max_epochs": 5}, {}, batches(6), 0.1 * 30),
        ({"max_steps": 7, "max_epochs": -1}, {}, batches(6), 0.1 * 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, {}, batches(6), 0.1 * 4),
        ({"max_epochs": 2, "limit_train_batches": 3}, {}, batches(6), 0.1 * 6),
        ({"max_steps": 7, "max_epochs": -1}, {}, stream(6), 0.1 * 7),
        # unknown lengths
        ({"max_epochs": 2}, {}, stream(6), None),
        ({"max_epochs": -1}, {}, batches(6), None),
        # schedules: the peak counts
        ({}, {"scheduler": lambda o: schedulers.OneCycleLR(o, 0.4, total_steps=30)}, batches(30), 0.4 * 30),
        ({}, {"scheduler": lambda o: schedulers.LambdaLR(o, noam), "base": 1.0}, batches(30), 0.05 * 30),
        ({}, {"scheduler": lambda o: schedulers.CosineAnnealingLR(o, 30)}, batches(30), 0.1 * 30),
        (
            {"max_epochs": 3},
            {"scheduler": lambda o: schedulers.StepLR(o, 1, 2.0), "interval": "epoch"},
            batches(4),
            0.4 * 12,
        ),
    ],
)
def test_the_peak_times_the_steps(trainer: dict, module: dict, loader: Any, expected: float | None) -> None:
    options = {"max_epochs": 1, **trainer}
    base = module.pop("base", 0.1)
    found = look(make_trainer(**options), Net(lambda p: torch.optim.SGD(p, lr=base), **module), loader)
    assert found == ({} if expected is None else {"lr_steps": pytest.approx(expected, rel=1e-6)})


def test_decay_that_is_independent_of_the_learning_rate() -> None:
    trainer = make_trainer([WeightDecay(0.1, apply="independent", summary=False)], max_epochs=5)
    assert look(trainer, Net(), batches(6)) == {"lr_steps": 30.0}


def test_nothing_trains_and_nobody_is_told() -> None:
    seen: list[str] = []

    class Spy(pl.Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            seen.append("sanity check")

        def on_train_start(self, *_: Any) -> None:
            seen.append("training")

    class Watched(ValidatedNet):
        def on_fit_start(self) -> None:
            self.logger.log_metrics({"anything": 1.0})

    logger = pl.loggers.logger.DummyLogger()
    logger.log_metrics = lambda *_: seen.append("logger")  # type: ignore[assignment]
    look(make_trainer([Spy()], logger=logger), Watched(), data(), data())
    assert seen == []


def make(weight_decay: float, lr: float = 0.1, epochs: int = 1, values: list[float] | None = None) -> tuple[Any, ...]:
    if values is not None:
        values.append(weight_decay)
    trainer = make_trainer([WeightDecay(weight_decay, summary=False)], max_epochs=epochs)
    return trainer, ValidatedNet(lambda p: torch.optim.SGD(p, lr=lr)), data(), data()


def test_the_range_of_a_search_follows() -> None:
    """SGD(lr=0.1) for 3 epochs of 8 batches: eta T = 2.4."""
    result = search_weight_decay(functools.partial(make, epochs=3), trials=3, seeds=1, progress=False)
    assert result.lr_steps == pytest.approx(2.4)
    tried = sorted(trial.weight_decay for trial in result.trials)
    assert tried == pytest.approx([0.0, 0.01 / 2.4, math.sqrt(0.1) / 2.4, 10 / 2.4], rel=1e-2)
    row = next(row for row in result.rows() if row["weight_decay"] == tried[3])
    assert row["eta_lambda_T"] == pytest.approx(10.0, rel=1e-2)
    assert "eta*lambda*T" in result.table()


def test_a_range_that_does_nothing_is_told_before_it_trains() -> None:
    values: list[float] = []
    told = r"eta \* lambda \* T = 0\.008 for the largest lambda, 0\.1, with eta \* T = 0\.08: .* up to high=1\.2e\+02"
    with pytest.warns(UserWarning, match=told):
        search_weight_decay(
            functools.partial(make, lr=0.01, values=values), low=1e-5, high=0.1, trials=1, seeds=1, progress=False
        )
    assert len(values) == 3, "looked at, and two trials"
    assert search_weight_decay(make, low=1e-3, high=0.1, trials=1, seeds=1, progress=False).lr_steps == pytest.approx(
        0.8
    )


def test_where_it_cant_be_known_the_range_is_the_usual_one_and_it_is_told() -> None:
    def endless(weight_decay: float) -> tuple[Any, ...]:
        trainer = make_trainer([WeightDecay(weight_decay, summary=False)], max_epochs=2)
        return trainer, ValidatedNet(), stream(4), data()

    with pytest.warns(UserWarning, match=r"lambda is searched from 1e-05 to 0\.1\. Give `low` and `high`"):
        result = search_weight_decay(endless, trials=3, seeds=1, progress=False)
    assert sorted(trial.weight_decay for trial in result.trials) == [0.0, 1e-5, 1e-3, 1e-1]
    search_weight_decay(endless, low=1e-3, high=1.0, trials=1, seeds=1, progress=False)
