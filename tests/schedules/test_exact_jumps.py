"""Jumps come in their exact step, also those of schedules within schedules, by exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from lightning_l2.schedules import (
    ConstantSchedule,
    CosineRestartsSchedule,
    Schedule,
    SequenceSchedule,
    StepSchedule,
    WarmupSchedule,
)

STEP = StepSchedule([0.1, 0.3, 0.5, 0.7, 0.9], [2.0] * 5)
EDGES = [Fraction(edge, 10) for edge in (1, 3, 5, 7, 9)]


def jumps(schedule: Schedule, length: int) -> list[int]:
    """Return the steps that have another value than the one before."""
    found = [schedule.over(length)(step / (length - 1)) for step in range(length)]
    return [step for step in range(1, length) if found[step] != found[step - 1]]


def first(edge: Fraction, length: int) -> int:
    """Return the first step that is at or beyond an edge."""
    return math.ceil(edge * (length - 1))


LENGTHS = [11, 31, 61, 101, 241, 301, 1001, 1801]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("start", [Fraction(1, 10), Fraction(1, 5), Fraction(3, 10), Fraction(7, 10)])
def test_within_a_part(length: int, start: Fraction) -> None:
    schedule = SequenceSchedule([ConstantSchedule(1.0), STEP], [float(start)])
    assert jumps(schedule, length) == sorted({first(start + edge * (1 - start), length) for edge in EDGES})


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fraction", [Fraction(1, 10), Fraction(1, 3), Fraction(2, 5)])
def test_behind_a_warm_up_and_within_two_parts(length: int, fraction: Fraction) -> None:
    """The warm-up starts at its end, so that only jumps change anything."""
    warm = WarmupSchedule(float(fraction), STEP, start=1.0)
    within = {fraction + edge * (1 - fraction) for edge in EDGES}
    assert jumps(warm, length) == sorted({first(edge, length) for edge in within})
    tail = {Fraction(3, 10) + edge * Fraction(7, 10) for edge in within}
    deep = SequenceSchedule([ConstantSchedule(1.0), warm], [0.3])
    assert jumps(deep, length) == sorted({first(edge, length) for edge in tail})


@pytest.mark.parametrize("length", LENGTHS)
def test_restarts_within_a_part(length: int) -> None:
    schedule = SequenceSchedule([ConstantSchedule(1.0), CosineRestartsSchedule(4.0, 1.0, cycles=7)], [0.3])
    found = [schedule(step / (length - 1)) for step in range(length)]
    for cycle in range(7):
        edge = Fraction(3, 10) + Fraction(7, 10) * Fraction(cycle, 7)
        if (edge * (length - 1)).denominator == 1:
            assert found[first(edge, length)] == pytest.approx(4.0, abs=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_from_part_to_part_within_a_part(length: int) -> None:
    parts = SequenceSchedule(
        [ConstantSchedule(value) for value in (2.0, 3.0, 4.0, 5.0, 6.0, 7.0)], [0.1, 0.3, 0.5, 0.7, 0.9]
    )
    for start in (Fraction(1, 10), Fraction(1, 5), Fraction(3, 10), Fraction(7, 10)):
        schedule = SequenceSchedule([ConstantSchedule(1.0), parts], [float(start)])
        edges = [start, *(start + edge * (1 - start) for edge in EDGES)]
        assert jumps(schedule, length) == sorted({first(edge, length) for edge in edges})


def test_over_a_million_steps() -> None:
    length, start = 1_000_001, Fraction(1, 10)
    schedule = SequenceSchedule([ConstantSchedule(1.0), STEP], [0.1])
    level = 1.0
    for edge in EDGES:
        step = first(start + edge * (1 - start), length)
        assert [schedule((step + k) / (length - 1)) for k in (-1, 0)] == [level, level := 2 * level]
