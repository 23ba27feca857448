"""What the pictures show, read back from the figures; expected values are written down or come from closed forms."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.colors import to_hex

from lightning_l2.plots import (
    plot_histograms,
    plot_norm_heatmap,
    plot_norms,
    plot_penalty,
    plot_schedule,
    plot_update_ratios,
    preview,
    read_history,
)
from lightning_l2.plots.history import curves_of
from lightning_l2.plots.style import row_labels, without_common_prefix
from lightning_l2.schedules import CosineSchedule, LinearSchedule, StepSchedule
from tests.figures import assert_readable, labelled_lines, words_of

PARTS = ("ln_1", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "ln_2", "mlp.fc1", "mlp.fc2", "gate")
FIVE = ["conv1", "bn1", "conv2", "bn2", "a_classifier_head_with_quite_a_long_name"]
TRANSFORMER = [f"model.encoder.layers.{layer}.{part}" for layer in range(33) for part in PARTS]
MANY = ["model.embeddings.tokens", "model.embeddings.positions", *TRANSFORMER, "model.norm", "model.head"]
FLAT = [f"layer_{number}" for number in range(300)]


def history_of(names: list[str], steps: int = 40) -> dict[str, tuple[list[int], list[float]]]:
    """Norms that grow by a rate of their own, lambda on a ramp, and the rest that goes with it."""
    at = [10 * step + 9 for step in range(steps)]
    history = {}
    for index, name in enumerate(names):
        rate = math.sin(index + 1.0)
        history[f"l2_norm/{name}"] = at, [(index % 7 + 1) * math.exp(rate * step / steps) for step in range(steps)]
        history[f"update_ratio/{name}"] = at, [1e-3 * (index % 5 + 1) / (step + 1) for step in range(steps)]
    history["l2_norm/total"] = at, [10.0] * steps
    for group, base in {"decay": 0.1, "no_decay": 0.0, "head": 0.2}.items():
        history[f"weight_decay/{group}"] = at, [base * step for step in range(steps)]
        history[f"l2_penalty/{group}"] = at, [base * step * 5 for step in range(steps)]
        history[f"lr-AdamW/{group}"] = at, [0.01] * steps
    history["l2_penalty/total"] = at, [1.5 * step for step in range(steps)]
    history["train_loss"] = at, [2.0] * steps
    return history


def in_words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in words_of(figure))


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


@pytest.mark.parametrize("names", [FIVE[:1], FIVE, MANY])
def test_histograms_can_be_read(names) -> None:
    assert_readable(plot_histograms({name: torch.randn(200) for name in names}, bins=20, title="Weights"))


# Reading


def write_metrics(logger: Any) -> None:
    logger.log_metrics({"loss": 2.0}, step=4)
    logger.log_metrics({"loss": 1.0, "l2_norm/fc": 3.5}, step=9)
    logger.log_metrics({"l2_norm/fc": 3.0}, step=14)
    logger.log_metrics({"loss": 0.5}, step=9)  # logged again, as after a resume
    logger.log_metrics({"loss": float("nan")}, step=14)
    logger.save()


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_history_is_what_was_logged(make, tmp_path) -> None:
    logger = make(tmp_path)
    write_metrics(logger)
    history = read_history(logger.log_dir)
    steps, losses = history["loss"]
    assert (steps, losses[:2]) == ([4, 9, 14], [2.0, 0.5])
    assert math.isnan(losses[2])
    assert history["l2_norm/fc"] == ([9, 14], [3.5, 3.0])


def test_history_is_read_from_a_file_too(tmp_path) -> None:
    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    for logger, pattern in ((csv, "metrics.csv"), (board, "events*")):
        write_metrics(logger)
        (path,) = (path for path in tmp_path.rglob(pattern))
        assert read_history(path)["l2_norm/fc"] == ([9, 14], [3.5, 3.0])


def test_cells_that_are_no_numbers_are_no_metrics(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,note,empty\n9,0.5,fine,\n7,,,\n5,0.25,good,\n")
    assert read_history(tmp_path) == {"loss": ([5, 9], [0.25, 0.5])}


def test_no_metrics_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"No metrics at '.*'. Expected a metrics.csv, TensorBoard event files"):
        read_history(tmp_path)


def test_events_without_tensorboard_are_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ModuleNotFoundError, match=r"Install it with `pip install tensorboard`"):
        read_history(tmp_path)


def test_layers_count_unless_told_the_order() -> None:
    history = {f"l2_norm/{name}": ([0], [1.0]) for name in ("b.10", "b.9", "a", "total")}
    assert list(curves_of(history, "l2_norm")) == ["a", "b.9", "b.10"]
    assert list(curves_of(history, "l2_norm", ["b.10", "b.9"])) == ["b.10", "b.9", "a"]
    assert list(curves_of({"l2_norm/total": ([0], [1.0])}, "l2_norm")) == ["total"]


@pytest.mark.parametrize(
    ("plot", "prefix"),
    [(plot_norm_heatmap, "l2_norm"), (plot_norms, "l2_norm"), (plot_update_ratios, "update_ratio")],
)
def test_a_quantity_that_was_not_logged_is_an_error(plot, prefix) -> None:
    with pytest.raises(ValueError, match=rf"no '{prefix}/...' metric, but: loss. L2NormMonitor logs it"):
        plot({"loss": ([0], [1.0])})


# Heat map


def image_of(figure: Any) -> tuple[Any, np.ndarray]:
    (image,) = figure.axes[0].images
    return image, image.get_array()


def test_heatmap_shows_each_norm_relative_to_the_first_one_above_0() -> None:
    history = {
        "l2_norm/b": ([4, 9, 14], [2.0, 8.0, 1.0]),
        "l2_norm/a": ([4, 9, 14], [0.0, 3.0, 6.0]),
        "l2_norm/c": ([9], [5.0]),
        "l2_norm/zero": ([4, 9, 14], [0.0, 0.0, 0.0]),
        "l2_norm/total": ([4], [9.0]),
    }
    figure = plot_norm_heatmap(history, layers=["b", "a"])
    image, shown = image_of(figure)
    nan = float("nan")
    expected = [[1.0, 4.0, 0.5], [0.0, 1.0, 2.0], [nan, 1.0, nan], [nan, nan, nan]]
    np.testing.assert_array_equal(np.ma.filled(shown, nan), expected)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b", "a", "c", "zero"]
    assert (image.norm.vmin, image.norm.vmax) == (0.25, 4.0), "white is 1"
    assert figure.axes[0].get_xlim() == (4, 14)
    assert figure.axes[0].get_ylim() == (3.5, -0.5)
    assert {"1", "6", "5", "0"} <= {text.get_text() for text in words_of(figure)}, (
        "the last norms stand beside the rows"
    )


def test_heatmap_shows_the_norms_themselves_and_those_of_gradients_on_request() -> None:
    figure = plot_norm_heatmap({"grad_norm/a": ([0, 1], [2.0, 8.0])}, relative=False, prefix="grad_norm")
    image, shown = image_of(figure)
    np.testing.assert_array_equal(shown, [[2.0, 8.0]])
    assert (image.norm.vmin, image.norm.vmax, image.cmap.name) == (2.0, 8.0, "viridis")


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


# Curves


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


# Histograms


def test_histograms_count_every_weight() -> None:
    values = torch.tensor([[0.0, 0.005, -0.5], [1.0, 0.25, float("nan")]])
    figure = plot_histograms({"fc.weight": values, "fc.bias": [3.0, 4.0], "empty": torch.zeros(0)}, bins=4)
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes[:3]]
    assert heights[0] == [0, 1, 3, 1]
    assert heights[1] == [0, 0, 0, 2]
    assert heights[2] == [0, 0, 0, 0]
    shown = in_words(figure)
    assert "‖w‖ 1.15\n40% near 0" in shown, "sqrt(0.005^2 + 0.5^2 + 1 + 0.25^2) = 1.146, two of five"
    assert "‖w‖ 5\n0% near 0" in shown


def test_histograms_of_complex_weights_count_their_parts() -> None:
    figure = plot_histograms({"weight": torch.tensor([3.0 + 4.0j, 0.0j])}, bins=4)
    assert [patch.get_height() for patch in figure.axes[0].patches] == [0, 0, 2, 2]
    assert "‖w‖ 5\n50% near 0" in in_words(figure)


def test_of_many_tensors_an_even_selection_is_drawn() -> None:
    figure = plot_histograms({name: torch.ones(2) for name in FLAT}, bins=5, title="Weights")
    shown = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert shown == [f"layer_{number}" for number in range(0, 300, 13)]
    assert figure.get_suptitle() == "Weights: 24 of 300 tensors"


def test_histograms_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"There is no tensor to draw"):
        plot_histograms({})


# Schedules


def test_schedule_is_drawn_as_it_acts_on_each_group() -> None:
    groups = {"decay": 0.1, "head": 0.3, "no_decay": 0.0}
    (axes,) = plot_schedule(LinearSchedule(1.0, 3.0), weight_decay=groups, steps=101).axes
    lines = labelled_lines(axes)
    assert set(lines) == set(groups)
    for name, base in groups.items():
        steps, values = lines[name]
        assert (steps[0], steps[-1]) == (0, 100)
        np.testing.assert_allclose(values, [base * (1 + 2 * step / 100) for step in steps], rtol=1e-12)
    assert axes.get_xlabel() == "optimizer step"


@pytest.mark.parametrize(
    ("length", "label", "end"), [({}, "progress of the training", 1.0), ({"epochs": 7}, "epoch", 7)]
)
def test_schedule_without_steps_has_another_axis(length, label, end) -> None:
    (axes,) = plot_schedule(CosineSchedule(1.0, 10.0), **length).axes
    (line,) = axes.get_lines()
    assert (axes.get_xlabel(), line.get_xdata()[-1]) == (label, end)
    assert (line.get_ydata()[0], line.get_ydata()[500], line.get_ydata()[-1]) == pytest.approx((1.0, 5.5, 10.0))


def test_schedule_by_epoch_is_held_within_an_epoch() -> None:
    (axes,) = plot_schedule(LinearSchedule(0.0, 3.0), epochs=4, per_epoch=True).axes
    (line,) = axes.get_lines()
    assert [value for value, _ in itertools.groupby(line.get_ydata())] == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert dict(zip(*line.get_data(), strict=True))[0.5] == 0.0


def test_impossible_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match=r"Expected `steps` to be at least 1, got 0"):
        plot_schedule(LinearSchedule(0.0, 1.0), steps=0)
    with pytest.raises(ValueError, match=r"Expected `epochs` to be at least 1, got -1"):
        plot_schedule(LinearSchedule(0.0, 1.0), epochs=-1)
    with pytest.raises(ValueError, match=r"A schedule by epoch needs their number: give `epochs`"):
        plot_schedule(LinearSchedule(0.0, 1.0), per_epoch=True)


SCHEDULER = """
    - class_path: lightning_l2.WeightDecayScheduler
      init_args:
        schedule: {class_path: lightning_l2.schedules.LinearSchedule, init_args: {start: 1.0, end: 10.0}}
