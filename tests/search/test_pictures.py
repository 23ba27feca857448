import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_l2.search import Run, SearchPlan, SearchResult, Trial
from lightning_l2.search.pictures import plot_curves, plot_gap, plot_metric, plot_norm
from tests.figures import assert_readable

LAMBDAS = [1e-3, 1e-1, 1e-5]


def result(
    mode: Any = "min", train: bool = True, norm: bool = True, seeds: int = 2, zero: bool = False
) -> SearchResult:
    def run(seed: int, weight_decay: float) -> Run:
        curves = {"val_loss": [3.0, 2.0, 1.0 + seed + abs(math.log10(weight_decay) + 3)]}
        curves |= {"train_loss": [2.0, 1.0, 0.5]} if train else {}
        metrics = {name: curve[-1] for name, curve in curves.items()}
        return Run(seed, metrics["val_loss"], metrics, curves, 10 * (seed + 1) / weight_decay if norm else None)

    trials = [Trial(n, value, runs=tuple(run(s, value) for s in range(seeds))) for n, value in enumerate(LAMBDAS)]
    if zero:
        worse = (
            Run(seed, 6.0 - seed, {"val_loss": 6.0, "train_loss": 0.5}, {"val_loss": [6.0] * 3}, 9.0) for seed in (0, 1)
        )
        trials.append(Trial(5, 0.0, runs=tuple(worse)))
    trials.append(Trial(3, 1e-2, state="pruned", runs=(run(0, 1e-2),)))
    trials.append(Trial(4, 3e-2, state="failed", runs=(Run(0, math.nan),), error="nan"))
    return SearchResult(trials, SearchPlan(mode=mode, seeds=seeds))


def line(axes: Any, start: str) -> Any:
    return next(line for line in axes.get_lines() if str(line.get_label()).startswith(start))


def test_the_metric_and_each_seed() -> None:
    axes, _ = plot_metric(result()).axes
    assert axes.get_xscale() == "log"
    assert list(line(axes, "mean over the seeds").get_xdata()) == sorted(LAMBDAS)
    assert list(line(axes, "mean over the seeds").get_ydata()) == pytest.approx([3.5, 1.5, 3.5])
    assert sorted(line(axes, "each seed").get_ydata()) == pytest.approx([1.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    for label, weight_decay in (("stopped early", 1e-2), ("failed", 3e-2)):
        assert list(line(axes, label).get_xdata()) == [weight_decay]
        assert line(axes, label).get_transform() == axes.get_xaxis_transform(), "at the edge: there is no last value"
    marked = line(axes, "best and suggested: 0.001")
    assert marked.get_xdata()[0] == 1e-3
    assert marked.get_zorder() > axes.xaxis.get_zorder() + 0.1, "above the grid"


def test_what_decides_is_a_panel_of_its_own() -> None:
    """Differences to lambda = 0: 1 - 6 and 2 - 5 for lambda = 1e-3, two more for the others."""
    _, axes = plot_metric(result(zero=True)).axes
    assert axes.get_title("left") == "Difference to lambda = 0, paired by seed: above 0 is worse"
    (container,) = axes.containers
    points, _, (bars,) = container
    assert list(points.get_xdata()) == sorted(LAMBDAS)
    assert list(points.get_ydata()) == pytest.approx([-2.0, -4.0, -2.0])
    errors = [(segment[1][1] - segment[0][1]) / 2 for segment in bars.get_segments()]
    assert errors == pytest.approx([1.0] * 3), "std of -3 and -5 is sqrt(2), over sqrt(2)"
    _, without = plot_metric(result()).axes
    assert without.get_title("left").startswith("Difference to the best, paired by seed")
    assert list(without.containers[0][0].get_xdata()) == [1e-5, 1e-1]


def test_zero_stands_apart_on_the_log_axis() -> None:
    for figure in (plot_metric(result(zero=True)), plot_norm(result(zero=True)), plot_gap(result(zero=True))):
        axes = figure.axes[-1]
        ticks, labels = axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()]
        assert labels[0] == "0"
        assert ticks[0] < 1e-5 / 2
        assert list(ticks[1:]) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
        assert min(axes.get_xticks(minor=True)) > 1e-5, "no scale between 0 and the lowest lambda"
        assert_readable(figure)
    upper = plot_metric(result(zero=True)).axes[0]
    alone = next(one for one in upper.get_lines() if list(one.get_ydata()) == [5.5])
    assert list(alone.get_xdata()) == [ticks[0]], "no line leads to it"


@pytest.mark.parametrize(
    ("monitor", "mode", "scale"),
    [("val_loss", "min", "log"), ("val_loss", "max", "linear"), ("val_acc", "max", "linear"), ("f1", "min", "linear")],
)
def test_a_loss_may_be_logarithmic_and_an_accuracy_never(monitor: str, mode: Any, scale: str) -> None:
    trials = [Trial(n, 10.0**-n, runs=(Run(0, value), Run(1, value))) for n, value in enumerate((0.97, 0.1, 0.9))]
    assert plot_metric(SearchResult(trials, SearchPlan(monitor=monitor, mode=mode))).axes[0].get_yscale() == scale


def test_trials_that_differ_in_more_than_lambda_are_no_line() -> None:
    joint = [Trial(n, value, {"lr": 0.1 + n}, runs=result().trials[n].runs) for n, value in enumerate(LAMBDAS)]
    for plot in (plot_metric, plot_norm, plot_gap):
        for trials, style in ((joint, "None"), (result().trials, "-")):
            axes = plot(SearchResult(trials, SearchPlan(seeds=2))).axes[0]
            assert axes.get_lines()[0].get_linestyle() == style


def test_the_best_and_the_suggested_are_marked_apart() -> None:
    axes = plot_metric(result("max")).axes[0]
    assert line(axes, "best").get_label() == "best and suggested: 0.1"
    noisy = [Trial(0, 1e-3, runs=(Run(0, 1.0), Run(1, 1.2))), Trial(1, 1e-2, runs=(Run(0, 1.3), Run(1, 1.1)))]
    axes = plot_metric(SearchResult(noisy)).axes[0]
    assert line(axes, "best").get_label() == "best: 0.001"
    assert line(axes, "suggested").get_label() == "suggested: 0.01"


def test_the_curves() -> None:
    figure = plot_curves(result())
    train, val, scale = figure.axes
    assert (train.get_title("left"), val.get_title("left")) == ("train_loss", "val_loss")
    assert scale.get_ylabel() == "lambda (weight decay)"
    assert len(val.get_lines()) == len(train.get_lines()) == 4, "three complete, one stopped early"
    # the mean over the seeds; the pruned one comes first
    np.testing.assert_allclose([curve.get_ydata()[-1] for curve in val.get_lines()], [2.0, 3.5, 1.5, 3.5])
    assert [curve.get_linestyle() for curve in val.get_lines()] == [":", "-", "-", "-"]
    widths = [curve.get_linewidth() for curve in val.get_lines()]
    assert widths.index(max(widths)) == 2, "the suggested one"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["suggested: 0.001", "stopped early"]
    assert [tick for tick in val.get_xticks() if tick % 1] == [], "an epoch is a whole number"
    assert_readable(figure)
    (mesh,) = (part for part in scale.collections if part.get_array() is not None)
    ends = mesh.cmap(mesh.norm([1e-5, 1e-1]))
    np.testing.assert_allclose([val.get_lines()[place].get_color() for place in (1, 3)], ends, err_msg="as the scale")
    assert len(plot_curves(result(train=False)).axes) == 2


def test_the_norm() -> None:
    (axes,) = plot_norm(result()).axes
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [15 / value for value in sorted(LAMBDAS)])
    with pytest.raises(ValueError, match="No norm of the weights was measured"):
        plot_norm(result(norm=False))


