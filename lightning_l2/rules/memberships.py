"""Which parameter groups of which optimizers have a parameter, for rules that ask for the user's group or optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_l2.optimizers.inner import updating_optimizers

if TYPE_CHECKING:
    from torch import Tensor


class Membership(NamedTuple):
    """A parameter group that has a parameter.

    Args:
        group: The user's group.
        place: Its index in its optimizer.
        optimizers: The class of that optimizer, and of the one that wraps it.
    """

    group: Mapping[str, Any]
    place: int
    optimizers: tuple[type, ...]

    def is_in(self, group: str | int | None, optimizer: str | None) -> bool:
        """Return whether the group is of that name or index, in an optimizer of that class; None stands for any."""
        wanted = group is None or group == (self.place if isinstance(group, int) else self.group.get("name"))
        return wanted and (optimizer is None or any(is_called(kind, optimizer) for kind in self.optimizers))


def memberships(optimizers: Any | Sequence[Any]) -> dict[Tensor, list[Membership]]:
    """Return the groups of each parameter, in the optimizers that update it.

    What a wrapper's own groups have and none of those in it, as where each process updates a share, is in its own.

    Args:
        optimizers: One optimizer or several, wrapped or bare.

    >>> import torch
    >>> weight = torch.zeros(1)
    >>> sgd = torch.optim.SGD([{"params": [weight], "name": "head"}])
    >>> [found] = memberships(sgd)[weight]
    >>> found.place, found.is_in("head", None), found.is_in(0, "SGD"), found.is_in(1, "SGD"), found.is_in(None, "Adam")
    (0, True, True, False, False)
    """
    found: dict[Tensor, list[Membership]] = {}
    for user in optimizers if isinstance(optimizers, Sequence) else [optimizers]:
        inner = updating_optimizers(user)
        for one in inner:
            _add(found, one, dict.fromkeys([type(one), type(user)]))
        if all(one is not user for one in inner):
            _add(found, user, dict.fromkeys([type(user), *map(type, inner)]), known=set(found))
    return found


def is_called(kind: type, name: str) -> bool:
    """Return whether a class has a name, which may stand after a package that the class lives in.

    >>> is_called(Membership, "Membership"), is_called(Membership, "lightning_l2.Membership"), is_called(int, "float")
    (True, True, False)
    """
    package, dot, own = name.rpartition(".")
    return kind.__name__ == own and f"{kind.__module__}.".startswith(package + dot)


def _add(
    found: dict[Tensor, list[Membership]], optimizer: Any, kinds: Mapping[type, None], known: set[Tensor] | None = None
) -> None:
    for place, group in enumerate(getattr(optimizer, "param_groups", ())):
        for parameter in group["params"]:
            if known is None or parameter not in known:
                found.setdefault(parameter, []).append(Membership(group, place, tuple(kinds)))
