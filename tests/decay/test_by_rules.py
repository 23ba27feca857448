"""Weight decay by rules in a bare training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import distribute_tensor

from lightning_l2 import DecayRule, weight_decay_in_force
from lightning_l2.decay import RuleDecay
from lightning_l2.param_groups.resume import Resuming
from lightning_l2.param_groups.summary import GroupSummary

LR, LAMBDA = 0.1, 0.3


def net() -> nn.Sequential:
    """Float64 ones."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1)).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


def still(model: nn.Module, *optimizers: Any, steps: int = 1) -> dict[str, float]:
    """Step with gradients of 0; return what is left of each parameter."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.flatten()[0].item() for name, parameter in model.named_parameters()}


def expected(factor: float) -> dict[str, float]:
    return dict.fromkeys(("0.bias", "1.weight", "1.bias", "2.bias"), 1.0) | {"0.weight": factor, "2.weight": factor}


@pytest.mark.parametrize(
    ("apply", "kind", "factor"),
    [
        ("optimizer", torch.optim.SGD, 1 - LR * LAMBDA),
        ("coupled", torch.optim.SGD, 1 - LR * LAMBDA),
        ("decoupled", torch.optim.SGD, 1 - LR * LAMBDA),
        ("independent", torch.optim.Adam, 1 - LAMBDA),
        ("cautious", torch.optim.Rprop, 1 - LR * LAMBDA),
    ],
)
def test_what_is_left_of_each_parameter(apply: Any, kind: Any, factor: float) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=LR)
    before = [dict(group) for group in optimizer.param_groups]
    decay = RuleDecay(model, [optimizer], LAMBDA, apply=apply)
    assert still(model, optimizer, steps=3) == pytest.approx(expected(factor**3), rel=1e-12)
    assert optimizer.param_groups == before
    decay.remove()
    assert still(model, optimizer, steps=3) == pytest.approx(expected(factor**3), rel=1e-12)
    assert weight_decay_in_force(optimizer) == {"group0": before[0].get("weight_decay", 0.0)}


def test_without_a_value_each_group_keeps_its_own() -> None:
    model = net()
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.1},
        {"params": model[2].parameters(), "weight_decay": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR)
    decay = RuleDecay(model, [optimizer], rules=[DecayRule("head", pattern=r"^2\.w", multiplier=0.5), "default"])
    assert decay.weight_decay() == {"0.weight": 0.1, "0.bias": 0.0, "2.weight": 0.1, "2.bias": 0.0}
    assert weight_decay_in_force(optimizer) == {
        "decay": 0.1,
        "group0/no_decay": 0.0,
        "head": 0.1,
        "group1/no_decay": 0.0,
    }
    optimizer.param_groups[1]["weight_decay"] = 0.8
    assert still(model, optimizer)["2.weight"] == pytest.approx(1 - LR * 0.4, rel=1e-12)


@pytest.mark.parametrize("apply", ["coupled", "decoupled", "independent", "cautious"])
def test_rules_that_all_say_a_value_need_none_from_the_optimizer(apply: Any) -> None:
    model = net()
    optimizer = torch.optim.Rprop(model.parameters(), lr=LR)
    rules = [
        DecayRule("exempt_head", pattern=r"^2\.", multiplier=0.0),
        "exempt",
        DecayRule("body", weight_decay=LAMBDA),
    ]
    decay = RuleDecay(model, [optimizer], rules=rules, apply=apply)
    assert decay.weight_decay()["0.weight"] == LAMBDA
    factor = {"coupled": 1 - LR, "independent": 1 - LAMBDA}.get(apply, 1 - LR * LAMBDA)  # Rprop goes by signs
    assert still(model, optimizer) == pytest.approx(dict.fromkeys(expected(1), 1.0) | {"0.weight": factor}, rel=1e-12)


def test_the_base_may_follow_from_the_group() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}]
    decay = RuleDecay(model, [torch.optim.SGD(groups)], lambda group: 2 * group["lr"])
    assert decay.weight_decay() == {"0.weight": 0.2, "0.bias": 0.0, "2.weight": 0.4, "2.bias": 0.0}


def test_the_summary() -> None:
    model = net()
    decay = RuleDecay(model, [torch.optim.SGD(model.parameters(), lr=LR)], LAMBDA)
    assert decay.summary() == [
        GroupSummary("decay", "decay", LAMBDA, 2, 6, ("0.weight", "2.weight")),
        GroupSummary("no_decay", "no_decay", 0.0, 4, 7, ("0.bias", "1.weight", "1.bias", "2.bias")),
    ]


def test_lazy_parameters_are_decided_once_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.7)
    decay = RuleDecay(model, [optimizer], LAMBDA)
    assert not decay.is_decided
    assert not decay.decide()
    assert decay.weight_decay() == {}
    model(torch.ones(1, 3))
    assert decay.decide()
    assert not decay.decide()
    assert decay.weight_decay() == {"0.weight": LAMBDA, "0.bias": 0.0, "1.weight": LAMBDA, "1.bias": 0.0}


def test_optimizers_that_take_the_place_of_others() -> None:
    model = net()
    first = torch.optim.SGD(model.parameters(), lr=LR)
    decay = RuleDecay(model, [first], LAMBDA)
    still(model, first)
    second = torch.optim.SGD(model.parameters(), lr=LR)
    assert decay.follow([second])
    assert not decay.follow([second])
    assert still(model, second) == pytest.approx(expected((1 - LR * LAMBDA) ** 2), rel=1e-12)
    assert still(model, first) == pytest.approx(expected((1 - LR * LAMBDA) ** 2), rel=1e-12), "the first is left alone"
    assert not first._optimizer_step_pre_hooks


def test_two_optimizers_of_one_module() -> None:
    model = net()
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=LR), torch.optim.SGD(model[2].parameters(), lr=LR)]
    decay = RuleDecay(model, optimizers, LAMBDA)
    assert [row.group for row in decay.summary()] == [
        *("optimizer0/decay", "optimizer0/no_decay", "optimizer1/decay", "optimizer1/no_decay")
    ]
    left = still(model, *optimizers)
    assert (left["0.weight"], left["2.weight"]) == pytest.approx((1 - LR * LAMBDA,) * 2, rel=1e-12)


def test_the_version_changes_with_the_groups() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=LR)
    decay = RuleDecay(model, [optimizer], LAMBDA)
    still(model, optimizer)
    before = list(decay.version)
    still(model, optimizer)
    assert list(decay.version) == before
    optimizer.add_param_group({"params": list(model[2].parameters())})
    still(model, optimizer)
    assert list(decay.version) != before


@pytest.mark.parametrize(("on_resume", "base"), [("config", LAMBDA), ("checkpoint", 0.5)])
def test_a_checkpoints_lambda(on_resume: Any, base: float) -> None:
    model, resuming = net(), Resuming(on_resume)
    resuming.has_restored, resuming.restored = True, {"0.weight": 0.5, "2.weight": 0.5}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    RuleDecay(model, [optimizer], LAMBDA, resuming=resuming)
    assert still(model, optimizer) == pytest.approx(expected(1 - LR * base), rel=1e-12)
    assert resuming.differences() is not None


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (
            torch.optim.Rprop,
            {"weight_decay": 0.1},
            MisconfigurationException,
            r"Rprop has no .* Use WeightDecay\(apply=",
        ),
        (
            torch.optim.Rprop,
            {"apply": "decoupled"},
            MisconfigurationException,
            r"Rprop has no .* to keep, which rule 'decay' goes by\. Give WeightDecay a `weight_decay`, or the rule one",
        ),
        (torch.optim.SGD, {"apply": "sideways"}, ValueError, r"Unknown apply='sideways'"),
        (torch.optim.SGD, {"rules": [DecayRule("x", pattern="none"), "default"]}, ValueError, r"Rule 'x' matched no"),
    ],
)
def test_misuse(kind: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=LR)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error, match=message):
        RuleDecay(model, [optimizer], **arguments)
    assert optimizer.param_groups == before


def test_an_optimizer_of_parameters_that_are_kept_out_of_sight_is_no_fault() -> None:
    model, hidden = net(), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([hidden], lr=LR, weight_decay=0.7)
    RuleDecay(model, [optimizer], LAMBDA)
    assert weight_decay_in_force(optimizer) == {"unassigned": 0.7}


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_an_optimizer_of_parameters_from_before_the_module_was_sharded(mesh: Any) -> None:
    """As LightningCLI's `--optimizer` has them under FSDP2: it would train nothing."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(list(model.parameters()), lr=LR)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
    with pytest.raises(
        ValueError, match=r"None of the 2 parameters of SGD belongs to the module.*configure_optimizers"
    ):
        RuleDecay(model, [optimizer], LAMBDA)


def test_an_optimizer_over_fewer_parameters_takes_the_place_of_another() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    decay = RuleDecay(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 0.1)
    assert len(decay.weight_decay()) == 4
    decay.follow([torch.optim.SGD(model[1].parameters(), lr=0.1)])
    assert decay.weight_decay() == {"1.weight": 0.1, "1.bias": 0.0}
    assert sum(row.tensors for row in decay.summary()) == 2
    decay.remove()
