"""The picture of a schedule, before any training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_l2.arguments import check_at_least
from lightning_l2.plots.style import draw_curves, fit_scale, stacked_axes, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_l2.schedules.base import Schedule

POINTS = 1001


def plot_schedule(
    schedule: Schedule | Mapping[str, Schedule],
    *,
    weight_decay: Mapping[str, float] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    per_epoch: bool = False,
    lr: float | None = None,
) -> Figure:
    r"""Draw a schedule before any training, as it acts on each group, and what decay will leave of the weights.

    With the peak $\eta$ of the learning rate, decay leaves at least $\prod_t (1 - \eta \lambda_t)$.

    Args:
        schedule: A function of progress, 0 at the first optimizer step and 1 at the last one; or one for each group.
        weight_decay: Base lambda of each group, by the group's name; without it the multiplier itself is drawn.
        steps: Length of the training in optimizer steps, for the horizontal axis.
        epochs: Length of the training in epochs, for the horizontal axis where `steps` is not given.
        per_epoch: Hold the value within an epoch, as `WeightDecayScheduler(interval="epoch")` does; needs `epochs`.
        lr: Peak of the learning rate, or what else lambda is multiplied with in a step, to draw what decay leaves; with
            `weight_decay` and `steps`.

    Returns:
        The figure.

    Raises:
        ValueError: If a length is below 1, or `per_epoch` comes without `epochs`.

    >>> from lightning_l2.schedules import CosineSchedule
    >>> figure = plot_schedule(CosineSchedule(1.0, 10.0), weight_decay={"decay": 0.05, "no_decay": 0.0}, steps=1000)
    >>> figure.axes[0].get_xlabel()
    'optimizer step'
    """
    check_at_least(1, steps=steps, epochs=epochs)
    if per_epoch and epochs is None:
        raise ValueError("A schedule by epoch needs their number: give `epochs`.")
    groups = dict.fromkeys(schedule, 1.0) if isinstance(schedule, Mapping) else {"multiplier": 1.0}
    groups = groups if weight_decay is None else dict(weight_decay)
    schedules = {group: schedule[group] if isinstance(schedule, Mapping) else schedule for group in groups}
    name = ", ".join(dict.fromkeys(type(one).__name__ for one in schedules.values()))
    unit, length = _axis(steps, epochs)
    if (count := epochs if per_epoch else steps) is not None:
        schedules = {group: one.over(count) for group, one in schedules.items()}
    progress = [index / (POINTS - 1) for index in range(POINTS)]
    at = [length * point for point in progress]
    if per_epoch and epochs is not None:
        progress = [min(math.floor(point * epochs), epochs - 1) / max(epochs - 1, 1) for point in progress]
    curves = {group: (at, [base * schedules[group](point) for point in progress]) for group, base in groups.items()}
    shows_left = lr is not None and steps is not None and weight_decay is not None
    figure, (axes, *below) = stacked_axes([2.6, 1.8] if shows_left else [2.6])
    from matplotlib.ticker import AutoLocator

    words = ("Multiplier of weight decay", "multiplier") if weight_decay is None else ("Weight decay", "λ")
    style_axes(axes, f"{words[0]}: {name}", words[1])
    axes.set_xlabel(unit)
    if steps is None and epochs is None:
        axes.xaxis.set_major_locator(AutoLocator())
    draw_curves(axes, curves)
    fit_scale(axes, curves)
    if below and lr is not None and steps is not None:
        style_axes(below[0], f"Left of the weights by decay alone, at least (peak lr {lr:g})", "share")
        draw_curves(below[0], {name: (at, _left(lambdas, lr, steps)) for name, (_, lambdas) in curves.items()})
        below[0].set_ylim(-0.04, 1.06)
        below[0].set_xlabel(unit)
    return figure


def _left(lambdas: Sequence[float], lr: float, steps: int) -> list[float]:
    """Return what decay leaves up to each of the points of a schedule over so many steps."""
    logs = [math.log1p(-min(lr * value, 1 - 1e-12)) for value in lambdas]
    first, *rest = itertools.accumulate(logs)
    # the points stand for the steps between them
    return [math.exp((total - first / 2) * steps / len(lambdas)) for total in (first, *rest)]


def _axis(steps: int | None, epochs: int | None) -> tuple[str, float]:
    """Return the horizontal axis' name and where the last optimizer step lies on it."""
    if steps is not None:
        return "optimizer step", steps - 1.0
    return ("epoch", float(epochs)) if epochs is not None else ("progress of the training", 1.0)
