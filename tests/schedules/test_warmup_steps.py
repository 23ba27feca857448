"""Warm-ups that count in steps, alone and within other schedules."""

from __future__ import annotations

from fractions import Fraction

import pytest
from jsonargparse import ArgumentParser

from lightning_l2.schedules import ConstantSchedule, LinearSchedule, Schedule, SequenceSchedule, WarmupSchedule


def values(schedule: Schedule, length: int) -> list[float]:
    resolved = schedule.over(length)
    return [resolved(step / max(1, length - 1)) for step in range(length)]


@pytest.mark.parametrize("length", [12, 101, 1000])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_each_step(length: int, steps: int) -> None:
    """Step t has t / steps, then the rest of the training from 1 to 3."""
    schedule = WarmupSchedule(steps=steps, then=LinearSchedule(1.0, 3.0))
    rest = length - 1 - steps
    expected = [step / steps if step < steps else 1 + 2 * (step - steps) / rest for step in range(length)]
    assert values(schedule, length) == pytest.approx(expected, rel=1e-12)
    assert values(schedule, length)[steps] == pytest.approx(1.0, rel=1e-12)


def test_by_default_it_leads_to_the_base() -> None:
    assert values(WarmupSchedule(steps=4), 7) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert values(WarmupSchedule(steps=2, start=0.5), 4) == [0.5, 0.75, 1.0, 1.0]


def test_within_the_share_of_another() -> None:
    """Steps 0 to 9 and 10 to 20: the second part warms up over four steps of its own."""
    second = WarmupSchedule(steps=4, then=ConstantSchedule(2.0))
    found = values(SequenceSchedule([ConstantSchedule(1.0), second], [0.5]), 21)
    assert found == pytest.approx([1.0] * 10 + [0.0, 0.5, 1.0, 1.5] + [2.0] * 7, rel=1e-12)


def test_a_warm_up_after_a_warm_up() -> None:
    inner = WarmupSchedule(steps=2, then=ConstantSchedule(3.0), start=0.5)
    assert values(WarmupSchedule(steps=3, then=inner), 8) == pytest.approx([0, 0.5, 1, 1.5, 2.25, 3, 3, 3], rel=1e-12)
    assert values(WarmupSchedule(0.5, inner), 9) == pytest.approx(
        [0, 0.375, 0.75, 1.125, 1.5, 2.25, 3, 3, 3], rel=1e-12
    )


def test_a_training_that_ends_before_the_warm_up_is_told() -> None:
    schedule = WarmupSchedule(steps=10, then=LinearSchedule(2.0, 0.0))
    message = r"WarmupSchedule warms up over 10 steps of a training that has 5: it ends at 0\.4 of the way\."
    with pytest.warns(UserWarning, match=message):
        found = values(schedule, 5)
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], rel=1e-12)
    # one step to try the code says nothing of the length
    assert values(schedule, 1) == [0.0]
    assert values(WarmupSchedule(steps=4, then=LinearSchedule(2.0, 0.0)), 5) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"WarmupSchedule\(steps=3\) needs the length of the training"):
        WarmupSchedule(steps=3)(0.0)
    for given in ({}, {"fraction": 0.1, "steps": 3}):
        with pytest.raises(ValueError, match="Expected one of `fraction` and `steps` of WarmupSchedule, got fraction="):
            WarmupSchedule(**given)
    with pytest.raises(ValueError, match="Expected `steps` to be finite and above 0, got 0"):
        WarmupSchedule(steps=0)


def test_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    then = {"class_path": "lightning_l2.schedules.CosineSchedule", "init_args": {"start": 1.0, "end": 2.0}}
    for arguments in ({"steps": 3}, {"steps": 3, "then": then}, {"fraction": 0.1, "then": then}):
        given = {"class_path": "lightning_l2.schedules.WarmupSchedule", "init_args": arguments}
        printed = parser.dump(parser.parse_object({"schedule": given}))
        schedule = parser.instantiate(parser.parse_string(printed)).schedule
        assert (schedule.steps, schedule.fraction) == (arguments.get("steps"), arguments.get("fraction"))
        assert schedule.over(11)(1.0) == (2.0 if "then" in arguments else 1.0)


def test_fractions_over_many_lengths() -> None:
    """In exact arithmetic, so that no rounding of the test hides one of the code."""
    for length in range(6, 400, 7):
        found = values(WarmupSchedule(steps=5, then=LinearSchedule(1.0, 0.0)), length)
        rest = max(1, length - 6)
        expected = [Fraction(t, 5) if t < 5 else 1 - Fraction(t - 5, rest) for t in range(length)]
        assert found == pytest.approx([float(value) for value in expected], abs=1e-13)
