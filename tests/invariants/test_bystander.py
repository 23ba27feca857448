"""Callbacks that aren't asked to change anything change no weight and no random state, bit for bit."""

import functools
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import ValidatedNet, assert_same_weights, data, make_trainer, weights


class WithDropout(ValidatedNet):
    def __init__(self, **options: Any) -> None:
        super().__init__(lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1), **options)
        self.body.append(nn.Dropout(0.5))


def run(callbacks: list[pl.Callback], **options: Any) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = WithDropout()
    make_trainer(callbacks, max_epochs=2, log_every_n_steps=1, **options).fit(model, data(), data())
    return weights(model), (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())


BYSTANDERS = {
    "monitor": lambda: [L2NormMonitor()],
    "monitor-parameters": lambda: [L2NormMonitor(every_n_steps=1, per="parameter", gradients=True, updates=True)],
    "monitor-modules": lambda: [L2NormMonitor(every_n_steps=1, per="module", gradients=True, updates=True)],
    "monitor-groups": lambda: [L2NormMonitor(every_n_steps=3, per="group", gradients=True, updates=True)],
    "monitor-total": lambda: [L2NormMonitor(every_n_steps=2, per="total")],
    "two-monitors": lambda: [L2NormMonitor(per="total"), L2NormMonitor(every_n_steps=2, per="parameter")],
    "one-rule": lambda: [WeightDecay(rules=[DecayRule("all")], summary=False)],
    "scheduler": lambda: [WeightDecayScheduler(LinearSchedule(start=1.0, end=1.0))],
    "all": lambda: [
        L2NormMonitor(every_n_steps=1, gradients=True, updates=True),
        WeightDecayScheduler(LinearSchedule(start=1.0, end=1.0)),
        WeightDecay(0.1, rules=[DecayRule("head", pattern="^head.weight"), DecayRule("rest")]),
    ],
}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}


@functools.cache
def without(options: str) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    return run([], **OPTIONS[options])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, "plain") for name in BYSTANDERS),
        *((name, options) for name in ("monitor-groups", "all") for options in ("accumulation", "clipping")),
    ],
)
def test_weights_and_random_state_are_untouched(name: str, options: str) -> None:
    actual, random_states = run(BYSTANDERS[name](), **OPTIONS[options])
    expected, expected_random_states = without(options)
    assert_same_weights(actual, expected)
    assert random_states == expected_random_states
