"""Whose lambda holds after a resume, in a table of both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_l2.param_groups.resume import Resuming


def sgd(*lambdas: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "weight_decay": value} for value in lambdas], lr=0.1)


@pytest.mark.parametrize("on_resume", ["Config", "", None, True])
def test_an_unknown_word_is_refused(on_resume: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected `on_resume` to be 'config', 'checkpoint' or 'error', got"):
        Resuming(on_resume)


@pytest.mark.parametrize(
    ("on_resume", "restored", "expected"),
    [
        ("config", None, 0.2),
        ("checkpoint", None, 0.2),
        ("config", {"a": 0.5}, 0.2),
        ("checkpoint", {"a": 0.5}, 0.5),
        ("checkpoint", {"b": 0.5}, 0.2),
        ("error", {"a": 0.5}, 0.2),
    ],
)
def test_choose(on_resume: Any, restored: Any, expected: float) -> None:
    resuming = Resuming(on_resume)
    resuming.restored = restored
    assert resuming.choose("a", 0.2) == expected


def test_differences_are_told_once_with_an_example() -> None:
    resuming = Resuming("config")
    resuming.restored = {"a": 0.5, "b": 0.2, "c": 0.1}
    for name in "abc":
        resuming.choose(name, 0.2)
    assert resuming.differences() == (
        "The weight decay of 2 parameters differs between configuration and checkpoint, for example of 'a': 0.2 is "
        "configured, 0.5 in the checkpoint"
    )
    assert resuming.differences() is None


def test_groups_that_a_checkpoint_without_our_state_restored() -> None:
    resuming, optimizer = Resuming("checkpoint"), sgd(0.5)
    resuming.has_restored = True
    resuming.take_over([optimizer])
    assert resuming.choose("a", 0.2, optimizer.param_groups[0]) == 0.5
    assert resuming.choose("a", 0.2, sgd(0.5).param_groups[0]) == 0.2  # a group that came after it


@pytest.mark.parametrize(("has_restored", "restored"), [(False, None), (True, {})])
def test_groups_are_not_asked_otherwise(has_restored: bool, restored: Any) -> None:
    resuming, optimizer = Resuming("checkpoint"), sgd(0.5)
    resuming.has_restored, resuming.restored = has_restored, restored
    resuming.take_over([optimizer])
    assert resuming.choose("a", 0.2, optimizer.param_groups[0]) == 0.2


def test_what_the_groups_were_built_with_holds_if_the_configuration_does() -> None:
    resuming, optimizer = Resuming("config"), sgd(0.1, 0.2)
    resuming.take_down([optimizer])
    assert resuming.configured(optimizer, [optimizer]) == []  # nothing was restored
    resuming.has_restored = True
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.9  # as loading a state does
    assert resuming.configured(optimizer, [optimizer]) == [((0.9, 0.9), 0.1), ((0.9, 0.9), 0.2)]
    optimizer.add_param_group({"params": [torch.zeros(1)], "weight_decay": 0.4})
    assert resuming.configured(optimizer, [optimizer])[2] == ((0.4,), 0.4)  # one that came later has what it says
    other = Resuming("checkpoint")
    other.take_down([optimizer])
    other.has_restored = True
    assert other.configured(optimizer, [optimizer]) == []


def test_an_optimizer_within_another_goes_by_what_the_users_was_built_with() -> None:
    resuming, users, inner = Resuming("config"), sgd(0.1), sgd(0.01)
    inner.param_groups[0]["params"] = users.param_groups[0]["params"]
    resuming.take_down([users])
    resuming.has_restored = True
    users.param_groups[0]["weight_decay"] = 0.9
    assert resuming.configured(inner, [users]) == [((0.01, 0.9), 0.1)]
