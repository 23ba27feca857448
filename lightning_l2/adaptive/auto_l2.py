"""Weight decay that starts strong and is reduced whenever it holds the training back (AutoL2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from lightning_l2.arguments import check_at_least, check_fraction, check_not_negative, check_positive, check_types
from lightning_l2.schedules.feedback import FeedbackSchedule, OptimizerLike, read_metric


@final
@dataclass(frozen=True)
class AutoL2Decay(FeedbackSchedule):
    r"""Start with strong weight decay and reduce it each time the training loss or error goes up.

    A metric goes up when it is above its smallest value so far, in `patience` observations in a row. Then $multiplier
    \leftarrow multiplier * factor$, and the next $refractory / multiplier$ observations change nothing: the weaker
    the decay, the longer it takes to show. Strong decay reaches its best performance fast, weak decay reaches a better
    one later; this goes from the one to the other. The authors start at 0.1.

    Both metrics have to fall as the training gets better, and the loss has to be without the penalty. Reads metrics
    only, so it works with every optimizer, without a transfer.

    Args:
        monitor: Name of the logged training loss.
        error: Name of the logged training error (share of wrong answers), or None.
        factor: What the multiplier is multiplied with, dimensionless, above 0 and below 1.
        patience: Observations in a row that have to be above the smallest value, at least 1.
        refractory: Observations without another change after a change, at a multiplier of 1; at least 0.
        min_multiplier: Smallest multiplier, dimensionless, at least 0.

    Raises:
        ValueError: If an argument is out of its range; if a metric was not logged.

    Source: Lewkowycz and Gur-Ari, "On the training dynamics of deep networks with L2 regularization",
    arXiv 2006.08643, 2020.

    >>> schedule, state = AutoL2Decay("train_loss", refractory=0), {}
    >>> optimizer = type("Optimizer", (), {"param_groups": [{}], "state": {}})()
    >>> [schedule.multipliers(optimizer, {"train_loss": loss}, state)[0] for loss in (2.0, 1.0, 1.5, 1.4, 0.9)]
    [1.0, 1.0, 1.0, 0.1, 0.1]
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "metric"

    monitor: str
    error: str | None = field(default=None, kw_only=True)
    factor: float = field(default=0.1, kw_only=True)
    patience: int = field(default=2, kw_only=True)
    refractory: float = field(default=1.0, kw_only=True)
    min_multiplier: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(factor=self.factor)
        check_fraction(factor=self.factor)  # it only ever reduces weight decay; PlateauSchedule can raise it
        check_at_least(1, patience=self.patience)
        check_not_negative(refractory=self.refractory, min_multiplier=self.min_multiplier)

    def check(self, optimizer: OptimizerLike) -> None:
        """Accept every optimizer: only metrics are read."""

    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        """Count the observation and return one multiplier for all groups."""
        names = [self.monitor] if self.error is None else [self.monitor, self.error]
        rises = max(self._count_rise(name, read_metric(self, name, metrics), state) for name in names)
        state["observations"] = state.get("observations", 0) + 1
        if rises >= self.patience and state["observations"] > state.get("refractory_until", 0):
            state["multiplier"] = max(state.get("multiplier", 1.0) * self.factor, self.min_multiplier)
            if state["multiplier"] > 0.0:
                state["refractory_until"] = state["observations"] + self.refractory / state["multiplier"]
            state.update({f"rises/{name}": 0 for name in names})
        return [state.get("multiplier", 1.0)] * len(optimizer.param_groups)

    @staticmethod
    def _count_rise(name: str, value: float, state: dict[str, Any]) -> int:
        rises = f"rises/{name}"
        if value <= state.get(f"best/{name}", math.inf):
            state.update({f"best/{name}": value, rises: 0})
        else:
            state[rises] = state.get(rises, 0) + 1
        return int(state[rises])
