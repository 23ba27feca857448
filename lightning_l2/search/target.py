"""Find where a Trainer's lambda comes from, and set it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

# Callbacks by the names of their classes, the first that is there first.
TAKE_LAMBDA = ("WeightDecay", "L2Penalty")


def set_weight_decay(callbacks: Sequence[Any], groups: Sequence[dict[str, Any]], weight_decay: float | None) -> str:
    """Set lambda where it comes from, and return where that is.

    Args:
        callbacks: the Trainer's callbacks: the first `WeightDecay`, else the first `L2Penalty` gets it.
        groups: the optimizers' groups, which get it where there is neither: the strongest group lambda, others in
            proportion; all of them where none has any.
        weight_decay: lambda, or None to only look.

    Raises:
        MisconfigurationException: If there is nothing that takes a lambda.
    """
    for name in TAKE_LAMBDA:
        for callback in callbacks:
            if any(kind.__name__ == name for kind in type(callback).__mro__):
                if weight_decay is not None:
                    callback.weight_decay = weight_decay
                return f"the callback {name}"
    groups = [group for group in groups if "weight_decay" in group]
    if not groups:
        raise MisconfigurationException(
            "There is no lambda to search: the Trainer has no WeightDecay callback and its optimizer no "
            "`weight_decay`. Add the callback WeightDecay()."
        )
    strongest = max(group["weight_decay"] for group in groups)
    if weight_decay is not None:
        for group in groups:
            group["weight_decay"] = weight_decay * (group["weight_decay"] / strongest if strongest else 1.0)
    return "the optimizer's parameter groups"


def hide_summaries(callbacks: Sequence[Any]) -> None:
    """Keep `WeightDecay` from showing its table of groups for each of many trainings."""
    for callback in callbacks:
        if hasattr(callback, "print_summary"):
            callback.print_summary, callback.summary_file = False, None
