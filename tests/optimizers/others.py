"""Something that acts within a step and tells of it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn


class Noting(StepHook):
    """Notes each moment, with the name of its turn."""

    def __init__(self, optimizer: Optimizer, turn: Turn, log: list[str]) -> None:
        self.turn = turn  # type: ignore[misc]
        self.log = log
        super().__init__(optimizer, "The test")

    def note(self, moment: str) -> None:
        self.log.append(f"{self.turn.name.lower()} {moment}")

    def begin(self, *, has_closure: bool) -> None:
        self.note(f"begin {has_closure}")

    def before_clipping(self) -> None:
        self.note("before clipping")

    def before_closure(self) -> None:
        self.note("before closure")

    def objective(self, loss: Any) -> Any:
        self.note("objective")
        return loss

    def before_update(self) -> None:
        self.note("before update")

    def after_update(self) -> None:
        self.note("after update")
