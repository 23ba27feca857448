"""The four pictures of a search: the metric, the curves, the norm of the weights and the generalisation gap."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lightning_l2.plots.style import COLOURS, OTHERS, legend_beside, new_figure, style_axes
from lightning_l2.search.suggestion import SMALL, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_l2.search.trials import Trial

BEST, SUGGESTED, ZERO = COLOURS[0], COLOURS[1], "black"
GREY = "#8A9099"
# Between 0 and 1, so that a log axis would stretch what doesn't matter.
SHARES = re.compile(r"acc|auc|auroc|f1|iou|dice|precision|recall|r2|score", re.IGNORECASE)


def plot_metric(result: Comparison) -> Figure:
    """Draw the monitored metric against lambda, and beside it what decides: the difference to lambda = 0.

    Above are the mean and each seed, below the mean difference, paired by seed, with its standard error; where 0 was
    not tried, to the best. Trials that were stopped early are circles at the edge, since they have no last value, and
    failed ones crosses.
    """
    figure = new_figure(8.5, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    complete, seeds = _of_state(result, "complete"), result.plan.seeds
    _over_lambda(upper, result, f"{result.plan.monitor} against lambda", result.plan.monitor)
    _draw(upper, result, complete, lambda trial: [run.value for run in trial.runs])
    _choose_scale(upper, result, [run.value for trial in complete for run in trial.runs])
    edge = 0.98 if result.plan.mode == "min" else 0.02
    for state, marker, label in (("pruned", "o", "stopped early"), ("failed", "x", "failed")):
        if lambdas := [_place(trial, result) for trial in _of_state(result, state)]:
            at_edge = upper.get_xaxis_transform()
            style: dict[str, Any] = {"color": GREY, "markerfacecolor": "white", "transform": at_edge}
            upper.plot(lambdas, [edge] * len(lambdas), marker, label=label, **style)
    _mark(upper, result)
    zero = result.zero
    reference = "lambda = 0" if zero is not None else "the best"
    title = f"Difference to {reference}{', paired by seed' if seeds > 1 else ''}: above 0 is worse"
    _over_lambda(lower, result, title, "difference")
    lower.axhline(0, color=GREY, linewidth=0.8)
    others = [trial for trial in complete if trial is not (zero or result.best)]
    differences = [result.to_zero(trial) for trial in others]
    errors = [0.0 if math.isnan(away.error) else away.error for away in differences]
    label = "mean and its standard error" if seeds > 1 else "difference"
    bars: dict[str, Any] = {"color": "black", "markersize": 4, "capsize": 3, "linewidth": 1.2, "label": label}
    points = [_place(trial, result) for trial in others], [away.mean for away in differences]
    lower.errorbar(*points, yerr=errors, fmt=_line(others), **bars)
    small = max(median(errors or [0.0]), SMALL * abs(result.best.mean))
    if small and max((abs(value) for value in points[1]), default=0.0) > 20 * small:
        # What harms by far would press what decides flat.
        lower.set_yscale("symlog", linthresh=small)
    _mark(lower, result)
    for axes in (upper, lower):
        legend_beside(axes)
    upper.tick_params(labelbottom=False)
    upper.set_xlabel("")
    return figure


def plot_curves(result: Comparison) -> Figure:
    """Draw the training and the validation metric over the epochs, a curve for each lambda: the mean over its seeds.

    The suggested one is thick, those of trials that were stopped early are dotted, that of lambda = 0 is black.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    names = [name for name in (result.train_metric, result.plan.monitor) if name is not None]
    trials = [trial for state in ("pruned", "complete") for trial in _of_state(result, state)]
    curves = {name: [_mean_curve(trial, name) for trial in trials] for name in names}
    # Without the yellow that vanishes on white.
    colours = ListedColormap(colormaps["viridis"].resampled(256)(range(0, 230)))
    scale, suggested = LogNorm(*_ends(result)), result.suggestion.number
    figure = new_figure(5.0 * len(names) + 1.0, 4.6)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        style_axes(axes, name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for trial, curve in zip(trials, curves[name], strict=True):
            line: dict[str, Any] = {"linestyle": ":" if trial.state == "pruned" else "-", "linewidth": 1.5}
            line |= {"color": colours(scale(trial.weight_decay)), "zorder": 2.2} if trial.weight_decay else {}
            line |= {"linewidth": 3.5, "zorder": 2.5} if trial.number == suggested else {}
            line |= {} if trial.weight_decay else {"color": ZERO, "zorder": 2.6}
            axes.plot(range(1, len(curve) + 1), curve, marker="o" if len(curve) == 1 else None, **line)
    _choose_scale(panels[0], result, [value for several in curves.values() for curve in several for value in curve])
    figure.colorbar(ScalarMappable(scale, colours), ax=panels, label="lambda (weight decay)")
    legend = [Line2D([], [], color=GREY, linewidth=3.5, label=f"suggested: {result.weight_decay:.3g}")]
    if result.zero:
        legend.append(Line2D([], [], color=ZERO, linewidth=1.5, label="lambda = 0"))
    if any(trial.state == "pruned" for trial in trials):
        legend.append(Line2D([], [], color=GREY, linestyle=":", label="stopped early"))
    figure.legend(handles=legend, frameon=False, fontsize=8, loc="outside lower center", ncols=len(legend))
    return figure


def plot_norm(result: Comparison) -> Figure:
    """Draw the L2 norm of the trained weights against lambda.

    Raises:
        ValueError: If no norm was measured.
    """
    trials = [trial for trial in _of_state(result, "complete") if not math.isnan(trial.l2_norm)]
    if not trials:
        raise ValueError("No norm of the weights was measured. A fit function can return it as 'l2_norm'.")
    figure, axes = _one_panel(result, "L2 norm of the weights after training", "‖w‖")
    _draw(axes, result, trials, lambda trial: [run.l2_norm for run in trial.runs if run.l2_norm is not None])
    axes.set_ylim(0, 1.06 * max(run.l2_norm or 0.0 for trial in trials for run in trial.runs))
    _mark(axes, result)
    legend_beside(axes)
    return figure


def plot_gap(result: Comparison) -> Figure:
    """Draw the generalisation gap against lambda: how much worse the monitored metric is than the training's.

    Raises:
        ValueError: If there is no training metric to compare with.
    """
    train, monitor, sign = result.train_metric, result.plan.monitor, result.plan.sign
    if train is None:
        raise ValueError(f"No training metric belongs to {monitor!r}. Log one as {monitor.replace('val', 'train')!r}.")
    words = f"{monitor} - {train}" if sign > 0 else f"{train} - {monitor}"
    figure, axes = _one_panel(result, "Generalisation gap", words)
    trials = [trial for trial in _of_state(result, "complete") if all(train in run.metrics for run in trial.runs)]
    _draw(axes, result, trials, lambda trial: [sign * (run.value - run.metrics[train]) for run in trial.runs])
    axes.axhline(0, color=GREY, linewidth=0.8)
    _mark(axes, result)
    legend_beside(axes)
    return figure


def _one_panel(result: Comparison, title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = new_figure(8.5, 4.2)
    axes = figure.subplots()
    _over_lambda(axes, result, title, ylabel)
    return figure, axes


def _over_lambda(axes: Axes, result: Comparison, title: str, ylabel: str) -> None:
    """Make lambda's axis logarithmic, with a place for 0 apart where 0 was tried."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    low, high = _ends(result)
    style_axes(axes, title, ylabel)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * 1.3)
    axes.set_xlabel("lambda (weight decay)")
    if any(trial.weight_decay == 0 for trial in result.trials):
        zero = _zero_place(result)
        decades = [tick for tick in LogLocator().tick_values(low, high) if low / 1.3 <= tick <= high * 1.3]
        if len(decades) < 2:
            decades = [low, high]
        axes.set_xlim(zero / 1.3, high * 1.3)
        powers = [math.log10(tick) for tick in decades]
        words = [f"$10^{{{power:.0f}}}$" if power % 1 == 0 else f"{10**power:.2g}" for power in powers]
        axes.set_xticks([zero, *decades], ["0", *words])
        minor = [tick for tick in LogLocator(subs=range(2, 10)).tick_values(low, high) if low < tick <= high * 1.3]
        axes.xaxis.set_minor_locator(FixedLocator(minor))
        axes.xaxis.set_minor_formatter(NullFormatter())
        # no scale between 0 and the lowest lambda
        axes.axvspan(zero * 1.3, low / 1.3, color="white", zorder=0.9, linewidth=0)
        axes.axvline(math.sqrt(zero * low), color=GREY, linestyle=(0, (1, 3)), linewidth=1.0, zorder=1)


def _ends(result: Comparison) -> tuple[float, float]:
    tried = [trial.weight_decay for trial in result.trials if trial.weight_decay > 0] or [1e-3]
    low, high = result.plan.low, result.plan.high
    ends = min(tried) if low is None else low, max(tried) if high is None else high
    return ends if ends[0] < ends[1] else (ends[0] / 3, ends[1] * 3)


def _zero_place(result: Comparison) -> float:
    """Return where 0 is drawn on the log axis: an eighth of the range beneath its lower end."""
    low, high = _ends(result)
    return float(low / max((high / low) ** 0.125, 3.0))


def _place(trial: Trial, result: Comparison) -> float:
    return trial.weight_decay or _zero_place(result)


def _choose_scale(axes: Axes, result: Comparison, values: Sequence[float]) -> None:
    """Take a logarithmic axis where a loss spans so much that the small values would look alike."""
    finite = [value for value in values if math.isfinite(value)]
    is_loss = result.plan.mode == "min" and not SHARES.search(result.plan.monitor)
    if is_loss and finite and min(finite) > 0 and max(finite) / min(finite) > 4:
        axes.set_yscale("log")


def _of_state(result: Comparison, state: str) -> list[Trial]:
    trials = [trial for trial in result.trials if trial.state == state]
    return sorted(trials, key=lambda trial: trial.weight_decay)


def _draw(axes: Axes, result: Comparison, trials: Sequence[Trial], values: Callable[[Trial], list[float]]) -> None:
    """Draw the mean of each trial, 0 without a line to the others, and each seed."""
    several = result.plan.seeds > 1
    style: dict[str, Any] = {"color": "black", "markersize": 4, "linewidth": 1.2}
    label: str | None = "mean over the seeds" if several else "trial"
    for is_zero in (False, True):
        if part := [trial for trial in trials if (trial.weight_decay == 0) == is_zero]:
            places = [_place(trial, result) for trial in part]
            axes.plot(places, [fmean(values(trial)) for trial in part], _line(part), label=label, **style)
            label = None
    if several:
        points = [(_place(trial, result), value) for trial in trials for value in values(trial)]
        axes.plot(*zip(*points, strict=True), ".", color=OTHERS, zorder=1.9, label="each seed")


def _line(trials: Sequence[Trial]) -> str:
    """Return how to draw values against lambda: without a line where they differ in more than lambda."""
    return "o" if any(trial.others for trial in trials) else "o-"


def _mark(axes: Axes, result: Comparison) -> None:
    best, suggestion = result.best, result.suggestion
    same = best.number == suggestion.number
    label = f"best{' and suggested' if same else ''}: {best.weight_decay:.3g}"
    style: dict[str, Any] = (
        {"color": SUGGESTED, "zorder": 1.7} if same else {"color": BEST, "linestyle": "--", "zorder": 1.6}
    )
    axes.axvline(_place(best, result), label=label, **style)
    if not same:
        words = f"suggested: {suggestion.weight_decay:.3g}"
        axes.axvline(_place(suggestion, result), color=SUGGESTED, zorder=1.7, label=words)


def _mean_curve(trial: Trial, name: str) -> list[float]:
    curves = [run.curves[name] for run in trial.runs if name in run.curves]
    length = min((len(curve) for curve in curves), default=0)
    return [fmean(curve[epoch] for curve in curves) for epoch in range(length)]
