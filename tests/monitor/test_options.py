"""Options of the monitor: values that are refused are in the callback's own tests."""

import re
from typing import Any

import pytest

from lightning_l2.monitor import NormAlarms, NormOptions


def test_true_means_before_clipping() -> None:
    assert NormOptions(gradients=True).gradients == "before_clipping"
    assert NormOptions(gradients="after_clipping").gradients == "after_clipping"
    assert NormOptions().gradients is False


def test_what_is_kept_from_the_start() -> None:
    assert not NormOptions(alarms=NormAlarms()).keeps_initial
    assert NormOptions(initial_ratio=True).keeps_initial
    assert NormOptions(alarms=NormAlarms(vanishing=0.1)).keeps_initial


MISUSES: list[tuple[dict[str, Any], str]] = [
    ({"rms": 1}, "NormOptions needs `rms` to be bool, but got 1 of type int."),
    ({"prog_bar": "yes"}, "NormOptions needs `prog_bar` to be bool, but got 'yes' of type str."),
    ({"histograms": 0}, "Expected `histograms` to be an integer of at least 1 or None, got 0."),
    ({"depth": 1, "per": "group"}, "`depth` rolls modules up and goes with per='module', got per='group'."),
]


@pytest.mark.parametrize(("options", "message"), MISUSES, ids=str)
def test_misuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        NormOptions(**options)
