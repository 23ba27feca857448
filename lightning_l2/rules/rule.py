"""One rule: which parameters it means and which weight decay they get."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_l2.arguments import check_choice, check_pattern, check_types
from lightning_l2.rules.memberships import is_called

if TYPE_CHECKING:
    from lightning_l2.rules.parameters import ParameterInfo


@dataclass(frozen=True)
class DecayRule:
    r"""Give the parameters that meet all conditions a weight decay of their own.

    The weight decay is `weight_decay` where given, else `multiplier` times the base weight decay of the optimizer.
    A rule without a condition takes every parameter.

    Args:
        name: Name of the rule and of the parameter group it makes.
        pattern: Regular expression searched for in the qualified name.
        modules: Classes, or names of classes, of the module that owns the parameter, one or several; derived classes
            count.
        max_ndim: Largest number of dimensions.
        group: Name (`group["name"]`) or index of the parameter group that the optimizer has the parameter in.
        optimizer: Name of the class of the optimizer that has the parameter, or of one that wraps it; not of a base
            class, so `Adam` is no `AdamW`.
        weight_decay: Absolute weight decay, as of torch optimizers (gradient of $weight_decay / 2 * \|w\|^2$).
        multiplier: Weight decay relative to the base value, dimensionless.
        default_exemptions: Only parameters that the default rules exempt: 0-D and 1-D ones, also behind dimensions of
            size 1, biases, those of normalisation layers, and those that the model declares (`no_weight_decay()`,
            `_no_weight_decay`).
        before_norm: Only parameters of layers directly followed by a normalisation layer, in the order in which their
            parent registers them.
        optional: Allow the rule to match nothing.
        per_parameter: Make a group of each parameter, called `<name>/<parameter's name>`, as schedules need that give
            each matrix its own weight decay (`AlphaDecay`). A step takes longer with many groups: 3.4 times with 400
            small ones.
        layer_multiplier: Ratio of the weight decays of two successive layers; the first group of `pattern` is the
            layer's number, the last layer has the full weight decay, the one before `layer_multiplier` times that.
        towards: What the weights decay towards: `"zero"`, or the `"start"`, the weights that training began with; None
            for what the callback says.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of range, the pattern is no regular expression, or options exclude each other.

    >>> DecayRule("head", pattern=r"^head\.", multiplier=0.5).resolve(0.1)
    0.05
    """

    name: str
    pattern: str | None = field(default=None, kw_only=True)
    modules: str | tuple[str | type, ...] = field(default=(), kw_only=True)
    max_ndim: int | None = field(default=None, kw_only=True)
    group: int | str | None = field(default=None, kw_only=True)
    optimizer: str | None = field(default=None, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)
    multiplier: float | None = field(default=None, kw_only=True)
    default_exemptions: bool = field(default=False, kw_only=True)
    before_norm: bool = field(default=False, kw_only=True)
    optional: bool = field(default=False, kw_only=True)
    per_parameter: bool = field(default=False, kw_only=True)
    layer_multiplier: float | None = field(default=None, kw_only=True)
    towards: Literal["zero", "start"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the values and make `modules` a tuple, since YAML gives a list or one name."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"A rule needs a name, a non-empty string, but got {self.name!r}.")
        given: Any = self.modules
        several = isinstance(given, Sequence) and not isinstance(given, str)
        modules = tuple(given) if several else (given,)
        object.__setattr__(self, "modules", modules)
        for module in modules:
            if not isinstance(module, (str, type)) or not module:
                raise TypeError(f"Rule {self.name!r}: modules must be classes or names of classes, got {module!r}.")
        if self.max_ndim is not None and (type(self.max_ndim) is not int or self.max_ndim < 0):
            raise ValueError(f"Rule {self.name!r}: max_ndim must be an integer of at least 0, got {self.max_ndim!r}.")
        if isinstance(self.group, int) and not isinstance(self.group, bool) and self.group < 0:
            raise ValueError(
                f"Expected `group` of rule {self.name!r} to be an index of at least 0, or a name, got {self.group}."
            )
        for option in ("weight_decay", "multiplier", "layer_multiplier"):
            if (value := getattr(self, option)) is not None:
                check_weight_decay(value, f"Rule {self.name!r}: {option}")
        if self.weight_decay is not None and self.multiplier is not None:
            raise ValueError(
                f"Rule {self.name!r} has both weight_decay={self.weight_decay} and multiplier={self.multiplier}. "
                "Give the absolute value or the one relative to the base, not both."
            )
        self._check_pattern()
        check_types(type(self), vars(self))
        check_choice((None, "zero", "start"), towards=self.towards)

    def _check_pattern(self) -> None:
        if self.pattern is not None and not isinstance(self.pattern, str):
            raise TypeError(
                f"Rule {self.name!r}: pattern must be a string, got {self.pattern!r}. One that means several names is "
                "'^head|^neck'."
            )
        check_pattern(f"rule {self.name!r}", pattern=self.pattern)
        if self.layer_multiplier is not None and not re.compile(self.pattern or "").groups:
            raise ValueError(
                f"Rule {self.name!r} has layer_multiplier={self.layer_multiplier}, so its pattern must have a group "
                rf"that is the layer's number, such as 'layers\.(\d+)\.', got {self.pattern!r}."
            )

    @property
    def asks_optimizers(self) -> bool:
        """Whether the rule can only be decided where the optimizers are known."""
        return self.group is not None or self.optimizer is not None

    @property
    def follows_base(self) -> bool:
        """Whether the weight decay depends on the optimizer's base value."""
        return self.weight_decay is None and self.multiplier != 0.0

    @property
    def is_catch_all(self) -> bool:
        """Whether the rule has no condition, so takes every parameter."""
        return not self.conditions()

    def conditions(self) -> dict[str, object]:
        """Return the conditions that are given, by the names of their arguments."""
        names = ("pattern", "modules", "max_ndim", "group", "optimizer", "default_exemptions", "before_norm")
        values = {name: getattr(self, name) for name in names}
        return {
            name: value for name, value in values.items() if value is not None and value is not False and value != ()
        }

    def group_of(self, parameter: str) -> str:
        """Return what the group of a parameter is called, from the parameter's qualified name."""
        return f"{self.name}/{parameter}" if self.per_parameter else self.name

    def resolve(self, base: float) -> float:
        """Return the weight decay of the rule's parameters.

        Args:
            base: Weight decay of the optimizer.

        Raises:
            ValueError: If the base is negative or not finite.
        """
        check_weight_decay(base, "weight_decay")
        if self.weight_decay is not None:
            return float(self.weight_decay)
        return float(base * (1.0 if self.multiplier is None else self.multiplier))

    def matches(self, info: ParameterInfo) -> bool:
        """Return whether a parameter meets all conditions, under any one of its names."""
        if self.max_ndim is not None and info.ndim > self.max_ndim:
            return False
        if self.default_exemptions and not info.exempt:
            return False
        if self.asks_optimizers and (info.member is None or not info.member.is_in(self.group, self.optimizer)):
            return False
        return any(
            (self.pattern is None or re.search(self.pattern, place.name) is not None)
            and (not self.modules or any(is_of_class(place.owner, module) for module in self.modules))
            and (not self.before_norm or place.before_norm)
            for place in info.places
        )


def is_of_class(module: nn.Module, wanted: str | type) -> bool:
    """Return whether a module is of a class or derives from it.

    A `SyncBatchNorm` counts as every kind of batch normalisation, since `Trainer(sync_batchnorm=True)` puts it in their
    place.

    Args:
        module: Any module.
        wanted: A class, its name (`Embedding`), or its name after a package it lives in (`torch.nn.Embedding`).
    """
    classes = type(module).__mro__
    if isinstance(module, nn.SyncBatchNorm):
        classes += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if isinstance(wanted, type):
        return isinstance(module, wanted) or wanted in classes
    return any(is_called(cls, wanted) for cls in classes)


def check_weight_decay(value: Any, what: str) -> None:
    """Raise unless a value is a finite number of at least 0.

    Args:
        value: Weight decay or multiplier.
        what: How the message names it.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{what} must be a number, got {value!r} of type {type(value).__name__}.")
    # a whole number may be too large for `float`
    if not 0 <= (value if isinstance(value, int) else float(value)) <= sys.float_info.max:
        raise ValueError(f"{what} must be finite and at least 0, got {value!r}.")
