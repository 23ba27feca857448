"""Keep groups that were split from one parent in step: what somebody writes to one of them is meant for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

# What a child has of its own; all other options are shared with its parent.
OWN_KEYS = frozenset(
    (
        *("name", "weight_decay", "initial_weight_decay", "weight_decay_multiplier", "rule"),
        *("decoupled_weight_decay", "param_names", "params"),
    )
)
# A tensor and how often it was changed in place, a counter for which torch has no public name.
Mark: TypeAlias = tuple[int, int]


class SharedOptions:
    """What sibling groups had in common when they were aligned last.

    Args:
        parent: The group that they were split from.

    >>> siblings = [{"params": [], "lr": 0.1}, {"params": [], "lr": 0.1}]
    >>> options = SharedOptions({"params": [], "lr": 0.1})
    >>> siblings[1]["lr"] = 0.2
    >>> options.align(siblings)
    >>> siblings[0]["lr"]
    0.2
    """

    def __init__(self, parent: Mapping[str, Any]) -> None:
        self._values = {
            key: value for key, value in parent.items() if key not in OWN_KEYS and not isinstance(value, torch.Tensor)
        }
        self._marks: dict[str, list[Mark]] = {}

    def align(self, siblings: Sequence[dict[str, Any]]) -> None:
        """Give to all siblings what somebody wrote to one of them; where two got different values, leave them."""
        first, *others = siblings
        self._note_keys(siblings)
        for key, marks in self._marks.items():
            self._marks[key] = _align_tensors([sibling[key] for sibling in siblings], marks)
        values = [first.get(key) for key in self._values]
        if all([other.get(key) for key in self._values] == values for other in others):
            # as nearly always: nobody has written, or somebody to all of them
            self._values.update(zip(self._values, values, strict=True))
            return
        for key, before in self._values.items():
            changed = [value for sibling in siblings if (value := sibling.get(key, before)) != before]
            if changed and all(value == changed[0] for value in changed):
                self._values[key] = changed[0]
                for sibling in siblings:
                    sibling[key] = changed[0]

    def _note_keys(self, siblings: Sequence[Mapping[str, Any]]) -> None:
        """Note keys that are new, and those that hold a number now where a tensor was."""
        first = siblings[0]
        for key in [key for key in self._marks if not isinstance(first[key], torch.Tensor)]:
            del self._marks[key]
        for key in first.keys() - self._values.keys() - self._marks.keys() - OWN_KEYS:
            if isinstance(first[key], torch.Tensor):
                self._marks[key] = _marks([sibling[key] for sibling in siblings])
            else:
                self._values[key] = first[key]


def _align_tensors(tensors: Sequence[Tensor], before: Collection[Mark]) -> list[Mark]:
    """Do the same for values that are changed in place; to compare what they hold would wait for their device."""
    changed = [tensor for tensor, mark in zip(tensors, _marks(tensors), strict=True) if mark not in before]
    if len(changed) == 1:
        for tensor in tensors:
            if tensor is not changed[0]:
                tensor.copy_(changed[0])
    return _marks(tensors)


def _marks(tensors: Iterable[Tensor]) -> list[Mark]:
    return [(id(tensor), tensor._version) for tensor in tensors]
