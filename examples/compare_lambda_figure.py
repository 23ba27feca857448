"""The picture of `compare_lambda.py`: nine panels that say what lambda does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_l2.plots.style import COLOURS, GRID, OTHERS, new_figure

if TYPE_CHECKING:
    import torch
    from compare_lambda import Run
    from matplotlib.axes import Axes

BLUE, RED, GREEN, PURPLE = COLOURS[:4]
TRAIN, HELD_OUT = "#8A9099", BLUE


def draw(
    runs: Mapping[float, Run],
    best: float,
    others: Mapping[str, Run],
    ridge: tuple[Sequence[float], Sequence[Sequence[float]], Sequence[Sequence[float]]],
) -> Any:
    """Return the figure.

    Args:
        runs: A training by its lambda, ascending, 0 first.
        best: The lambda with the lowest loss on held-out digits.
        others: A training by the name of what regularised it.
        ridge: Strengths of ridge regressions, their coefficients by WeightDecay, and by scikit-learn.
    """
    figure = new_figure(13, 11)
    figure.suptitle("What λ does: 60 handwritten digits to learn from, 600 to judge by", fontsize=15, fontweight="bold")
    grid = figure.subplots(3, 3)
    three = {"too little": (0.0, RED), "about right": (best, GREEN), "too much": (max(runs), PURPLE)}
    words = ("learned by heart", "learned", "hardly learned")
    highest = 1.15 * max(max(run.history["val_loss"][1]) for run in runs.values())
    for axes, (title, (weight_decay, colour)), word in zip(grid[0], three.items(), words, strict=True):
        draw_losses(axes, runs[weight_decay], highest)
        decorate(axes, f"λ = {weight_decay:g}, {title}: {word}", "training step", "loss", colour)
    draw_choice(grid[1, 0], runs, three)
    draw_norms(grid[1, 1], runs, three)
    weights = {f"λ = {value:g}": (runs[value].weights, colour) for value, colour in three.values()}
    draw_weights(grid[1, 2], weights, 0.005, "smaller than 0.005")
    decorate(grid[1, 2], "Larger λ: weights closer to 0", "weight", "number of weights")
    draw_errors(grid[2, 0], {"nothing": runs[0.0], **others})
    kinds = {"L2": GREEN, "L1": COLOURS[4], "dropout": COLOURS[5]}
    draw_weights(grid[2, 1], {name: (others[name].weights, colour) for name, colour in kinds.items()}, 0.0, "exactly 0")
    decorate(grid[2, 1], "L2 and dropout stay dense, L1 is sparse", "weight", "number of weights")
    draw_ridge(grid[2, 2], *ridge)
    return figure


def decorate(axes: Axes, title: str, xlabel: str, ylabel: str, colour: str = "black") -> None:
    """Give a panel its words and a faint grid."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colour)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def draw_losses(axes: Axes, run: Run, highest: float) -> None:
    """Draw both losses over the steps, and the gap between them."""
    steps, held_out = run.history["val_loss"]
    train = dict(zip(*run.history["train_loss"], strict=True))
    axes.fill_between(steps, [train[step] for step in steps], held_out, color=HELD_OUT, alpha=0.12, linewidth=0)
    axes.plot(steps, held_out, color=HELD_OUT, linewidth=2.2, label="on held-out digits")
    axes.plot(*run.history["train_loss"], color=TRAIN, linewidth=2.2, label="on the 60 samples")
    axes.set_ylim(0, highest)
    axes.legend(frameon=False, fontsize=9)


def draw_choice(axes: Axes, runs: Mapping[float, Run], three: Mapping[str, tuple[float, str]]) -> None:
    """Draw the final losses against lambda."""
    places = places_of(list(runs))
    for metric, colour, label in (
        ("val_loss", HELD_OUT, "on held-out digits"),
        ("train_loss", TRAIN, "on the samples"),
    ):
        axes.plot(places, [run.last(metric) for run in runs.values()], "o-", color=colour, linewidth=2.2, label=label)
    for weight_decay, colour in three.values():
        place = places[list(runs).index(weight_decay)]
        axes.axvline(place, color=colour, linewidth=8, alpha=0.2, zorder=0)
    axes.set_xticks(places, [f"{value:g}" for value in runs], fontsize=8)
    top = 1.2 * axes.get_ylim()[1]
    axes.set_ylim(0, top)
    for place, word, side in ((0.2, "← overfit", "left"), (places[-1] - 0.2, "underfit →", "right")):
        axes.annotate(word, (place, 0.97 * top), ha=side, va="top", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0.03, 0.25))
    decorate(axes, "The best λ lies between", "λ", "loss at the end")


