"""Groups that are split for good, where a strategy takes them over before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2.decay import ScheduledDecay
from lightning_l2.decay.early import EarlySplit
from lightning_l2.param_groups.resume import Resuming
from lightning_l2.param_groups.summary import GroupSummary
from lightning_l2.schedules import LinearSchedule


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))


def split(model: nn.Module, optimizer: Any, base: float | None = 0.3, resuming: Any = None) -> EarlySplit:
    return EarlySplit(model, [optimizer], lambda group: base, "default", resuming or Resuming("config"))


def shown(optimizer: Any) -> list[tuple[Any, ...]]:
    return [
        (group["name"], group["weight_decay"], len(group["params"]), group["lr"]) for group in optimizer.param_groups
    ]


def test_the_groups_are_those_of_an_expert() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "name": "head"}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    early = split(model, optimizer)
    assert shown(optimizer) == [
        ("group0/decay", 0.3, 1, 0.2),
        ("group0/no_decay", 0.0, 1, 0.2),
        ("head/decay", 0.3, 1, 0.1),
        ("head/no_decay", 0.0, 1, 0.1),
    ]
    assert early.weight_decay() == {"0.weight": 0.3, "0.bias": 0.0, "2.weight": 0.3, "2.bias": 0.0}
    assert early.summary()[0] == GroupSummary("group0/decay", "decay", 0.3, 1, 4, ("0.weight",))
    assert not optimizer._optimizer_step_pre_hooks


def test_without_a_value_each_keeps_the_groups_own() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.7)
    split(model, optimizer, None)
    assert shown(optimizer) == [("decay", 0.7, 2, 0.1), ("no_decay", 0.0, 4, 0.1)]


def test_names_of_parameters_are_split_along() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.named_parameters(), lr=0.1)
    split(layer, optimizer)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


def test_lambda_is_written_again_after_a_state_was_restored() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    early = split(model, optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.9
    early.begin([optimizer])
    assert shown(optimizer) == [("decay", 0.3, 2, 0.1), ("no_decay", 0.0, 4, 0.1)]
    scheduled = ScheduledDecay(LinearSchedule(1.0, 3.0), [optimizer], length=2, writes=True)
    scheduled.set(1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.9, 0.0], rel=1e-15)


def test_groups_that_the_strategy_dropped_or_flattened() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    early = split(model, optimizer)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    del optimizer.param_groups[0]
    early.begin([optimizer])
    assert shown(optimizer) == [("no_decay", 0.0, 1, 0.1)]


@pytest.mark.parametrize(("on_resume", "value"), [("config", 0.3), ("checkpoint", 0.5)])
def test_whose_lambda_holds_after_a_resume(on_resume: Any, value: float) -> None:
    model, resuming = net(), Resuming(on_resume)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    early = split(model, optimizer, resuming=resuming)
    resuming.has_restored, resuming.restored = True, {"0.weight": 0.5, "2.weight": 0.5}
    early.begin([optimizer])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [value, 0.0]
    assert early.weight_decay()["0.weight"] == value
    assert early.summary()[0].weight_decay == value


def test_several_lambdas_of_a_checkpoint_for_what_is_one_group_now() -> None:
    model, resuming = net(), Resuming("checkpoint")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    early = split(model, optimizer, resuming=resuming)
    resuming.has_restored, resuming.restored = True, {"0.weight": 0.5}
    with pytest.raises(ValueError, match=r"several weight decays for parameters of the group 'decay'.*DeepSpeed has"):
        early.begin([optimizer])
