"""Weight decay over the root of Adam's mean second moment (SWD, AdamS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_l2.adaptive.selection import check_unflattened
from lightning_l2.norms.layout import plain_part
from lightning_l2.norms.squared import local_squared_norms
from lightning_l2.schedules.feedback import FeedbackSchedule, OptimizerLike
from lightning_l2.sharding import gradient_of, sum_over_shards

ADAM_FAMILY = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


@final
@dataclass(frozen=True)
class StableDecay(FeedbackSchedule):
    r"""Scale weight decay as Adam scales its steps: $multiplier = 1 / \sqrt{mean(v_hat)}$, one for all groups.

    $v_hat = (beta2 * v + (1 - beta2) * g^2) / (1 - beta2^{step})$ is the second moment that this step will use,
    and the mean is over all elements of all parameters of the optimizer that have a gradient. Decoupled decay then is
    $w \leftarrow w - lr / \sqrt{mean(v_hat)} * weight_decay * w$. The multiplier is large where gradients are
    small (1000 at 1e-3), so the base weight decay has to be that much smaller than AdamW's: the authors use 5e-4.

    Reads `betas` and the states `exp_avg_sq`, `max_exp_avg_sq` and `step` of Adam, AdamW, NAdam and RAdam of torch, of
    their subclasses, and of any optimizer that keeps these states for its parameters once it has stepped. Meant for
    decoupled decay (coupled decay is part of Adam's own gradient, which this doesn't see). The gradients are those
    before clipping. A step whose mean is 0 or not finite (fp16 overflow) changes nothing. One transfer from the
    accelerator a step.

    Raises:
        ValueError: If the optimizer keeps no second moments, or FSDP1 has cut the parameters.

    Source: Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them: A Gradient-Norm
    Perspective" (first "Stable Weight Decay Regularization"), arXiv 2011.11152, 2020.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.tensor([0.5, 0.5])
    >>> optimizer = torch.optim.AdamW([weight])
    >>> round(StableDecay().multipliers(optimizer, {}, {})[0], 6)
    2.0
    """

    reads: ClassVar[Literal["lr", "gradients", "metric"]] = "gradients"

    def check(self, optimizer: OptimizerLike) -> None:
        """Refuse optimizers without Adam's second moments, and parameters that FSDP1 has cut or DeepSpeed flattened."""
        check_unflattened(self, optimizer)
        states = [state for state in optimizer.state.values() if state]
        keeps = bool(states) and all("exp_avg_sq" in state and "step" in state for state in states)
        has_betas = all("betas" in group for group in optimizer.param_groups)
        if not (has_betas and (keeps or isinstance(optimizer, ADAM_FAMILY))):
            raise ValueError(
                f"StableDecay reads the second moments (`betas`, `exp_avg_sq`, `step`) of Adam, AdamW, NAdam or RAdam, "
                f"but {type(optimizer).__name__} doesn't keep them. Use one of these, or another schedule."
            )

    @torch.no_grad()
    def multipliers(self, optimizer: OptimizerLike, metrics: Mapping[str, float], state: dict[str, Any]) -> list[float]:
        r"""Return $1 / \sqrt{mean(v_hat)}$ of the coming step for all groups."""
        mean = coming_mean(optimizer)
        if mean > 0.0 and math.isfinite(mean):
            state["multiplier"] = 1.0 / math.sqrt(mean)
        return [state.get("multiplier", 0.0)] * len(optimizer.param_groups)


def coming_mean(optimizer: OptimizerLike) -> float:
    """Return the mean of the coming step's `v_hat` over all elements with a gradient, by one transfer."""
    groups = {
        weight: group for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
    }
    if not groups:
        return 0.0
    weights: list[Tensor] = list(groups)
    states = [optimizer.state.get(weight, {}) for weight in weights]
    gradients = [gradient for weight in weights if (gradient := gradient_of(weight)) is not None]
    squares = local_squared_norms(gradients)
    sums = [
        coming_sum(*of_weight) for of_weight in zip(gradients, squares.unbind(), states, groups.values(), strict=True)
    ]
    moments, steps = to_host(sum_over_shards(torch.stack(sums), weights), [state.get("step", 0.0) for state in states])
    betas = [float(group["betas"][1]) for group in groups.values()]
    corrected = [
        moment / (1.0 - beta ** (step + 1.0)) for moment, beta, step in zip(moments, betas, steps, strict=True)
    ]
    # Adam keeps a second moment of the real and one of the imaginary part
    return math.fsum(corrected) / sum(weight.numel() * (1 + weight.is_complex()) for weight in weights)


def coming_sum(gradient: Tensor, squares: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Return the sum of a parameter's second moment in the coming step, over the part that this process holds.

    Args:
        gradient: The parameter's gradient, distributed as the parameter is.
        squares: Sum of the squares of this process's part of the gradient.
        state: What the optimizer keeps for the parameter, empty before its first step.
        group: The parameter's group, with `betas` and `amsgrad`.
    """
    beta2 = float(group["betas"][1])
    if not state:
        return (1.0 - beta2) * squares
    moment = plain_part(state["exp_avg_sq"])
    if group.get("amsgrad"):
        part = plain_part(gradient)
        moment = torch.addcmul(beta2 * moment, part, part, value=1.0 - beta2)
        return torch.maximum(plain_part(state["max_exp_avg_sq"]), moment).sum(dtype=squares.dtype).to(squares.device)
    total = moment.sum(dtype=torch.promote_types(moment.dtype, torch.float32))
    return beta2 * total.to(squares) + (1.0 - beta2) * squares


def to_host(values: Tensor, steps: list[Tensor | float]) -> tuple[list[float], list[float]]:
    """Return values and step counts as numbers, by one transfer.

    Adam keeps its step counts on the host unless it is fused or capturable; then they travel with the values.
    """
    away = [step.to(values).view(1) for step in steps if isinstance(step, Tensor) and step.device.type != "cpu"]
    numbers = torch.cat([values, *away]).tolist()
    moved = iter(numbers[len(steps) :])
    on_host = [next(moved) if isinstance(step, Tensor) and step.device.type != "cpu" else float(step) for step in steps]
    return numbers[: len(steps)], on_host
