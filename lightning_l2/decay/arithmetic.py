"""The arithmetic of decay on lists of parameters, in place: dense, sharded, or the rows of a sparse gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_l2.sharding import gradient_of, local_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypeAlias

    from lightning_l2.decay.rounding import Share, Stochastic

    # by parameter, what this process holds of the weights that it started from
    Starts: TypeAlias = Mapping[Tensor, Tensor]


@torch.no_grad()
def add_decay_gradient(params: Iterable[Tensor], weight_decay: float | Tensor, starts: Starts | None = None) -> None:
    r"""Add the gradient of the penalty in place: $g \leftarrow g + \lambda (w - w_0)$, where there is a gradient.

    Args:
        params: Parameters w, sharded ones too; a sparse gradient gets its part in the rows it has, once each.
        weight_decay: Lambda, dimensionless; a tensor of one element is not read on the host.
        starts: What this process holds of $w_0$, of the parameters for which that is not 0.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.zeros(2)
    >>> add_decay_gradient([w], 0.1)
    >>> w.grad
    tensor([0.1000, 0.1000])
    """
    params = with_gradient(params)
    if is_zero(weight_decay) or not params:
        return
    rows = [rows_of(param) for param in params]
    weights = read(params, rows)
    grads = [_gradient(param) for param in params]
    free: tuple[list[Tensor], list[Tensor]] = [], []
    for param, row, grad, weight in zip(params, rows, grads, weights, strict=True):
        if starts and param in starts:
            # one after the other, for temporaries of one parameter
            _add([grad], [weight - start_of_rows(starts[param], row, weight)], weight_decay)
        else:
            free[0].append(grad)
            free[1].append(weight)
    _add(*free, weight_decay)


def _add(grads: list[Tensor], weights: list[Tensor], weight_decay: float | Tensor) -> None:
    if isinstance(weight_decay, Tensor):
        for grad, weight in zip(grads, weights, strict=True):
            grad.addcmul_(weight, weight_decay.to(weight.device, weight.dtype))
    elif grads:
        torch._foreach_add_(grads, weights, alpha=weight_decay)


@torch.no_grad()
def shrink(
    shares: Iterable[tuple[Iterable[Tensor], Share]], rounding: Stochastic | None = None, starts: Starts | None = None
) -> None:
    r"""Step in place: $w \leftarrow w - s (w - w_0)$, where there is a gradient, of a sparse one only its rows.

    Args:
        shares: Lists of parameters w, and the share s of each list.
        rounding: How to round, None for the nearest.
        starts: What this process holds of $w_0$, of the parameters for which that is not 0.
    """
    moving = [(share, param) for family, share in shares for param in family if param.grad is not None]
    moving = [(share, param) for share, param in moving if type(share) is not float or share]
    if not moving:
        return
    of_each, params = map(list, zip(*moving, strict=True))
    rows = [rows_of(param) for param in params]
    weights = read(params, rows)
    origins = [
        start_of_rows(starts[param], row, weight) if starts and param in starts else None
        for param, row, weight in zip(params, rows, weights, strict=True)
    ]
    if rounding is not None:
        pulls = [w if origin is None else w - origin for w, origin in zip(weights, origins, strict=True)]
        rounding.subtract(real_parts(weights), real_parts(pulls), of_each)
    else:
        _pull(weights, origins, of_each)
        free = [index for index, origin in enumerate(origins) if origin is None]
        if free:
            _scale([weights[index] for index in free], [of_each[index] for index in free])
    write(params, rows, weights)


def _pull(weights: list[Tensor], origins: list[Tensor | None], of_each: list[Share]) -> None:
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for weight, origin, share in zip(weights, origins, of_each, strict=True):
        if origin is not None and isinstance(share, Tensor):
            weight.lerp_(origin, share.to(weight))
        elif origin is not None:
            pair = together.setdefault(float(share), ([], []))
            pair[0].append(weight)
            pair[1].append(origin)
    for share, (pulled, towards) in together.items():
        torch._foreach_lerp_(pulled, towards, share)


def _scale(weights: list[Tensor], of_each: list[Share]) -> None:
    factors = [1 - share for share in of_each if not isinstance(share, Tensor)]
    # The CPU's foreach kernel rounds 1 - s to the dtype of the weights first: to 1, in bfloat16.
    if len(factors) == len(weights) and not any(weight.is_cpu and weight.element_size() < 4 for weight in weights):
        if len(set(factors)) == 1:
            torch._foreach_mul_(weights, factors[0])
        else:
            torch._foreach_mul_(weights, factors)
    else:
        for weight, share in zip(weights, of_each, strict=True):
            if isinstance(share, Tensor):
                weight.addcmul_(weight, share.to(weight.device, weight.dtype), value=-1)
            else:
                weight.mul_(1 - share)


@torch.no_grad()
def decay_from(
    before: list[Tensor],
    weights: list[Tensor],
    share: Share,
    *,
    masked: bool,
    rounding: Stochastic | None = None,
    starts: list[Tensor] | None = None,
) -> None:
    r"""Subtract a share of $v$, the weights before the update, less what they started from: $w \leftarrow w - s\,m\,v$.

    Args:
        before: The weights before the update; real, as complex ones are seen by their parts.
        weights: The weights after it, changed in place.
        share: Share s, eta lambda.
        masked: Whether the mask m is 1 only where the update does not oppose v, and 0 elsewhere.
        rounding: How to round, None for the nearest.
        starts: What they started from, None for 0.
    """
    pulls = list(before if starts is None else torch._foreach_sub(before, starts))
    decays = pulls
    if masked:
        decays = list(torch._foreach_sub(before, weights))
        torch._foreach_sign_(decays)
        # The sign first: u * w itself would underflow to "no sign" for small updates of small weights.
        torch._foreach_mul_(decays, pulls)
        torch._foreach_sign_(decays)
        torch._foreach_add_(decays, 1)
        torch._foreach_clamp_max_(decays, 1)
        torch._foreach_mul_(decays, pulls)
    if rounding is not None:
        rounding.subtract(weights, decays, [share] * len(weights))
    elif isinstance(share, Tensor):
        for weight, decay in zip(weights, decays, strict=True):
            weight.addcmul_(decay, share.to(weight.device, weight.dtype), value=-1)
    else:
        torch._foreach_add_(weights, decays, alpha=-share)


def with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters that have a gradient; the others take no step, so nothing decays them."""
    return [param for param in params if param.grad is not None]


