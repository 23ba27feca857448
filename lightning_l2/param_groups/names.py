"""Names of parameter groups in tables and logs: short, and unique over all optimizers of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias


class Owner(NamedTuple):
    """Whose a parameter group is.

    Args:
        optimizer: Index of its optimizer.
        parent: Index of the user's group that it is a part of.
        own: The name that the user gave that group, if any.
        label: What a rule calls the part, None for a group that no rule has split.
    """

    optimizer: int
    parent: int
    own: str | None
    label: str | None


def unique_names(owners: Sequence[Owner], known: Mapping[int, str] = MappingProxyType({})) -> list[str]:
    """Return a name for each group, prefixed only where it would not be unique otherwise.

    A group that no rule has split has the user's name or its number.

    Args:
        owners: Whose each group is.
        known: By index, names that groups have already and keep.

    >>> unique_names([Owner(0, 0, None, "decay"), Owner(0, 0, None, "no_decay")])
    ['decay', 'no_decay']
    >>> unique_names([Owner(0, 0, "body", "decay"), Owner(0, 1, "head", "decay"), Owner(0, 1, "head", "no_decay")])
    ['body/decay', 'head/decay', 'no_decay']
    >>> unique_names([Owner(0, 0, None, "decay"), Owner(1, 0, None, "decay"), Owner(1, 1, None, None)])
    ['optimizer0/decay', 'optimizer1/decay', 'optimizer1/group1']
    """
    names = _names_by_hand(owners) | dict(known)
    taken = set(names.values())
    of_label: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        if owner.label is not None and index not in known:
            of_label.setdefault(owner.label, []).append(index)
    for label, holders in of_label.items():
        several = len({owners[index].optimizer for index in holders}) > 1
        parents = {owners[index][:2] for index in holders}
        for scheme in _SCHEMES_OF_SEVERAL if several else _SCHEMES:
            proposed = [name for index in holders if (name := scheme(owners[index], label))]
            if len(proposed) == len(holders) and len(set(proposed)) == len(parents) and not taken & set(proposed):
                break
        proposed = _numbered(proposed)
        names.update(zip(holders, proposed, strict=True))
        taken.update(proposed)
    # a key that ends with this is the one of all groups
    return [f"{names[index]}_" if names[index] == "total" else names[index] for index in range(len(owners))]


def _names_by_hand(owners: Sequence[Owner]) -> dict[int, str]:
    several = len({owner.optimizer for owner in owners}) > 1
    by_hand = {index: owner for index, owner in enumerate(owners) if owner.label is None}
    plain = {
        index: owner.own or f"optimizer{owner.optimizer}/" * several + f"group{owner.parent}"
        for index, owner in by_hand.items()
    }
    prefixed = {
        index: f"optimizer{by_hand[index].optimizer}/{name}" if _is_double(name, plain) else name
        for index, name in plain.items()
    }
    return {
        index: f"{name}/group{by_hand[index].parent}" if _is_double(name, prefixed) else name
        for index, name in prefixed.items()
    }


def _is_double(name: str, names: dict[int, str]) -> bool:
    return list(names.values()).count(name) > 1


def _numbered(names: Sequence[str]) -> list[str]:
    """Tell apart what one rule made of one parent: a checkpoint's lambda may differ where the rule's doesn't."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"part{count}/{name}" for name, count in zip(names, counts, strict=True)]


_Scheme: TypeAlias = Callable[[Owner, str], str | None]
_SCHEMES: tuple[_Scheme, ...] = (
    lambda owner, label: label,
    lambda owner, label: owner.own and f"{owner.own}/{label}",
    lambda owner, label: f"{owner.own or f'group{owner.parent}'}/{label}",
    lambda owner, label: f"optimizer{owner.optimizer}/{owner.own or f'group{owner.parent}'}/{label}",
)
_SCHEMES_OF_SEVERAL: tuple[_Scheme, ...] = (
    *_SCHEMES[:2],
    lambda owner, label: f"optimizer{owner.optimizer}/{label}",
    *_SCHEMES[2:],
)
