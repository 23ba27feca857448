"""`weight_decay_in_force` tells the lambda that the coming step decays by, under the names of the groups."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule, WeightDecay, WeightDecayScheduler, weight_decay_in_force
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Shrinking, batches, make_trainer, sgd

STEPS = 6
# from 1.5 in the first step to 0.5 in the last
FALLING = 1.5 - np.arange(STEPS) / (STEPS - 1)


class Ask(pl.Callback):
    """Asks before each step, of the optimizer itself and of Lightning's wrapper."""

    def __init__(self, accumulate: int = 1) -> None:
        self.accumulate = accumulate
        self.told: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        told = weight_decay_in_force(trainer.optimizers[0])
        assert weight_decay_in_force(pl_module.optimizers()) == told
        if batch_idx % self.accumulate == 0:
            self.told.append(told)
        assert self.told[-1] == told, "lambda changed within a window of accumulation"

    def assert_told(self, expected: dict[str, Any]) -> None:
        assert [told.keys() for told in self.told] == [expected.keys()] * STEPS
        for name, values in expected.items():
            np.testing.assert_allclose([told[name] for told in self.told], values, rtol=1e-12, err_msg=name)


def falling() -> WeightDecayScheduler:
    return WeightDecayScheduler(LinearSchedule(start=1.5, end=0.5))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("apply", ["optimizer", "decoupled"])
def test_it_is_base_times_schedule_and_what_the_step_decays_by(apply: str, accumulate: int) -> None:
    rules = [DecayRule("head", pattern=r"^head\.weight$", multiplier=2.0), "default"]
    model, ask = Shrinking(), Ask(accumulate)
    mine = [WeightDecay(0.2, rules=rules, apply=apply, summary=False), falling(), ask]
    make_trainer(mine, accumulate_grad_batches=accumulate).fit(model, batches(STEPS * accumulate))
    ask.assert_told({"head": 0.4 * FALLING, "decay": 0.2 * FALLING, "no_decay": np.zeros(STEPS)})
    for group, name in (("head", "head.weight"), ("decay", "body.0.weight"), ("no_decay", "head.bias")):
        np.testing.assert_allclose(model.watches[0].of(name), [told[group] for told in ask.told], rtol=1e-9)


def by_hand(module: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(module.body.parameters()), "weight_decay": 0.3},
        {"params": list(module.head.parameters()), "weight_decay": 0.7, "name": "head"},
    ]


def test_of_groups_made_by_hand_under_a_schedule() -> None:
    model, ask = Shrinking(), Ask()
    model.make_optimizer = lambda params: sgd(by_hand(model))
    make_trainer([falling(), ask]).fit(model, batches(STEPS))
    ask.assert_told({"group0": 0.3 * FALLING, "head": 0.7 * FALLING})
    np.testing.assert_allclose(model.watches[0].of("head.weight"), 0.7 * FALLING, rtol=1e-9)


def test_of_groups_made_by_hand_outside_of_any_fit() -> None:
    module = Shrinking()
    assert weight_decay_in_force(torch.optim.AdamW(by_hand(module))) == {"group0": 0.3, "head": 0.7}
    assert weight_decay_in_force(torch.optim.Adam(module.parameters(), weight_decay=0.1)) == {"group0": 0.1}