def is_zero(value: float | Tensor) -> bool:
    """Return whether a number is 0; of a tensor on a device nobody asks."""
    return not isinstance(value, Tensor) and value == 0


def rows_of(param: Tensor) -> Tensor | None:
    """Return the rows that a sparse gradient touches, each once, and None for a dense gradient.

    Raises:
        RuntimeError: If the gradient is sparse in more than its rows.
    """
    if param.grad is None or not param.grad.is_sparse:
        return None
    if param.grad.sparse_dim() != 1:
        raise RuntimeError(
            f"Decay of sparse gradients acts on rows, got a gradient with {param.grad.sparse_dim()} sparse dimensions "
            f"for a parameter of shape {tuple(param.shape)}. Give it a group with weight_decay=0."
        )
    param.grad = param.grad.coalesce()
    return param.grad.indices()[0]


@torch.no_grad()
def read(params: Sequence[Tensor], rows: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the weights themselves where they are dense, and copies of the rows where not."""
    return [local_part(param) if row is None else param[row] for param, row in zip(params, rows, strict=True)]


def start_of_rows(start: Tensor, row: Tensor | None, like: Tensor) -> Tensor:
    """Return the start of a parameter where its weights are, of the rows that a sparse gradient touches or of all."""
    there = start.to(like.device, non_blocking=True)
    return there if row is None else there[row]


@torch.no_grad()
def write(params: Sequence[Tensor], rows: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    """Put rows that `read` has copied back into their parameters."""
    for param, row, weight in zip(params, rows, weights, strict=True):
        if row is not None:
            param.index_copy_(0, row, weight)


def real_parts(tensors: list[Tensor]) -> list[Tensor]:
    """Return complex tensors as views on their real and imaginary parts, others as they are."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def _gradient(param: Any) -> Tensor:
    """Return what can be changed in place of a gradient: its rows if it is sparse, its shard if it is sharded."""
    if param.grad.is_sparse:
        return cast("Tensor", param.grad.values())
    # added to each of partial sums, lambda w would count several times
    param.grad = gradient_of(param)
    return local_part(param.grad)
