"""The four pictures of a search: the metric, the curves, the norm of the weights and the generalisation gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_l2.plots.style import COLOURS, OTHERS, legend_beside, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_l2.search.result import SearchResult
    from lightning_l2.search.suggestion import Trial

BEST, SUGGESTED = COLOURS[0], COLOURS[1]
GREY = "#8A9099"


def plot_metric(result: SearchResult) -> Figure:
    """Draw the monitored metric against lambda on a log axis: mean and spread over the seeds, and each seed.

    Trials that were stopped early are circles at the edge, since they have no last value, and failed ones crosses.

    Args:
        result: What a search found, with a complete trial at least.
    """
    figure, axes = _over_lambda(result, f"{result.plan.monitor} against lambda", result.plan.monitor)
    complete = _by_lambda(result, "complete")
    spreads = [0.0 if math.isnan(trial.spread) else trial.spread for trial in complete]
    values = [trial.weight_decay for trial in complete], [trial.mean for trial in complete]
    label = "mean and standard deviation over the seeds" if result.plan.seeds > 1 else "trial"
    bars: dict[str, Any] = {"color": "black", "markersize": 4, "capsize": 3, "linewidth": 1.2, "label": label}
    axes.errorbar(*values, yerr=spreads, fmt=_line(complete), **bars)
    if result.plan.seeds > 1:
        _draw_seeds(axes, complete, lambda trial: [run.value for run in trial.runs])
    _choose_scale(axes, [run.value for trial in complete for run in trial.runs])
    edge = 0.98 if result.plan.mode == "min" else 0.02
    for state, marker, label in (("pruned", "o", "stopped early"), ("failed", "x", "failed")):
        lambdas = [trial.weight_decay for trial in _by_lambda(result, state)]
        if lambdas:
            style: dict[str, Any] = {"color": GREY, "markerfacecolor": "white", "transform": axes.get_xaxis_transform()}
            axes.plot(lambdas, [edge] * len(lambdas), marker, label=label, **style)
    _mark(axes, result)
    return figure


def plot_curves(result: SearchResult) -> Figure:
    """Draw the training and the validation metric over the epochs, a curve for each lambda: the mean over its seeds.

    The suggested one is thick, those of trials that were stopped early are dotted.

    Args:
        result: What a search found, with a complete trial at least.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.lines import Line2D

    names = [name for name in (result.train_metric, result.plan.monitor) if name is not None]
    trials = [trial for state in ("pruned", "complete") for trial in _by_lambda(result, state)]
    curves = {name: [_mean_curve(trial, name) for trial in trials] for name in names}
    # Without the yellow that vanishes on white.
    colours = ListedColormap(colormaps["viridis"].resampled(256)(range(0, 230)))
    scale, suggested = LogNorm(result.plan.low, result.plan.high), result.suggestion.number
    figure = new_figure(5.0 * len(names) + 1.0, 4.2)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        style_axes(axes, name)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for trial, curve in zip(trials, curves[name], strict=True):
            line = ":" if trial.state == "pruned" else "-"
            width = 3.5 if trial.number == suggested else 1.5
            marker, colour = "o" if len(curve) == 1 else None, colours(scale(trial.weight_decay))
            axes.plot(range(1, len(curve) + 1), curve, line, linewidth=width, marker=marker, color=colour)
    _choose_scale(panels[0], [value for several in curves.values() for curve in several for value in curve])
    figure.colorbar(ScalarMappable(scale, colours), ax=panels, label="lambda (weight decay)")
    legend = [Line2D([], [], color=GREY, linewidth=3.5, label=f"suggested: {result.weight_decay:.3g}")]
    if any(trial.state == "pruned" for trial in trials):
        legend.append(Line2D([], [], color=GREY, linestyle=":", label="stopped early"))
    panels[-1].legend(handles=legend, frameon=False, fontsize=8)
    return figure


