"""When the Trainer has a new value of a metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from torch import Tensor


class MetricWatch:
    """Tells of each value that a metric is given, once, as soon as hooks of callbacks can know it.

    A value is new if it is another object than before: the Trainer keeps one as long as nobody logs the metric again.
    Each method is called in the hook of its name, and returns whether there is a new value.

    Args:
        name: The metric, or None for none, of which there is never a value.
        asks: Who wants it, to begin a warning with.
    """

    def __init__(self, name: str | None, asks: str) -> None:
        self._name, self._asks = name, asks
        self._observed: Tensor | None = None
        self._before_validation: Tensor | None = None
        self._has_read, self._is_stale = True, False

    def epoch_starts(self, trainer: Any) -> bool:
        """Look for what the module logged when the epoch before ended, after the callbacks' own hooks."""
        self._keep_identity(trainer)
        is_new = not self._has_read and self._is_new(trainer, warns=True)
        self._has_read = False
        return is_new

    def validation_starts(self, trainer: Any) -> None:
        """Take note of the metric before a validation."""
        self._keep_identity(trainer)
        self._before_validation = self._value(trainer)

    def validation_ends(self, trainer: Any) -> bool:
        """Look for what a validation brought, also within an epoch."""
        if self._value(trainer) is self._before_validation:
            return False
        is_new = self._is_new(trainer)
        self._is_stale = True
        return is_new

    def epoch_ends(self, trainer: Any) -> bool:
        """Look for what the epoch brought."""
        self._keep_identity(trainer)
        return self._is_new(trainer)

    def training_ends(self, trainer: Any) -> bool:
        """Complain of a metric that never came."""
        return not self._has_read and self._is_new(trainer, warns=True)

    def _value(self, trainer: Any) -> Tensor | None:
        return None if self._name is None else trainer.callback_metrics.get(self._name)

    def _keep_identity(self, trainer: Any) -> None:
        """Know a value again that was read at the end of a validation, when the Trainer had not put it away yet."""
        if self._is_stale:
            self._observed, self._is_stale = self._value(trainer), False

    def _is_new(self, trainer: Any, *, warns: bool = False) -> bool:
        value = self._value(trainer)
        if value is None and warns and self._name is not None:
            rank_zero_warn(
                f"{self._asks} monitors {self._name!r}, which is not among the metrics "
                f"{sorted(trainer.callback_metrics)}. Weight decay stays as it is."
            )
        if value is None or value is self._observed:
            return False
        self._observed, self._has_read = value, True
        return True
