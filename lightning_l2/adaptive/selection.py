"""What the adaptive schedules ask of a parameter group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_l2.schedules.feedback import OptimizerLike
from lightning_l2.sharding import has_flat_pieces, is_flat_parameter, is_flat_piece

HEAD = r"(?<![a-z])(lm_?head|head|output|classifier|logits)(?![a-z])"
"""Names that rules and groups of output layers go by."""


def matches(pattern: str | None, group: Mapping[str, Any]) -> bool:
    """Return whether the name of a group's rule, or else the group's own, contains a regular expression."""
    return pattern is not None and re.search(pattern, str(group.get("rule") or group.get("name", ""))) is not None


def base_weight_decay(group: Mapping[str, Any]) -> float:
    """Return lambda of a group before any schedule.

    >>> base_weight_decay({"weight_decay": 0.02, "initial_weight_decay": 0.01})
    0.01
    """
    return float(group.get("initial_weight_decay", group.get("weight_decay", 0.0)))


def check_unflattened(schedule: object, optimizer: OptimizerLike) -> None:
    """Raise a `ValueError` if FSDP1 or DeepSpeed has flattened the parameters, so that no sums over them can be had.

    Pieces that FSDP1 is known not to have cut (`NO_SHARD`) are whole, see `as_seen`.
    """
    # On FSDP2 a parameter is a DTensor, which knows its processes.
    pieces = [p for group in optimizer.param_groups for p in group["params"] if is_flat_piece(p)]
    find = getattr(optimizer, "flat_shards", None)
    shards = None if find is None or not pieces else find()
    is_cut = any(shards is None or id(piece) in shards or is_flat_parameter(piece) for piece in pieces)
    if is_cut or has_flat_pieces(optimizer):
        raise ValueError(
            f"{type(schedule).__name__} sums over whole tensors, but {'FSDP1' if is_cut else 'DeepSpeed'} has "
            f"flattened the parameters of {type(optimizer).__name__}. Use FSDP2 (ModelParallelStrategy) or "
            "DDP, or another schedule."
        )
