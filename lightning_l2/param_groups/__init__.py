"""An optimizer's parameter groups, the user's own outside of updates, and the parts of them that decay alike."""

from lightning_l2.param_groups.decay_groups import DecayGroups, decay_groups, weight_decay_in_force
from lightning_l2.param_groups.parts import DecayGroup
from lightning_l2.param_groups.summary import GroupSummary

__all__ = ["DecayGroup", "DecayGroups", "GroupSummary", "decay_groups", "weight_decay_in_force"]


def __dir__() -> list[str]:
    return __all__
