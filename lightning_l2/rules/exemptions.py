"""Which parameters are commonly not decayed whatever their shape: of normalisation layers, biases, magnitudes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

# Layers that multiply by their weight: a `NormLinear` that derives from Linear is no normalisation layer.
_WEIGHT_LAYERS = frozenset(
    {"Linear", "Bilinear", "_ConvNd", "Embedding", "EmbeddingBag", "RNNBase", "RNNCellBase", "MultiheadAttention"}
)
# The same by the end of a class name, for those that derive from none of them, such as a `QuantLinear`.
_WEIGHT_CLASS = re.compile(r"(?:Linear|Conv(?:Transpose)?(?:[1-3N][dD])?|Dense|Embedding|(?:GRU|LSTM|RNN)(?:Cell)?)$")
# In a class name the last noun tells what it is: `EncoderRMSNorm` is a normalisation, `RMSNormEncoder` is none.
_NORM_CLASS = re.compile(
    r"(?:(?<!Weight)(?<!Spectral)[Nn]orm(?:ali[sz]ation)?(?![a-z])|(?<![A-Z])(?:[FGL]RN|BN|GN|LN)(?![A-Za-z]))(?P<rest>.*)"
)
_OTHER_NOUN = re.compile(
    r"(?<!Per)(?:Attention|Attn|Block|Cell|Conv|Decoder|Dense|Embedding|Encoder|Free|GRU|Head|Linear|LSTM|MLP|Mlp|Net|RNN)"
)
_NORM_ATTRIBUTE = re.compile(r"(?:^|_)(?!denorm)[a-z]*norm(?:ali[sz]ation)?s?_?\d*$")
_TABLES = frozenset({"Embedding", "ParameterList", "ParameterDict"})
# A word of the name, so `debias` is none; with the endings of torch's RNNs, of attention's keys and of tables.
_BIAS = re.compile(r"(?:^|_)bias(?:es)?(?:_table|_[a-z]|_[ih][hr](?:_l\d+(?:_reverse)?)?|_?\d+)?$")


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's class and its bases, the class first."""
    return tuple(cls.__name__ for cls in type(module).__mro__)


def is_norm(module: nn.Module, attribute: str = "") -> bool:
    """Return whether a module is a normalisation layer: by its class, a base class, or its attribute's name.

    A block that holds layers with weights, such as a `ConvNormAct`, is none.

    Args:
        module: Any module.
        attribute: Name that its parent has for it; it counts only where the class says nothing.

    >>> from torch import nn
    >>> is_norm(nn.LayerNorm(3)), is_norm(nn.Linear(3, 3), "norm1")
    (True, False)
    """
    by_class = _names_norm(class_names(module))
    named = by_class if by_class is not None else _NORM_ATTRIBUTE.search(attribute.lower()) is not None
    return named and not any(_multiplies(class_names(part)) for part in module.modules())


@lru_cache(maxsize=1024)
def _multiplies(names: tuple[str, ...]) -> bool:
    """Decide by the names of a class and its bases whether it is a layer that multiplies by its weight."""
    return not _WEIGHT_LAYERS.isdisjoint(names) or any(_WEIGHT_CLASS.search(name) for name in names)


@lru_cache(maxsize=1024)
def _names_norm(names: tuple[str, ...]) -> bool | None:
    """Decide by the names of a class and its bases; None where they say nothing."""
    if not _WEIGHT_LAYERS.isdisjoint(names):
        return False
    found = [match for name in names if (match := _NORM_CLASS.search(name)) is not None]
    if any(_OTHER_NOUN.search(match["rest"]) is None for match in found):
        return True
    return False if found or _OTHER_NOUN.search(names[0]) else None


def is_bias(owner: nn.Module, attribute: str, tensor: str) -> bool:
    """Return whether a tensor of any shape is a bias: by its name, or that of the table or list it stands in.

    Args:
        owner: The module that has the tensor.
        attribute: Name that the parent has for the owner.
        tensor: Name of the tensor on its owner.

    >>> from torch import nn
    >>> is_bias(nn.LSTM(2, 2), "lstm", "bias_ih_l0"), is_bias(nn.Linear(2, 2), "debias", "weight")
    (True, False)
    >>> is_bias(nn.Embedding(32, 2), "relative_attention_bias", "weight")
    True
    """
    if _BIAS.search(tensor) is not None:
        return True
    return _BIAS.search(attribute) is not None and not _TABLES.isdisjoint(class_names(owner))


def is_gain(owners: Iterable[nn.Module], shape: Sequence[int]) -> bool:
    """Return whether a parameter is a vector, or a number, that is stored with further dimensions of size 1.

    A layer scale of shape (C, 1, 1) or a class token of shape (1, 1, C) does what one of shape (C,) does, which is
    exempt. A kernel of such a shape is none: its owner tells, a layer that multiplies by its weight.

    Args:
        owners: The modules that have the parameter, several for a tied one.
        shape: Its shape before any sharding.

    >>> from torch import nn
    >>> is_gain([nn.Module()], (8, 1, 1)), is_gain([nn.Conv2d(8, 8, 1, groups=8)], (8, 1, 1, 1))
    (True, False)
    """
    return sum(size != 1 for size in shape) <= 1 and not any(_multiplies(class_names(owner)) for owner in owners)


def is_weight_norm_magnitude(holder: nn.Module, leaf: str) -> bool:
    """Return whether a parameter is the g of a weight norm, w = g v / ||v||.

    It is one number an output channel, stored with dimensions of size 1, and does what the gain of a normalisation
    layer does after a plain weight: it is exempt as that gain is, and v is decayed as that weight is (Salimans,
    Kingma: Weight Normalization, arXiv 1602.07868, 2016).

    Args:
        holder: The module in which the parameter is registered.
        leaf: The name under which it is registered there.
    """
    if isinstance(holder, parametrize.ParametrizationList):
        # torch has no public name for the parametrization of its own weight norm.
        return leaf == "original0" and any(type(step).__name__ == "_WeightNorm" for step in holder.children())
    return leaf.endswith("_g") and any(name == f"{leaf[:-2]}_v" for name, _ in holder.named_parameters(recurse=False))
