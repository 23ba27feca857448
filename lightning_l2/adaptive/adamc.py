"""Weight decay in proportion to the learning rate on layers that a normalisation follows (AdamC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from lightning_l2.adaptive.selection import HEAD, matches
from lightning_l2.arguments import check_pattern, check_positive, check_types
from lightning_l2.schedules.feedback import (
    FeedbackSchedule,
    OptimizerLike,
    check_learning_rates,
    relative_learning_rates,
)


@final
@dataclass(frozen=True)
class CorrectedDecay(FeedbackSchedule):
    r"""Correct weight decay for the learning rate's schedule: $multiplier = lr / max_lr$, and 1 for excluded groups.

    A normalised layer settles where $\|gradient\| / \|w\| = \sqrt{2 * weight_decay / lr}$; a falling lr alone lets
    the gradient grow at the end of training. With decoupled decay a corrected step takes $lr^2 / max_lr *
    weight_decay$ of the weights.

    Meant for layers that a normalisation follows, in practice all but the output layer: give that one a rule of its
    own, whose name `exclude` finds. Reads `lr` (and `max_lr`, `initial_lr`) of every parameter group, of any
    optimizer. No transfer, unless `lr` is a tensor on an accelerator.

    Args:
        exclude: Regular expression for names of rules (or groups) that keep their weight decay; None corrects all.
        max_lr: Peak of the learning rate; by default found as by `LRSchedule`.

    Raises:
        ValueError: If `exclude` is no regular expression, `max_lr` is not finite and above 0, or a group has no `lr`.

    Source: Defazio, "Why Gradients Rapidly Increase Near the End of Training", arXiv 2506.02285, 2025.

    >>> body, head = {"rule": "decay", "lr": 0.1, "initial_lr": 0.4}, {"rule": "head", "lr": 0.1, "initial_lr": 0.4}
    >>> optimizer = type("Optimizer", (), {"param_groups": [body, head], "state": {}})()
    >>> CorrectedDecay().multipliers(optimizer, {}, {})
    [0.25, 1.0]
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "lr"

    exclude: str | None = HEAD
    max_lr: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_pattern(exclude=self.exclude)
        check_positive(max_lr=self.max_lr)

    def check(self, optimizer: OptimizerLike) -> None:
        """Refuse groups that have no learning rate."""
        check_learning_rates(self, optimizer)

    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        """Return $lr / max_lr$ for the corrected groups and 1 for the others."""
        ratios = relative_learning_rates(optimizer, self.max_lr, state)
        return [
            1.0 if matches(self.exclude, group) else ratio
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True)
        ]
