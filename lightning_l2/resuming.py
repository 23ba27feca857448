"""Whose weight decay holds when a training resumes: that of its configuration, or that of the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.optim import Optimizer

    from lightning_l2.summary import GroupSummary

OnResume: TypeAlias = Literal["config", "checkpoint", "error"]


class Resuming:
    """Decide, parameter by parameter, between two base lambdas, and remember where they differ.

    Args:
        on_resume: Whose holds; with `"error"` it is for the caller to raise what `differences` says.

    Attributes:
        restored: The checkpoint's base lambdas by parameter name, empty where there is none.

    Raises:
        ValueError: If `on_resume` is none of the three.

    >>> resuming = Resuming("checkpoint")
    >>> resuming.restored = {"head.weight": 0.1}
    >>> resuming.choose("head.weight", 0.2), resuming.choose("body.weight", 0.2)
    (0.1, 0.2)
    """

    def __init__(self, on_resume: OnResume) -> None:
        if on_resume not in get_args(OnResume):
            raise ValueError(f"Expected `on_resume` to be 'config', 'checkpoint' or 'error', got {on_resume!r}.")
        self.on_resume = on_resume
        self.restored: dict[str, float] = {}
        self._built_with: list[list[float | None]] = []
        self._differing: dict[str, tuple[float, float]] = {}

    def take_down(self, optimizers: Sequence[Optimizer]) -> None:
        """Remember which weight decay optimizers were built with, before their states are restored."""
        self._built_with = [[group.get("weight_decay") for group in o.param_groups] for o in optimizers]

    def undo_restored(self, optimizers: Sequence[Optimizer]) -> None:
        """Undo that an optimizer's state, when it is restored, brings the weight decay of its time along."""
        if self.on_resume == "checkpoint" and not self.restored:
            return  # the checkpoint is one without this package: what its groups have holds
        for optimizer, values in zip(optimizers, self._built_with, strict=False):
            if len(values) == len(optimizer.param_groups):
                for group, value in zip(optimizer.param_groups, values, strict=True):
                    _set_base(group, value)

    def choose(self, name: str, configured: float) -> float:
        """Return the base lambda of a parameter, given the one that the configuration asks for."""
        restored = self.restored.get(name, configured)
        if restored != configured:
            self._differing[name] = (configured, restored)
        return restored if self.on_resume == "checkpoint" else configured

    def differences(self) -> str | None:
        """Say how the two differed in what was chosen since the last call, None if they didn't."""
        differing, self._differing = self._differing, {}
        if not differing:
            return None
        name, (configured, restored) = next(iter(differing.items()))
        return (
            f"The weight decay of {len(differing)} parameters differs between configuration and checkpoint, for "
            f"example of {name!r}: {configured:g} is configured, {restored:g} in the checkpoint"
        )


def rewrite(
    groups: Iterable[dict[str, Any]], summary: Iterable[GroupSummary], weight_decay: Mapping[str, float]
) -> list[GroupSummary]:
    """Write base lambdas into groups that can't be split any more; what a schedule made of them stays.

    Args:
        groups: Parameter groups with their names.
        summary: What is known of them.
        weight_decay: The base lambdas by parameter name.

    Returns:
        The summary of what holds now.

    Raises:
        ValueError: If parameters of one group have different ones.
    """
    rows = [replace(row, weight_decay=_common(row, weight_decay)) for row in summary]
    by_name = {row.group: row.weight_decay for row in rows}
    for group in groups:
        if group.get("name") in by_name:
            group["initial_weight_decay"] = by_name[group["name"]]
            group["weight_decay"] = by_name[group["name"]] * group.get("weight_decay_multiplier", 1.0)
    return rows


def _common(row: GroupSummary, weight_decay: Mapping[str, float]) -> float:
    values = {name: weight_decay.get(name, row.weight_decay) for name in row.names}
    if len(set(values.values())) > 1:
        raise ValueError(
            f"The checkpoint has several weight decays for parameters of the group {row.group!r}, {values}, and "
            "DeepSpeed has made the group one piece. Set on_resume='config', or use the rules of the checkpoint."
        )
    return next(iter(values.values()), row.weight_decay)


def _set_base(group: dict[str, Any], value: float | None) -> None:
    if value is not None:
        group["initial_weight_decay" if "initial_weight_decay" in group else "weight_decay"] = value
