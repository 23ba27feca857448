"""Which optimizer really updates a parameter, where one is wrapped into another."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch import Tensor

# A wrapper holds a few optimizers; a long list of its is something else, such as a history of losses.
_LONGEST = 1000


def updating_optimizers(optimizers: Any | Iterable[Any]) -> list[Any]:
    """Return the optimizers that update parameters: the innermost ones, each once.

    A wrapper holds others in its attributes, or in lists, tuples or dicts there (SAM, Lookahead, several optimizers in
    one, `ZeroRedundancyOptimizer`, Lightning's own). It updates nothing itself if one of them has a parameter of its
    own groups, or if it has none.

    Args:
        optimizers: One optimizer or several, wrapped or bare.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1)])
    >>> wrapper = type("Wrapper", (), {"param_groups": sgd.param_groups})()
    >>> wrapper.inner = [sgd]
    >>> updating_optimizers(wrapper) == updating_optimizers([sgd, wrapper]) == [sgd]
    True
    """
    several = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    found = {id(inner): inner for optimizer in several for inner in _innermost(optimizer, set())}
    return list(found.values())


def updating_optimizers_as_before(optimizers: Iterable[Any]) -> list[Any]:
    """Return the same as they were found when each optimizer was first looked through, which takes a while.

    What a wrapper came to hold since is missing.
    """
    found: dict[int, Any] = {}
    for optimizer in optimizers:
        known = [inner() for inner in _KNOWN.get(optimizer, ())]
        if not known or None in known:
            known = updating_optimizers(optimizer)
            _KNOWN[optimizer] = [weakref.ref(inner) for inner in known]
        found.update((id(inner), inner) for inner in known)
    return list(found.values())


_KNOWN: weakref.WeakKeyDictionary[Any, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def _innermost(optimizer: Any, seen: set[int]) -> list[Any]:
    seen.add(id(optimizer))
    if type(optimizer).__module__.startswith("torch.optim."):
        return [optimizer]
    inner = [innermost for one in _held(optimizer, seen) for innermost in _innermost(one, seen)]
    mine = _parameters(optimizer)
    updates_itself = not inner or (bool(mine) and all(mine.isdisjoint(_parameters(one)) for one in inner))
    return [optimizer, *inner] if updates_itself else inner


def _held(optimizer: Any, seen: set[int]) -> list[Any]:
    """Return the optimizers that an optimizer holds directly or in containers."""
    found: list[Any] = []
    queue: deque[Any] = deque(value for key, value in vars(optimizer).items() if key != "param_groups")
    while queue:
        value = queue.popleft()
        if id(value) in seen:
            continue
        if isinstance(value, Optimizer):
            seen.add(id(value))
            found.append(value)
        elif isinstance(value, list | tuple) and len(value) < _LONGEST:
            seen.add(id(value))
            queue.extend(value)
        elif isinstance(value, Mapping) and not isinstance(value, defaultdict) and len(value) < _LONGEST:
            seen.add(id(value))  # an optimizer's state is a defaultdict
            queue.extend(value.values())
    return found


def _parameters(optimizer: Any) -> set[Tensor]:
    return {parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}


def is_hookable(optimizer: Any) -> bool:
    """Return whether an optimizer's steps call hooks.

    >>> import torch
    >>> is_hookable(torch.optim.SGD([torch.zeros(1)]))
    True
    """
    # torch marks a class whose `step` calls hooks, when the first object of it is made
    step = getattr(type(optimizer), "step", None)
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and getattr(step, "hooked", False)


def check_hookable(optimizer: Any, asks: str) -> None:
    """Refuse an optimizer whose steps call no hooks.

    Args:
        optimizer: One of `updating_optimizers`.
        asks: Who needs the hooks, to begin the message with.

    Raises:
        TypeError: If it is not derived from `torch.optim.Optimizer`, or never called its constructor.
    """
    if not is_hookable(optimizer):
        raise TypeError(
            f"{asks} needs step hooks (`register_step_pre_hook`), which {type(optimizer).__name__} does not call. "
            "Derive it from torch.optim.Optimizer and call `super().__init__`, or keep the optimizer that it wraps in "
            "one of its attributes."
        )


def has_groups_of_its_own(optimizer: Any) -> bool:
    """Return whether an optimizer's `param_groups` is one list, the same each time, and no property that makes it.

    >>> import torch
    >>> has_groups_of_its_own(torch.optim.SGD([torch.zeros(1)]))
    True
    """
    return isinstance(optimizer.param_groups, list) and optimizer.param_groups is optimizer.param_groups
