"""Histograms of weights, counted on their device, and the loggers that take them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_l2.norms.layout import blocks, plain_part, wide_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Counts between equally spaced edges.

    Args:
        lowest: The left edge, which is the smallest weight.
        highest: The right edge, which is the largest weight.
        counts: How many weights are in each bin.

    >>> Histogram(0.0, 1.0, (2.0, 1.0)).edges
    [0.0, 0.5, 1.0]
    """

    lowest: float
    highest: float
    counts: tuple[float, ...]

    @property
    def edges(self) -> list[float]:
        """The edges of the bins, one more than there are bins."""
        width = (self.highest - self.lowest) / len(self.counts)
        return [self.lowest + width * index for index in range(len(self.counts))] + [self.highest]


@torch.no_grad()
def count(weight: Tensor, bins: int = BINS) -> Tensor:
    """Count a weight's entries in equally wide bins between its smallest and its largest one, block by block.

    Args:
        weight: Any shape and floating dtype, not empty.
        bins: Number of bins.

    Returns:
        Shape `(2 + bins,)`: smallest, largest, counts. On the weight's device, without synchronising.

    >>> count(torch.tensor([0.0, 0.1, 1.0]), bins=2)
    tensor([0., 1., 2., 1.], dtype=torch.float64)
    """
    lowest, highest = (edge.float() for edge in torch.aminmax(weight))
    width = ((highest - lowest) / bins).clamp_min(torch.finfo(torch.float32).tiny)
    counts = torch.zeros(bins, dtype=wide_dtype(weight.device), device=weight.device)
    for block in blocks(weight):
        places = ((block.float() - lowest) / width).clamp_(0, bins)
        counts += torch.histc(places, bins, 0, bins)
    return torch.cat([lowest.view(1), highest.view(1), counts])


def count_weights(weight: Tensor) -> Tensor | None:
    """Count the entries of a weight, real and imaginary parts of a complex one; None if it has none.

    >>> count_weights(torch.zeros(3, 0)) is None
    True
    """
    return count(plain_part(weight)) if weight.numel() else None


def histogram(counted: Sequence[float]) -> Histogram:
    """Return what `count` found, on the host.

    >>> histogram([0.0, 1.0, 2.0, 1.0])
    Histogram(lowest=0.0, highest=1.0, counts=(2.0, 1.0))
    """
    return Histogram(counted[0], counted[1], tuple(counted[2:]))


def takes_histograms(logger: Any) -> bool:
    """Return whether a logger is TensorBoard's or one like it, or that of Weights & Biases."""
    return _is_wandb(logger) or hasattr(getattr(logger, "experiment", None), "add_histogram_raw")


def log_histogram(logger: Any, key: str, found: Histogram, step: int) -> None:
    """Send a histogram to a logger that takes one."""
    counts = list(found.counts)
    if _is_wandb(logger):
        wandb = sys.modules["wandb"]
        logger.log_metrics({key: wandb.Histogram(np_histogram=(counts, found.edges))}, step=step)
        return
    centers = [(left + right) / 2 for left, right in pairwise(found.edges)]
    logger.experiment.add_histogram_raw(
        key,
        min=found.lowest,
        max=found.highest,
        num=sum(counts),
        sum=sum(count * center for count, center in zip(counts, centers, strict=True)),
        sum_squares=sum(count * center * center for count, center in zip(counts, centers, strict=True)),
        bucket_limits=found.edges[1:],
        bucket_counts=counts,
        global_step=step,
    )


def _is_wandb(logger: Any) -> bool:
    return type(logger).__name__ == "WandbLogger"
