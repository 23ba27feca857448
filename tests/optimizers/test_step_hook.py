"""What acts within a step: at which moments, in which order, and how often."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_l2.optimizers.step_hook import StepHook, gradients_are_complete, tell_once, updates_of
from lightning_l2.optimizers.turns import Turn
from tests.optimizers.others import Noting
from tests.param_groups.others import Spy, ones


def test_a_hook_gives_the_optimizer_another_loss() -> None:
    class Doubling(StepHook):
        turn = Turn.PENALTY

        def objective(self, loss: Any) -> Any:
            return 2 * loss

    optimizer = Spy(ones(1))
    Doubling(optimizer, "The test")
    assert optimizer.step(lambda: 3.0) == 6.0


def test_gradients_are_told_of_once_however_many_tell() -> None:
    optimizer, log = Spy(ones(1)), []
    Noting(optimizer, Turn.DECAY, log)
    first, second = object(), object()

    def told() -> int:
        return log.count("decay before clipping")

    for teller in (first, second):
        gradients_are_complete(optimizer, teller)
    assert told() == 1
    gradients_are_complete(optimizer, first)  # the second time: they are new, as after a skipped step
    assert told() == 2
    gradients_are_complete(optimizer, second)
    assert told() == 2
    optimizer.step()
    gradients_are_complete(optimizer, object())  # nobody has told since the step
    assert told() == 3
    gradients_are_complete(optimizer, second)
    assert told() == 3
    gradients_are_complete(Spy(ones(1)), first)  # to which nothing is attached


def test_what_is_attached_or_removed_within_a_step() -> None:
    optimizer, log = Spy(ones(1)), []
    leaving, staying = Noting(optimizer, Turn.DECAY, log), Noting(optimizer, Turn.CONSTRAINT, [])

    def closure() -> None:
        Noting(optimizer, Turn.MONITOR, log)
        leaving.remove()

    optimizer.step(closure)
    assert [entry for entry in log if "monitor" in entry] == []
    assert "decay after update" not in log
    assert "constraint after update" in staying.log
    log.clear()
    optimizer.step()
    assert log == ["monitor begin False", "monitor before update", "monitor after update"]


def test_a_warning_is_given_once() -> None:
    optimizer = Spy(ones(1))
    assert not tell_once(optimizer), "nobody acts on it"
    Noting(optimizer, Turn.DECAY, [])
    assert [tell_once(optimizer), tell_once(optimizer)] == [True, False]


def test_updates_are_counted_while_anything_acts() -> None:
    optimizer = Spy(ones(1))
    optimizer.step()
    assert updates_of(optimizer) == 0
    Noting(optimizer, Turn.DECAY, [])
    for _ in range(3):
        optimizer.step()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert updates_of(optimizer) == 3
