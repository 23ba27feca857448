"""Schedules that answer to what the training does instead of how far it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, final

from lightning_l2.arguments import check_at_least, check_choice, check_not_negative, check_positive, check_types


class OptimizerLike(Protocol):
    """The two attributes of a torch optimizer that a feedback schedule reads."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups with their options."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """What the optimizer keeps for each parameter."""


class FeedbackSchedule(ABC):
    """Give each parameter group its multiplier of weight decay from what the training does.

    Derive a frozen dataclass. What a schedule has to remember goes into `state`, never into itself: so one object
    serves several optimizers and trainings, and the memory is saved in checkpoints.

    Attributes:
        reads: What has to be known before a call: the learning rate of the coming step ("lr", asked for any number of
            times a step), its unscaled gradients ("gradients", once a step), or a metric ("metric", once for each
            value; its name is the attribute `monitor`).

    >>> @dataclass(frozen=True)
    ... class WhileLossAbove(FeedbackSchedule):
    ...     limit: float
    ...     monitor: str = "val_loss"
    ...     reads: ClassVar = "metric"
    ...     def check(self, optimizer): ...
    ...     def multipliers(self, optimizer, metrics, state):
    ...         return [float(metrics[self.monitor] > self.limit)] * len(optimizer.param_groups)
    >>> optimizer = type("Optimizer", (), {"param_groups": [{}], "state": {}})()
    >>> WhileLossAbove(0.5).multipliers(optimizer, {"val_loss": 0.7}, {})
    [1.0]
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]]

    @abstractmethod
    def check(self, optimizer: OptimizerLike) -> None:
        """Refuse an optimizer that lacks what this schedule reads.

        Raises:
            ValueError: If it does: what is missing, and which optimizers have it.
        """

    @abstractmethod
    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        """Return the multiplier of each parameter group, dimensionless, at least 0.

        Args:
            optimizer: The optimizer whose groups are asked for.
            metrics: The values logged last, by name.
            state: What earlier calls for this optimizer left here, empty at first; numbers, strings and lists.
        """


@final
@dataclass(frozen=True)
class PlateauSchedule(FeedbackSchedule):
    r"""Change the multiplier when a metric has stopped improving, as torch's `ReduceLROnPlateau` does for lr.

    An observation is a value that an epoch brought; an epoch without validation brings none of a validation metric.
    After more than `patience` observations without improvement, $multiplier \leftarrow multiplier * factor$ (within
    its bounds); the next `cooldown` observations don't count. An improvement by mode and threshold mode:
    $metric < best * (1 - threshold)$ (min, rel), $metric < best - threshold$ (min, abs),
    $metric > best * (1 + threshold)$ (max, rel), $metric > best + threshold$ (max, abs). A NaN is no improvement.

    A factor below 1 weakens weight decay, one above 1 strengthens it (a validation loss that stalls while the training
    loss falls).

    Args:
        monitor: Name of a logged metric.
        mode: Whether the metric should fall ("min") or grow ("max").
        factor: What the multiplier is multiplied with, dimensionless, above 0 and not 1.
        patience: Observations without improvement that are put up with, at least 0.
        threshold: Smallest change that is an improvement, at least 0; relative or in the metric's unit.
        threshold_mode: Whether `threshold` is a share of the best value ("rel") or a difference ("abs").
        cooldown: Observations after a change that don't count, at least 0.
        min_multiplier: Smallest multiplier, dimensionless, at least 0.
        max_multiplier: Largest multiplier, dimensionless, none by default.

    Raises:
        ValueError: If an argument is out of its range; if the metric was not logged.

    >>> schedule, state = PlateauSchedule("val_loss", factor=0.5, patience=1), {}
    >>> optimizer = type("Optimizer", (), {"param_groups": [{}], "state": {}})()
    >>> [schedule.multipliers(optimizer, {"val_loss": loss}, state)[0] for loss in (1.0, 0.8, 0.8, 0.8, 0.7)]
    [1.0, 1.0, 1.0, 0.5, 0.5]
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "metric"

    monitor: str
    mode: Literal["min", "max"] = field(default="min", kw_only=True)
    factor: float = field(default=0.1, kw_only=True)
    patience: int = field(default=10, kw_only=True)
    threshold: float = field(default=1e-4, kw_only=True)
    threshold_mode: Literal["rel", "abs"] = field(default="rel", kw_only=True)
    cooldown: int = field(default=0, kw_only=True)
    min_multiplier: float = field(default=0.0, kw_only=True)
    max_multiplier: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_choice(("min", "max"), mode=self.mode)
        check_choice(("rel", "abs"), threshold_mode=self.threshold_mode)
        check_positive(factor=self.factor)
        if self.factor == 1.0:
            raise ValueError("PlateauSchedule needs a `factor` other than 1, but got 1.0, which changes nothing.")
        check_not_negative(min_multiplier=self.min_multiplier)
        upper = math.inf if self.max_multiplier is None else self.max_multiplier
        if not self.min_multiplier <= 1.0 <= upper:
            raise ValueError(
                f"PlateauSchedule starts at a multiplier of 1, which is not within `min_multiplier` "
                f"{self.min_multiplier} and `max_multiplier` {self.max_multiplier}."
            )
        check_at_least(0, patience=self.patience, threshold=self.threshold, cooldown=self.cooldown)

    def check(self, optimizer: OptimizerLike) -> None:
        """Accept every optimizer: only the metric is read."""

    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        """Count the metric's observation and return one multiplier for all groups."""
        metric = read_metric(self, self.monitor, metrics)
        if self._improves(metric, state.get("best", math.inf if self.mode == "min" else -math.inf)):
            state.update(best=metric, bad=0)
        else:
            state["bad"] = state.get("bad", 0) + 1
        if state.get("cooldown", 0) > 0:
            state.update(cooldown=state["cooldown"] - 1, bad=0)
        if state["bad"] > self.patience:
            upper = math.inf if self.max_multiplier is None else self.max_multiplier
            multiplier = min(max(state.get("multiplier", 1.0) * self.factor, self.min_multiplier), upper)
            state.update(multiplier=multiplier, cooldown=self.cooldown, bad=0)
        return [state.get("multiplier", 1.0)] * len(optimizer.param_groups)

    def _improves(self, metric: float, best: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        if self.threshold_mode == "rel":
            return sign * metric > sign * best * (1.0 + sign * self.threshold)
        return sign * metric > sign * best + self.threshold


@final
@dataclass(frozen=True)
class LRSchedule(FeedbackSchedule):
    """Tie weight decay to the learning rate: $multiplier = lr / max_lr$, for each group by itself.

    With decoupled decay a step then shrinks weights by $lr^2 / max_lr * weight_decay$.

    Args:
        max_lr: Peak of the learning rate; by default the largest that is known of the group: its `max_lr`
            (OneCycleLR), its `initial_lr` (any scheduler), or what it has had so far. Give it for schedules that say
            nowhere how high they will rise (CyclicLR).

    Raises:
        ValueError: If `max_lr` is not finite and above 0, or a group has no `lr`.

    >>> group = {"lr": 0.25, "initial_lr": 1.0}
    >>> optimizer = type("Optimizer", (), {"param_groups": [group], "state": {}})()
    >>> LRSchedule().multipliers(optimizer, {}, {})
    [0.25]
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "lr"

    max_lr: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(max_lr=self.max_lr)

    def check(self, optimizer: OptimizerLike) -> None:
        """Refuse groups that have no learning rate."""
        check_learning_rates(self, optimizer)

    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        """Return $lr / max_lr$ of each group; an `lr` that is a tensor on an accelerator costs a transfer."""
        return relative_learning_rates(optimizer, self.max_lr, state)


def relative_learning_rates(optimizer: OptimizerLike, max_lr: float | None, state: dict[str, Any]) -> list[float]:
    """Return $lr / max_lr$ of each group; without a `max_lr` its peak is what is known of the group, see `LRSchedule`.

    Args:
        optimizer: The optimizer whose groups are asked for.
        max_lr: Peak of the learning rate, or None.
        state: Keeps the largest learning rate that each group has had.
    """
    ratios = []
    for index, group in enumerate(optimizer.param_groups):
        lr, key = float(group["lr"]), f"max_lr/{group.get('name', index)}"
        known = [float(group[name]) for name in ("max_lr", "initial_lr") if name in group]
        state[key] = max([lr, state.get(key, 0.0), *known])
        peak = state[key] if max_lr is None else max_lr
        ratios.append(lr / peak if peak > 0.0 else 0.0)
    return ratios


def check_learning_rates(schedule: object, optimizer: OptimizerLike) -> None:
    """Raise a `ValueError` for a group that has no learning rate."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"{type(schedule).__name__} reads the learning rate of each parameter group, but group {index} of "
                f"{type(optimizer).__name__} has no `lr`. All torch optimizers have one."
            )


def read_metric(schedule: object, name: str, metrics: Mapping[str, float]) -> float:
    """Return a metric's value, or raise a `ValueError` that names those there are."""
    if name not in metrics:
        raise ValueError(
            f"{type(schedule).__name__} monitors {name!r}, which was not logged. Logged: {sorted(metrics)}."
        )
    return float(metrics[name])
