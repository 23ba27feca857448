"""What all pictures share: figures without pyplot, colours that everyone can tell apart, names that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from lightning_l2.extras import brought_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_l2.plots.history import Curve, History

# Okabe and Ito's colours, without the yellow that vanishes on white; black last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OTHERS = "#C9CDD2"
GRID = "#E6E8EB"
LABEL_WIDTH = 30


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, outside pyplot, so that no window and no backend is involved.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    with brought_by("plots", "Pictures need"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def stacked_axes(heights: Sequence[float], width: float = 8.5) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel above the other, of heights in inches, over one axis of optimizer steps."""
    figure = new_figure(width, sum(heights) + 0.5 * len(heights))
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    rows: list[Axes] = list(grid[:, 0])
    label_steps(rows[-1])
    return figure, rows


def label_steps(axes: Axes) -> None:
    """Make the horizontal axis one of optimizer steps, of which there are no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def style_axes(axes: Axes, title: str, ylabel: str = "") -> None:
    """Give axes their words, a faint grid and no box."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def draw_curves(axes: Axes, curves: History, *, among: Collection[str] = (), **line: Any) -> None:
    """Draw curves and name them beside the axes: all of up to seven, of more the ones that change most.

    Equal curves would hide each other, so they become one that carries all names.

    Args:
        axes: Where to draw.
        curves: Name -> (steps, values).
        among: All names that have a colour, also those that this picture leaves out; by default those of the curves.
        line: More options of `Axes.plot` for the curves that are named.
    """
    merged = _merge_equal(curves)
    named = merged
    if len(merged) > len(COLOURS):
        named = sorted(merged, key=lambda curve: _change(curve[2][1]))[1 - len(COLOURS) :]
    # By name, so that a group has its colour in every picture, whatever it stands beside there.
    names = {*curves, *among}
    coloured = names if len(names) <= len(COLOURS) else {name for name, _, _ in named}
    colours = dict(zip(sorted(coloured), COLOURS, strict=False))
    for name, label, (steps, values) in (c for c in merged if c in named):
        style: dict[str, Any] = {"color": colours[name], "linewidth": 1.8, "zorder": 2.5, **line}
        axes.plot(steps, values, label=label, marker="o" if len(steps) == 1 else None, **style)
    for index, (_, _, (steps, values)) in enumerate(c for c in merged if c not in named):
        words = None if index else f"{len(merged) - len(named)} that change less"
        axes.plot(steps, values, color=OTHERS, linewidth=0.8, zorder=2, label=words)
    if len(curves) > 1:
        legend_beside(axes)


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8, borderaxespad=0)


def fit_scale(axes: Axes, curves: History, *, log: bool = True) -> None:
    """Take a vertical axis from 0, or a logarithmic one where positive values span more than a factor of 30."""
    values = [value for _, series in curves.values() for value in series if math.isfinite(value)]
    if log and values and min(values) > 0 and max(values) / min(values) > 30:
        _label_log_axis(axes, max(values) / min(values))
    elif values and min(values) >= 0:
        top = max(values) or 1.0
        axes.set_ylim(-0.04 * top, 1.06 * top)  # below 0, so that a curve at 0 is seen


def without_common_prefix(names: Sequence[str]) -> list[str]:
    """Return names without the leading dotted parts that all share, and with the middle of long ones left out.

    A number keeps the word before it.

    >>> without_common_prefix(["model.conv1", "model.fc"])
    ['conv1', 'fc']
    >>> without_common_prefix(["model.layers.0.fc", "model.layers.1.fc"])
    ['layers.0.fc', 'layers.1.fc']
    """
    parts = [name.split(".") for name in names]
    common = _shared(parts)
    if common and any(part[common].isdigit() for part in parts):
        common -= 1
    labels = [".".join(part[common:]) for part in parts]
    # What would look alike loses its beginning in place of its middle, and stays whole where that doesn't help.
    for elide in (_elide_middle, _elide_beginning):
        elided = [elide(label, labels) for label in labels]
        if len(set(elided)) == len(set(labels)):
            return elided
    return labels


