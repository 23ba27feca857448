"""Rules that ask for the user's group or the optimizer: which parameters they take, and where they can't know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2 import WeightDecay
from lightning_l2.rules import DecayRule, assign_rules, decay_param_groups
from lightning_l2.rules.memberships import is_called, memberships
from tests.helpers import Net, batches, make_trainer


class Muon(torch.optim.SGD):
    """Stands in for one: an optimizer of another class for the matrices."""


class Sam(torch.optim.Optimizer):
    """Wraps another one, whose groups are its own too."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self.base = base
        self.param_groups = base.param_groups


def model() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 2)})


def two(net: Any) -> list[torch.optim.Optimizer]:
    body = [{"params": [net["body"].weight], "name": "matrices"}]
    rest = [
        {"params": [*net["norm"].parameters(), net["body"].bias]},
        {"params": net["head"].parameters(), "name": "head"},
    ]
    return [Muon(body, lr=0.1), torch.optim.AdamW(rest)]


def taken(net: nn.Module, optimizers: Any, **conditions: Any) -> set[str]:
    rules = [DecayRule("mine", **conditions), "default"]
    return {name for name, rule in assign_rules(net, rules, optimizers=optimizers).items() if rule.name == "mine"}


HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"group": "matrices"}, {"body.weight"}),
        ({"group": "head"}, HEAD),
        ({"group": 0}, {"body.weight", "norm.weight", "norm.bias", "body.bias"}),
        ({"group": 1}, HEAD),
        ({"group": 0, "optimizer": "Muon"}, {"body.weight"}),
        ({"optimizer": "AdamW"}, {"norm.weight", "norm.bias", "body.bias", *HEAD}),
        ({"optimizer": "torch.optim.AdamW"}, {"norm.weight", "norm.bias", "body.bias", *HEAD}),
        ({"optimizer": "AdamW", "max_ndim": 1, "group": "head"}, {"head.bias"}),
    ],
)
def test_by_group_and_by_optimizer(conditions: dict[str, Any], expected: set[str]) -> None:
    net = model()
    assert taken(net, two(net), **conditions) == expected


@pytest.mark.parametrize("name", ["SGD", "Adam", "Optimizer", "torch.optim.Muon"])
def test_an_optimizers_base_class_is_not_its_name(name: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=r"The optimizers are 'Muon', 'AdamW'\.$"):
        taken(net, two(net), optimizer=name)


def test_a_wrapped_optimizer_has_both_names() -> None:
    net = model()
    adamw = torch.optim.AdamW(net.parameters())
    for name in ("Sam", "AdamW"):
        assert taken(net, Sam(adamw), optimizer=name) == dict(net.named_parameters()).keys()
        assert len(memberships(Sam(adamw))) == 6


def test_what_a_wrapper_has_alone_is_in_its_own_groups() -> None:
    """As where each process updates a share."""

    class Shares(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            self.share = torch.optim.AdamW(self.param_groups[0]["params"][:2])

    net = model()
    found = memberships(Shares(net.parameters()))
    assert {kind.__name__ for member in found[net["body"].weight] for kind in member.optimizers} == {"AdamW", "Shares"}
    assert taken(net, Shares(net.parameters()), optimizer="AdamW") == dict(net.named_parameters()).keys()


def test_a_parameter_in_no_group_meets_neither_condition() -> None:
    net = model()
    sgd = torch.optim.SGD(net["head"].parameters(), lr=0.1)
    assert taken(net, sgd, group=0) == HEAD
    assert taken(net, sgd, optimizer="SGD") == HEAD


def test_a_parameter_of_two_optimizers_is_decided_by_the_first() -> None:
    net = model()
    optimizers = [torch.optim.AdamW(net.parameters()), Muon(net["head"].parameters(), lr=0.1)]
    rules = [DecayRule("muon", optimizer="Muon"), DecayRule("rest")]
    assert {rule.name for rule in assign_rules(net, rules, optimizers=optimizers).values()} == {"rest"}
    assert {
        name for name, rule in assign_rules(net, rules, optimizers=optimizers[::-1]).items() if rule.name == "muon"
    } == HEAD


NOT_KNOWN = r"Rule 'm' asks for a group or an optimizer \(group=None, optimizer='Muon'\), and no optimizer is"
RULES = [DecayRule("m", optimizer="Muon"), "default"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda: assign_rules(model(), RULES),
        lambda: decay_param_groups(model(), 0.1, RULES),
    ],
    ids=["assign_rules", "decay_param_groups"],
)
def test_where_no_optimizer_is_known_it_is_an_error(ask: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=NOT_KNOWN):
        ask()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group": -1}, ValueError, "Expected `group` of rule 'a' to be an index of at least 0, or a name, got -1."),
        ({"group": True}, TypeError, "DecayRule needs `group` to be int | str | None, but got True of type bool."),
        ({"group": 0.5}, TypeError, "DecayRule needs `group` to be int | str | None, but got 0.5 of type float."),
        ({"optimizer": 3}, TypeError, "DecayRule needs `optimizer` to be str | None, but got 3 of type int."),
    ],
)
def test_messages(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        DecayRule("a", **arguments)
    assert str(caught.value) == message


def test_an_unknown_group_is_told_before_the_first_step() -> None:
    net = Net()
    rules = [DecayRule("head", group="head"), "default"]
    with pytest.raises(ValueError, match=r"Rule 'head' matched no parameter \(group='head'\)\. The groups are 0\."):
        make_trainer([WeightDecay(0.1, rules=rules)]).fit(net, batches(1))


def test_names_of_classes() -> None:
    assert is_called(Muon, "Muon")
    assert is_called(Muon, f"{__name__}.Muon")
    assert not is_called(Muon, "torch.Muon")
    assert not is_called(Muon, "uon")
