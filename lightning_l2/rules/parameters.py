"""What is known about each parameter of a model: its name, its shape, its owner, and whether it is commonly exempt."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_l2.norms.layout import READABLE, unreadable
from lightning_l2.rules.exemptions import class_names, is_bias, is_gain, is_norm, is_weight_norm_magnitude
from lightning_l2.sharding import is_flat_parameter, is_flat_piece, shapes_before_flattening, show_shards

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_l2.rules.memberships import Membership

# Names under which wrappers keep the wrapped module, and that are no name of a user's.
_PRIVATE_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# `module` may be a user's own name, so it is skipped only below these classes.
_WRAPPED_NAMES = {
    "AveragedModel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
}


def clean_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile`, FSDP and activation checkpointing put into it.

    Args:
        name: Qualified name, as of `named_parameters()`.

    >>> clean_name("model._orig_mod.encoder._fsdp_wrapped_module.weight")
    'model.encoder.weight'
    """
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _PRIVATE_COMPONENTS)


class Place(NamedTuple):
    """One name under which a parameter stands in a model; a tied parameter has several.

    Args:
        name: Clean qualified name.
        owner: The module that the parameter belongs to; of a parametrized tensor the module that has the tensor.
        before_norm: Whether a normalisation layer directly follows the owner, in the order of registration.
        exempt: Whether it is a bias, of a normalisation layer, or otherwise commonly not decayed whatever its shape.
    """

    name: str
    owner: nn.Module
    before_norm: bool
    exempt: bool


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter and what rules ask about it.

    Args:
        name: Clean qualified name, the first that the model has for it.
        parameter: The parameter, or the flat one that holds it.
        ndim: Number of dimensions before any sharding.
        places: All its names and owners.
        exempt: Whether it is commonly not decayed: 0-D or 1-D, also behind dimensions of size 1, exempt at one of its
            places, or declared by the model.
        member: The group that has it, where optimizers were asked for, in a description for each group.
    """

    name: str
    parameter: nn.Parameter
    ndim: int
    places: tuple[Place, ...]
    exempt: bool
    member: Membership | None = None


class _Site(NamedTuple):
    """A module that may hold parameters, and the module that these belong to, another one below a parametrization."""

    path: str
    holder: nn.Module
    owner: nn.Module
    tensor: str | None
    attribute: str
    before_norm: bool


def describe_parameters(model: nn.Module, root: nn.Module | None = None) -> list[ParameterInfo]:
    """Return what is known about every parameter, in the order of `model.named_parameters()`, tied ones once.

    Args:
        model: Any module, wrapped or not.
        root: The module that a strategy wrapped the model in; FSDP1 keeps there what it knows of shapes.

    Raises:
        RuntimeError: If a lazy parameter has no shape yet, or FSDP1 has flattened one and is not in the root.
        TypeError: If the model is no module, a parameter to train is quantized, nested or one of MKL-DNN, or a
            module's `no_weight_decay()` returns anything but names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a module, got {model!r}. Give an instance, not its class.")
    show_shards(model if root is None else root)
    sites = list(_sites(model))
    shapes = shapes_before_flattening(model if root is None else root)
    site_of = {id(site.holder): site for site in sites}
    found: dict[tuple[int, str], tuple[nn.Parameter, torch.Size, list[Place]]] = {}
    for site in sites:
        for leaf, parameter in site.holder.named_parameters(recurse=False):
            if is_flat_parameter(parameter):
                for place, shape in _flattened(parameter, site_of):
                    found.setdefault((id(parameter), place.name), (parameter, shape, []))[2].append(place)
            else:
                place, shape = _place(site, leaf), _shape(parameter, _join(site.path, leaf), shapes)
                found.setdefault((id(parameter), ""), (parameter, shape, []))[2].append(place)
    declared = _declared_names(sites, {place.name for _, _, places in found.values() for place in places})
    infos = []
    for parameter, shape, places in found.values():
        exempt = len(shape) <= 1 or bool(getattr(parameter, "_no_weight_decay", False))
        exempt = exempt or any(place.exempt or place.name in declared for place in places)
        exempt = exempt or is_gain([place.owner for place in places], shape)
        infos.append(ParameterInfo(places[0].name, parameter, len(shape), tuple(places), exempt))
    return infos


