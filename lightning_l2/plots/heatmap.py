"""The norms of all layers over a training in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_l2.plots.history import History, as_grid, curves_of
from lightning_l2.plots.style import label_steps, new_figure, row_labels

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MOST_LABELS = 45


def plot_norm_heatmap(
    history: History, *, layers: Sequence[str] | None = None, relative: bool = True, prefix: str = "l2_norm"
) -> Figure:
    """Draw layers as rows, steps as columns and the L2 norm as colour.

    Args:
        history: The metrics of a training, e.g. from `read_history`.
        layers: Names from the input of the network to its output; by default they are sorted.
        relative: Colour the norm as a multiple of the layer's first logged one other than 0, so that layers of any size
            compare: orange grows, purple shrinks, white stays. Otherwise the norm itself, on a log scale.
        prefix: Another quantity that is logged by layer, such as `"grad_norm"`.

    Returns:
        The figure; layers that were not logged at a step are grey there.

    Raises:
        ValueError: If nothing was logged under `prefix`.

    >>> figure = plot_norm_heatmap({"l2_norm/body": ([0, 50], [1.0, 1.2]), "l2_norm/head": ([0, 50], [3.0, 2.0])})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['body', 'head']
    """
    curves = curves_of(history, prefix, layers)
    names = list(curves)
    steps, norms = as_grid(curves)
    figure = new_figure(8.5, min(max(1.6 + 0.24 * len(names), 3.0), 10.0))
    axes = figure.add_subplot()
    _draw(figure, axes, steps, _relative_to_first(norms) if relative else norms, relative)
    axes.set_title(
        "L2 norm of each layer" if prefix == "l2_norm" else prefix, loc="left", fontsize=11, fontweight="bold"
    )
    label_steps(axes)
    positions, labels, blocks = row_labels(names, MOST_LABELS)
    axes.set_yticks(positions, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    if len(names) <= MOST_LABELS:
        blocks = list(range(1, len(names)))
        _write_last_values(axes, norms)
    axes.hlines([row - 0.5 for row in blocks], *axes.get_xlim(), color="white", linewidth=0.8)
    return figure


def _relative_to_first(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    usable = np.isfinite(norms) & (norms > 0)
    first = norms[np.arange(len(norms)), usable.argmax(axis=1)]
    return norms / np.where(usable.any(axis=1), first, np.nan)[:, None]


def _draw(figure: Figure, axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], relative: bool) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    low, high = _colour_range(values, relative)
    colours = colormaps["PuOr_r" if relative else "viridis"].with_extremes(bad="#DDDDDD", under="#DDDDDD")
    edge = 0.5 * (len(steps) == 1)
    edges = np.concatenate([[steps[0] - edge], (steps[1:] + steps[:-1]) / 2, [steps[-1] + edge]])
    rows = np.arange(len(values) + 1) - 0.5
    image = axes.pcolorfast(edges, rows, values, cmap=colours, norm=LogNorm(low, high))
    axes.invert_yaxis()
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("norm / first logged norm" if relative else "norm")
    ticks = _ticks(low, high)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
    bar.minorticks_off()


def _colour_range(values: NDArray[np.float64], relative: bool) -> tuple[float, float]:
    """Return the values at the ends of the colour scale; for ratios as far below 1 as above it."""
    import numpy as np

    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    if relative:
        high = max(high, 1 / low, 1.05)
        return 1 / high, high
    return low, max(high, low * 1.05)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = MaxNLocator(5) if high / low < 8 else LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,))
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _write_last_values(axes: Axes, norms: NDArray[np.float64]) -> None:
    import numpy as np

    right = axes.secondary_yaxis("right")
    last = [row[np.isfinite(row)][-1] if np.isfinite(row).any() else np.nan for row in norms]
    right.set_yticks(range(len(last)), [f"{value:.3g}" for value in last], fontsize=8)
    axes.annotate("last", (1, 1), (5, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
