"""Groups are split while an optimizer updates, and only then: what the update finds, and what comes back of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_l2.decay import attach_decay
from lightning_l2.param_groups.decay_groups import decay_groups
from tests.param_groups.others import Spy, in_force, ones

Make = Callable[[Any], Optimizer]


def split(parameters: list[nn.Parameter], *lambdas: float) -> dict[Tensor, float]:
    return dict(zip(parameters, lambdas, strict=True))


# --- what the update finds ---


def test_children_stand_in_the_list_while_it_updates_and_at_no_other_time() -> None:
    parameters = ones(4)
    optimizer = Spy(parameters, lr=0.1, weight_decay=0.7, note="mine")
    listed, parent = optimizer.param_groups, optimizer.param_groups[0]
    before = dict(parent)
    in_force(optimizer, split(parameters, 0.2, 0.0, 0.2, 0.5))
    within: list[bool] = []

    def closure() -> None:
        within.append(optimizer.param_groups is listed and listed == [before] and listed[0] is parent)

    optimizer.step(closure)
    assert within == [True]
    found = [([index_of(p, parameters) for p in g["params"]], g["weight_decay"]) for g in optimizer.seen[-1]]
    # in the order in which their parameters first appear
    assert [(places, value) for places, value in found] == [([0, 2], 0.2), ([1], 0.0), ([3], 0.5)]
    for child in optimizer.seen[-1]:
        assert list(child) == list(before), "keys in their order"
        assert {key: child[key] for key in ("lr", "note")} == {"lr": 0.1, "note": "mine"}
    assert optimizer.param_groups is listed
    assert len(listed) == 1
    assert listed[0] is parent
    assert parent == before
    # closed form: a gradient of 0 leaves (1 - lr lambda) of each
    assert [p[0].item() for p in parameters] == pytest.approx([0.98, 1.0, 0.98, 0.95], rel=1e-15)


def test_children_of_several_groups_stand_where_their_parent_stood() -> None:
    parameters = ones(5)
    groups = [{"params": parameters[:2], "lr": 0.3}, {"params": []}, {"params": parameters[2:], "name": "last"}]
    optimizer = Spy(groups)
    in_force(optimizer, split(parameters, 0.1, 0.2, 0.2, 0.2, 0.1))
    optimizer.step()
    found = [(g["lr"], [index_of(p, parameters) for p in g["params"]], g["weight_decay"]) for g in optimizer.seen[-1]]
    assert found == [(0.3, [0], 0.1), (0.3, [1], 0.2), (0.1, [], 0.0), (0.1, [2, 3], 0.2), (0.1, [4], 0.1)]


def test_options_are_the_parents_at_that_moment() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters)
    in_force(optimizer, split(parameters, 0.1, 0.0))
    for rate in (0.1, 0.2):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert [group["lr"] for group in optimizer.seen[-1]] == [rate, rate]
    optimizer.param_groups[0]["new"] = 3
    optimizer.step(lambda: optimizer.param_groups[0].update(lr=0.3))
    assert [(group["lr"], group["new"]) for group in optimizer.seen[-1]] == [(0.3, 3), (0.3, 3)]
    del optimizer.param_groups[0]["new"]
    optimizer.step()
    assert all("new" not in group for group in optimizer.seen[-1])


def test_children_are_the_same_objects_in_every_step() -> None:
    """So that compiled steps are compiled once, and optimizers may keep things by group."""
    parameters = ones(3)
    optimizer = Spy(parameters)
    in_force(optimizer, split(parameters, 0.1, 0.0, 0.1))
    for rate in (0.1, 0.2, 0.2):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    first, second, third = optimizer.identities
    assert len(set(first)) == 2
    assert second == third
    kinds: list[type] = []
    optimizer.write = lambda index, group: kinds.append(type(group))
    optimizer.step()
    assert kinds == [dict, dict], "as fast as any, once it is known that all are read"


def test_a_group_that_has_its_lambda_stands_for_itself() -> None:
    parameters = ones(2)
    optimizer = Spy([{"params": parameters[:1], "weight_decay": 0.5}, {"params": parameters[1:]}])
    decay_groups(optimizer).hold(optimizer, "The test")
    mine = [id(group) for group in optimizer.param_groups]
    optimizer.step()
    assert optimizer.identities[-1] == mine


def test_a_group_without_weight_decay_is_left_alone() -> None:
    parameters = ones(2)
    optimizer = torch.optim.Rprop(parameters, lr=0.1)
    in_force(optimizer, split(parameters, 0.1, 0.0))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([id(group) for group in optimizer.param_groups]))
    optimizer.step()
    assert seen == [[id(optimizer.param_groups[0])]]


def test_names_of_parameters_are_split_along() -> None:
    layer = nn.Linear(2, 1)
    optimizer = Spy(layer.named_parameters())
    in_force(optimizer, {layer.weight: 0.1, layer.bias: 0.0})
    optimizer.step()
    assert [group["param_names"] for group in optimizer.seen[-1]] == [["weight"], ["bias"]]
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("in_step", [{"weight_decay": 0.0}, {"decoupled": True, "absent": 1}], ids=str)
def test_options_that_only_the_update_sees(in_step: dict[str, Any]) -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, weight_decay=0.7, decoupled=False)
    groups = in_force(optimizer, split(parameters, 0.1, 0.2))
    groups.hide(in_step)
    before = dict(optimizer.param_groups[0])
    optimizer.step(lambda: before == optimizer.param_groups[0] or pytest.fail("hidden in the closure"))
    assert optimizer.param_groups == [before]
    if "weight_decay" in in_step:  # then there is nothing to split
        assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.seen[-1]] == [(2, 0.0)]
    else:
        assert [(g["weight_decay"], g["decoupled"]) for g in optimizer.seen[-1]] == [(0.1, True), (0.2, True)]
        assert all("absent" not in g for g in optimizer.seen[-1])
    groups.hide(None)
    optimizer.step()
    assert [(g["weight_decay"], g["decoupled"]) for g in optimizer.seen[-1]] == [(0.1, False), (0.2, False)]


# --- what comes back ---


def test_what_is_written_into_all_children_goes_to_the_parent() -> None:
    parameters = ones(3)
    optimizer = Spy(parameters, k=0)
    in_force(optimizer, split(parameters, 0.1, 0.0, 0.3))

    def write(index: int, group: dict[str, Any]) -> None:
        group["k"] += 1
        group["new"] = "text"

    optimizer.write = write
    for step in (1, 2, 3):
        optimizer.step()
        assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["new"]) == (step, "text")
        assert [group["k"] for group in optimizer.seen[-1]] == [step - 1] * 3


def test_values_that_differ_stay_each_with_its_child_until_somebody_writes_to_the_parent() -> None:
    """As the scale that Prodigy finds for each group, which an expert's groups would have, too."""
    parameters = ones(3)
    optimizer = Spy(parameters, d=1.0)
    in_force(optimizer, split(parameters, 0.1, 0.0, 0.3))
    optimizer.write = lambda index, group: group.update(d=group["d"] * (index + 2))
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 2.0
    optimizer.step()
    assert [group["d"] for group in optimizer.seen[-1]] == [2.0, 3.0, 4.0]
    optimizer.param_groups[0]["d"] = 10.0
    optimizer.step()
    assert [group["d"] for group in optimizer.seen[-1]] == [10.0] * 3
    optimizer.step()
    assert [group["d"] for group in optimizer.seen[-1]] == [20.0, 30.0, 40.0]
    # the values of all groups may meet again
    optimizer.write = lambda index, group: group.update(d=5.0)
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 5.0
    assert not any(group.own_options for group in decay_groups(optimizer).groups)
    optimizer.step()
    assert [group["d"] for group in optimizer.seen[-1]] == [5.0] * 3


