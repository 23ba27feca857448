"""Weight decay per parameter group, scheduled, measured and constrained, for LightningModules nobody has to edit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_l2.callbacks.l2_norm_monitor import L2NormMonitor
    from lightning_l2.callbacks.l2_penalty import L2Penalty
    from lightning_l2.callbacks.norm_constraint import NormConstraint
    from lightning_l2.callbacks.norm_plots import NormPlots
    from lightning_l2.callbacks.weight_decay import WeightDecay
    from lightning_l2.callbacks.weight_decay_scheduler import WeightDecayScheduler
    from lightning_l2.decay_rule import DecayRule
    from lightning_l2.mixin import WeightDecayMixin
    from lightning_l2.rules import assign_rules, decay_param_groups
    from lightning_l2.search import search_weight_decay

__all__ = [
    "DecayRule",
    "L2NormMonitor",
    "L2Penalty",
    "NormConstraint",
    "NormPlots",
    "WeightDecay",
    "WeightDecayMixin",
    "WeightDecayScheduler",
    "assign_rules",
    "decay_param_groups",
    "search_weight_decay",
]
__version__ = "0.1.0"
# Imported when asked for: Lightning takes seconds, and the command line can answer much without it.
_HOMES = {
    "DecayRule": "decay_rule",
    "L2NormMonitor": "callbacks.l2_norm_monitor",
    "L2Penalty": "callbacks.l2_penalty",
    "NormConstraint": "callbacks.norm_constraint",
    "NormPlots": "callbacks.norm_plots",
    "WeightDecay": "callbacks.weight_decay",
    "WeightDecayMixin": "mixin",
    "WeightDecayScheduler": "callbacks.weight_decay_scheduler",
    "assign_rules": "rules",
    "decay_param_groups": "rules",
    "search_weight_decay": "search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
