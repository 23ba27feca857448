"""What holds of every picture: words that can be read, labels, colours, and no trace in pyplot."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lightning_l2.plots import (
    plot_norm_heatmap,
    plot_norms,
    plot_penalty,
    plot_schedule,
    plot_update_ratios,
)
from lightning_l2.plots.style import COLOURS, draw_curves, label_steps, new_figure, row_labels, without_common_prefix
from lightning_l2.schedules import LinearSchedule, StepSchedule
from tests.figures import assert_readable, words_of
from tests.plots.pictured import FIVE, FLAT, MANY, history_of


@pytest.mark.parametrize("names", [FIVE, MANY, FLAT], ids=["5", "301", "300 flat"])
@pytest.mark.parametrize(
    "plot", [plot_norm_heatmap, plot_norms, plot_update_ratios, plot_penalty], ids=lambda plot: plot.__name__
)
def test_every_word_can_be_read(plot, names) -> None:
    options = {} if plot is plot_penalty else {"layers": names}
    figure = plot(history_of(names), **options)
    assert_readable(figure)
    for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
        assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes), "it hides no curve"


@pytest.mark.parametrize("values", [[float("nan")], [0.0], [1.0], [float("inf"), 1.0]])
def test_pictures_bear_what_a_broken_training_leaves(values) -> None:
    steps = list(range(len(values)))
    keys = ("l2_norm/a", "update_ratio/a", "l2_penalty/total", "train_loss")
    history = {key: (steps, values) for key in keys}
    for plot in (plot_norm_heatmap, plot_norms, plot_update_ratios, plot_penalty):
        words_of(plot(history))


def test_labels_name_blocks_where_layers_are_many() -> None:
    positions, labels, blocks = row_labels(MANY, 45)
    assert labels == [f"encoder.layers.{layer}" for layer in range(33)], "no room beside them for what is one row high"
    assert positions == [2 + 9 * layer + 4 for layer in range(33)]
    assert blocks[:4] == [1, 2, 11, 20]
    assert row_labels(FLAT, 45)[:2] == (list(range(0, 300, 7)), [f"layer_{number}" for number in range(0, 300, 7)])
    assert row_labels(["net.a", "net.b"], 45) == ([0, 1], ["a", "b"], [])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'Get it with `pip install "lightning_l2\[plots\]"`'):
        plot_schedule(StepSchedule([0.5], [2.0]))


def test_pictures_leave_no_trace_in_pyplot() -> None:
    from matplotlib import pyplot

    for plot in (plot_norm_heatmap, plot_norms, plot_penalty, plot_update_ratios):
        plot(history_of(FIVE))
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(("low", "high", "expected"), [(0.3, 11.0, ["0.5", "1", "2", "5", "10"]), (0.02, 50.0, None)])
def test_labels_of_a_short_log_axis_are_few_plain_numbers(low: float, high: float, expected: Any) -> None:
    figure = plot_penalty({"l2_penalty/total": ([0, 1], [low, high])})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    inside = [
        text.get_text()
        for text in axes.yaxis.get_ticklabels(which="both")
        if text.get_text() and axes.get_ylim()[0] <= text.get_position()[1] <= axes.get_ylim()[1]
    ]
    assert inside == expected if expected else 2 <= len(inside) <= 5
    assert_readable(figure)


def test_names_that_would_look_alike_when_cut_stay_whole() -> None:
    names = [f"encoder.{kind}.a_very_long_name_of_a_layer.weight" for kind in ("first", "second", "third")]
    assert len(set(without_common_prefix(names))) == 3
    alike = [f"model.start_of_a_name.{word}.and_the_end_of_it" for word in ("query", "value")]
    assert len(set(without_common_prefix([*alike, "head"]))) == 3


def test_a_short_training_has_whole_steps() -> None:
    figure = plot_norms({"l2_norm/head": ([0, 1, 2], [1.0, 1.1, 1.2])})
    assert [tick for tick in figure.axes[-1].get_xticks() if tick % 1] == []


def test_a_group_has_its_colour_in_every_picture() -> None:
    groups = {"head": 0.1, "decay": 0.05, "no_decay": 0.0}
    schedule = plot_schedule(LinearSchedule(1.0, 2.0), weight_decay=groups, steps=3)
    history = {f"weight_decay/{name}": ([0, 1], [value, value]) for name, value in sorted(groups.items())}
    logged = plot_norms({"l2_norm/layer": ([0, 1], [1.0, 1.1]), **history})
    colours = [
        {line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (schedule.axes[0], logged.axes[1])
    ]
    assert colours[0] == colours[1]
    assert len(set(colours[0].values())) == 3


def drawn(names: list[str], **options: object) -> dict[str, str]:
    axes = new_figure(4, 3).add_subplot()
    draw_curves(axes, {name: ([0, 1], [float(place), 1.0]) for place, name in enumerate(names)}, **options)
    return {str(line.get_label()): str(line.get_color()) for line in axes.get_lines()}


def test_a_colour_belongs_to_a_name_also_where_others_are_left_out() -> None:
    everything = drawn(["head", "decay", "frozen"])
    assert everything == {"decay": COLOURS[0], "frozen": COLOURS[1], "head": COLOURS[2]}
    assert drawn(["head", "decay"], among=["frozen", "decay", "head"]) == {
        "decay": COLOURS[0],
        "head": COLOURS[2],
    }


def test_equal_curves_have_the_colour_of_the_first_name() -> None:
    axes = new_figure(4, 3).add_subplot()
    draw_curves(axes, {name: ([0, 1], [float(name == "c")] * 2) for name in "bac"})
    assert {line.get_label(): line.get_color() for line in axes.get_lines()} == {"b, a": COLOURS[0], "c": COLOURS[2]}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.conv1", "model.fc"], ["conv1", "fc"]),
        (
            ["a_name_that_is_cut_in_its_middle.weight", "b"],
            ["a_name_that_is…s_middle.weight", "b"],
        ),
        # the middle is what differs
        (
            [*(f"model.encoder.layers.{layer}.self_attention.output.dense.weight" for layer in (0, 1)), "b"],
            ["…layers.0.self_attention.outp…", "…layers.1.self_attention.outp…", "b"],
        ),
        # so do both ends of what is left
        (
            [f"a.{'x' * 20}.{word}_{'y' * 30}_{end}_{'z' * 20}" for word in "pq" for end in "rs"],
            [f"{word}_{'y' * 30}_{end}_{'z' * 20}" for word in "pq" for end in "rs"],
        ),
    ],
)
def test_names_are_short_and_never_look_alike(names: list[str], labels: list[str]) -> None:
    found = without_common_prefix(names)
    assert found == labels
    assert len(set(found)) == len(names)


@pytest.mark.parametrize(("last", "ticks"), [(3, [0, 1, 2, 3]), (570, [0, 100, 200, 300, 400, 500])])
def test_steps_are_whole_and_round(last: int, ticks: list[int]) -> None:
    axes = new_figure(8, 3).add_subplot()
    label_steps(axes)
    axes.set_xlim(0, last)
    assert [tick for tick in axes.get_xticks() if 0 <= tick <= last] == ticks
    assert axes.get_xlabel() == "optimizer step"
