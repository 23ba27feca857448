"""Histograms of the weights of each layer in one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lightning_l2.plots.style import COLOURS, new_figure, without_common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

MOST_PANELS = 24


def plot_histograms(tensors: Mapping[str, torch.Tensor | ArrayLike], *, bins: int = 60, title: str = "") -> Figure:
    """Draw a histogram of each tensor's values, with its L2 norm and the share of values next to zero.

    Next to zero is below a hundredth of the tensor's largest magnitude. Counts are on a log scale, so that few large
    weights are seen beside many small ones.

    Args:
        tensors: Name -> values of any shape and device, such as `dict(model.named_parameters())`; complex ones are
            drawn by their real and imaginary parts. Of more than 24 an even selection is drawn.
        bins: Number of bins over the range of a tensor.
        title: Words above the panels.

    Raises:
        ValueError: If there is no tensor.

    >>> layer = torch.nn.Linear(3, 2)
    >>> [axes.get_title(loc="left") for axes in plot_histograms(dict(layer.named_parameters())).axes[:2]]
    ['weight', 'bias']
    """
    if not tensors:
        raise ValueError("There is no tensor to draw. Expected at least one, such as `dict(model.named_parameters())`.")
    names = list(tensors)[:: math.ceil(len(tensors) / MOST_PANELS)]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(2.5 * columns + 0.4, 1.7 * rows + 0.5)
    selection = f"{len(names)} of {len(tensors)} tensors" if len(names) < len(tensors) else ""
    figure.suptitle(": ".join(filter(None, (title, selection))), fontsize=11, fontweight="bold")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name, label in zip(grid, names, without_common_prefix(names), strict=False):
        _draw_histogram(axes, torch.as_tensor(tensors[name]).detach(), label, bins)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return figure


def _draw_histogram(axes: Axes, values: torch.Tensor, label: str, bins: int) -> None:
    values = (torch.view_as_real(values) if values.is_complex() else values).flatten().double().cpu()
    values = values[values.isfinite()]
    reach = values.abs().max().item() if values.numel() else 0.0
    near_zero = (values.abs() < reach / 100).double().mean().item() if reach else 1.0
    span = (-reach, reach) if reach else (-1.0, 1.0)
    axes.hist(values.numpy(), bins=bins, range=span, color=COLOURS[0], log=bool(values.numel()))
    axes.set_title(label, fontsize=8, loc="left")
    axes.text(
        *(0.98, 0.96),
        f"‖w‖ {values.norm().item():.3g}\n{near_zero:.0%} near 0",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7,
    )
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0.7, 8 * axes.get_ylim()[1])  # room for the words
