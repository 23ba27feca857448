"""What is said of a rule that decides on nothing: always something real that it may have meant."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_l2.rules import DecayRule, assign_rules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
        self.head = nn.Linear(2, 2)


def said(rule: DecayRule, optimizers: object = None) -> str:
    with pytest.raises(ValueError, match=f"Rule {rule.name!r}") as caught:
        assign_rules(Net(), [rule, "default"], optimizers=optimizers)
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        (r"^hed\.", "head.weight"),
        (r"^haed\.", "head.weight"),
        (r"^model\.head\.", "head.weight"),
        (r"head.wieght", "head.weight"),
        (r"^backbone\.head\.bias$", "head.bias"),
        (r"Head", "head.weight"),
        (r"feature\.0\.", "features.0.weight"),
        (r"\bfeatures\.9\.", "features.0.weight"),
        (r"(hed|haed)\.bias", "head.bias"),
        (r"backbone", None),
        (r"^\d+$", None),
        ("^$", None),
    ],
)
def test_three_real_parameters_are_named(pattern: str, first: str | None) -> None:
    message = said(DecayRule("x", pattern=pattern))
    named = re.findall(r"'([\w.]+)'", message[message.index("Closest names") :])
    assert len(named) == len(set(named)) == 3
    assert set(named) <= dict(Net().named_parameters()).keys()
    assert first is None or named[0] == first


@pytest.mark.parametrize(
    ("pattern", "found", "meant"),
    [
        ("head?bias", "head.bias", "^head.bias$"),
        ("features.?.bi?s", "features.0.bias", r"^features\..\.bi.s$"),
        ("he?d.*", "head.weight", r"^he.d\."),
    ],
)
def test_a_glob_is_explained(pattern: str, found: str, meant: str) -> None:
    message = said(DecayRule("x", pattern=pattern))
    assert f"As a glob it would match {found!r}, but patterns are regular expressions: write {meant!r}." in message
    rule = DecayRule("x", pattern=meant)
    assert found in {name for name, won in assign_rules(Net(), [rule, "default"]).items() if won.name == "x"}


@pytest.mark.parametrize(("pattern", "meant"), [("*.bias", r"\.bias$"), ("**head*", ".*head")])
def test_a_glob_that_is_no_regular_expression_is_explained(pattern: str, meant: str) -> None:
    with pytest.raises(ValueError, match="to be a regular expression") as caught:
        DecayRule("x", pattern=pattern)
    assert str(caught.value).endswith(f"As one, the glob is {meant!r}.")


def test_the_condition_that_nothing_meets_is_told() -> None:
    model = Net()
    groups = [{"params": model.features.parameters(), "name": "body"}, {"params": model.head.parameters()}]
    sgd = torch.optim.SGD(groups, lr=0.1)

    def told(**conditions: object) -> str:
        with pytest.raises(ValueError, match="matched no parameter") as caught:
            assign_rules(model, [DecayRule("x", **conditions), "default"], optimizers=[sgd])
        return str(caught.value).partition("). ")[2]

    assert told(group="boddy") == "The groups are 'body', 1."
    assert told(group=2, pattern="head") == "The groups are 'body', 1."
    assert told(optimizer="Muon") == "The optimizers are 'SGD'."
    assert told(modules="Linaer", pattern="head") == "Closest classes: 'Linear'."
    assert told(group="body", pattern="head") == (
        "No parameter meets all of them: pattern matches 'head.weight', group matches 'features.0.weight'."
    )
    assert told(max_ndim=0) == "If a model may have none, set optional=True."
