"""An exempt group decays by exactly 0 whatever the schedule does, and the others come back from 0."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import Schedule
from tests.helpers import DECAYED, EXEMPT, Shrinking, batches, hand_grouped, make_trainer


@dataclass(frozen=True)
class Table(Schedule):
    """A schedule by hand: the value of the nearest of equally spaced points."""

    values: tuple[float, ...]

    def __call__(self, progress: float) -> float:
        return self.values[round(progress * (len(self.values) - 1))]


TABLES = {
    "starts-at-0": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    "touches-0": (2.0, 1.0, 0.0, 0.0, 1.0, 2.0),
    "ends-at-0": (1.0, 0.8, 0.6, 0.4, 0.2, 0.0),
    "rises-late": (0.0, 0.0, 0.0, 0.0, 0.0, 7.0),
    "alternates": (0.0, 3.0, 0.0, 3.0, 0.0, 3.0),
    "constant-0": (0.0,) * 6,
}


def by_hand(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class HandGrouped(Shrinking):
    """The expert's own groups with 0 for the exempt one; no callback made them."""

    def configure_optimizers(self) -> Any:
        self.make_optimizer = lambda params: by_hand(hand_grouped(0.05)(self))
        return super().configure_optimizers()


def build(grouping: str, values: str, table: tuple[float, ...]) -> tuple[Shrinking, list[Any], float]:
    scheduler = WeightDecayScheduler(Table(table), values=values)
    scale = 1.0 if values == "weight_decay" else 0.05
    if grouping == "hand":
        return HandGrouped(), [scheduler], scale
    callbacks = [WeightDecay(0.05, summary=False), scheduler]
    return Shrinking(by_hand), callbacks if grouping == "rules" else callbacks[::-1], scale


GROUPINGS = ["rules", "rules-after-scheduler", "hand"]


@pytest.mark.parametrize(
    ("name", "grouping", "values"),
    [
        *((name, "rules", "multiplier") for name in TABLES),
        *(("alternates", grouping, "multiplier") for grouping in GROUPINGS[1:]),
        *(("touches-0", grouping, "weight_decay") for grouping in GROUPINGS),
    ],
)
def test_through_a_whole_run(name: str, grouping: str, values: str) -> None:
    table = TABLES[name]
    model, callbacks, scale = build(grouping, values, table)
    make_trainer(callbacks).fit(model, batches(6))
    watch = model.watches[0]
    for name in EXEMPT:
        assert watch.of(name) == [0.0] * 6, name
    for name in DECAYED:
        np.testing.assert_allclose(watch.of(name), scale * np.array(table), rtol=1e-9, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("saved_after", [1, 2, 3])
@pytest.mark.parametrize(
    ("table", "grouping"),
    [*((TABLES[name], "rules") for name in ("touches-0", "alternates", "starts-at-0")), (TABLES["alternates"], "hand")],
)
def test_through_a_resume_while_everything_is_0(
    table: tuple[float, ...], grouping: str, saved_after: int, tmp_path: Path
) -> None:
    """Saved when every group stands at 0, exempt and decayed groups must still be told apart."""
    model, callbacks, scale = build(grouping, "multiplier", table)
    callbacks[-1] = WeightDecayScheduler(Table(table), total_steps=6)
    trainer = make_trainer(callbacks, limit_train_batches=1, max_epochs=saved_after)
    trainer.fit(model, batches(6))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    model, callbacks, _ = build(grouping, "multiplier", table)
    trainer = make_trainer(callbacks, limit_train_batches=1, max_epochs=6)
    trainer.fit(model, batches(6), ckpt_path=tmp_path / "last.ckpt")
    watch = model.watches[0]
    for name in EXEMPT:
        assert watch.of(name) == [0.0] * (6 - saved_after), name
    for name in DECAYED:
        np.testing.assert_allclose(watch.of(name), scale * np.array(table[saved_after:]), rtol=1e-9, atol=1e-14)


def test_absolute_values_keep_the_proportions_of_the_groups() -> None:
    """With values="weight_decay" the strongest group gets the schedule's value, the others their share of it."""

    class Three(Shrinking):
        def configure_optimizers(self) -> Any:
            named = dict(self.named_parameters())
            self.make_optimizer = lambda params: by_hand(
                [
                    {"params": [named["body.0.weight"]], "weight_decay": 0.02},
                    {"params": [named["head.weight"]], "weight_decay": 0.08},
                    {"params": [p for n, p in named.items() if n in EXEMPT], "weight_decay": 0.0},
                ]
            )
            return super().configure_optimizers()

    model = Three()
    make_trainer([WeightDecayScheduler(Table(TABLES["starts-at-0"]), values="weight_decay")]).fit(model, batches(6))
    watch = model.watches[0]
    np.testing.assert_allclose(watch.of("head.weight"), TABLES["starts-at-0"], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(watch.of("body.0.weight"), np.array(TABLES["starts-at-0"]) / 4, rtol=1e-9, atol=1e-14)
    assert watch.of("head.bias") == [0.0] * 6
