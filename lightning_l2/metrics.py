"""The L2 norm and penalty of parameters as torchmetrics metrics, with their statistics over updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_l2.norms import squared_norms
from lightning_l2.optimizers.inner import updating_optimizers
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.sharding import flat_shards, is_flat_piece

Statistic: TypeAlias = Literal["last", "mean", "min", "max", "std"]
Parameters: TypeAlias = Tensor | nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def l2_norm(parameters: Parameters) -> Tensor:
    r"""Compute the L2 norm of parameters as one vector, \(\sqrt{\sum_i w_i^2}\).

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
    if isinstance(parameters, nn.Module) and any(map(_is_fsdp1, parameters.modules())):
        shards = flat_shards(parameters)
    else:
        _check_whole(tensors, "Give the outermost module instead of them.")
    return squared_norms(tensors, [shards.get(id(tensor)) for tensor in tensors]).sum().sqrt()


def l2_penalty(param_groups: Optimizer | Iterable[Mapping[str, Any]]) -> Tensor:
    r"""Compute the penalty \(\sum_g \frac{\lambda_g}{2} \lVert w_g \rVert_2^2\) of an optimizer's parameter groups.

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


class _Running(Metric):
    """A number that parameters have, and its statistic over updates.

    All processes hold the same parameters, so they are averaged, not added up.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(self, statistic: Statistic, of: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if statistic not in get_args(Statistic):
            choices = ", ".join(map(repr, get_args(Statistic)))
            raise ValueError(f"Expected argument `statistic` to be one of {choices}, but got {statistic!r}.")
        self.statistic = statistic
        # A MetricCollection takes metrics whose states have the same names and values for one.
        self._of = of
        for name, (start, reduction) in _STATES.items():
            self.add_state(f"{name}_{of}", torch.tensor(start, dtype=torch.float64), dist_reduce_fx=reduction)

    def _add(self, value: Tensor) -> None:
        state = self._state()
        value = value.to(state["sum"].device, state["sum"].dtype)
        self._set("count", state["count"] + 1)
        self._set("sum", state["sum"] + value)
        self._set("squares", state["squares"] + value.square())
        self._set("min", torch.minimum(state["min"], value))
        self._set("max", torch.maximum(state["max"], value))
        self._set("last", value)

    def compute(self) -> Tensor:
        """Return the statistic, shape `()`; NaN without an update."""
        state = self._state()
        mean = state["sum"] / state["count"]
        if self.statistic == "mean":
            return mean
        if self.statistic == "std":
            return (state["squares"] / state["count"] - mean.square()).clamp_min(0).sqrt()
        return torch.where(state["count"] > 0, state[self.statistic], torch.nan)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one or several values.

        Args:
            val: What `compute` or `forward` returned, once or several times; by default what `compute` returns now.
            ax: Matplotlib axes to draw on.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Any, exclude_state: Sequence[str] = "") -> nn.Module:
        try:
            return super()._apply(fn, exclude_state)
        except TypeError:  # devices without float64
            return self.set_dtype(torch.float32)._apply(fn, exclude_state)

    def _state(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"{name}_{self._of}") for name in _STATES}

    def _set(self, name: str, value: Tensor) -> None:
        setattr(self, f"{name}_{self._of}", value)


def _latest(states: Tensor) -> Tensor:
    """Reduce states of equal processes, or of the past and the present."""
    return states[-1]


_STATES: dict[str, tuple[float, Any]] = {
    "count": (0.0, "sum"),
    "sum": (0.0, "sum"),
    "squares": (0.0, "sum"),
    "min": (float("inf"), "min"),
    "max": (float("-inf"), "max"),
    "last": (float("nan"), _latest),
}


class L2Norm(_Running):
    r"""The L2 norm of parameters as one vector, \(\sqrt{\sum_i w_i^2}\), over updates.

    Args:
        statistic: What `compute` returns of the norms that updates saw: the `"last"`, `"mean"`, `"min"`, `"max"` or
            their standard deviation (`"std"`, population).
        kwargs: As for any torchmetrics metric.

    Raises:
        ValueError: If `statistic` is none of these.

    >>> metric = L2Norm(statistic="max")
    >>> metric.update([torch.tensor([3.0, 4.0])])
    >>> metric.update([torch.tensor([0.6, 0.8])])
    >>> metric.compute()
    tensor(5., dtype=torch.float64)
    """

    def __init__(self, statistic: Statistic = "mean", **kwargs: Any) -> None:
        super().__init__(statistic, "norm", **kwargs)

    def update(self, parameters: Parameters) -> None:
        """Take the norm now.

        Args:
            parameters: A module (all its parameters), a mapping by name, tensors, or a tensor.
        """
        self._add(l2_norm(parameters))


class L2Penalty(_Running):
    r"""The penalty \(\sum_g \frac{\lambda_g}{2} \lVert w_g \rVert_2^2\) over updates.

    Args:
        statistic: What `compute` returns of the penalties that updates saw, as for `L2Norm`.
        kwargs: As for any torchmetrics metric.

    Raises:
        ValueError: If `statistic` is none of these.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)
    >>> metric = L2Penalty()
    >>> metric.update(optimizer.param_groups)
    >>> metric.compute()
    tensor(1.2500, dtype=torch.float64)
    """

    def __init__(self, statistic: Statistic = "mean", **kwargs: Any) -> None:
        super().__init__(statistic, "penalty", **kwargs)

    def update(self, param_groups: Optimizer | Iterable[Mapping[str, Any]]) -> None:
        """Take the penalty now, with the lambda that the groups have now.

        Args:
            param_groups: An optimizer, its `param_groups`, or dicts that have `params` and `weight_decay` like them.
        """
        self._add(l2_penalty(param_groups))


def _tensors(parameters: Parameters) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    return list(parameters.values() if isinstance(parameters, Mapping) else parameters)


def _is_fsdp1(module: nn.Module) -> bool:
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def _check_whole(tensors: Sequence[Tensor], way_out: str) -> None:
    if any(map(is_flat_piece, tensors)):
        raise ValueError(
            f"FSDP1 has cut the parameters into pieces, which don't tell what the other processes have. {way_out}"
        )