def is_undecided(model: nn.Module) -> bool:
    """Return whether a model has lazy parameters, on which no rule can decide before the first forward pass.

    >>> is_undecided(nn.LazyLinear(1)), is_undecided(nn.Linear(1, 1))
    (True, False)
    """
    return any(map(is_lazy, model.parameters()))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sites(module: nn.Module, path: str = "", attribute: str = "", before_norm: bool = False) -> Iterator[_Site]:
    """Walk a module in the order of `named_modules`, shared modules at each of their places."""
    yield _Site(path, module, module, None, attribute, before_norm)
    children = list(module.named_children())
    wrapped = _wrapped_name(module) if children else None
    for (name, child), following in zip_longest(children, children[1:]):
        if name == "parametrizations" and any(isinstance(held, ParametrizationList) for held in child.children()):
            for tensor, holder in child.named_children():
                holder_path = _join(path, f"parametrizations.{tensor}")
                yield _Site(holder_path, holder, module, tensor, attribute, before_norm)
                for step, parametrization in holder.named_children():
                    yield from _sites(parametrization, _join(holder_path, step))
        elif name in _PRIVATE_COMPONENTS or name == wrapped:
            yield from _sites(child, path, attribute, before_norm)
        else:
            followed = following is not None and is_norm(_unwrapped(following[1]), following[0])
            yield from _sites(child, _join(path, name), attribute if name.isdigit() else name, followed)


def _wrapped_name(module: nn.Module) -> str | None:
    """Return the name of the child that a wrapper wraps, None of any other module."""
    return next((_WRAPPED_NAMES[name] for name in class_names(module) if name in _WRAPPED_NAMES), None)


def _unwrapped(module: nn.Module) -> nn.Module:
    while (name := _wrapped_name(module)) is not None and name in dict(module.named_children()):
        module = module.get_submodule(name)
    return module


def _place(site: _Site, leaf: str) -> Place:
    tensor = site.tensor or leaf
    exempt = (
        is_norm(site.owner, site.attribute)
        or is_bias(site.owner, site.attribute, tensor)
        or is_weight_norm_magnitude(site.holder, leaf)
        # The state matrix of state-space models, never decayed by their authors (Gu, Dao: Mamba, arXiv 2312.00752,
        # 2023). The mark they set on it is lost when a layer is deep-copied, and transformers sets none.
        or tensor == "A_log"
    )
    return Place(_join(site.path, leaf), site.owner, site.before_norm, exempt)


def _shape(parameter: nn.Parameter, name: str, shapes: dict[int, torch.Size]) -> torch.Size:
    """Return the shape before FSDP1 or DeepSpeed ZeRO-3 (`ds_shape`) flattened the parameter."""
    if is_lazy(parameter):
        raise RuntimeError(
            f"The lazy parameter {name!r} has no shape yet, so no rule can decide on it. "
            "Run one batch through the model first."
        )
    if is_flat_piece(parameter) and id(parameter) not in shapes:
        raise RuntimeError(
            f"FSDP has flattened the parameter {name!r}, and the FullyShardedDataParallel that knows its shape is "
            "outside of the module. Give the outermost module as `root` (in Lightning `trainer.strategy.model`), or "
            "decide before the module is wrapped."
        )
    if (kind := unreadable(parameter)) and parameter.requires_grad:
        raise TypeError(
            f"Expected every parameter to train to be dense or sparse, got {name!r}, which is {kind}. Freeze it, or "
            f"train what its `{READABLE[kind]}()` returns."
        )
    if kind == "nested":
        return torch.Size([0] * parameter.dim())  # it may have no shape to tell
    return shapes.get(id(parameter), getattr(parameter, "ds_shape", parameter.shape))


def _flattened(flat: Any, site_of: dict[int, _Site]) -> Iterator[tuple[Place, torch.Size]]:
    """Yield the original parameters within a flat parameter of FSDP1 (`use_orig_params=False`)."""
    for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
        yield _place(site_of[id(info.module)], info.param_name), shape


def _declared_names(sites: list[_Site], names: set[str]) -> set[str]:
    """Return the names that modules declare by `no_weight_decay()` and `no_weight_decay_keywords()`."""
    declared: set[str] = set()
    for site in sites:
        prefix = _join(site.path, "")
        for name in _declarations(site.holder, "no_weight_decay"):
            if prefix + name in names:
                declared.add(prefix + name)
            else:
                # timm allows wildcards. A suffix serves a module that passes on what one of its children declares.
                below = (full for full in names if full.startswith(prefix))
                declared.update(
                    full for full in below if full.endswith(f".{name}") or fnmatchcase(full[len(prefix) :], name)
                )
        for keyword in _declarations(site.holder, "no_weight_decay_keywords"):
            declared.update(full for full in names if full.startswith(prefix) and keyword in full[len(prefix) :])
    return declared


def _declarations(module: nn.Module, attribute: str) -> list[str]:
    # Not by getattr on the module: it is slow where nothing is found, and wrappers pass it on to what they wrap.
    if attribute not in vars(module) and not hasattr(type(module), attribute):
        return []
    declaration = getattr(module, attribute)
    names = declaration() if callable(declaration) else declaration
    if isinstance(names, (set, frozenset, list, tuple, dict)) and all(isinstance(name, str) for name in names):
        return [clean_name(name) for name in names]
    if callable(declaration):
        raise TypeError(
            f"{type(module).__name__}.{attribute}() must return a set, list or dict of parameter names, got {names!r}."
        )
    return []
