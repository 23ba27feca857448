"""Rules by the user's group and the optimizer's class in a bare loop, also where parameters, groups and states move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule, weight_decay_in_force
from lightning_l2.decay import RuleDecay

LR = 0.1
GROUPS = [DecayRule("first", group=0, weight_decay=0.5, optional=True), DecayRule("late", group="late"), "default"]


class Muon(torch.optim.SGD):
    """Another class of optimizer."""


def ones(*shapes: tuple[int, ...]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes])


def left(model: nn.ParameterList, *optimizers: Any) -> list[float]:
    """Step with gradients of 0; return what is left of each parameter."""
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return [parameter.flatten()[0].item() for parameter in model]


def factor(*lambdas: float) -> Any:
    return pytest.approx([1 - LR * value for value in lambdas], rel=1e-12)


def test_each_optimizer_its_lambda_and_a_shared_parameter_both() -> None:
    model = ones((2, 2), (2, 2), (2, 2))
    muon, sgd = Muon([model[0], model[2]], lr=LR), torch.optim.SGD([model[1], model[2]], lr=LR)
    rules = [DecayRule("muon", optimizer="Muon", multiplier=3.0), "default"]
    decay = RuleDecay(model, [muon, sgd], 0.2, rules=rules)
    assert decay.weight_decay() == {"0": 0.2 * 3.0, "2": 0.2 * 3.0, "1": 0.2, "optimizer1/2": 0.2}
    assert left(model, muon, sgd) == pytest.approx([1 - LR * 0.6, 1 - LR * 0.2, (1 - LR * 0.6) * (1 - LR * 0.2)])
    assert weight_decay_in_force(sgd) == {"decay": 0.2}


def test_a_parameter_that_moves_is_decided_by_its_new_group() -> None:
    model = ones((2, 2), (2, 2))
    sgd = torch.optim.SGD([{"params": [model[0]]}, {"params": [model[1]], "name": "late"}], lr=LR)
    RuleDecay(model, [sgd], 0.2, rules=GROUPS)
    assert left(model, sgd) == factor(0.5, 0.2)
    sgd.param_groups[1]["params"].append(sgd.param_groups[0]["params"].pop())
    assert left(model, sgd) == pytest.approx([(1 - LR * 0.5) * (1 - LR * 0.2), (1 - LR * 0.2) ** 2], rel=1e-12)


def test_a_group_that_comes_late_is_decided_when_it_is_seen() -> None:
    model = ones((2, 2), (2, 2))
    sgd = torch.optim.SGD([model[0]], lr=LR)
    rules = [DecayRule("first", group=0, weight_decay=0.5), DecayRule("late", group="late", optional=True), "default"]
    RuleDecay(model, [sgd], 0.2, rules=rules)
    assert left(model, sgd) == factor(0.5, 0.0)
    sgd.add_param_group({"params": [model[1]], "name": "late", "weight_decay": 0.9})
    assert left(model, sgd) == pytest.approx([(1 - LR * 0.5) ** 2, 1 - LR * 0.2], rel=1e-12)
    assert weight_decay_in_force(sgd) == {"first": 0.5, "late": 0.2}


def test_a_state_that_is_loaded_and_another_optimizer_change_nothing() -> None:
    model = ones((2, 2), (2, 2))
    groups = [{"params": [model[0]]}, {"params": [model[1]], "name": "late"}]
    sgd = torch.optim.SGD(groups, lr=LR)
    decay = RuleDecay(model, [sgd], 0.2, rules=GROUPS)
    sgd.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert left(model, sgd) == factor(0.5, 0.2)
    other = torch.optim.SGD([{"params": [model[1]], "name": "late"}, {"params": [model[0]]}], lr=LR)
    decay.follow([other])
    assert weight_decay_in_force(other) == {"first": 0.5, "decay": 0.2}


def test_depth_counts_over_the_layers_of_a_group() -> None:
    model = ones((2, 2), (2, 2), (2, 2))
    sgd = torch.optim.SGD([{"params": [model[0], model[1]]}, {"params": [model[2]]}], lr=LR)
    rules = [DecayRule("layer", pattern=r"^(\d)", group=0, layer_multiplier=0.5), "default"]
    assert RuleDecay(model, [sgd], 0.2, rules=rules).weight_decay() == {"0": 0.1, "1": 0.2, "2": 0.2}


def test_a_wrapper_whose_process_updates_a_share() -> None:
    """The table tells of all parameters, whoever updates them."""

    class Shares(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"weight_decay": 0.0})
            self.share = Muon(self.param_groups[0]["params"][:1], lr=LR)

    model = ones((2, 2), (2, 2), (2,))
    user = Shares(model.parameters())
    rules = ["exempt", DecayRule("muon", optimizer="Muon", weight_decay=0.7), "default"]
    decay = RuleDecay(model, [user.share], 0.2, rules=rules, users=[user])
    assert decay.weight_decay() == {"0": 0.7, "1": 0.7, "2": 0.0}
    assert left(model, user.share) == factor(0.7, 0.0, 0.0)