def test_weight_decay_and_parameters_that_an_update_writes_are_not_the_users() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, weight_decay=0.7)
    in_force(optimizer, split(parameters, 0.1, 0.2))
    optimizer.write = lambda index, group: group.update(weight_decay=9.0, params=list(group["params"]))
    for _ in range(2):
        optimizer.step()
        assert optimizer.lambdas() == [0.1, 0.2]
        assert optimizer.param_groups[0]["weight_decay"] == 0.7
        assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, parameters))


def test_a_tensor_is_shared_whoever_fills_it() -> None:
    parameters, lr = ones(2), torch.tensor(0.5)
    optimizer = Spy(parameters, lr=lr, count=torch.zeros(()))
    count = optimizer.param_groups[0]["count"]
    in_force(optimizer, split(parameters, 0.1, 0.0))
    optimizer.write = lambda index, group: group["count"].add_(1)
    optimizer.step()
    assert all(group["lr"] is lr and group["count"] is count for group in optimizer.seen[-1])
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.param_groups[0]["count"] is count
    assert count.item() == 2  # as an expert's two groups would share it


def test_tensors_that_each_child_got_anew_stay_with_it() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, t=torch.zeros(()))
    in_force(optimizer, split(parameters, 0.1, 0.0))
    optimizer.write = lambda index, group: group.update(t=group["t"] + index + 1)
    for _ in range(2):
        optimizer.step()
    assert [group["t"].item() for group in optimizer.seen[-1]] == [1.0, 2.0]
    assert optimizer.param_groups[0]["t"].item() == 2.0


