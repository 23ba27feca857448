"""Names of parameter groups: short, and unique over all optimizers of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_l2.param_groups import GroupSplit


def name_groups(splits: Sequence[GroupSplit]) -> None:
    """Name every group that has no name yet by its key, prefixed where that is not unique among all optimizers.

    Args:
        splits: The splits of all optimizers of a module, in order.
    """
    owners, groups, taken = [], [], set()
    for number, split in enumerate(splits):
        for index, group in enumerate(split.groups):
            if "name" in group:
                taken.add(group["name"])
            else:
                owners.append((number, *split.origin(index)))
                groups.append(group)
    for group, name in zip(groups, unique_names(owners, taken), strict=True):
        group["name"] = name


def unique_names(owners: Sequence[tuple[int, int, str | None, str]], taken: Iterable[str] = ()) -> list[str]:
    """Return a name for each new group: what it is called, prefixed only where that is not unique.

    Args:
        owners: For each group the index of its optimizer, the index of its parent group, the parent's own name if it
            has one, and what it is called.
        taken: Names that are in use already.

    >>> unique_names([(0, 0, None, "decay"), (0, 0, None, "no_decay")])
    ['decay', 'no_decay']
    >>> unique_names([(0, 0, "backbone", "decay"), (0, 1, "head", "decay"), (0, 1, "head", "no_decay")])
    ['backbone/decay', 'head/decay', 'no_decay']
    >>> unique_names([(0, 0, None, "decay"), (1, 0, None, "decay")])
    ['optimizer0/decay', 'optimizer1/decay']
    """
    taken = set(taken)
    names: dict[int, str] = {}
    of_name: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        of_name.setdefault(owner[3], []).append(index)
    for holders in of_name.values():
        several = len({owners[index][0] for index in holders}) > 1
        parents = {owners[index][:2] for index in holders}
        for scheme in _NAME_SCHEMES if several else _NAME_SCHEMES_OF_ONE:
            proposed = [name for index in holders if (name := scheme(*owners[index]))]
            if len(proposed) == len(holders) and len(set(proposed)) == len(parents) and not taken & set(proposed):
                break
        proposed = _numbered(proposed)
        names.update(zip(holders, proposed, strict=True))
        taken.update(proposed)
    return [names[index] for index in range(len(owners))]


def _numbered(names: Sequence[str]) -> list[str]:
    """Tell apart what one rule made of one parent: a checkpoint's lambda may differ where the rule's doesn't."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"part{count}/{name}" for name, count in zip(names, counts, strict=True)]


_NameScheme = Callable[[int, int, str | None, str], str | None]
_NAME_SCHEMES_OF_ONE: tuple[_NameScheme, ...] = (
    lambda optimizer, parent, own, name: name,
    lambda optimizer, parent, own, name: own and f"{own}/{name}",
    lambda optimizer, parent, own, name: f"{own or f'group{parent}'}/{name}",
    lambda optimizer, parent, own, name: f"optimizer{optimizer}/{own or f'group{parent}'}/{name}",
)
_NAME_SCHEMES: tuple[_NameScheme, ...] = (
    *_NAME_SCHEMES_OF_ONE[:2],
    lambda optimizer, parent, own, name: f"optimizer{optimizer}/{name}",
    *_NAME_SCHEMES_OF_ONE[2:],
)