def row_labels(names: Sequence[str], limit: int) -> tuple[list[float], list[str], list[int]]:
    """Return where to write which names beside rows, and where to draw lines between blocks.

    Up to `limit` rows carry their own names. More are labelled by the deepest common prefix that leaves at most `limit`
    blocks of neighbours, such as `encoder.layer.7`; names without such a structure by every n-th of them.

    Args:
        names: Dotted names, one a row.
        limit: How many labels there is room for.

    Returns:
        Positions, labels, and the first row of each block but the first.
    """
    if len(names) <= limit:
        return list(range(len(names))), without_common_prefix(names), []
    for depth in range(max(name.count(".") for name in names), 0, -1):
        prefixes = [".".join(name.split(".")[:depth]) for name in names]
        blocks = [list(rows) for _, rows in itertools.groupby(range(len(names)), key=prefixes.__getitem__)]
        if limit / 8 < len(blocks) <= limit:
            labels = without_common_prefix([prefixes[rows[0]] for rows in blocks])
            shown = _apart(blocks, len(names) / limit)
            return [_middle(blocks[i]) for i in shown], [labels[i] for i in shown], [rows[0] for rows in blocks[1:]]
    every = range(0, len(names), math.ceil(len(names) / limit))
    labels = without_common_prefix(names)
    return list(every), [labels[row] for row in every], []


def _label_log_axis(axes: Axes, span: float) -> None:
    """Write few numbers beside a logarithmic axis; on short ones matplotlib's own overlap in a low panel."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    if span < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _apart(blocks: Sequence[Sequence[int]], gap: float) -> list[int]:
    """Return which blocks get a label, the largest first, so that no two labels are closer than `gap` rows."""
    shown: list[int] = []
    for index in sorted(range(len(blocks)), key=lambda i: -len(blocks[i])):
        if all(abs(_middle(blocks[index]) - _middle(blocks[other])) >= gap for other in shown):
            shown.append(index)
    return sorted(shown)


def _middle(rows: Sequence[int]) -> float:
    return (rows[0] + rows[-1]) / 2


def _merge_equal(curves: History) -> list[tuple[str, str, Curve]]:
    """Return the first name, the label and the values of curves that differ."""
    names: dict[tuple[tuple[float, ...], tuple[float, ...]], dict[str, str]] = {}
    for name, label in zip(curves, without_common_prefix(list(curves)), strict=True):
        steps, values = curves[name]
        names.setdefault((tuple(steps), tuple(values)), {})[name] = label
    return [(min(labels), _join(list(labels.values())), curve) for curve, labels in names.items()]


def _change(values: Sequence[float]) -> float:
    """Return by how many factors of e a curve moves; curves that touch zero or less by their range."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    return math.log(high / low) if low > 0 else high - low


def _join(names: Sequence[str]) -> str:
    together = ", ".join(names)
    return together if len(together) <= LABEL_WIDTH or len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Return how many leading words all names share, the last one of each aside."""
    count = 0
    while len(parts) > 1 and all(len(part) > count + 1 for part in parts) and len({p[count] for p in parts}) == 1:
        count += 1
    return count


def _elide_middle(name: str, others: Sequence[str]) -> str:
    keep = LABEL_WIDTH // 2
    return name if len(name) <= LABEL_WIDTH else f"{name[: keep - 1]}…{name[-keep:]}"


def _elide_beginning(name: str, others: Sequence[str]) -> str:
    """Leave out what other long names begin with too, but for the last word, and an end that is still too long."""
    shared = _shared([other.split(".") for other in others if len(other) > LABEL_WIDTH])
    kept = ".".join(name.split(".")[max(shared - 1, 0) :])
    if len(name) <= LABEL_WIDTH or len(kept) == len(name):
        return name
    return f"…{kept}" if len(kept) < LABEL_WIDTH else f"…{kept[: LABEL_WIDTH - 2]}…"
