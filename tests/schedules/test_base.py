"""What holds of every schedule: ranges, errors, equality, and its way through jsonargparse."""

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_l2.schedules import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    FeedbackSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    OneCycleSchedule,
    PiecewiseSchedule,
    PolynomialSchedule,
    Schedule,
    SequenceSchedule,
    WarmupSchedule,
)
from tests.helpers import parser_of, through_yaml
from tests.schedules.every import (
    FEEDBACK,
    ONE_OF_EACH,
    fraction,
    positive,
)

multiplier = st.just(0.0) | positive
inner = st.floats(1e-3, 1.0 - 1e-3)


@st.composite
def ranged(draw: st.DrawFn) -> tuple[Schedule, float, float, float]:
    """Draw a schedule of one shape with its first value, last value and highest or lowest value in between."""
    start, end, peak = draw(multiplier), draw(multiplier), draw(multiplier)
    kind = draw(st.sampled_from(["linear", "cosine", "exponential", "polynomial", "cyclic", "restarts", "one_cycle"]))
    if kind == "exponential":
        start, end = draw(positive), draw(positive)
        return ExponentialSchedule(start, end), start, end, start
    if kind == "cyclic":
        return CyclicSchedule(start, peak, cycles=draw(st.integers(1, 20)), rise=draw(inner)), start, start, peak
    if kind == "restarts":
        return CosineRestartsSchedule(start, end, cycles=draw(st.integers(1, 9))), start, end, start
    if kind == "one_cycle":
        return OneCycleSchedule(start, peak, end, rise=draw(inner)), start, end, peak
    shapes = {
        "linear": LinearSchedule(start, end),
        "cosine": CosineSchedule(start, end),
        "polynomial": PolynomialSchedule(start, end, draw(st.floats(0.1, 10.0))),
    }
    return shapes[kind], start, end, start


@given(ranged(), fraction, st.floats(0.0, 0.9))
def test_ends_are_exact_and_no_value_is_out_of_range(
    drawn: tuple[Schedule, float, float, float], progress: float, warmup: float
) -> None:
    schedule, start, end, between = drawn
    assert schedule(0.0) == start
    assert schedule(1.0) == end
    assert min(start, end, between) <= schedule(progress) <= max(start, end, between)
    warm = WarmupSchedule(warmup, schedule)
    assert warm(1.0) == end
    assert warm(0.0) == (0.0 if warmup > 0.0 else start)
    assert SequenceSchedule([ConstantSchedule(7.0), schedule], [0.5])(0.5) == start
    assert SequenceSchedule([schedule, schedule], [0.5])(1.0) == end


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), fraction, st.floats(0.0, 1e-6), st.integers(1, 5))
def test_continuous_schedules_have_no_jumps(
    start: float, end: float, progress: float, little: float, cycles: int
) -> None:
    later = min(progress + little, 1.0)
    continuous = [
        LinearSchedule(start, end),
        CosineSchedule(start, end),
        ExponentialSchedule(start + 0.1, end + 0.1),
        PolynomialSchedule(start, end, 2.0),
        InverseSquareRootSchedule(start, 0.1),
        CyclicSchedule(start, end, cycles=cycles),
        OneCycleSchedule(start, end, 1.0),
        WarmupSchedule(0.1, CosineSchedule(start, end)),
        PiecewiseSchedule([(0.2, start), (0.7, end), (0.9, 0.0)]),
    ]
    for schedule in continuous:
        # The steepest slope of these is below 10 / 0.1
        assert abs(schedule(later) - schedule(progress)) <= 1000.0 * little + 1e-12


OUTSIDE = [-1e-9, 1.0 + 1e-9, math.nan, math.inf, 2]


@pytest.mark.parametrize(
    ("schedule", "progress"),
    [*((schedule, 2) for schedule in ONE_OF_EACH), *((ConstantSchedule(), progress) for progress in OUTSIDE)],
    ids=repr,
)
def test_progress_outside_the_training_is_an_error(schedule: Schedule, progress: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `progress` to be within \[0, 1\], got .* 0 at the first"):
        schedule(progress)


@pytest.mark.parametrize("schedule", ONE_OF_EACH, ids=repr)
def test_every_multiplier_of_every_schedule_is_checked(schedule: Schedule) -> None:
    multipliers = {"value", "start", "end", "peak"} & set(vars(schedule))
    for name in multipliers:
        with pytest.raises(ValueError, match=rf"Expected `{name}` to be finite and"):
            replace(schedule, **{name: math.nan})


@pytest.mark.parametrize("schedule", [*ONE_OF_EACH, *FEEDBACK], ids=repr)
def test_schedules_are_values(schedule: Schedule | FeedbackSchedule) -> None:
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert repr(twin) == repr(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.__setattr__("anything", 1)


ANY = Schedule | FeedbackSchedule


def as_config(schedule: object) -> object:
    """Write a schedule as a user would in YAML."""
    if isinstance(schedule, (Schedule, FeedbackSchedule)):
        arguments = {name: as_config(value) for name, value in vars(schedule).items()}
        return {"class_path": f"lightning_l2.schedules.{type(schedule).__name__}", "init_args": arguments}
    return [as_config(item) for item in schedule] if isinstance(schedule, tuple) else schedule


@pytest.mark.parametrize("schedule", [*ONE_OF_EACH, *FEEDBACK], ids=repr)
def test_yaml_gives_the_schedule_and_prints_public_paths(schedule: Schedule | FeedbackSchedule) -> None:
    parsed, printed = through_yaml(ANY, as_config(schedule))
    assert parsed == schedule
    assert f"class_path: lightning_l2.schedules.{type(schedule).__name__}\n" in printed


simple = st.builds(LinearSchedule, multiplier, multiplier) | st.builds(ExponentialSchedule, positive, positive)
nested = st.recursive(
    simple,
    lambda part: (
        st.builds(WarmupSchedule, st.floats(0.0, 0.9), part)
        | st.builds(lambda a, b, at: SequenceSchedule([a, b], [at]), part, part, inner)
    ),
    max_leaves=4,
)


@settings(max_examples=10)
@given(nested, fraction)
def test_nested_schedules_survive_yaml(schedule: Schedule, progress: float) -> None:
    parsed, _ = through_yaml(ANY, as_config(schedule))
    assert parsed == schedule
    assert parsed(progress) == schedule(progress)


def test_command_line_overrides_yaml_and_short_names_do() -> None:
    arguments = ["--value=CosineSchedule", "--value.start=1", "--value.end=10"]
    parsed = parser_of(ANY).instantiate(parser_of(ANY).parse_args([*arguments, "--value.end=5"]))
    assert parsed.value == CosineSchedule(1.0, 5.0)


def test_misspelt_argument_is_an_error_that_names_it() -> None:
    config = {"class_path": "lightning_l2.schedules.CosineSchedule", "init_args": {"start": 1.0, "stop": 2.0}}
    with pytest.raises(Exception, match="stop"):
        parser_of(ANY).parse_object({"value": config})


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for schedule in [*ONE_OF_EACH, *FEEDBACK]:
        documented = dict(re.findall(r"^ +(\w+): (.+)$", type(schedule).__doc__.partition("Args:")[2], re.MULTILINE))
        with pytest.raises(SystemExit):
            parser_of(ANY).parse_args([f"--value.help=lightning_l2.schedules.{type(schedule).__name__}"])
        text = " ".join(capsys.readouterr().out.split())
        for argument in vars(schedule):
            assert documented[argument] in text
