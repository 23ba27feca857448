"""When alarms go off, by tables."""

import math
from typing import Any

import pytest

from lightning_l2.monitor import NormAlarms

CASES: list[tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = [
    ({}, {"norms": {"a": 1.0}}, []),
    ({}, {"norms": {"a": math.inf, "b": math.nan, "c": 1e30}}, [("non_finite", "a"), ("non_finite", "b")]),
    ({"max_norm": 2}, {"norms": {"a": 2.0, "b": 2.1, "c": math.inf}}, [("max_norm", "b"), ("non_finite", "c")]),
    ({"max_norm": 2}, {"norms": {"a": 1.5, "b": 1.5, "total": 2.12}}, []),
    ({"max_norm": 2}, {"norms": {"total": 2.12}}, [("max_norm", "total")]),
    ({"growth": 2}, {"norms": {"a": 2.0, "b": 2.1}, "previous": {"a": 1.0, "b": 1.0}}, [("growth", "b")]),
    ({"growth": 2}, {"norms": {"new": 9.0, "zero": 9.0}, "previous": {"zero": 0.0}}, []),
    ({"growth": 2}, {"norms": {"a": 9.0}, "previous": {"a": math.nan}}, []),
    ({"vanishing": 0.1}, {"norms": {"a": 0.1, "b": 0.09}, "first": {"a": 1.0, "b": 1.0}}, [("vanishing", "b")]),
    ({"vanishing": 0.1}, {"norms": {"zero": 0.0, "new": 0.0}, "first": {"zero": 0.0}}, []),
    ({"penalty": 1}, {"norms": {}, "penalty": 2.0, "loss": 1.9}, [("penalty", "total")]),
    ({"penalty": 1}, {"norms": {}, "penalty": 2.0, "loss": -3.0}, []),
    ({"penalty": 1}, {"norms": {}, "penalty": 2.0, "loss": None}, []),
    ({"penalty": 1}, {"norms": {}, "penalty": 2.0, "loss": math.nan}, []),
]


@pytest.mark.parametrize(("limits", "seen", "expected"), CASES, ids=str)
def test_check(limits: dict[str, Any], seen: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = list(NormAlarms(**limits).check(**{"previous": {}, "first": {}, **seen}))
    assert [(alarm.kind, alarm.layer) for alarm in found] == expected
    for alarm in found:
        assert alarm.layer in alarm.message or alarm.kind == "penalty"


BOUNDS = [
    ({"max_norm": 0}, "Expected `max_norm` to be None or a finite number above 0, got 0."),
    ({"max_norm": math.inf}, "Expected `max_norm` to be None or a finite number above 0, got inf."),
    ({"growth": 1.0}, "Expected `growth` to be None or a finite number above 1, got 1.0."),
    ({"penalty": -1}, "Expected `penalty` to be None or a finite number above 0, got -1."),
    ({"penalty": math.nan}, "Expected `penalty` to be None or a finite number above 0, got nan."),
    ({"vanishing": 1.5}, "Expected `vanishing` to be a fraction between 0 and 1, got 1.5."),
]


@pytest.mark.parametrize(("limits", "message"), BOUNDS, ids=str)
def test_limits_out_of_range(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.") + "$"):
        NormAlarms(**limits)
