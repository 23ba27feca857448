"""Norms, penalty and update ratios as curves over the steps of a training."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from lightning_l2.plots.history import Curve, History, as_grid, curves_of
from lightning_l2.plots.style import (
    COLOURS,
    draw_curves,
    fit_scale,
    legend_beside,
    stacked_axes,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USUAL_LOSS = re.compile(r"(?:train(?:ing)?[_/.])?loss(?:_step)?")


def plot_norms(history: History, *, layers: Sequence[str] | None = None) -> Figure:
    """Draw the L2 norm of each layer, and beneath it lambda of each group and the learning rate.

    Args:
        history: The metrics of a training with `l2_norm/<layer>`, and where logged `weight_decay/<group>` and
            LearningRateMonitor's `lr-...`.
        layers: Names from the input of the network to its output; by default they are sorted.

    Returns:
        The figure. Of more than seven layers those that change most are coloured and named.

    Raises:
        ValueError: If no norms were logged.

    >>> figure = plot_norms({"l2_norm/head": ([0, 50], [1.0, 1.2]), "lr-SGD": ([0, 50], [0.1, 0.05])})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['L2 norm of each layer', 'Learning rate']
    """
    panels = {
        ("L2 norm of each layer", "‖w‖"): curves_of(history, "l2_norm", layers),
        ("Weight decay in force", "λ"): _decay_curves(history),
        ("Learning rate", "lr"): _learning_rates(history),
    }
    panels = {words: curves for words, curves in panels.items() if curves}
    figure, rows = stacked_axes([2.8, *[1.3] * (len(panels) - 1)])
    for axes, ((title, ylabel), curves) in zip(rows, panels.items(), strict=True):
        style_axes(axes, title, ylabel)
        draw_curves(axes, curves)
        fit_scale(axes, curves, log=ylabel == "‖w‖")
    return figure


def plot_penalty(history: History, *, loss: str | None = None) -> Figure:
    """Draw the penalty lambda/2 ||w||^2 against the loss it stands beside, and beneath it their ratio.

    Where weight decay is decoupled, as in AdamW, no optimizer minimises their sum; the ratio then tells how the penalty
    would weigh in the loss.

    Args:
        history: The metrics of a training with `l2_penalty/<group>` or `l2_penalty/total`.
        loss: The name of the training loss in `history`; by default `train_loss` and its like are looked for. Without
            any the penalty is drawn alone.

    Raises:
        ValueError: If the penalty was not logged, or there is no metric named `loss`.

    >>> figure = plot_penalty({"l2_penalty/total": ([0, 50], [0.1, 0.2]), "train_loss": ([0, 50], [2.0, 1.0])})
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['L2 penalty against the training loss', 'Penalty relative to the loss']
    """
    groups = curves_of(history, "l2_penalty")
    total = history.get("l2_penalty/total") or next(iter(groups.values()))
    losses = _loss_of(history, loss)
    figure, rows = stacked_axes([2.6, 1.5] if losses else [2.6])
    style_axes(rows[0], "L2 penalty against the training loss" if losses else "L2 penalty")
    if losses:
        rows[0].plot(*losses, color="#8A9099", linewidth=1.5, label="training loss")
        _draw_ratio(rows[1], (total[0], _ratio(total, losses)))
    rows[0].plot(*total, color="black", linewidth=2.2, label="penalty λ/2 ‖w‖²")
    parts = {f"penalty of {name}": groups[name] for name in groups if len(groups) > 1 and any(groups[name][1])}
    draw_curves(rows[0], parts, among=[f"penalty of {name}" for name in groups], linestyle="--", linewidth=1.4)
    fit_scale(rows[0], {"total": total, "loss": losses or total})
    legend_beside(rows[0])
    return figure


def plot_update_ratios(history: History, *, layers: Sequence[str] | None = None) -> Figure:
    """Draw the update-to-weight ratio ||w_after - w_before|| / ||w_before|| of each layer.

    Args:
        history: The metrics of a training with `update_ratio/<layer>`.
        layers: Names from the input of the network to its output; by default they are sorted.

    Raises:
        ValueError: If no update ratios were logged.

    >>> plot_update_ratios({"update_ratio/head": ([0, 50], [0.01, 0.002])}).axes[0].get_title(loc="left")
    'How far a step moves each layer'
    """
    curves = {name: _thinned(curve) for name, curve in curves_of(history, "update_ratio", layers).items()}
    figure, (axes,) = stacked_axes([4.2])
    style_axes(axes, "How far a step moves each layer", "‖Δw‖ / ‖w‖")
    if len(curves) <= len(COLOURS):
        draw_curves(axes, curves)
    else:
        _draw_band(axes, curves)
    fit_scale(axes, curves)
    return figure


def _thinned(curve: Curve, most: int = 200) -> Curve:
    """Return medians over neighbouring steps, so that noise of many steps does not fill the picture."""
    size = math.ceil(len(curve[0]) / most)
    chunks = range(0, len(curve[0]), size)
    return curve[0][::size], [median(curve[1][start : start + size]) for start in chunks]


def _draw_band(axes: Axes, curves: History) -> None:
    """Draw where the layers lie, and by name the three with the largest and with the smallest median."""
    import numpy as np

    steps, grid = as_grid(curves)
    grid[np.isinf(grid)] = np.nan
    known = ~np.isnan(grid).all(axis=0)  # a training that diverged ends without numbers
    if not known.any():
        return
    steps, grid = steps[known], grid[:, known]
    for low, high, shade, words in ((0, 100, 0.12, "all"), (10, 90, 0.25, "middle 80 %")):
        edges = np.nanpercentile(grid, [low, high], axis=0)
        label = f"{words} of {len(curves)} layers" if low == 0 else words
        axes.fill_between(steps, *edges, color="black", alpha=shade, linewidth=0, label=label)
    axes.plot(steps, np.nanmedian(grid, axis=0), color="black", linewidth=2, label="median layer", zorder=3)
    by_size = sorted(curves, key=lambda name: -median(curves[name][1]))
    draw_curves(axes, {name: curves[name] for name in by_size[:3] + by_size[-3:]}, linewidth=1.1)


def _decay_curves(history: History) -> History:
    """Return lambda of each group; without our monitor, what LearningRateMonitor logs on request."""
    ours = {key.removeprefix("weight_decay/"): history[key] for key in history if key.startswith("weight_decay/")}
    return ours or {
        key.removeprefix("lr-").removesuffix("-weight_decay"): history[key]
        for key in history
        if key.startswith("lr-") and key.endswith("-weight_decay")
    }


def _learning_rates(history: History) -> History:
    extras = ("-weight_decay", "-momentum")
    names = [key for key in history if key.startswith("lr-") and not key.endswith(extras)]
    return {key.removeprefix("lr-"): history[key] for key in names}


def _loss_of(history: History, loss: str | None) -> Curve | None:
    if loss is not None and loss not in history:
        raise ValueError(
            f"The history has no '{loss}', but: {', '.join(sorted(history))}. Name the loss with `loss=...`."
        )
    # the longest name is the one by step, where a loss is logged by step and by epoch
    usual = sorted(filter(USUAL_LOSS.fullmatch, history), key=len)
    return history[loss] if loss else history[usual[-1]] if usual else None


def _ratio(penalty: Curve, losses: Curve) -> list[float]:
    """Return penalty / |loss| at the penalty's steps, with the loss last logged by then."""
    last = [losses[1][max(bisect_right(losses[0], step) - 1, 0)] for step in penalty[0]]
    return [value / abs(loss) if loss else 0.0 for value, loss in zip(penalty[1], last, strict=True)]


def _draw_ratio(axes: Axes, ratio: Curve) -> None:
    style_axes(axes, "Penalty relative to the loss", "penalty / loss")
    axes.plot(*ratio, color="black", linewidth=1.8)
    fit_scale(axes, {"ratio": ratio})
    if any(value > 1 for value in ratio[1]):
        top = axes.get_ylim()[1]
        axes.axhspan(1, top, color=COLOURS[1], alpha=0.12, linewidth=0, label="penalty above loss")
        axes.set_ylim(top=top)
        legend_beside(axes)