"""
DECAY = """
    - class_path: lightning_l2.WeightDecay
      init_args:
        weight_decay: 0.05
        rules:
          - {name: head, modules: [Linear], multiplier: 2.0}
          - {name: fixed, pattern: conv, weight_decay: 0.01}
          - default
"""


def previewed(tmp_path: Any, text: str, monkeypatch: Any) -> dict[str, tuple[float, float, float, float]]:
    """Return first and last step and value of each curve that `preview` draws."""
    drawn = {}

    def save(figure: Any, path: Any, **_: Any) -> None:
        for name, (steps, values) in labelled_lines(figure.axes[0]).items():
            drawn[name] = steps[0], steps[-1], values[0], values[-1]

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    config = tmp_path / "config.yaml"
    config.write_text(text)
    preview(config)
    return {name: pytest.approx(ends) for name, ends in drawn.items()}


def test_preview_draws_lambda_of_each_rule(tmp_path, monkeypatch) -> None:
    drawn = previewed(tmp_path, f"trainer:\n  max_steps: 100\n  callbacks:{DECAY}{SCHEDULER}", monkeypatch)
    assert drawn == {
        "head": (0, 99, 0.1, 1.0),
        "fixed": (0, 99, 0.01, 0.1),
        "no_decay": (0, 99, 0.0, 0.0),
        "decay": (0, 99, 0.05, 0.5),
    }


def test_preview_of_absolute_values_stand_for_the_base(tmp_path, monkeypatch) -> None:
    absolute = SCHEDULER.replace("init_args:\n", "init_args:\n        values: weight_decay\n", 1)
    drawn = previewed(tmp_path, f"fit:\n  trainer:\n    callbacks:{DECAY}{absolute}".replace("\n", "\n  "), monkeypatch)
    assert drawn["head"] == (0, 1, 2.0, 20.0)
    assert drawn["decay"] == (0, 1, 1.0, 10.0)


def test_preview_takes_lambda_of_the_optimizer(tmp_path, monkeypatch) -> None:
    optimizer = "optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    weight_decay: 0.2\n"
    trainer = f"trainer:\n  max_epochs: 3\n  callbacks+:{SCHEDULER}"
    assert previewed(tmp_path, optimizer + trainer, monkeypatch) == {"all parameters": (0, 3, 0.2, 2.0)}
    assert previewed(tmp_path, trainer, monkeypatch) == {"multiplier": (0, 3, 1.0, 10.0)}


def test_preview_by_epoch(tmp_path, monkeypatch) -> None:
    by_epoch = SCHEDULER.replace("init_args:\n", "init_args:\n        interval: epoch\n        total_steps: 5\n", 1)
    assert previewed(tmp_path, f"trainer:\n  callbacks:{by_epoch}", monkeypatch) == {"multiplier": (0, 5, 1.0, 10.0)}


def test_preview_writes_a_picture(tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"trainer:\n  callbacks:{DECAY}{SCHEDULER}")
    assert preview(config) == tmp_path / "config.png"
    assert (tmp_path / "config.png").read_bytes().startswith(b"\x89PNG")
    assert preview(str(config), str(tmp_path / "other.svg")).read_text().startswith("<?xml")


@pytest.mark.parametrize("text", ["", "trainer: {}", f"trainer:\n  callbacks:{DECAY}"])
def test_preview_of_a_constant_lambda_is_an_error(text, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml' has no WeightDecayScheduler with a `schedule`"):
        preview(tmp_path / "config.yaml")


def test_preview_of_a_schedule_that_reads_the_training_is_an_error(tmp_path) -> None:
    scheduler = "\n    - {class_path: WeightDecayScheduler, init_args: {schedule: lightning_l2.schedules.LRSchedule}}"
    (tmp_path / "config.yaml").write_text(f"trainer:\n  callbacks:{scheduler}")
    with pytest.raises(ValueError, match=r"LRSchedule answers to the training itself, so it can't be drawn before it"):
        preview(tmp_path / "config.yaml")


def test_preview_without_jsonargparse_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer:\n  callbacks:{SCHEDULER}")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_l2\[cli\]"'):
        preview(tmp_path / "config.yaml")


# matplotlib


def test_without_matplotlib_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'Get it with `pip install "lightning_l2\[plots\]"`'):
        plot_schedule(StepSchedule([0.5], [2.0]))


def test_pictures_leave_no_trace_in_pyplot() -> None:
    from matplotlib import pyplot

    for plot in (plot_norm_heatmap, plot_norms, plot_penalty, plot_update_ratios):
        plot(history_of(FIVE))
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [("trial,val_loss\n0,1.0\n", r"no column `step`, but: trial, val_loss\. Give the metrics\.csv"), ("", "but: none")],
)
def test_other_tables_are_refused(rows: str, message: str, tmp_path: Any) -> None:
    (tmp_path / "trials.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_history(tmp_path / "trials.csv")


def test_rows_without_a_step_and_cells_without_a_name_are_passed_over(tmp_path: Any) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0,7.0\n,2.0\n1,3.0\n")
    assert read_history(tmp_path) == {"loss": ([0, 1], [1.0, 3.0])}


def test_an_absent_event_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"No metrics at '.*events\.out\.tfevents\.1'"):
        read_history(tmp_path / "events.out.tfevents.1")


def test_penalty_above_the_loss_is_marked_although_the_first_is_not_a_number() -> None:
    history = {"l2_penalty/total": ([0, 1], [math.nan, 5.0]), "train_loss": ([0, 1], [1.0, 1.0])}
    assert "penalty above loss" in in_words(plot_penalty(history))


@pytest.mark.parametrize("known", [[], [0.1]], ids=["at no step", "at one step"])
@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_ratios_of_a_training_that_diverged_are_drawn(known: list[float], unknown: float, tmp_path: Any) -> None:
    values = [*known, unknown, unknown]
    history = {f"update_ratio/{name}": (list(range(len(values))), values) for name in FIVE + FLAT[:5]}
    plot_update_ratios(history).savefig(tmp_path / "ratios.png")


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
