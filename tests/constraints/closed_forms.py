"""Norms and projections by numpy in float64, and a projection by the code under test."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_l2.constraints import FixedBound, InitialBound, Projection
from lightning_l2.constraints.methods import constrain_
from lightning_l2.constraints.vectors import ConstrainedVectors, Per
from lightning_l2.norms.squared import ROW

SHAPES = [(), (1,), (7,), (3, 5), (4, 3, 2, 2), (2, ROW + 3), (2, 3 * ROW)]


def norms_of(tensors: list[Tensor], per: str) -> list[float]:
    """The norms by numpy, in float64."""
    arrays = [tensor.double().numpy() for tensor in tensors]
    if per == "row":
        return [float(np.linalg.norm(row)) for array in arrays for row in np.atleast_1d(array)]
    norms = [float(np.linalg.norm(array)) for array in arrays]
    return norms if per == "parameter" else [math.hypot(*norms)]


def projected(tensors: list[Tensor], per: str, bound: float) -> list[Tensor]:
    """The closed form, row by row, in float64."""
    result = []
    together = norms_of(tensors, "group")[0]
    for tensor in tensors:
        array = tensor.double().numpy().copy()
        for row in [array] if per != "row" or array.ndim == 0 else [array[i : i + 1] for i in range(len(array))]:
            norm = together if per == "group" else float(np.linalg.norm(row))
            row *= min(1.0, bound / norm) if norm else 1.0
        result.append(torch.from_numpy(array))
    return result


def project(
    tensors: list[Tensor], bound: float | Tensor, *, per: Per = "parameter", counts: Sequence[int] | None = None
) -> Tensor:
    """Project in place, and return the norms before."""
    given = {"reference": bound} if isinstance(bound, Tensor) else {}
    vectors = ConstrainedVectors(tensors, per, counts)
    _, squares = constrain_(vectors, given, InitialBound() if given else FixedBound(bound), Projection())
    return squares.sqrt()
