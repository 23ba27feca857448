"""Weight decay by rules where a strategy takes the optimizer over, groups and all: they are split for good before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_l2.param_groups.bases import RuleBases
from lightning_l2.param_groups.decay_groups import decay_groups, decay_groups_of
from lightning_l2.param_groups.summary import GroupSummary, summarize

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lightning_l2.param_groups.resume import Resuming
    from lightning_l2.rules import Rules


class EarlySplit:
    """Parameter groups that were split for good, as DeepSpeed needs them, which keeps them so, in checkpoints too.

    Args:
        model: The module.
        optimizers: Its optimizers, not taken over yet.
        weight_decay: Gives base lambda from a parameter group, None to keep the group's own.
        rules: As of `assign_rules`.
        resuming: Knows what a checkpoint says.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        weight_decay: Callable[[Mapping[str, Any]], float | None],
        rules: Rules,
        resuming: Resuming,
    ) -> None:
        self._resuming = resuming
        bases = RuleBases(model, rules, weight_decay, resuming)
        found = decay_groups_of(optimizers)
        for one in found:
            one.decide(bases)
        self._summary = summarize(group for one in found for group in one.groups)
        self._bases = {d.key: float(g.base) for one in found for g in one.unnamed() for d in g.decisions}
        for one in found:
            _split(one.optimizer)
            one.decide(None)

    def begin(self, optimizers: Sequence[Any]) -> None:
        """Put lambda into the groups of optimizers that were taken over, and perhaps restored with other values.

        Raises:
            ValueError: If a checkpoint has several lambdas for what is one group now.
        """
        self._bases = {key: self._resuming.choose(key, value) for key, value in self._bases.items()}
        self._summary = [replace(row, weight_decay=self._common(row)) for row in self._summary]
        rows = {row.group: row.weight_decay for row in self._summary}
        for optimizer in optimizers:
            groups = optimizer.param_groups
            decay_groups(optimizer).fix([rows.get(g.get("name"), g.get("weight_decay", 0.0)) for g in groups])

    def summary(self) -> list[GroupSummary]:
        """Describe the groups."""
        return self._summary

    def weight_decay(self) -> dict[str, float]:
        """Return the base lambda of each parameter by name."""
        return dict(self._bases)

    def _common(self, row: GroupSummary) -> float:
        values = {name: self._bases.get(name, row.weight_decay) for name in row.names}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"The checkpoint has several weight decays for parameters of the group {row.group!r}, {values}, and "
                "DeepSpeed has made the group one piece. Set on_resume='config', or use the rules of the checkpoint."
            )
        return next(iter(values.values()), row.weight_decay)


def _split(optimizer: Optimizer) -> None:
    children = []
    for group in decay_groups(optimizer).groups:
        child = {**group.parent, "params": group.params, "weight_decay": group.base, "name": group.name}
        if "param_names" in child:
            child["param_names"] = [child["param_names"][index] for index in group.indices]
        children.append(child)
    optimizer.param_groups[:] = children
