"""The options of `L2NormMonitor`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_l2.arguments import check_pattern, check_types
from lightning_l2.monitor.alarms import NormAlarms
from lightning_l2.monitor.layers import Per


@dataclass(frozen=True)
class NormOptions:
    """The options of `L2NormMonitor`, which explains them, checked.

    Raises:
        ValueError: If an option is out of its range.

    >>> NormOptions(gradients=True).gradients
    'before_clipping'
    """

    every_n_steps: int | None = None
    per: Per = "module"
    depth: int | None = None
    include: str | None = None
    rms: bool = False
    distance: bool = False
    prog_bar: bool = False
    gradients: bool | Literal["before_clipping", "after_clipping"] = False
    updates: bool = False
    rotation: bool = False
    initial_ratio: bool = False
    spectra: int | None = None
    histograms: int | None = None
    alarms: NormAlarms | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for name in ("every_n_steps", "depth", "spectra", "histograms"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"Expected `{name}` to be an integer of at least 1 or None, got {count!r}.")
        self._check_choice("per", get_args(Per))
        self._check_choice("gradients", (True, False, "before_clipping", "after_clipping"))
        if self.depth is not None and self.per != "module":
            raise ValueError(
                f"`depth` rolls modules up and goes with per='module', got per={self.per!r}. Leave it out."
            )
        check_pattern(include=self.include)
        if self.include is not None and self.per == "total":
            raise ValueError(
                f"`include` chooses layers, got {self.include!r}, and per='total' logs none. Leave one of them out."
            )
        if self.gradients is True:
            object.__setattr__(self, "gradients", "before_clipping")

    @property
    def keeps_initial(self) -> bool:
        """Whether norms at the start of training are needed later."""
        return self.initial_ratio or (self.alarms is not None and self.alarms.vanishing is not None)

    def _check_choice(self, name: str, choices: tuple[object, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, got {value!r}.")
