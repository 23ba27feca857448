"""What is known of optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch

from lightning_l2.optimizers.facts import (
    OWN_WAY,
    ascent_sign,
    has_decoupled_flag,
    is_schedule_free,
    own_way,
    reads_loss,
    torch_class,
)
from tests.decay.test_attach import OWN_WAY as EXPECTED
from tests.decay.test_attach import weight


@pytest.mark.parametrize("name", EXPECTED)
def test_own_way(name: str) -> None:
    make, expected = EXPECTED[name]
    assert own_way(make([weight()])) == expected


def test_every_optimizer_of_torch_is_known() -> None:
    """With a way of its own or without a weight decay at all."""
    unknown = []
    for name in torch.optim.__all__:
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            has_decay = "weight_decay" in kind([weight()], lr=0.1).defaults
            if has_decay != (name in OWN_WAY):
                unknown.append(name)
    assert unknown == []


def test_groups_that_decay_in_different_ways_have_no_common_one() -> None:
    groups = [{"params": [weight()], "decoupled_weight_decay": flag} for flag in (True, False)]
    assert own_way(torch.optim.Adam(groups)) is None
    assert has_decoupled_flag(torch.optim.Adam(groups))
    assert not has_decoupled_flag(torch.optim.SGD([weight()]))


class Derived(torch.optim.AdamW):
    """Runs torch's step."""


class Overridden(torch.optim.AdamW):
    """Runs its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (torch.optim.AdamW, "AdamW"),
        (torch.optim.Adam, "Adam"),
        (Derived, "AdamW"),
        (Overridden, None),
        (pytorch_optimizer.Lion, None),
    ],
)
def test_whose_step_it_is(kind: Any, name: str | None) -> None:
    assert torch_class(kind([weight()], lr=0.1)) == name


@pytest.mark.parametrize(
    ("kind", "reads"),
    [(torch.optim.LBFGS, True), (torch.optim.SGD, False), (Derived, False), (Overridden, True)],
)
def test_who_may_look_at_the_loss(kind: Any, reads: bool) -> None:
    assert reads_loss(kind([weight()], lr=0.1)) == reads


def test_schedule_free() -> None:
    assert is_schedule_free(pytorch_optimizer.ScheduleFreeSGD([weight()], lr=0.1))
    assert not is_schedule_free(torch.optim.SGD([weight()], lr=0.1))


def test_signs() -> None:
    one = torch.optim.SGD([{"params": [weight()], "maximize": True}, {"params": [weight()]}], lr=0.1)
    assert [ascent_sign(one, group) for group in one.param_groups] == [-1, 1]
    one.maximize = True
    assert [ascent_sign(one, {}), ascent_sign(one, {"maximize": False})] == [-1, 1]


def test_a_schedule_free_optimizer_may_have_no_weight_decay() -> None:
    class Averaging(torch.optim.Optimizer):
        """Keeps averaged weights, and decays none."""

        def step(self, closure: Any = None) -> None:
            """Update nothing."""

    groups = [{"params": [torch.zeros(1)], "train_mode": True}]
    assert own_way(Averaging(groups, {"lr": 0.1})) is None
    assert own_way(Averaging(groups, {"lr": 0.1, "weight_decay": 0.0})) == "decoupled"