def places_of(lambdas: Sequence[float]) -> list[int]:
    """Return even places: the lambdas are about even on a log scale, which has no place for 0."""
    return list(range(len(lambdas)))


def draw_norms(axes: Axes, runs: Mapping[float, Run], three: Mapping[str, tuple[float, str]]) -> None:
    """Draw the norm of the weights that decay over the steps, one curve a lambda."""
    colours = dict(three.values())
    curves = {value: run.history["l2_norm/decay"] for value, run in runs.items()}
    for weight_decay, (steps, norms) in curves.items():
        chosen = weight_decay in colours
        axes.plot(steps, norms, color=colours.get(weight_decay, OTHERS), linewidth=2.2 if chosen else 1.2)
    top = 1.06 * max(max(norms) for _, norms in curves.values())
    axes.set_ylim(0, top)
    heights = spread([norms[-1] for _, norms in curves.values()], 0.05 * top)
    for (weight_decay, (steps, _)), height in zip(curves.items(), heights, strict=True):
        axes.annotate(f"{weight_decay:g}", (steps[-1], height), (5, -3), textcoords="offset points", fontsize=8)
    decorate(axes, "Larger λ: smaller norm", "training step", "‖w‖ of the weights")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return values at least a gap apart, in the same order, for words beside curves."""
    heights = list(values)
    by_height = sorted(range(len(heights)), key=heights.__getitem__)
    for below, above in itertools.pairwise(by_height):
        heights[above] = max(heights[above], heights[below] + gap)
    return heights


def draw_weights(axes: Axes, weights: Mapping[str, tuple[torch.Tensor, str]], zero: float, words: str) -> None:
    """Draw how the weights are distributed, and write how many are 0 or next to it.

    Args:
        axes: Where to draw.
        weights: Weights and a colour by name.
        zero: The largest size of a weight that counts as 0.
        words: What such a weight is called.
    """
    reach = 0.6
    for name, (values, colour) in weights.items():
        zeros = (values.abs() <= zero).float().mean().item()
        style = {"histtype": "step", "linewidth": 2.0, "color": colour, "label": f"{name}: {zeros:.0%} {words}"}
        axes.hist(values.tolist(), bins=81, range=(-reach, reach), log=True, **style)
    axes.set_ylim(0.7, 3e6)  # room for the legend
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw_errors(axes: Axes, runs: Mapping[str, Run]) -> None:
    """Draw the loss on held-out digits by what regularised, and write how many it gets wrong."""
    losses = [run.last("val_loss") for run in runs.values()]
    bars = axes.barh(list(runs), losses, color=(RED, GREEN, COLOURS[4], COLOURS[5], BLUE), height=0.6)
    words = [f"{run.last('val_loss'):.2f}, {run.last('val_error'):.0%} wrong" for run in runs.values()]
    axes.bar_label(bars, words, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(losses))
    decorate(axes, "L2 beside L1 and dropout", "loss on held-out digits", "")
    axes.grid(visible=False, axis="y")


def draw_ridge(
    axes: Axes, alphas: Sequence[float], ours: Sequence[Sequence[float]], ridge: Sequence[Sequence[float]]
) -> None:
    """Draw the coefficients against the strength, lines by scikit-learn and dots by WeightDecay."""
    axes.plot(alphas, ridge, color=TRAIN, linewidth=1.2)
    axes.plot(alphas, ours, "o", color=BLUE, markersize=3.5)
    axes.plot([], [], color=TRAIN, label="scikit-learn's Ridge")
    axes.plot([], [], "o", color=BLUE, markersize=3.5, label="WeightDecay")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=9)
    decorate(axes, "On a linear model it is ridge regression", "alpha = λ N / 2", "coefficients (diabetes data)")
