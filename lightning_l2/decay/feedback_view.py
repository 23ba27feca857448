"""An optimizer as schedules see it that read the training: with a group for each part that decays alike."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lightning_l2.param_groups.decay_groups import decay_groups

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed import ProcessGroup


class _View:
    # Values of the class, so that these are found before properties of the optimizer's, such as DeepSpeed's have.
    param_groups: Sequence[dict[str, Any]] = ()
    state: Mapping[Any, Any] = MappingProxyType({})
    defaults: Mapping[str, Any] = MappingProxyType({})


_VIEWS: dict[type, Any] = {}


def as_seen(
    optimizer: Any,
    among: re.Pattern[str] | None = None,
    shards: Callable[[], Mapping[int, ProcessGroup]] | None = None,
) -> Any:
    """Return what stands for an optimizer, of its class.

    Args:
        optimizer: One that updates by itself.
        among: Only parts with such a name; None for all.
        shards: Finds the parameters that FSDP1 has cut, see `flat_shards`; None where nobody knows the module.

    >>> import torch
    >>> groups = [{"params": [torch.zeros(1)], "name": "head"}, {"params": [torch.zeros(1)], "weight_decay": 0.2}]
    >>> view = as_seen(torch.optim.AdamW(groups, weight_decay=0.1))
    >>> [(group["name"], group["weight_decay"]) for group in view.param_groups], isinstance(view, torch.optim.AdamW)
    ([('head', 0.1), ('group1', 0.2)], True)
    """
    kind: Any = type(optimizer)
    if kind not in _VIEWS:
        _VIEWS[kind] = type(kind.__name__, (_View, kind), {})  # schedules ask of what class it is
    view = object.__new__(_VIEWS[kind])
    vars(view).update(
        state=optimizer.state,
        flat_shards=shards,
        defaults=getattr(optimizer, "defaults", {}),
        param_groups=[
            {
                **group.parent,
                "params": group.params,
                "name": group.name,
                **({"rule": group.rule} if group.decisions else {}),
                "weight_decay": group.weight_decay,
                "initial_weight_decay": group.base,
            }
            for group in decay_groups(optimizer).groups
            if among is None or among.search(group.name)
        ],
    )
    vars(view).update(vars(optimizer) | vars(view))  # DeepSpeed's have more that tells what they are
    return view
