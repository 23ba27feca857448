"""The norm constraints of a training: whom they hold, when they act, and what is logged of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.param_groups.decay_groups import decay_groups_of
from lightning_l2.rules.assign import rules_by_parameter
from lightning_l2.rules.parameters import is_undecided

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_l2.constraints.attach import AttachedConstraint
    from lightning_l2.rules.assign import Rules


def names_of_constrained(
    module: nn.Module, rules: Rules, outermost: nn.Module | None, optimizers: Sequence[Optimizer]
) -> Mapping[Tensor, str | None]:
    """Return the name of each constrained parameter, None for each exempt one; nothing while some are lazy.

    Raises:
        MisconfigurationException: If nothing would be constrained.
    """
    if is_undecided(module):
        return {}
    names: dict[Tensor, str | None] = {}
    for name, parameter, rule in rules_by_parameter(module, rules, outermost):
        names[parameter] = name if rule.resolve(1.0) else None
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not any(tensor in names for group in groups for tensor in group["params"]):
        raise MisconfigurationException(
            "None of the optimizers' parameters are the module's, so NormConstraint can't know them. Build the "
            "optimizer from the parameters as they are after `configure_model`."
        )
    if not any(names.values()):
        raise MisconfigurationException(
            f"NormConstraint has nothing to constrain: its rules exempt all {len(names)} parameters of the "
            "module. Give rules that give some of them a weight decay."
        )
    return names


class ConstraintsInForce:
    """The constraints that are attached to a training's optimizers.

    Args:
        attach: Attaches one to an optimizer.
        look: As of `Attachments`.

    Attributes:
        has_stepped: Whether a step was logged, as the first of a fit is.
    """

    def __init__(
        self, attach: Callable[[Optimizer], AttachedConstraint], look: Callable[[], Any] | None = None
    ) -> None:
        self.has_stepped = False
        self._constraints = Attachments(lambda _, optimizer: attach(optimizer), look)

    @property
    def is_undecided(self) -> bool:
        """Whether lazy parameters put off what there is to constrain."""
        return any(constraint.undecided for constraint in self._constraints)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Go over to other optimizers, and look up what there is to constrain, before a step moves it."""
        decay_groups_of(optimizers)
        self._constraints.follow(optimizers)
        for constraint in self._constraints:
            constraint.prepare()

    def memorise(self) -> None:
        """Write down what bounds and multipliers remember."""
        for constraint in self._constraints:
            constraint.memorise()

    def remove(self) -> None:
        """Leave the optimizers alone."""
        self._constraints.remove()

    def metrics(self, prefix: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the extremes and the values of each vector, by logged key, in one transfer."""
        read = [
            (constraint.labels, table)
            for constraint in self._constraints
            if (table := constraint.readout()) is not None
        ]
        if not read:
            return {}, {}
        labels = [label for own, _ in read for label in own]
        columns = torch.cat([table for _, table in read], dim=1).tolist()
        extremes, each = {}, {}
        quantities = next(constraint.quantities for constraint in self._constraints)
        for quantity, values in zip(quantities, columns, strict=True):
            extreme = min if quantity in ("bound", "slack") else max
            # Bounds that are not known yet are infinite.
            finite = {label: value for label, value in zip(labels, values, strict=True) if math.isfinite(value)}
            each.update({f"{prefix}/{quantity}/{label}": value for label, value in finite.items()})
            if finite:
                extremes[f"{prefix}/{quantity}"] = extreme(finite.values())
        return extremes, each
