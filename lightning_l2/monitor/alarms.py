"""Alarms about norms that explode, vanish or are no numbers, and about a penalty that outweighs the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_l2.arguments import check_keys, check_types

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Alarm(NamedTuple):
    """What is wrong with a layer.

    Args:
        kind: `non_finite`, `max_norm`, `growth`, `vanishing` or `penalty`.
        layer: The layer, or `total`.
        message: What was seen, and the limit.
    """

    kind: str
    layer: str
    message: str


@dataclass(frozen=True)
class NormAlarms:
    """When to warn about norms, once for each kind and layer.

    A norm that is infinite or not a number is always reported.

    Args:
        max_norm: Warn if the norm of a layer is above this, or the total where no layers are logged; None for never.
        growth: Warn if the norm of a layer is this many times what it was at the previous logged step.
        vanishing: Warn if the norm of a layer is below this fraction of what it was at the first step.
        penalty: Warn if the penalty of all weights is more than this many times the loss.
        stop: Stop the training in good order at an alarm.

    Raises:
        ValueError: If a limit is out of its range.

    >>> NormAlarms(max_norm=100.0, growth=2.0, stop=True)
    NormAlarms(max_norm=100.0, growth=2.0, vanishing=None, penalty=None, stop=True)
    """

    max_norm: float | None = None
    growth: float | None = None
    vanishing: float | None = None
    penalty: float | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for name, above in (("max_norm", 0), ("growth", 1), ("vanishing", 0), ("penalty", 0)):
            limit = getattr(self, name)
            if limit is not None and not above < limit < math.inf:
                raise ValueError(f"Expected `{name}` to be None or a finite number above {above}, got {limit!r}.")
        if self.vanishing is not None and self.vanishing >= 1:
            raise ValueError(f"Expected `vanishing` to be a fraction between 0 and 1, got {self.vanishing!r}.")

    @classmethod
    def of(cls, limits: Mapping[str, Any]) -> NormAlarms:
        """Return the alarms that have these arguments.

        Raises:
            TypeError: If there is no such argument.

        >>> NormAlarms.of({"growth": 2.0}) == NormAlarms(growth=2.0)
        True
        """
        check_keys("`alarms`", [field.name for field in fields(cls)], limits)
        return cls(**limits)

    def check(
        self,
        norms: Mapping[str, float],
        previous: Mapping[str, float],
        first: Mapping[str, float],
        penalty: float = 0.0,
        loss: float | None = None,
    ) -> Iterator[Alarm]:
        """Yield what is wrong.

        Args:
            norms: The norm of each layer.
            previous: The same at the previous logged step.
            first: The same at the first step.
            penalty: The penalty of all weights.
            loss: The loss, if known.

        >>> [alarm.message for alarm in NormAlarms(max_norm=1.0).check({"head": 2.0}, {}, {})]
        ['the L2 norm of head is 2, above max_norm=1']
        """
        for layer, norm in norms.items():
            before, start = previous.get(layer, 0.0), first.get(layer, 0.0)
            if not math.isfinite(norm):
                yield Alarm("non_finite", layer, _is_now(layer, norm))
                continue
            # the total grows with the number of layers, which have the limit each
            has_limit = layer != "total" or len(norms) == 1
            if self.max_norm is not None and norm > self.max_norm and has_limit:
                yield Alarm("max_norm", layer, f"{_is_now(layer, norm)}, above max_norm={self.max_norm:.4g}")
            if self.growth is not None and 0 < before < math.inf and norm > self.growth * before:
                times = f"{norm / before:.4g} times that of the previous logged step"
                yield Alarm("growth", layer, f"{_is_now(layer, norm)}, {times}")
            if self.vanishing is not None and norm < self.vanishing * start:
                yield Alarm("vanishing", layer, f"{_is_now(layer, norm)}, {norm / start:.2g} of that of the first step")
        if self.penalty is not None and loss is not None and penalty > self.penalty * abs(loss):
            yield Alarm("penalty", "total", f"the L2 penalty is {penalty:.4g} while the loss is {loss:.4g}")


def _is_now(layer: str, norm: float) -> str:
    return f"the L2 norm of {layer} is {norm:.4g}"
