"""AutoL2Decay on metrics that rise, worked out by hand."""

import json
import math
from typing import Any

import pytest

from lightning_l2.adaptive import (
    AutoL2Decay,
)
from tests.adaptive.trainings import sgd


@pytest.mark.parametrize(
    ("losses", "errors", "expected"),
    [
        # one rise is not enough, two in a row are; the smallest loss so far counts, not the last one
        ([3, 2, 2.5, 1, 1.5, 1.4, 0.5], None, [1, 1, 1, 1, 1, 0.1, 0.1]),
        # an equal loss is no rise
        ([1, 1, 1, 1], None, [1, 1, 1, 1]),
        # either metric reduces
        ([4, 3, 2, 1], [0.5, 0.6, 0.7, 0.5], [1, 1, 0.1, 0.1]),
        # a NaN is a rise
        ([1, math.nan, math.nan, 1], None, [1, 1, 0.1, 0.1]),
        # after the first reduction 1 / 0.1 = 10 observations are left alone, after the second 100
        ([1] + [2] * 40, None, [1] * 2 + [0.1] * 11 + [0.01] * 28),
    ],
    ids=["rise", "equal", "error", "nan", "refractory"],
)
def test_auto_l2_reduces_when_a_metric_goes_up(
    losses: list[float], errors: list[float] | None, expected: list[float]
) -> None:
    schedule = AutoL2Decay("loss", error=None if errors is None else "error")
    schedule.check(sgd(([1.0], [1.0], 0.1)))
    state: dict[str, Any] = {}
    seen = []
    for loss, error in zip(losses, errors or losses, strict=True):
        state = json.loads(json.dumps(state))
        seen += schedule.multipliers(sgd(([1.0], [1.0], 0.1)), {"loss": loss, "error": error}, state)
    assert seen == pytest.approx(expected)


def test_auto_l2_counts_rises_anew_after_a_reduction() -> None:
    schedule, optimizer = AutoL2Decay("loss", factor=0.5, refractory=0.0), sgd(([1.0], [1.0], 0.1))
    state: dict[str, Any] = {}
    seen = [schedule.multipliers(optimizer, {"loss": loss}, state)[0] for loss in (1, 2, 2, 2, 2)]
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_auto_l2_goes_on_after_a_first_value_that_is_not_a_number() -> None:
    schedule, optimizer, state = AutoL2Decay("loss", refractory=0.0), sgd(([1.0], [1.0], 0.1)), {}  # type: ignore[var-annotated]
    losses = (math.nan, 3.0, 2.0, 1.0, 1.5, 1.4)
    assert [schedule.multipliers(optimizer, {"loss": loss}, state)[0] for loss in losses] == [1.0] * 5 + [0.1]


def test_auto_l2_stops_at_its_minimum() -> None:
    schedule = AutoL2Decay("loss", factor=0.5, patience=1, refractory=0.0, min_multiplier=0.3)
    state: dict[str, Any] = {}
    optimizer = sgd(([1.0], [1.0], 0.1))
    seen = [schedule.multipliers(optimizer, {"loss": loss}, state)[0] for loss in (1, 2, 3, 4)]
    assert seen == [1.0, 0.5, 0.3, 0.3]
    with pytest.raises(ValueError, match=r"AutoL2Decay monitors 'loss', which was not logged. Logged: \['other'\]"):
        schedule.multipliers(sgd(([1.0], [1.0], 0.1)), {"other": 1.0}, {})