def test_equal_tensors_that_each_child_got_anew_are_not_one() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, t=None)
    in_force(optimizer, split(parameters, 0.1, 0.0))
    optimizer.write = lambda index, group: group.update(t=torch.zeros(()))
    optimizer.step()
    optimizer.write = lambda index, group: group["t"].add_(index + 1)
    optimizer.step()
    optimizer.write = lambda index, group: None
    optimizer.step()
    assert [group["t"].item() for group in optimizer.seen[-1]] == [1.0, 2.0]


def test_values_without_a_plain_equality() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, pair=None)
    in_force(optimizer, split(parameters, 0.1, 0.0))
    optimizer.write = lambda index, group: group.update(pair=torch.ones(3).numpy() * index)
    for _ in range(2):
        optimizer.step()
    assert [group["pair"].tolist() for group in optimizer.seen[-1]] == [[0.0] * 3, [1.0] * 3]


# --- exceptions ---


def test_an_exception_in_the_update_leaves_the_users_groups_and_the_next_step_is_right() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, weight_decay=0.7, k=0)
    parent, before = optimizer.param_groups[0], dict(optimizer.param_groups[0])
    in_force(optimizer, split(parameters, 0.1, 0.2))

    def fail(index: int, group: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    optimizer.write = fail
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert len(optimizer.param_groups) == 1
        assert optimizer.param_groups[0] is parent
        assert parent == before
    optimizer.write = lambda index, group: None
    optimizer.step()
    assert optimizer.lambdas() == [0.1, 0.2]


def test_an_exception_in_the_closure() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters, weight_decay=0.7)
    before = dict(optimizer.param_groups[0])
    in_force(optimizer, split(parameters, 0.1, 0.2))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups == [before]
    optimizer.step()
    assert optimizer.lambdas() == [0.1, 0.2]


# --- groups and parameters that change ---


def test_groups_that_come_and_go_and_parameters_that_are_replaced() -> None:
    _, _, third, late, fifth = parameters = ones(5)
    optimizer = Spy(parameters[:2])
    in_force(optimizer, split(parameters, 0.1, 0.2, 0.3, 0.4, 0.5))
    optimizer.step()
    assert optimizer.lambdas() == [0.1, 0.2]
    optimizer.add_param_group({"params": [third]})
    optimizer.step()
    assert optimizer.lambdas() == [0.1, 0.2, 0.3]
    optimizer.param_groups[0]["params"][0] = late  # in place, as pruning does
    optimizer.step()
    assert optimizer.lambdas() == [0.4, 0.2, 0.3]
    optimizer.param_groups[1]["params"].append(fifth)
    optimizer.step()
    assert optimizer.lambdas() == [0.4, 0.2, 0.3, 0.5]
    optimizer.param_groups[1]["params"].pop()
    optimizer.step()
    assert optimizer.lambdas() == [0.4, 0.2, 0.3]
    del optimizer.param_groups[0]
    optimizer.step()
    assert optimizer.lambdas() == [0.3]


