"""What a step takes of the weights, beside what the optimizer does."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule
from lightning_l2.decay.attach import attach_decay
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.optimizers.facts import step_size
from lightning_l2.param_groups.decay_groups import decay_groups


@pytest.mark.parametrize(("group", "expected"), [({"lr": 0.5}, 0.5), ({"lr": torch.tensor(0.25), "d": 4.0}, 1.0)])
def test_the_size_of_a_step(group: dict[str, Any], expected: float) -> None:
    assert step_size(group) == expected


class FindsItsScale(torch.optim.Optimizer):
    """Takes steps of `lr * d`, as Prodigy and D-Adaptation do, and decays by itself as it is told to."""

    def __init__(self, params: Any, scale: float) -> None:
        super().__init__(params, {"lr": 1.0, "d": scale, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            size = group["lr"] * group["d"]
            for parameter in group["params"]:
                parameter.sub_(size * (parameter.grad + group["weight_decay"] * parameter))
        return loss


@pytest.mark.parametrize("scale", [1e-3, 0.1])
def test_decoupled_decay_goes_by_the_step_that_the_optimizer_takes(scale: float) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    optimizer = FindsItsScale([{"params": [weight], "weight_decay": 0.5}], scale)
    handle = attach_decay(optimizer, "decoupled")
    optimizer.step()
    assert weight.tolist() == pytest.approx([1 - scale * 0.5] * 2, rel=1e-15)
    handle.remove()
    optimizer.step()  # its own again
    assert weight.tolist() == pytest.approx([(1 - scale * 0.5) ** 2] * 2, rel=1e-15)


@pytest.mark.parametrize("apply", ["decoupled", "independent", "coupled", "cautious"])
def test_lbfgs_takes_any_rules_in_its_one_group(apply: Any) -> None:
    """Its direction is that of plain descent in the first step, of at most lr: here the gradient is 0."""
    model = nn.Linear(2, 1, dtype=torch.float64)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=1)
    decay = RuleDecay(model, [optimizer], 0.1, apply=apply)
    assert decay.weight_decay() == {"weight": 0.1, "bias": 0.0}

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.0 * (model.weight.sum() + model.bias.sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert model.bias.item() == 1.0
    if apply == "coupled":  # one step of descent on lambda/2 ||w||^2, of length min(1, 1 / |g|_1) lr
        expected = 1 - 0.5 * min(1.0, 1 / (2 * 0.1)) * 0.1
    else:
        expected = 1 - 0.1 * (1.0 if apply == "independent" else 0.5)
    assert model.weight.tolist()[0] == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_many_lambdas_act_each_by_itself(make: Any) -> None:
    model = nn.ParameterList(nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(40))
    optimizer = make(model.parameters(), lr=0.5)
    lambdas = [0.01 * (1 + index) for index in range(40)]
    rules = [DecayRule(f"rule{index}", pattern=rf"^{index}$", weight_decay=lambdas[index]) for index in range(40)]
    RuleDecay(model, [optimizer], 0.1, rules=rules, apply="decoupled")
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    found = [parameter[0].item() for parameter in model]
    assert found == pytest.approx([1 - 0.5 * value for value in lambdas], rel=1e-12)


def two() -> tuple[nn.ParameterDict, list[torch.optim.Optimizer]]:
    """Two matrices of ones, each with a gradient of 0 and an optimizer of its own."""
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for name in ("first", "second")}
    )
    for parameter in model.values():
        parameter.grad = torch.zeros_like(parameter)
    return model, [torch.optim.SGD([parameter], lr=0.1) for parameter in model.values()]


def test_independent_decay_of_more_than_everything_is_refused_before_any_of_several_optimizers_moves() -> None:
    model, optimizers = two()
    rules: Any = [DecayRule("second", pattern="second", multiplier=3.0), "default"]
    decay = RuleDecay(model, optimizers, 0.5, rules=rules, apply="independent")
    with pytest.raises(ValueError, match=r"got weight_decay=1\.5\. Give a value of at most 1"):
        optimizers[0].step()
    assert (model["first"] == 1).all()
    decay.remove()


def test_an_optimizer_that_begins_late_is_not_refused_for_what_a_schedule_has_come_to() -> None:
    model, optimizers = two()
    decay = RuleDecay(model, optimizers, 0.5, apply="independent")
    optimizers[0].step()
    for optimizer in optimizers:
        decay_groups(optimizer).multiply(6.0)
    with pytest.warns(UserWarning, match=r"has driven lambda to 3, and apply='independent'"):
        optimizers[1].step()
    assert not model["second"].any()
    decay.remove()
