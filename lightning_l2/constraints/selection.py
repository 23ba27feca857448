"""Whom a norm constraint holds: what its rules give a weight decay, on the sphere hidden layers unless a rule asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.rules.assign import rules_by_parameter
from lightning_l2.rules.parameters import describe_parameters, is_undecided
from lightning_l2.rules.presets import PRESETS
from lightning_l2.rules.rule import is_of_class

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_l2.rules.assign import Rules
    from lightning_l2.rules.parameters import ParameterInfo


def names_of_constrained(
    module: nn.Module,
    rules: Rules,
    outermost: nn.Module | None,
    optimizers: Sequence[Optimizer],
    *,
    hidden: bool = False,
) -> Mapping[Tensor, str | None]:
    """Return the name of each constrained parameter, None for each exempt one; nothing while some are lazy.

    Args:
        module: The module.
        rules: Who is constrained: parameters that these give a weight decay.
        outermost: The module that a strategy wrapped it in.
        optimizers: Those that the parameters are to be found in.
        hidden: Whether rules of presets leave embeddings and the output layer out.

    Raises:
        MisconfigurationException: If nothing would be constrained.
    """
    if is_undecided(module):
        return {}
    left_out = _ends(module, outermost) if hidden else {}
    presets = {rule for preset in PRESETS.values() for rule in preset}
    names: dict[Tensor, str | None] = {}
    for name, parameter, rule in rules_by_parameter(module, rules, outermost):
        is_asked_for = rule not in presets or id(parameter) not in left_out
        names[parameter] = name if rule.resolve(1.0) and is_asked_for else None
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not any(tensor in names for group in groups for tensor in group["params"]):
        raise MisconfigurationException(
            "None of the optimizers' parameters are the module's, so NormConstraint can't know them. Build the "
            "optimizer from the parameters as they are after `configure_model`."
        )
    if not any(names.values()):
        why = f"On a sphere, {', '.join(left_out.values())} need a rule of their own. " if left_out else ""
        raise MisconfigurationException(
            f"NormConstraint has nothing to constrain: its rules exempt all {len(names)} parameters of the "
            f"module. {why}Give rules that give some of them a weight decay."
        )
    return names


def _ends(module: nn.Module, outermost: nn.Module | None) -> dict[int, str]:
    """Return the names of embeddings' weights and of the output layer's, by the parameter's `id`.

    The output layer is the last that the module registers of those with a matrix to train; it may be tied.
    """
    infos = describe_parameters(module, outermost)
    places = {id(part): place for place, part in enumerate(module.modules())}

    def last_place(info: ParameterInfo) -> int:
        return max(places.get(id(place.owner), -1) for place in info.places)

    matrices = [info for info in infos if not info.exempt and info.parameter.requires_grad]
    last = max(map(last_place, matrices), default=None)
    ends = {}
    for info in infos:
        is_table = any(is_of_class(p.owner, kind) for p in info.places for kind in ("Embedding", "EmbeddingBag"))
        if is_table or (info in matrices and last_place(info) == last):
            ends[id(info.parameter)] = repr(info.name)
    return ends
