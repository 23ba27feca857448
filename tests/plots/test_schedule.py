"""Schedules as they act on groups, read back from the figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_l2.plots import (
    plot_schedule,
)
from lightning_l2.schedules import CosineSchedule, LinearSchedule
from tests.figures import labelled_lines


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


def test_each_group_may_have_a_schedule_of_its_own() -> None:
    schedules = {"decay": LinearSchedule(1.0, 3.0), "head": CosineSchedule(1.0, 0.0)}
    (axes,) = plot_schedule(schedules, weight_decay={"decay": 0.1, "head": 0.2}, steps=11).axes
    ends = {name: (values[0], values[-1]) for name, (_, values) in labelled_lines(axes).items()}
    assert ends == {"decay": pytest.approx((0.1, 0.3)), "head": pytest.approx((0.2, 0.0))}
    assert axes.get_title(loc="left") == "Weight decay: LinearSchedule, CosineSchedule"
