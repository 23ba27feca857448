"""Norms, penalties and update ratios over a training, read back from the figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.colors import to_hex

from lightning_l2.plots import (
    plot_norm_heatmap,
    plot_norms,
    plot_penalty,
    plot_update_ratios,
)
from tests.figures import labelled_lines
from tests.plots.pictured import FIVE, FLAT, history_of, in_words


@pytest.mark.parametrize(
    ("plot", "prefix"),
    [(plot_norm_heatmap, "l2_norm"), (plot_norms, "l2_norm"), (plot_update_ratios, "update_ratio")],
)
def test_a_quantity_that_was_not_logged_is_an_error(plot, prefix) -> None:
    with pytest.raises(ValueError, match=rf"no '{prefix}/...' metric, but: loss. L2NormMonitor logs it"):
        plot({"loss": ([0], [1.0])})


def test_norms_stand_over_lambda_and_learning_rate() -> None:
    history = history_of(FIVE[:3])
    norms, decay, rates = plot_norms(history, layers=FIVE[:3]).axes
    assert labelled_lines(norms) == {name: history[f"l2_norm/{name}"] for name in FIVE[:3]}
    assert labelled_lines(decay) == {name: history[f"weight_decay/{name}"] for name in ("decay", "no_decay", "head")}
    assert labelled_lines(rates) == {"AdamW/decay and 2 more": history["lr-AdamW/decay"]}
    assert decay.get_ylim()[0] < 0, "a lambda of 0 can be seen"


def test_lambda_from_the_learning_rate_monitor_is_drawn_too() -> None:
    curve = ([0, 1], [0.1, 0.2])
    momentum = ([0, 1], [0.9, 0.8])
    history = {"l2_norm/a": curve, "lr-SGD": curve, "lr-SGD-weight_decay": curve, "lr-SGD-momentum": momentum}
    _, decay, rates = plot_norms(history).axes
    assert [list(line.get_ydata()) for line in decay.get_lines()] == [[0.1, 0.2]]
    assert len(rates.get_lines()) == 1
    assert len(plot_norms({"l2_norm/a": curve}).axes) == 1, "panels without metrics are left out"


def test_of_many_layers_those_that_change_most_have_a_name() -> None:
    factors = {f"layer{index}": 1 + index / 10 for index in range(12)}
    history = {f"l2_norm/{name}": ([0, 1], [5.0, 5.0 * factor]) for name, factor in factors.items()}
    (axes,) = plot_norms(history).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["layer6", "layer7", "layer8", "layer9", "layer10", "layer11", "6 that change less"]
    assert len({to_hex(line.get_color()) for line in axes.get_lines()}) == 7


def test_penalty_stands_against_the_loss() -> None:
    history = {
        "l2_penalty/decay": ([1, 3, 5], [1.0, 2.0, 3.0]),
        "l2_penalty/head": ([1, 3, 5], [1.0, 1.0, 1.0]),
        "l2_penalty/no_decay": ([1, 3, 5], [0.0, 0.0, 0.0]),
        "l2_penalty/total": ([1, 3, 5], [2.0, 3.0, 4.0]),
        "my_loss": ([2, 3, 4], [8.0, -4.0, 2.0]),
    }
    above, below = plot_penalty(history, loss="my_loss").axes
    lines = labelled_lines(above)
    assert set(lines) == {"training loss", "penalty λ/2 ‖w‖²", "penalty of decay", "penalty of head"}
    assert lines["penalty λ/2 ‖w‖²"] == ([1, 3, 5], [2.0, 3.0, 4.0])
    assert list(below.get_lines()[0].get_ydata()) == [2 / 8, 3 / 4, 4 / 2], "by the loss last logged, in magnitude"
    assert below.get_legend() is not None, "above 1 the penalty outweighs the loss"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train_loss"], "train_loss"),
        (["train_loss_epoch", "train_loss", "train_loss_step", "val_loss"], "train_loss_step"),
        (["loss", "val/loss"], "loss"),
        (["training/loss"], "training/loss"),
        (["val_loss", "objective"], None),
    ],
)
def test_the_training_loss_is_found_by_its_usual_names(names, found) -> None:
    history = {name: ([0], [number + 1.0]) for number, name in enumerate(names)}
    axes = plot_penalty({"l2_penalty/total": ([0], [1.0]), **history}).axes
    shown = labelled_lines(axes[0])
    assert shown.get("training loss") == (history[found] if found else None)
    assert len(axes) == (2 if found else 1)


def test_a_loss_that_was_not_logged_is_an_error() -> None:
    history = {"l2_penalty/total": ([1], [1.0]), "objective": ([1], [1.0])}
    with pytest.raises(ValueError, match=r"no 'los', but: l2_penalty/total, objective. Name the loss with `loss=...`"):
        plot_penalty(history, loss="los")


def test_ratios_of_many_steps_are_medians() -> None:
    values = [float(index % 3) for index in range(600)]
    (axes,) = plot_update_ratios({"update_ratio/fc": (list(range(600)), values)}).axes
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == list(range(0, 600, 3))
    assert set(line.get_ydata()) == {1.0}


def test_ratios_of_many_layers_are_a_band_with_its_ends_named() -> None:
    history = {f"update_ratio/layer{index}": ([0, 1], [index + 1.0] * 2) for index in range(11)}
    (axes,) = plot_update_ratios(history).axes
    lines = labelled_lines(axes)
    assert lines.pop("median layer")[1] == [6.0, 6.0]
    assert set(lines) == {f"layer{index}" for index in (0, 1, 2, 8, 9, 10)}
    edges = [band.get_paths()[0].get_extents().intervaly.tolist() for band in axes.collections]
    assert edges == [[1.0, 11.0], [2.0, 10.0]], "all layers, and the middle 80 %"


def test_penalty_above_the_loss_is_marked_although_the_first_is_not_a_number() -> None:
    history = {"l2_penalty/total": ([0, 1], [math.nan, 5.0]), "train_loss": ([0, 1], [1.0, 1.0])}
    assert "penalty above loss" in in_words(plot_penalty(history))


@pytest.mark.parametrize("known", [[], [0.1]], ids=["at no step", "at one step"])
@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_ratios_of_a_training_that_diverged_are_drawn(known: list[float], unknown: float, tmp_path: Any) -> None:
    values = [*known, unknown, unknown]
    history = {f"update_ratio/{name}": (list(range(len(values))), values) for name in FIVE + FLAT[:5]}
    plot_update_ratios(history).savefig(tmp_path / "ratios.png")
