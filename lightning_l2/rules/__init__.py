"""Which parameter gets which lambda: ordered rules, presets, and what the default exempts."""

from lightning_l2.rules.assign import Rules, assign_rules, decay_param_groups
from lightning_l2.rules.parameters import ParameterInfo
from lightning_l2.rules.presets import PRESETS
from lightning_l2.rules.rule import DecayRule

__all__ = ["PRESETS", "DecayRule", "ParameterInfo", "Rules", "assign_rules", "decay_param_groups"]


def __dir__() -> list[str]:
    return __all__