def plot_norm(result: SearchResult) -> Figure:
    """Draw the L2 norm of the weights that decay against lambda.

    Args:
        result: What a search found.

    Raises:
        ValueError: If no norm was measured.
    """
    trials = [trial for trial in _by_lambda(result, "complete") if not math.isnan(trial.l2_norm)]
    if not trials:
        raise ValueError("No norm of the weights was measured. A fit function can return it as 'l2_norm'.")
    figure, axes = _over_lambda(result, "L2 norm of the weights that decay, after training", "‖w‖")
    _draw_means(axes, trials, lambda trial: [run.l2_norm for run in trial.runs if run.l2_norm is not None])
    axes.set_ylim(bottom=0)
    _mark(axes, result)
    return figure


def plot_gap(result: SearchResult) -> Figure:
    """Draw the generalisation gap against lambda: how much worse the monitored metric is than the training's.

    Args:
        result: What a search found.

    Raises:
        ValueError: If there is no training metric to compare with.
    """
    train = result.train_metric
    if train is None:
        raise ValueError(
            f"No training metric belongs to {result.plan.monitor!r}. "
            f"Log one as {result.plan.monitor.replace('val', 'train')!r}."
        )
    figure, axes = _over_lambda(result, f"Generalisation gap: {result.plan.monitor} against {train}", "gap")
    sign = result.plan.sign
    trials = [trial for trial in _by_lambda(result, "complete") if all(train in run.metrics for run in trial.runs)]
    _draw_means(axes, trials, lambda trial: [sign * (run.value - run.metrics[train]) for run in trial.runs])
    axes.axhline(0, color=GREY, linewidth=0.8)
    _mark(axes, result)
    return figure


def _over_lambda(result: SearchResult, title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(8.5, 4.2)
    axes = figure.subplots()
    style_axes(axes, title, ylabel)
    axes.set_xscale("log")
    axes.set_xlim(result.plan.low / 1.3, result.plan.high * 1.3)
    axes.set_xlabel("lambda (weight decay)")
    return figure, axes


def _choose_scale(axes: Axes, values: Sequence[float]) -> None:
    """Take a logarithmic axis where positive values span so much that the small ones would look alike."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 4:
        axes.set_yscale("log")


def _by_lambda(result: SearchResult, state: str) -> list[Trial]:
    trials = [trial for trial in result.trials if trial.state == state]
    return sorted(trials, key=lambda trial: trial.weight_decay)


def _draw_means(axes: Axes, trials: Sequence[Trial], values: Callable[[Trial], list[float]]) -> None:
    means = [fmean(values(trial)) for trial in trials]
    style: dict[str, Any] = {"color": "black", "markersize": 4, "linewidth": 1.2, "label": "mean over the seeds"}
    axes.plot([trial.weight_decay for trial in trials], means, _line(trials), **style)
    _draw_seeds(axes, trials, values)


def _draw_seeds(axes: Axes, trials: Sequence[Trial], values: Callable[[Trial], list[float]]) -> None:
    points = [(trial.weight_decay, value) for trial in trials for value in values(trial)]
    axes.plot(*zip(*points, strict=True), ".", color=OTHERS, zorder=1, label="each seed")


def _line(trials: Sequence[Trial]) -> str:
    """Return how to draw values against lambda: without a line where they differ in more than lambda."""
    return "o" if any(trial.others for trial in trials) else "o-"


def _mark(axes: Axes, result: SearchResult) -> None:
    best, suggestion = result.best, result.suggestion
    same = best.number == suggestion.number
    label = f"best{' and suggested' if same else ''}: {best.weight_decay:.3g}"
    style: dict[str, Any] = {"color": SUGGESTED} if same else {"color": BEST, "linestyle": "--"}
    axes.axvline(best.weight_decay, label=label, zorder=0.5, **style)
    if not same:
        words = f"suggested: {suggestion.weight_decay:.3g}"
        axes.axvline(suggestion.weight_decay, color=SUGGESTED, zorder=0.5, label=words)
    legend_beside(axes)


def _mean_curve(trial: Trial, name: str) -> list[float]:
    curves = [run.curves[name] for run in trial.runs if name in run.curves]
    length = min((len(curve) for curve in curves), default=0)
    return [fmean(curve[epoch] for curve in curves) for epoch in range(length)]
