"""Which optimizer updates, where one holds others."""

from __future__ import annotations

import gc
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_l2.optimizers.inner import (
    check_hookable,
    has_groups_of_its_own,
    is_hookable,
    updating_optimizers,
    updating_optimizers_as_before,
)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2))


def sgd(*parameters: nn.Parameter) -> SGD:
    return SGD(parameters or [parameter()], lr=0.1)


class Holder(Optimizer):
    """An optimizer with groups and attributes."""

    def __init__(self, params: Any, **attributes: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        vars(self).update(attributes)

    def step(self, closure: Any = None) -> None:
        """Update nothing."""


def same(found: list[Any], *expected: Any) -> bool:
    return list(map(id, found)) == list(map(id, expected))


def test_a_bare_one_updates_itself() -> None:
    first, second = sgd(), sgd()
    assert same(updating_optimizers(first), first)
    assert same(updating_optimizers([first, second, first]), first, second)
    assert updating_optimizers([]) == []


@pytest.mark.parametrize(
    "hold",
    [
        lambda inner: inner,
        lambda inner: [inner],
        lambda inner: (inner,),
        lambda inner: {"a": [inner]},
        lambda inner: [[{"b": (inner, inner)}]],
    ],
)
def test_the_one_that_it_holds_updates_the_same_parameters(hold: Any) -> None:
    inner = sgd()
    outer = Holder(inner.param_groups, held=hold(inner))
    assert same(updating_optimizers(outer), inner)
    assert same(updating_optimizers([inner, outer]), inner)


def test_one_with_parameters_of_its_own_updates_too() -> None:
    mine, theirs = parameter(), parameter()
    inner = sgd(theirs)
    outer = Holder([mine], inner=inner)
    assert same(updating_optimizers(outer), outer, inner)


def test_a_wrapper_without_groups_updates_nothing() -> None:
    inner = sgd()
    wrapper = type("Wrapper", (), {})()
    wrapper.optimizer = inner
    assert same(updating_optimizers(wrapper), inner)


def test_several_floors_and_circles() -> None:
    first, second = sgd(), sgd()
    middle = Holder(first.param_groups, inner=first)
    outer = Holder([*first.param_groups[0]["params"], *second.param_groups[0]["params"]], parts=[middle, second])
    middle.owner = outer
    assert same(updating_optimizers(outer), first, second)


def test_states_and_long_histories_are_not_searched() -> None:
    inner = sgd()
    outer = Holder([parameter()], memory=defaultdict(list, {0: [inner]}), losses=[inner] * 1000)
    assert same(updating_optimizers(outer), outer)


def test_a_wrapper_around_one_without_groups_updates_nothing_itself() -> None:
    inner = sgd()
    middle = Holder([parameter()], inner=inner)
    del middle.param_groups
    assert same(updating_optimizers(Holder(inner.param_groups, middle=middle)), inner)


def test_as_before_until_one_that_was_found_is_gone() -> None:
    first, second, third = sgd(), sgd(), sgd()
    outer = Holder(first.param_groups, held=[first])
    assert same(updating_optimizers_as_before([outer, second]), first, second)
    outer.held.append(third)  # nobody looks again for what comes later
    assert same(updating_optimizers_as_before([outer, second]), first, second)
    assert same(updating_optimizers_as_before([third]), third)
    outer.held = [third]
    outer.param_groups = third.param_groups
    del first
    gc.collect()
    assert same(updating_optimizers_as_before([outer, second]), third, second)


def test_torchs_own_hold_nothing() -> None:
    one = sgd()
    one.other = sgd()
    assert same(updating_optimizers(one), one)


def test_hookable() -> None:
    class NoConstructor(Optimizer):
        def __init__(self) -> None:
            self.param_groups = [{"params": []}]

        def step(self, closure: Any = None) -> None:
            """Update nothing."""

    class Delegating(NoConstructor):
        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

    delegating = Delegating()
    delegating.inner = sgd()
    assert not is_hookable(delegating), "its inner one has hooks"
    assert is_hookable(sgd())
    assert is_hookable(Holder([parameter()]))
    assert not is_hookable(NoConstructor())
    assert not is_hookable(object())
    check_hookable(sgd(), "Anybody")
    with pytest.raises(TypeError) as error:
        check_hookable(NoConstructor(), "WeightDecay")
    assert str(error.value) == (
        "WeightDecay needs step hooks (`register_step_pre_hook`), which NoConstructor does not call. Derive it from "
        "torch.optim.Optimizer and call `super().__init__`, or keep the optimizer that it wraps in one of its "
        "attributes."
    )


def test_groups_that_are_made_anew_each_time() -> None:
    class Property:
        def __init__(self, groups: Any) -> None:
            self.groups = groups

        @property
        def param_groups(self) -> Any:
            return list(self.groups)

    assert has_groups_of_its_own(sgd())
    assert not has_groups_of_its_own(Property([]))
    assert not has_groups_of_its_own(type("Tuple", (), {"param_groups": ()})())
