"""Weight decay in proportion to the gradient's norm over the weights' (AWD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from lightning_l2.adaptive.selection import base_weight_decay, check_unflattened
from lightning_l2.arguments import check_fraction, check_types
from lightning_l2.norms.squared import squared_norms
from lightning_l2.schedules.feedback import FeedbackSchedule, OptimizerLike


@final
@dataclass(frozen=True)
class AdaptiveDecay(FeedbackSchedule):
    r"""Keep the pull of weight decay in proportion to the pull of the loss.

    $multiplier \leftarrow smoothing * multiplier + (1 - smoothing) * \|g\| / \|w\|$, from 0, with `g` the
    gradient of the loss and `w` the weights, each as one vector over the decayed groups (base weight decay above 0) of
    the optimizer; over all, where none decays and an `L2Penalty` follows. The base weight decay then is the wanted
    ratio of the two pulls, $\|weight_decay_t * w\| / \|g\|$: the authors' `lambda_awd`, about 0.02 where 5e-4 is
    usual.

    Reads gradients and weights, of any optimizer. A step whose norms are not finite (fp16 overflow) or whose weights
    are all 0 changes nothing. One transfer from the accelerator a step.

    Args:
        smoothing: Share of the previous multiplier, dimensionless, 0 to below 1.

    Raises:
        ValueError: If `smoothing` is outside [0, 1); if FSDP1 has cut the parameters.

    Source: Ghiasi, Shafahi and Ardekani, "Improving Robustness with Adaptive Weight Decay", arXiv 2210.00094, 2022.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> weight.grad = torch.tensor([0.0, 2.0])
    >>> optimizer = torch.optim.SGD([weight], weight_decay=0.02)
    >>> round(AdaptiveDecay(smoothing=0.0).multipliers(optimizer, {}, {})[0], 6)
    0.4
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "gradients"

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_fraction(smoothing=self.smoothing)

    def check(self, optimizer: OptimizerLike) -> None:
        """Refuse parameters that FSDP1 has cut or DeepSpeed flattened; else only gradients and weights are read."""
        check_unflattened(self, optimizer)

    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        r"""Return one multiplier for all groups, moved towards $\|g\| / \|w\|$ of this step."""
        decayed = [group for group in optimizer.param_groups if base_weight_decay(group) > 0.0]
        groups = decayed or optimizer.param_groups
        weights = [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]
        if weights:
            squares = squared_norms([*(weight.grad for weight in weights), *weights]).tolist()
            gradient, weight = math.fsum(squares[: len(weights)]), math.fsum(squares[len(weights) :])
            ratio = math.sqrt(gradient / weight) if weight > 0.0 else math.nan
            if math.isfinite(ratio):
                previous = state.get("multiplier", 0.0)
                state["multiplier"] = self.smoothing * previous + (1.0 - self.smoothing) * ratio
        return [state.get("multiplier", 0.0)] * len(optimizer.param_groups)
