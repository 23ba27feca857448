r"""Singular values of weight matrices: spectral norm, stable rank and condition number, without a decomposition.

$$\lVert W \rVert_2 = \sigma_{\max}, \quad \operatorname{srank} W = \frac{\lVert W \rVert_F^2}{\sigma_{\max}^2}, \quad
\kappa = \frac{\sigma_{\max}}{\sigma_{\min}}$$

Power iteration that remembers where it has been, Golub-Kahan bidiagonalisation, needs two products with the matrix an
iteration, keeps on the device, and reaches the largest singular value in far fewer of them.

Source: Golub, Kahan, Calculating the Singular Values and Pseudo-Inverse of a Matrix, 1965; Rudelson, Vershynin,
Sampling from Large Matrices (stable rank), arXiv math/0503442, 2007.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

ITERATIONS = 32  # enough for the largest singular value to about 1e-3


def reduced(weight: Tensor) -> Tensor | None:
    """Return the `bidiagonal` matrix of a weight, None if it is no matrix.

    >>> reduced(torch.zeros(8)) is None
    True
    """
    matrix = as_matrix(weight)
    return None if matrix is None else bidiagonal(matrix)


def as_matrix(weight: Tensor) -> Tensor | None:
    """View a weight as the matrix that maps inputs to outputs, kernels flattened; None if it is no matrix.

    >>> as_matrix(torch.zeros(8, 4, 3, 3)).shape
    torch.Size([8, 36])
    >>> as_matrix(torch.zeros(8, 1)) is None
    True
    """
    if weight.ndim < 2:
        return None
    # The order of columns doesn't matter, so a kernel stored channels last needs no copy either.
    inner = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
    matrix = weight.permute(0, *inner).flatten(1)
    return matrix if min(matrix.shape) > 1 else None


@torch.no_grad()
def bidiagonal(matrix: Tensor) -> Tensor:
    """Reduce a matrix to a small bidiagonal one that shares its extreme singular values.

    Args:
        matrix: Shape `(m, n)`, any floating or complex dtype; fp32 or wider is used without a copy.

    Returns:
        Shape `(2, k)` with `k = min(32, m, n)`, the number of iterations: the diagonal, and the entries above it after
        a 0. On the matrix' device, without synchronising and without touching the global random state.

    >>> entries = bidiagonal(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    >>> largest, smallest = extreme_singular_values(entries.flatten().tolist())
    >>> round(largest, 5), round(smallest, 5)
    (3.0, 1.0)
    """
    if matrix.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        matrix = matrix.to(torch.complex64 if matrix.is_complex() else torch.float32)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.mH
    rows, columns = matrix.shape
    steps = min(ITERATIONS, columns)
    generator = torch.Generator(matrix.device).manual_seed(0)
    right = torch.zeros(steps, columns, dtype=matrix.dtype, device=matrix.device)
    left = torch.zeros(steps, rows, dtype=matrix.dtype, device=matrix.device)
    # lengths, which are real also where the matrix is complex
    entries = torch.zeros(2, steps, dtype=matrix.dtype.to_real(), device=matrix.device)
    start = torch.zeros(columns, dtype=matrix.dtype, device=matrix.device)
    right[0], _ = _direction(start, right[:0], entries, generator)
    for step in range(steps):
        left[step], entries[0, step] = _direction(matrix @ right[step], left[:step], entries, generator)
        if step + 1 < steps:
            along = matrix.mH @ left[step]
            right[step + 1], entries[1, step + 1] = _direction(along, right[: step + 1], entries, generator)
    return entries


def extreme_singular_values(entries: Sequence[float]) -> tuple[float, float]:
    """Return the largest and the smallest singular value of a bidiagonal matrix, on the host.

    Args:
        entries: What `bidiagonal` returned, its rows one after the other. The largest value is that of the matrix to
            about 1e-3, from below; the smallest is an upper bound, exact if there were as many iterations as the
            matrix' shorter side.

    >>> extreme_singular_values([4.0, 2.0, 0.0, 0.0])
    (4.0, 2.0)
    """
    diagonal, above = torch.tensor(entries, dtype=torch.float64).view(2, -1)
    if not (diagonal.isfinite().all() and above.isfinite().all()):
        return float("nan"), float("nan")
    values = torch.linalg.svdvals(torch.diag(diagonal) + torch.diag(above[1:], 1))
    return values[0].item(), values[-1].item()


def _direction(vector: Tensor, basis: Tensor, entries: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the direction in which a vector leaves a basis, and how far.

    If it stays within the basis, up to rounding, all that it can tell is told: a random direction follows, at 0.
    """
    random = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
    new, fresh = _orthogonal(vector, basis), _orthogonal(random, basis)
    length = torch.linalg.vector_norm(new)
    stays = length <= 100 * torch.finfo(length.dtype).eps * entries.amax()
    direction = torch.where(stays, fresh / torch.linalg.vector_norm(fresh), new / length)
    return direction, torch.where(stays, 0.0, length)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Take out of a vector what lies along the rows of a basis, twice, since once leaves rounding errors."""
    for _ in range(2):
        vector = vector - basis.t() @ (basis.conj() @ vector)
    return vector
