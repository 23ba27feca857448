"""Optimizers as they are: what is known of torch's, which one really updates, and what may act within its step."""

from lightning_l2.optimizers.facts import own_way
from lightning_l2.optimizers.inner import updating_optimizers
from lightning_l2.optimizers.step_hook import StepHook

__all__ = ["StepHook", "own_way", "updating_optimizers"]


def __dir__() -> list[str]:
    return __all__
