import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_l2.search import Run, SearchPlan, SearchResult, Trial
from lightning_l2.search.pictures import plot_curves, plot_gap, plot_metric, plot_norm

LAMBDAS = [1e-3, 1e-1, 1e-5]


def result(mode: Any = "min", train: bool = True, norm: bool = True, seeds: int = 2) -> SearchResult:
    def run(seed: int, weight_decay: float) -> Run:
        curves = {"val_loss": [3.0, 2.0, 1.0 + seed + abs(math.log10(weight_decay) + 3)]}
        curves |= {"train_loss": [2.0, 1.0, 0.5]} if train else {}
        metrics = {name: curve[-1] for name, curve in curves.items()}
        return Run(seed, metrics["val_loss"], metrics, curves, 10 * (seed + 1) / weight_decay if norm else None)

    trials = [Trial(n, value, runs=tuple(run(s, value) for s in range(seeds))) for n, value in enumerate(LAMBDAS)]
    trials.append(Trial(3, 1e-2, state="pruned", runs=(run(0, 1e-2),)))
    trials.append(Trial(4, 3e-2, state="failed", runs=(Run(0, math.nan),), error="nan"))
    return SearchResult(trials, SearchPlan(mode=mode, seeds=seeds))


def line(axes: Any, start: str) -> Any:
    return next(line for line in axes.get_lines() if str(line.get_label()).startswith(start))


def test_the_metric_with_its_spread() -> None:
    (axes,) = plot_metric(result()).axes
    assert axes.get_xscale() == "log"
    (container,) = axes.containers
    points, _, (bars,) = container
    assert list(points.get_xdata()) == sorted(LAMBDAS)
    assert list(points.get_ydata()) == pytest.approx([3.5, 1.5, 3.5])
    spread = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert spread == pytest.approx([2 * math.sqrt(0.5)] * 3)
    assert sorted(line(axes, "each seed").get_ydata()) == pytest.approx([1.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    for label, weight_decay in (("stopped early", 1e-2), ("failed", 3e-2)):
        assert list(line(axes, label).get_xdata()) == [weight_decay]
        assert line(axes, label).get_transform() == axes.get_xaxis_transform(), "at the edge: there is no last value"
    assert line(axes, "best and suggested: 0.001").get_xdata()[0] == 1e-3


def test_trials_that_differ_in_more_than_lambda_are_no_line() -> None:
    joint = [Trial(n, value, {"lr": 0.1 + n}, runs=result().trials[n].runs) for n, value in enumerate(LAMBDAS)]
    for plot in (plot_metric, plot_norm, plot_gap):
        for trials, style in ((joint, "None"), (result().trials, "-")):
            (axes,) = plot(SearchResult(trials, SearchPlan(seeds=2))).axes
            assert axes.get_lines()[0].get_linestyle() == style


def test_the_best_and_the_suggested_are_marked_apart() -> None:
    (axes,) = plot_metric(result("max")).axes
    assert line(axes, "best").get_label() == "best and suggested: 0.1"
    noisy = [Trial(0, 1e-3, runs=(Run(0, 1.0), Run(1, 1.2))), Trial(1, 1e-2, runs=(Run(0, 1.3), Run(1, 1.1)))]
    (axes,) = plot_metric(SearchResult(noisy)).axes
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
    assert [text.get_text() for text in val.get_legend().get_texts()] == ["suggested: 0.001", "stopped early"]
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
