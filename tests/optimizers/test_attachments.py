"""What a callback attaches follows the optimizers of a training."""

from __future__ import annotations

from typing import Any

import pytest
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.optimizers.turns import Turn
from tests.optimizers.others import Noting
from tests.param_groups.others import Spy, ones


class Handle:
    def __init__(self, number: int, optimizer: Any, log: list[Any]) -> None:
        self.optimizer, self.log = optimizer, log
        log.append(("on", number, optimizer))

    def remove(self) -> None:
        self.log.append(("off", self.optimizer))


def test_attachments_follow_optimizers_by_identity() -> None:
    first, second, third = (Spy(ones(1)) for _ in range(3))
    log: list[Any] = []
    attachments = Attachments(lambda number, optimizer: Handle(number, optimizer, log))
    assert attachments.follow([first, second])
    assert log == [("on", 0, first), ("on", 1, second)]
    assert not attachments.follow([first, second])
    kept = list(attachments)[1]
    log.clear()
    assert attachments.follow([second, third])
    assert log == [("off", first), ("on", 1, third)]
    assert next(iter(attachments)) is kept
    assert [handle.optimizer for handle in attachments] == [second, third]
    log.clear()
    attachments.remove()
    assert log == [("off", second), ("off", third)]
    assert list(attachments) == []


def test_attachments_look_before_the_first_step_of_an_optimizer_that_they_do_not_know() -> None:
    known, fresh = Spy(ones(1)), Spy(ones(1))
    before = list(_global_optimizer_pre_hooks)
    current, looks, log = [known], [], []

    def look() -> None:
        looks.append(len(current))
        attachments.follow(current)

    attachments = Attachments(lambda number, optimizer: Noting(optimizer, Turn.DECAY, log), look)
    attachments.follow(current)
    known.step()
    assert looks == []
    current[0] = fresh
    fresh.step()  # of which nothing is missed
    assert looks == [1]
    assert log[-3:] == ["decay begin False", "decay before update", "decay after update"]
    attachments.remove()
    assert list(_global_optimizer_pre_hooks) == before
    log.clear()
    known.step()
    fresh.step()
    assert (log, looks) == ([], [1])


def test_an_optimizer_that_nothing_can_be_attached_to_leaves_none_of_the_others_with_it() -> None:
    first, kept, refused = (Spy(ones(1)) for _ in range(3))
    log: list[Any] = []

    def attach(number: int, optimizer: Any) -> Handle:
        if optimizer is refused:
            raise TypeError("not this one")
        return Handle(number, optimizer, log)

    attachments = Attachments(attach, lambda: None)
    attachments.follow([kept])
    log.clear()
    with pytest.raises(TypeError, match="not this one"):
        attachments.follow([first, refused, kept])
    assert log[0] == ("on", 0, first)
    assert {entry[1] for entry in log if entry[0] == "off"} == {first, kept}
    assert list(attachments) == []
    assert attachments.follow([kept])
    attachments.remove()
