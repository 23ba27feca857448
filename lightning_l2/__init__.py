"""Weight decay per parameter group, scheduled, measured and constrained, for LightningModules nobody has to edit."""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_l2.callbacks.l2_norm_monitor import L2NormMonitor
    from lightning_l2.callbacks.l2_penalty import L2Penalty
    from lightning_l2.callbacks.norm_constraint import NormConstraint
    from lightning_l2.callbacks.norm_plots import NormPlots
    from lightning_l2.callbacks.weight_decay import WeightDecay
    from lightning_l2.callbacks.weight_decay_scheduler import WeightDecayScheduler
    from lightning_l2.mixin import WeightDecayMixin
    from lightning_l2.param_groups.decay_groups import weight_decay_in_force
    from lightning_l2.rules.assign import assign_rules, decay_param_groups
    from lightning_l2.rules.rule import DecayRule
    from lightning_l2.search.search import search_weight_decay

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
    "weight_decay_in_force",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import a name or a wing when it is asked for: Lightning takes seconds, and a mistyped file doesn't need it."""
    if name in __all__:
        wings = ("callbacks", "rules", "param_groups", "search", "mixin")
        faces = (import_module(f"{__name__}.{wing}") for wing in wings)
        found = next(getattr(face, name) for face in faces if hasattr(face, name))
    else:
        try:
            found = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_meant(name)}") from None
    globals()[name] = found
    return found


def _meant(name: str) -> str:
    """Return in words which class may be meant, and where it is."""
    if not name[:1].isupper():
        return ""
    wings = ("schedules", "adaptive", "constraints", "convert", "monitor", "metrics", "decay")
    places = {known: f"{__name__}.{wing}" for wing in wings for known in dir(import_module(f"{__name__}.{wing}"))}
    close = get_close_matches(name, places | dict.fromkeys(__all__, __name__), n=1)
    return f". Did you mean '{places.get(close[0], __name__)}.{close[0]}'?" if close else ""


def __dir__() -> list[str]:
    return __all__
