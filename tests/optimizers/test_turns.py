"""At which moments of a step what acts, and in which order."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from lightning_l2.optimizers.step_hook import gradients_are_complete
from lightning_l2.optimizers.turns import Turn
from tests.optimizers.others import Noting
from tests.param_groups.others import Spy, ones


class Logged(Spy):
    """Puts its update into the log."""

    log: ClassVar[list[str]] = []

    def step(self, closure: Any = None) -> Any:
        def logged() -> Any:
            self.log.append("closure")
            return closure()

        self.update(None if closure is None else logged)
        self.log.append("update")


ORDER = [Turn.SCHEDULE, Turn.PENALTY, Turn.DECAY, Turn.CONSTRAINT, Turn.MONITOR]


@pytest.mark.parametrize("attached", [ORDER, ORDER[::-1], ORDER[2:] + ORDER[:2]], ids=["in order", "back", "mixed"])
def test_the_order_of_turns_does_not_depend_on_who_came_first(attached: list[Turn]) -> None:
    optimizer, log = Logged(ones(1)), []
    optimizer.log = log  # type: ignore[misc]
    for turn in attached:
        Noting(optimizer, turn, log)
    gradients_are_complete(optimizer, "a callback")
    optimizer.step()
    names = [turn.name.lower() for turn in ORDER]
    assert log == [
        *(f"{name} before clipping" for name in names),
        *(f"{name} begin False" for name in names),
        *(f"{name} before update" for name in names),
        "update",
        *(f"{name} after update" for name in names),
    ]


def test_moments_of_a_step_with_a_closure_that_is_called_twice() -> None:
    class Twice(Logged):
        def step(self, closure: Any) -> None:
            closure()
            self.update(closure)
            self.log.append("update")

    optimizer, log = Twice(ones(1)), []
    optimizer.log = log  # type: ignore[misc]
    Noting(optimizer, Turn.DECAY, log)
    for arguments in ([lambda: None], []):
        log.clear()
        optimizer.step(*arguments) if arguments else optimizer.step(closure=lambda: None)
        once = ["decay before closure", "decay objective", "decay before update"]
        assert [entry for entry in log if entry != "closure"] == [
            "decay begin True",
            *once,
            *once,
            "update",
            "decay after update",
        ]
