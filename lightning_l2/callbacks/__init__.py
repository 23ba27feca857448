"""The callbacks: each decides when something happens and what is saved, works alone and in any order."""

from lightning_l2.callbacks.l2_norm_monitor import L2NormMonitor
from lightning_l2.callbacks.l2_penalty import L2Penalty
from lightning_l2.callbacks.norm_constraint import NormConstraint
from lightning_l2.callbacks.norm_plots import NormPlots
from lightning_l2.callbacks.weight_decay import WeightDecay
from lightning_l2.callbacks.weight_decay_scheduler import WeightDecayScheduler

__all__ = ["L2NormMonitor", "L2Penalty", "NormConstraint", "NormPlots", "WeightDecay", "WeightDecayScheduler"]


def __dir__() -> list[str]:
    return __all__