def test_a_group_that_the_closure_adds_decays_in_that_step() -> None:
    parameters = ones(2)
    optimizer = Spy(parameters[:1])
    in_force(optimizer, split(parameters, 0.1, 0.2))
    optimizer.step(lambda: optimizer.add_param_group({"params": parameters[1:]}))
    assert optimizer.lambdas() == [0.1, 0.2]
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("restore", ["itself", "a copy"])
def test_a_state_that_is_loaded(restore: str) -> None:
    parameters = ones(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.7)
    in_force(optimizer, split(parameters, 0.1, 0.0))
    state = optimizer.state_dict() if restore == "itself" else copy.deepcopy(optimizer.state_dict())
    assert len(state["param_groups"]) == 1
    optimizer.step()
    state["param_groups"][0]["lr"] = 0.2
    optimizer.load_state_dict(state)
    optimizer.step()
    assert [p[0].item() for p in parameters] == pytest.approx([0.99 * 0.98, 1.0], rel=1e-15)
    assert optimizer.param_groups[0]["weight_decay"] == 0.7


def test_schedulers_see_the_users_groups() -> None:
    parameters = ones(3)
    optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    in_force(optimizer, split(parameters, 0.1, 0.0, 0.3))
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1.0])
    for step in range(3):
        assert scheduler.get_last_lr() == [0.1 * 0.5**step, 0.1]
        optimizer.step()
        scheduler.step()
    expected = (1 - 0.01) * (1 - 0.005) * (1 - 0.0025)
    assert parameters[0][0].item() == pytest.approx(expected, rel=1e-15)
    assert parameters[2][0].item() == pytest.approx(0.97**3, rel=1e-15)


# --- as the groups of an expert ---

SHAPES = [(5, 6), (5,), (5, 5), (3, 5), (3,)]
LAMBDAS = [0.3, 0.0, 0.3, 0.1, 0.0]


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def loss_of(parameters: list[nn.Parameter], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    pulls = [(p - torch.randn(p.shape, generator=generator)).square().sum() for p in parameters]
    return sum(pulls) + sum(p.sin().sum() for p in parameters)


def train(parameters: list[nn.Parameter], optimizer: Any, steps: int = 8, with_graph: bool = False) -> list[Tensor]:
    torch.manual_seed(1)  # some draw random numbers, Kron from numpy's generator
    np.random.seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(parameters, step).backward(create_graph=with_graph)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None  # a graph would be a cycle
    return [parameter.detach().clone() for parameter in parameters]


def by_hand(parameters: list[nn.Parameter], lambdas: list[float] = LAMBDAS) -> list[dict[str, Any]]:
    """One group a lambda, in the order of their first parameters."""
    pairs = list(zip(parameters, lambdas, strict=True))
    return [{"params": [p for p, of in pairs if of == one], "weight_decay": one} for one in dict.fromkeys(lambdas)]


def assert_trains_as_an_expert(make: Make, matrices_only: bool = False, with_graph: bool = False) -> None:
    def start() -> list[nn.Parameter]:
        return [p for p in weights() if p.ndim > 1 or not matrices_only]

    lambdas = [value for value, shape in zip(LAMBDAS, SHAPES, strict=True) if len(shape) > 1 or not matrices_only]
    mine, experts, plain = start(), start(), start()
    optimizer = make(mine)
    in_force(optimizer, dict(zip(mine, lambdas, strict=True)))
    actual = train(mine, optimizer, with_graph=with_graph)
    expert = make(by_hand(experts, lambdas))
    expected = train(experts, expert, with_graph=with_graph)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    alone = make(plain)
    for group in alone.param_groups:
        group["weight_decay"] = 0.0
    without = train(plain, alone, with_graph=with_graph)
    assert any(not torch.equal(one, other) for one, other in zip(actual, without, strict=True)), "decay was to act"
    # and its group is as it would be without us
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.param_groups[0]) == list(alone.param_groups[0])
    for key in ("step", "k"):
        assert optimizer.param_groups[0].get(key) == alone.param_groups[0].get(key)


