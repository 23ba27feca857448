"""The arithmetic of decay on lists of parameters, in place: dense, sharded, or the rows of a sparse gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_l2.sharding import local_part, placed_as

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@torch.no_grad()
def add_decay_gradient(params: Iterable[Tensor], weight_decay: float | Tensor) -> None:
    """Add the gradient of lambda/2 ||w||^2 in place: g <- g + lambda w, where there is a gradient.

    Args:
        params: Parameters w, sharded ones too; a sparse gradient gets lambda w in the rows it has, once each.
        weight_decay: Lambda, dimensionless; a tensor of one element is not read on the host.

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
    if isinstance(weight_decay, Tensor):
        for grad, weight in zip(grads, weights, strict=True):
            grad.addcmul_(weight, weight_decay.to(weight.device, weight.dtype))
    else:
        torch._foreach_add_(grads, weights, alpha=weight_decay)


@torch.no_grad()
def scale(families: Iterable[Iterable[Tensor]], strengths: Iterable[float | Tensor]) -> None:
    """Scale in place: w <- (1 - strength) w, where there is a gradient, of a sparse one only its rows.

    Args:
        families: Lists of parameters.
        strengths: One for each list.
    """
    params: list[Tensor] = []
    of_each: list[float | Tensor] = []
    for family, strength in zip(families, strengths, strict=True):
        if isinstance(strength, Tensor) or strength != 0:
            for param in family:
                if param.grad is not None:
                    params.append(param)
                    of_each.append(strength)
    if not params:
        return
    rows = [rows_of(param) for param in params]
    weights = read(params, rows)
    factors = [1 - strength for strength in of_each if not isinstance(strength, Tensor)]
    # The CPU's foreach kernel rounds 1 - strength to the dtype of the weights first: to 1, in bfloat16.
    if len(factors) == len(weights) and not any(weight.is_cpu and weight.element_size() < 4 for weight in weights):
        if len(set(factors)) == 1:
            torch._foreach_mul_(weights, factors[0])
        else:
            torch._foreach_mul_(weights, factors)
    else:
        for weight, strength in zip(weights, of_each, strict=True):
            if isinstance(strength, Tensor):
                weight.addcmul_(weight, strength.to(weight.device, weight.dtype), value=-1)
            else:
                weight.mul_(1 - strength)
    write(params, rows, weights)


@torch.no_grad()
def decay_from(before: list[Tensor], weights: list[Tensor], strength: float | Tensor, *, masked: bool) -> None:
    """Subtract in place: w <- w - strength mask w_before; the mask is 1 where the update does not oppose w_before.

    Args:
        before: The weights before the update; real, as complex ones are seen by their parts.
        weights: The weights after it, changed in place.
        strength: Eta lambda.
        masked: Whether to mask at all.
    """
    decays = before
    if masked:
        decays = list(torch._foreach_sub(before, weights))
        torch._foreach_sign_(decays)
        # The sign first: u * w itself would underflow to "no sign" for small updates of small weights.
        torch._foreach_mul_(decays, before)
        torch._foreach_sign_(decays)
        torch._foreach_add_(decays, 1)
        torch._foreach_clamp_max_(decays, 1)
        torch._foreach_mul_(decays, before)
    if isinstance(strength, Tensor):
        for weight, decay in zip(weights, decays, strict=True):
            weight.addcmul_(decay, strength.to(weight.device, weight.dtype), value=-1)
    else:
        torch._foreach_add_(weights, decays, alpha=-strength)


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
    # Tensor parallelism leaves partial sums: added to each of them, lambda w would count several times.
    param.grad = placed_as(param, param.grad)
    return local_part(param.grad)
