"""The heat map, read back from the figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_l2.plots import (
    plot_norm_heatmap,
)
from tests.figures import words_of


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