TORCHS: dict[str, Make] = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "AdamW tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01)),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "Adadelta": partial(torch.optim.Adadelta, lr=0.1),
    "ASGD": partial(torch.optim.ASGD, lr=0.01),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
}


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_optimizers_train_as_an_experts(name: str) -> None:
    assert_trains_as_an_expert(TORCHS[name])


def test_torchs_muon_trains_as_an_experts() -> None:
    assert_trains_as_an_expert(partial(torch.optim.Muon, lr=0.01), matrices_only=True)


PUBLISHED = {
    name: kind
    for name, kind in vars(pytorch_optimizer).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer)
}
# Those that take more than parameters, or other ones.
MAKERS: dict[str, Make] = {
    "Ranger21": lambda params: pytorch_optimizer.Ranger21(params, num_iterations=8),
}
MATRICES_ONLY = {"SpectralSphere"}
SECOND_ORDER = {"AdaHessian", "SophiaH"}  # they ask for a graph of the gradient
LEFT_OUT = {
    "AdaBound": "goes by a list with a learning rate for each group that it was built with; see below",
    **dict.fromkeys(
        (
            *("SAM", "GSAM", "WSAM", "LookSAM", "FriendlySAM", "BSAM", "Lookahead", "OrthoGrad", "PCGrad", "TRAC"),
            *("SafeFP16Optimizer", "ScheduleFreeWrapper"),
        ),
        "wraps another optimizer or needs a closure; tests/optimizers/test_wrappers.py",
    ),
    **dict.fromkeys(("LOMO", "AdaLOMO", "AdamMini"), "takes a module, and makes groups of its own"),
    **dict.fromkeys(
        ("Muon", "AdaMuon", "NorMuon", "MuonClip", "DistributedMuon", "AdaGO"),
        "takes groups that say which are for it; in a test of their own",
    ),
    "LoRARite": "takes pairs of low-rank matrices, which a group must hold together",
    "DeMo": "needs another package and several processes",
}


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(LEFT_OUT)))
def test_other_libraries_optimizers_train_as_an_experts(name: str) -> None:
    make = MAKERS.get(name, PUBLISHED[name])
    one = make([p for p in weights() if p.ndim > 1 or name not in MATRICES_ONLY])
    if not all("weight_decay" in group for group in one.param_groups):
        with pytest.raises(ValueError, match="has no weight decay of its own"):
            attach_decay(one, "optimizer")
        return
    if name == "SaRA":  # moves no weight that is as large as these, and decays none
        return
    assert_trains_as_an_expert(make, name in MATRICES_ONLY, name in SECOND_ORDER)


def test_other_libraries_optimizers_are_many() -> None:
    assert len(set(PUBLISHED) - set(LEFT_OUT)) > 100
    assert set(LEFT_OUT) <= set(PUBLISHED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Muon", "AdaMuon", "NorMuon", "AdaGO"])
def test_optimizers_whose_groups_say_what_they_are_for(name: str) -> None:
    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in parameters if (p.ndim > 1) == use], "use_muon": use, "weight_decay": 0.0}
            for use in (True, False)
        ]

    mine, experts = weights(), weights()
    optimizer = PUBLISHED[name](groups(mine))
    in_force(optimizer, dict(zip(mine, LAMBDAS, strict=True)))
    expert = [
        {**part, "use_muon": group["use_muon"]}
        for group in groups(experts)
        for part in by_hand(group["params"], [LAMBDAS[index_of(p, experts)] for p in group["params"]])
    ]
    for actual, expected in zip(train(mine, optimizer), train(experts, PUBLISHED[name](expert)), strict=True):
        assert torch.equal(actual, expected)