def test_the_gap() -> None:
    (axes,) = plot_gap(result()).axes
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [3.0, 1.0, 3.0])
    assert axes.get_ylabel() == "val_loss - train_loss"
    assert plot_gap(result("max")).axes[0].get_ylabel() == "train_loss - val_loss"
    with pytest.raises(ValueError, match=r"No training metric belongs to 'val_loss'\. Log one as 'train_loss'"):
        plot_gap(result(train=False))


def test_what_is_written(tmp_path: Path) -> None:
    def names(result: SearchResult, folder: str) -> list[str]:
        written = result.save(tmp_path / folder)
        assert sorted(written) == sorted((tmp_path / folder).iterdir())
        return [path.name for path in written]

    assert names(result(), "all") == ["trials.csv", "metric.png", "curves.png", "l2_norm.png", "gap.png"]
    assert names(result(train=False, norm=False, seeds=1), "some") == ["trials.csv", "metric.png", "curves.png"]
    assert names(SearchResult(result().trials[3:]), "none") == ["trials.csv"]


def test_what_harms_by_far_presses_nothing_flat() -> None:
    """Four accuracies within 0.004, and one that is worse by 0.3 and noisy."""
    accuracies = {0.0: 0.726, 0.01: 0.725, 0.1: 0.722, 1.0: 0.724, 10.0: 0.45}
    noise = {10.0: 0.1}
    trials = [
        Trial(n, weight_decay, runs=tuple(Run(s, mean + s * noise.get(weight_decay, 1e-3)) for s in (-1, 0, 1)))
        for n, (weight_decay, mean) in enumerate(accuracies.items())
    ]
    _, axes = plot_metric(SearchResult(trials, SearchPlan(monitor="val_acc", mode="max"))).axes
    assert axes.get_yscale() == "symlog"
    near, far = (axes.transData.transform((1, value))[1] for value in (0.004, 0.276))
    assert near - axes.transData.transform((1, 0.0))[1] > (far - near) / 10


def test_lambda_0_is_seen_before_the_suggestion() -> None:
    lines = plot_curves(result(zero=True)).axes[0].get_lines()
    assert max(lines, key=lambda line: line.get_zorder()).get_color() == "black"
