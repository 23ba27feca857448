"""What schedules see of an optimizer that read the training."""

from __future__ import annotations

import re
from typing import Any

import torch

from lightning_l2.decay import RuleDecay, ScheduledDecay
from lightning_l2.decay.feedback_view import as_seen
from lightning_l2.rules import DecayRule
from lightning_l2.schedules import FeedbackSchedule


def test_a_group_for_each_part() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    RuleDecay(model, [optimizer], 0.1, rules=["exempt", DecayRule("all")])
    view = as_seen(optimizer)
    assert isinstance(view, torch.optim.AdamW)
    assert view.state is optimizer.state
    found = [(group["name"], group["rule"], group["weight_decay"], group["lr"]) for group in view.param_groups]
    assert found == [("all", "all", 0.1, 0.3), ("no_decay", "no_decay", 0.0, 0.3)]
    assert [group["params"] for group in view.param_groups] == [[model.weight], [model.bias]]
    assert [group["name"] for group in as_seen(optimizer, re.compile("^no")).param_groups] == ["no_decay"]


def test_a_schedule_of_some_groups_sees_only_those_and_optimizers_that_have_them() -> None:
    seen: list[tuple[str, list[str]]] = []

    class Counting(FeedbackSchedule):
        reads = "metric"

        def check(self, optimizer: Any) -> None:
            seen.append(("check", [group["name"] for group in optimizer.param_groups]))

        def multipliers(self, optimizer: Any, metrics: Any, state: dict[str, Any]) -> list[float]:
            seen.append(("ask", [group["name"] for group in optimizer.param_groups]))
            return [2.0, 3.0][: len(optimizer.param_groups)]

    def sgd(*names: str) -> torch.optim.Optimizer:
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "name": name} for name in names]
        return torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)

    optimizers = [sgd("head", "body"), sgd("other"), sgd("body2")]
    scheduled = ScheduledDecay(Counting(), optimizers, groups="body|head")
    assert scheduled.check()
    scheduled.observe({})
    assert seen == [
        ("check", ["head", "body"]),
        ("check", ["body2"]),
        ("ask", ["head", "body"]),
        ("ask", ["body2"]),
    ]
    found = [group["weight_decay"] for optimizer in optimizers for group in as_seen(optimizer).param_groups]
    assert found == [0.1 * 2.0, 0.1 * 3.0, 0.1, 0.1 * 2.0]
    assert scheduled.state().keys() == {0, 2}