def index_of(parameter: Tensor, parameters: list[nn.Parameter]) -> int:
    return next(index for index, one in enumerate(parameters) if one is parameter)


def test_an_optimizer_with_a_list_of_its_own_for_each_group_is_told() -> None:
    parameters = weights()
    optimizer = pytorch_optimizer.AdaBound(parameters)
    in_force(optimizer, dict(zip(parameters, LAMBDAS, strict=True)))
    loss_of(parameters, 0).backward()
    with pytest.raises(RuntimeError, match=r"AdaBound.*a list of its own.*apply='decoupled'"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_with_a_list_of_its_own_decays_the_other_way() -> None:
    parameters, plain = weights(), weights()
    optimizer = pytorch_optimizer.AdaBound(parameters, lr=0.01)
    decay_groups(optimizer).decide(in_force(optimizer, dict(zip(parameters, LAMBDAS, strict=True)))._bases)
    attach_decay(optimizer, "decoupled")
    reference = pytorch_optimizer.AdaBound(plain, lr=0.01)
    for step in range(3):
        for params, one in ((parameters, optimizer), (plain, reference)):
            one.zero_grad()
            loss_of(params, step).backward()
        with torch.no_grad():
            for parameter, value in zip(plain, LAMBDAS, strict=True):
                parameter.mul_(1 - 0.01 * value)
        optimizer.step()
        reference.step()
    for actual, expected in zip(parameters, plain, strict=True):
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-6, atol=1e-7)


class Reading(torch.optim.Optimizer):
    """Reads the parameters of so many groups in its own way, and moves them where no counter tells."""

    def __init__(self, params: Any, read: Callable[[dict[str, Any]], Any], most: int = 9) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})
        self.read, self.most = read, most

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups[: self.most]:
            for parameter in self.read(group):
                parameter.data.mul_(0.5)


READ: dict[str, Callable[[dict[str, Any]], Any]] = {
    "item": lambda group: group["params"],
    "get": lambda group: group.get("params"),
    "items": lambda group: dict(list(group.items()))["params"],
    "values": lambda group: next(value for value in group.values() if isinstance(value, list)),
    "dict": lambda group: dict(group)["params"],
    "copy": lambda group: group.copy()["params"],
    "keywords": lambda group: (lambda params, **_: params)(**group),
}


@pytest.mark.parametrize("read", READ)
def test_however_an_optimizer_reads_its_groups_it_is_known(read: str) -> None:
    parameters = ones(2)
    optimizer = Reading(parameters, READ[read])
    in_force(optimizer, split(parameters, 0.1, 0.2))
    optimizer.step()
    assert [parameter[0].item() for parameter in parameters] == [0.5, 0.5]
    first = ones(2)
    optimizer = Reading(first, READ[read], most=1)
    in_force(optimizer, split(first, 0.1, 0.2))
    with pytest.raises(RuntimeError, match=r"updated by 1 of 2 parameter groups: it goes by a list of its own"):
        optimizer.step()


def test_an_optimizer_that_does_not_move_says_nothing() -> None:
    """Which groups it reads is known only once it has updated."""

    class Waiting(Spy):
        def step(self, closure: Any = None) -> None:
            if self.seen:
                super().step(closure)
            self.seen.append([])

    parameters = ones(2)
    optimizer = Waiting(parameters)
    in_force(optimizer, split(parameters, 0.1, 0.0))
    optimizer.step()
    optimizer.step()
    assert parameters[0][0].item() == pytest.approx(0.99)


class ThroughParameters(torch.optim.LBFGS):
    """Keeps its parameters in a list, as LBFGS does, and reads one group's options only."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, max_iter=2)
        self.param_groups[0]["weight_decay"] = 0.1

    def step(self, closure: Any) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("value", [0.1, 0.2])
def test_a_group_that_is_not_split_needs_not_be_read_for_its_parameters(value: float) -> None:
    parameters = weights()
    optimizer = ThroughParameters(parameters)
    in_force(optimizer, dict.fromkeys(parameters, value))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(parameters, 0)
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before
