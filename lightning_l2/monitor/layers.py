"""Which parameters are watched, and the layers and parameter groups that their norms are rolled up to."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_l2.norms.squared import squared_norms
from lightning_l2.param_groups.decay_groups import decay_groups_of
from lightning_l2.rules.closest import meant
from lightning_l2.rules.parameters import clean_name, describe_parameters, is_undecided
from lightning_l2.sharding import flat_shards, group_members, has_flat_pieces, is_sharded, process_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

Per: TypeAlias = Literal["parameter", "module", "group", "total"]
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\..*")


@dataclass(frozen=True)
class Watched:
    """The parameters that training moves, in the model's order, and where their norms are counted.

    Args:
        parameters: Every parameter that requires a gradient, once.
        names: Their clean qualified names.
        layers: The layer that each is logged under, None for those that count in the totals at most.
        group_names: A unique name for each parameter group of all optimizers.
        members: For each group, the indices of its parameters.
        owners: For each parameter, the index of the first group that has it.
        counted: Whether each counts in the totals: those that an optimizer has, all if there is no optimizer.
        normalised: Whether each is a weight that a normalisation layer directly follows.
        shards: For pieces that FSDP1 made, the processes that have the others.
        sharded: Whether any parameter is spread over processes.
    """

    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    layers: tuple[str | None, ...]
    group_names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    owners: tuple[int | None, ...]
    counted: tuple[bool, ...]
    normalised: tuple[bool, ...]
    shards: tuple[ProcessGroup | None, ...]
    sharded: bool

    def by_layer(self, values: Mapping[int, float]) -> dict[str, float]:
        """Add up one value a parameter, by its index, over each layer, and over all that count under `total`.

        >>> from torch import nn
        >>> watch(nn.Linear(2, 2), []).by_layer({0: 9.0, 1: 16.0})
        {'weight': 9.0, 'bias': 16.0, 'total': 25.0}
        """
        sums: dict[str, float] = {}
        total, layers, counted = 0.0, self.layers, self.counted
        for index, value in values.items():
            layer = layers[index]
            if layer is not None:
                sums[layer] = sums.get(layer, 0.0) + value
            if counted[index]:
                total += value
        return {**sums, "total": total}

    def by_group(self, values: Mapping[int, float]) -> list[float]:
        """Add up one value a parameter over each parameter group."""
        return [sum(values[index] for index in indices if index in values) for indices in self.members]


def watch(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    per: Per = "module",
    depth: int | None = None,
    include: str | None = None,
    root: nn.Module | None = None,
    holders: Sequence[Any] = (),
) -> Watched:
    """Find the parameters of a model to watch.

    Frozen parameters are left out: training does not move them and no optimizer decays them. They are watched from
    when they are unfrozen. Parameters that no optimizer has, such as those of a moving average of the model or of a
    layer that was unfrozen and not handed to one yet, are watched and count in no total.

    Args:
        model: The model; parameters of the optimizers that are not the model's are watched under their group's name.
        optimizers: Bare torch optimizers.
        per: What a layer is: each parameter, the module that owns it, or its parameter group; `"total"` for none.
        depth: With `per="module"`: roll modules up to names of at most this many components.
        include: Regular expression; layers in whose name it is not found count in the totals only.
        root: The outermost module, where a strategy wrapped the model.
        holders: Optimizers around the bare ones that may hold more, as one that shares parameters among processes does.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> watch(model, [], per="module").layers
    ('0', '0', '1', '1')
    """
    names = {id(parameter): (clean_name(name), parameter) for name, parameter in model.named_parameters()}
    groups, group_names = _groups(optimizers)
    for parameters, group_name in zip(groups, group_names, strict=True):
        for index, parameter in enumerate(parameters):
            names.setdefault(id(parameter), (f"{group_name}.{index}", parameter))
    watched = [(name, p) for name, p in names.values() if p.requires_grad and not is_lazy(p)]
    normalised = _before_norm(model, root)
    shards = flat_shards(root if root is not None else model)
    return regroup(
        Watched(
            parameters=tuple(parameter for _, parameter in watched),
            names=tuple(name for name, _ in watched),
            layers=(),
            group_names=(),
            members=(),
            owners=(),
            counted=(),
            normalised=tuple(id(parameter) in normalised for _, parameter in watched),
            shards=tuple(shards.get(id(parameter)) for _, parameter in watched),
            sharded=any(id(parameter) in shards or process_groups(parameter) for _, parameter in watched),
        ),
        optimizers,
        per=per,
        depth=depth,
        include=include,
        holders=holders,
    )


def frozen_squares(model: nn.Module, root: nn.Module | None = None) -> dict[str, float]:
    """Return the squared L2 norms of the parameters that are frozen, by clean name, in one transfer.

    Args:
        model: The model.
        root: The outermost module, where a strategy wrapped the model.

    >>> frozen_squares(nn.LayerNorm(4, bias=False).requires_grad_(False))
    {'weight': 4.0}
    """
    frozen = {clean_name(name): p for name, p in model.named_parameters() if not p.requires_grad}
    # frozen weights may be packed, as integers or in a tensor class of their own
    frozen = {name: p for name, p in frozen.items() if p.is_floating_point() or p.is_complex()}
    frozen = {name: p for name, p in frozen.items() if type(p) is nn.Parameter or is_sharded(p)}
    if not frozen:
        return {}
    shards = flat_shards(model if root is None else root)
    squares = squared_norms(list(frozen.values()), [shards.get(id(p)) for p in frozen.values()])
    return dict(zip(frozen, squares.tolist(), strict=True))


def regroup(
    watched: Watched,
    optimizers: Sequence[Optimizer],
    *,
    per: Per = "module",
    depth: int | None = None,
    include: str | None = None,
    holders: Sequence[Any] = (),
) -> Watched:
    """Return the same parameters in the groups that the optimizers have now; the arguments are those of `watch`.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1)
    >>> watched = watch(layer, [])
    >>> regroup(watched, [torch.optim.SGD([{"params": [layer.weight], "name": "decay"}])], per="group").layers
    ('decay', None)
    """
    groups, names = _groups(optimizers)
    places = {id(parameter): index for index, parameter in enumerate(watched.parameters)}
    members = [tuple(places[id(p)] for p in parameters if id(p) in places) for parameters in groups]
    owner_of = {index: number for number in reversed(range(len(groups))) for index in members[number]}
    owners = [owner_of.get(index) for index in range(len(watched.parameters))]
    held = {id(p) for params in [*groups, *(one for h in holders for one in group_members(h))] for p in params}
    layers = [
        _layer(name, None if owner is None else names[owner], per, depth)
        for name, owner in zip(watched.names, owners, strict=True)
    ]
    return replace(
        watched,
        layers=tuple(layer if layer and (include is None or re.search(include, layer)) else None for layer in layers),
        group_names=tuple(names),
        members=tuple(members),
        owners=tuple(owners),
        counted=tuple(not optimizers or id(parameter) in held for parameter in watched.parameters),
    )


def check_include(
    model: nn.Module, watched: Watched, *, per: Per = "module", depth: int | None = None, include: str | None = None
) -> None:
    """Refuse what is found in the name of no layer, of a frozen one neither; the arguments are those of `watch`.

    Raises:
        MisconfigurationException: If there are layers, and none of them has such a name.

    >>> from torch import nn
    >>> check_include(nn.Linear(2, 2), watch(nn.Linear(2, 2), []), per="parameter", include="wei")
    """
    names = [*watched.names, *(clean_name(name) for name, _ in model.named_parameters())]
    layers = list(watched.group_names) if per == "group" else [_layer(name, None, per, depth) for name in names]
    layers = [layer for layer in dict.fromkeys(layers) if layer is not None]
    if include is not None and layers and not any(re.search(include, layer) for layer in layers):
        raise MisconfigurationException(
            f"L2NormMonitor(include={include!r}) finds none of the {len(layers)} layers (per={per!r}). "
            f"{meant(include, layers)}"
        )


def _before_norm(model: nn.Module, root: nn.Module | None) -> set[int]:
    if is_undecided(model):
        return set()
    infos = describe_parameters(model, root)
    return {id(info.parameter) for info in infos if not info.exempt and any(place.before_norm for place in info.places)}


def _layer(name: str, group: str | None, per: Per, depth: int | None) -> str | None:
    if per == "total":
        return None
    if per == "group":
        return group
    layer = name
    if per == "module":
        # A parameter that stands directly on the model is a layer of its own.
        layer = _PARAMETRIZED.sub("", name) if "parametrizations." in name else name.rpartition(".")[0]
        layer = ".".join(layer.split(".")[:depth]) or name
    return f"{layer}_" if layer == "total" else layer


def _groups(optimizers: Sequence[Optimizer]) -> tuple[list[list[Any]], list[str]]:
    """Return the parameters and the unique name of each part of the optimizers' groups that decays alike."""
    parts = [(optimizer, one.groups) for optimizer, one in zip(optimizers, decay_groups_of(optimizers), strict=True)]
    members: list[list[Any]] = []
    for optimizer, groups in parts:
        # DeepSpeed has put flat pieces in the place of parameters
        members += group_members(optimizer) if has_flat_pieces(optimizer) else [group.params for group in groups]
    return members, [group.name for _, groups in parts for group in groups]


def signature(model_parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer]) -> tuple[object, ...]:
    """Return what tells, cheaply, whether the parameters to watch or their groups have changed."""
    parameters = list(model_parameters)
    return (
        # a lazy parameter changes its class
        tuple(map(type, parameters)),
        tuple(map(attrgetter("requires_grad"), parameters)),
        tuple((id(one), one.current_version()) for one in decay_groups_of(optimizers)),
    )
