"""The L2 norm and penalty of parameters as torchmetrics metrics, with their statistics over updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric
from torchmetrics.aggregation import BaseAggregator
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_l2.arguments import check_choice
from lightning_l2.norms.squared import squared_norms
from lightning_l2.optimizers.inner import updating_optimizers
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.sharding import flat_shards, is_flat_piece, is_fsdp1

Statistic: TypeAlias = Literal["last", "mean", "min", "max", "std"]
Parameters: TypeAlias = Tensor | nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def l2_norm(parameters: Parameters) -> Tensor:
    r"""Compute the L2 norm of parameters as one vector, $\sqrt{\sum_i w_i^2}$.

    Args:
        parameters: A module (all its parameters), a mapping by name, tensors, or a tensor.

    Returns:
        Shape `()`, float64 where the device has it.

    Raises:
        ValueError: If FSDP1 has cut parameters into pieces, and the module is not given that knows the others.

    >>> l2_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5., dtype=torch.float64)
    """
    tensors = _tensors(parameters)
    shards: Mapping[int, Any] = {}
    if isinstance(parameters, nn.Module) and any(map(is_fsdp1, parameters.modules())):
        shards = flat_shards(parameters)
    else:
        _check_whole(tensors, "Give the outermost module instead of them.")
    return squared_norms(tensors, [shards.get(id(tensor)) for tensor in tensors]).sum().sqrt()


def l2_penalty(param_groups: Optimizer | Iterable[Mapping[str, Any]]) -> Tensor:
    r"""Compute the penalty $\sum_g \frac{\lambda_g}{2} \lVert w_g \rVert_2^2$ of an optimizer's parameter groups.

    Args:
        param_groups: An optimizer, its `param_groups`, or dicts that have `params` and `weight_decay` like them.

    Returns:
        Shape `()`, float64 where the device has it.

    Raises:
        ValueError: If FSDP1 has cut parameters into pieces.

    >>> l2_penalty([{"params": [torch.tensor([3.0, 4.0])], "weight_decay": 0.1}])
    tensor(1.2500, dtype=torch.float64)
    """
    if isinstance(param_groups, Optimizer):
        parts = [part for one in updating_optimizers(param_groups) for part in decay_groups(one).unnamed()]
        groups = [(float(part.weight_decay), part.params) for part in parts]
    else:
        groups = [(float(group.get("weight_decay", 0.0)), list(group["params"])) for group in param_groups]
    tensors = [parameter for _, parameters in groups for parameter in parameters]
    _check_whole(tensors, "Use L2NormMonitor, which logs the penalty, or FSDP2.")
    squares = squared_norms(tensors)
    penalty, start = squares.new_zeros(()), 0
    for weight_decay, parameters in groups:
        penalty = penalty + weight_decay / 2 * squares[start : start + len(parameters)].sum()
        start += len(parameters)
    return penalty


class _OverUpdates(WrapperMetric):
    """A number that parameters have, handed to the torchmetrics aggregator of one statistic.

    All processes hold the same parameters, so what they saw is averaged, not added up.
    """

    is_differentiable = False
    higher_is_better = False
    plot_lower_bound = 0.0

    _measure: Callable[..., Tensor]
    _forward_cache: Any

    def __init__(self, statistic: Statistic = "mean", **kwargs: Any) -> None:
        super().__init__()
        check_choice(tuple(_AGGREGATORS), statistic=statistic)
        self.statistic = statistic
        self._aggregator = _AGGREGATORS[statistic](**{"nan_strategy": math.nan, **kwargs})
        self._aggregator.set_dtype(torch.float64)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._aggregator.update(self._measured(*args, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update, and return the statistic of this update alone."""
        value: Tensor = self._aggregator(self._measured(*args, **kwargs))
        self._forward_cache = value  # where `LightningModule.log` looks for the value of a step
        return value

    def compute(self) -> Tensor:
        """Return the statistic, shape `()`; NaN without an update."""
        value: Tensor = self._aggregator.compute()
        # without an update, the infinity from which the smallest and the largest start
        return value if self.update_called else value.masked_fill(value.isinf(), torch.nan)

    def reset(self) -> None:
        """Forget all updates."""
        super().reset()
        self._aggregator.reset()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one or several values.

        Args:
            val: What `compute` or `forward` returned, once or several times; by default what `compute` returns now.
            ax: Matplotlib axes to draw on.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    @property
    def update_count(self) -> int:
        """How many updates there were."""
        return self._aggregator.update_count

    @property
    def update_called(self) -> bool:
        """Whether there was an update."""
        return self._aggregator.update_called

    def persistent(self, mode: bool = False) -> None:
        """Choose whether the statistic is in `state_dict`."""
        self._aggregator.persistent(mode)

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Change the dtype that the statistic is kept in, float64 at first."""
        self._aggregator.set_dtype(dst_type)
        return self

    def _apply(self, fn: Any, exclude_state: Sequence[str] = "") -> nn.Module:
        try:
            return super()._apply(fn, exclude_state)
        except TypeError:  # devices without float64
            return self.set_dtype(torch.float32)._apply(fn, exclude_state)

    def _measured(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._measure(*args, **kwargs).to(self._aggregator.device)


class _StdMetric(BaseAggregator):
    """Aggregate values into their population standard deviation, by sums of squares that don't cancel.

    Source: B. P. Welford, Note on a method for calculating corrected sums of squares and products, 1962.
    """

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(_merged, torch.zeros(3), state_name="moments", **kwargs)

    def update(self, value: float | Tensor) -> None:
        values = self._cast_and_nan_check_input(value)[0].reshape(-1, 1)
        singles = torch.cat([torch.ones_like(values), values, torch.zeros_like(values)], dim=1)
        self.moments = _merged(torch.cat([self.moments[None], singles]))

    def compute(self) -> Tensor:
        count, _, squares = self.moments.unbind()
        return (squares / count).sqrt()


class _LastMetric(BaseAggregator):
    """Aggregate values into the last one."""

    full_state_update = True
    last: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(_latest, torch.tensor(torch.nan), state_name="last", **kwargs)

    def update(self, value: float | Tensor) -> None:
        values, _ = self._cast_and_nan_check_input(value)
        if values.numel():
            self.last = values.flatten()[-1]


def _merged(moments: Tensor) -> Tensor:
    """Merge counts, means and sums of squared deviations from the mean, shape `(n, 3)`, into one, shape `(3,)`.

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1979.
    """
    count, mean, squares = moments[0]
    for other_count, other_mean, other_squares in moments[1:]:
        total = count + other_count
        share = other_count / total.clamp_min(1)
        difference = other_mean - mean
        squares = squares + other_squares + difference.square() * count * share
        count, mean = total, mean + difference * share
    return torch.stack([count, mean, squares])


def _latest(values: Tensor) -> Tensor:
    """Reduce what equal processes saw."""
    return values[-1]


_AGGREGATORS: dict[str, type[BaseAggregator]] = {
    "last": _LastMetric,
    "mean": MeanMetric,
    "min": MinMetric,
    "max": MaxMetric,
    "std": _StdMetric,
}


class L2Norm(_OverUpdates):
    r"""The L2 norm of parameters as one vector, $\sqrt{\sum_i w_i^2}$, over updates.

    Each metric measures for itself. For several statistics at the price of one, hand what `l2_norm` returns to
    torchmetrics' `MeanMetric`, `MaxMetric` and so on.

    Args:
        statistic: What `compute` returns of the norms that updates saw: the `"last"`, `"mean"`, `"min"`, `"max"` or
            their standard deviation (`"std"`, population).
        kwargs: As for torchmetrics' `MeanMetric`. By default NaN counts as NaN; `nan_strategy` changes that.

    Raises:
        ValueError: If `statistic` is none of these.

    >>> metric = L2Norm(statistic="max")
    >>> metric.update([torch.tensor([3.0, 4.0])])
    >>> metric.update([torch.tensor([0.6, 0.8])])
    >>> metric.compute()
    tensor(5., dtype=torch.float64)
    """

    _measure = staticmethod(l2_norm)

    def update(self, parameters: Parameters) -> None:
        """Take the norm now.

        Args:
            parameters: A module (all its parameters), a mapping by name, tensors, or a tensor.
        """
        super().update(parameters)


class L2Penalty(_OverUpdates):
    r"""The penalty $\sum_g \frac{\lambda_g}{2} \lVert w_g \rVert_2^2$ over updates.

    Args:
        statistic: What `compute` returns of the penalties that updates saw, as for `L2Norm`.
        kwargs: As for `L2Norm`.

    Raises:
        ValueError: If `statistic` is none of these.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)
    >>> metric = L2Penalty()
    >>> metric.update(optimizer.param_groups)
    >>> metric.compute()
    tensor(1.2500, dtype=torch.float64)
    """

    _measure = staticmethod(l2_penalty)

    def update(self, param_groups: Optimizer | Iterable[Mapping[str, Any]]) -> None:
        """Take the penalty now, with the lambda that the groups have now.

        Args:
            param_groups: An optimizer, its `param_groups`, or dicts that have `params` and `weight_decay` like them.
        """
        super().update(param_groups)


def _tensors(parameters: Parameters) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    return list(parameters.values() if isinstance(parameters, Mapping) else parameters)


def _check_whole(tensors: Sequence[Tensor], way_out: str) -> None:
    if any(map(is_flat_piece, tensors)):
        raise ValueError(
            f"FSDP1 has cut the parameters into pieces, which don't tell what the other processes have. {way_out}"
        )
