"""Histograms of weights, read back from the figures."""

from __future__ import annotations

import pytest
import torch

from lightning_l2.plots import (
    plot_histograms,
)
from tests.figures import assert_readable
from tests.plots.pictured import FIVE, FLAT, MANY, in_words


@pytest.mark.parametrize("names", [FIVE[:1], FIVE, MANY])
def test_histograms_can_be_read(names) -> None:
    assert_readable(plot_histograms({name: torch.randn(200) for name in names}, bins=20, title="Weights"))


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
