"""Schedules against closed forms in numpy, torch's LR schedulers of the same shape, and through jsonargparse."""

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch.optim import lr_scheduler

from lightning_l2.schedules import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    FeedbackSchedule,
    InverseSquareRootSchedule,
    LinearSchedule,
    LRSchedule,
    OneCycleSchedule,
    PiecewiseSchedule,
    PlateauSchedule,
    PolynomialSchedule,
    Schedule,
    SequenceSchedule,
    StepSchedule,
    WarmupSchedule,
)

PROGRESS = np.linspace(0.0, 1.0, 211)


def values(schedule: Schedule, progress: np.ndarray = PROGRESS) -> np.ndarray:
    return np.array([schedule(float(point)) for point in progress])


def half_cosine(start: float, end: float, progress: np.ndarray) -> np.ndarray:
    return end + (start - end) * (1 + np.cos(np.pi * progress)) / 2


CLOSED_FORMS: list[tuple[Schedule, Callable[[np.ndarray], np.ndarray]]] = [
    (ConstantSchedule(), np.ones_like),
    (ConstantSchedule(0.3), lambda p: np.full_like(p, 0.3)),
    (LinearSchedule(2.0, 0.5), lambda p: 2.0 - 1.5 * p),
    (LinearSchedule(0.0, 3.0), lambda p: 3.0 * p),
    (CosineSchedule(1.0, 10.0), lambda p: half_cosine(1.0, 10.0, p)),
    (CosineSchedule(0.4, 0.0), lambda p: half_cosine(0.4, 0.0, p)),
    (ExponentialSchedule(2.0, 0.02), lambda p: 2.0 * np.power(0.01, p)),
    (PolynomialSchedule(1.0, 0.1, 2.0), lambda p: 0.1 + 0.9 * (1 - p) ** 2),
    (PolynomialSchedule(0.5, 4.0, 0.5), lambda p: 4.0 - 3.5 * np.sqrt(1 - p)),
    (InverseSquareRootSchedule(2.0, 0.1), lambda p: 2.0 / np.sqrt(1 + 10 * p)),
    (StepSchedule([0.5, 0.75], [0.1, 5.0]), lambda p: np.select([p < 0.5, p < 0.75], [1.0, 0.1], 0.5)),
    (StepSchedule([0.0, 1.0], [3.0, 0.0], start=2.0), lambda p: np.where(p < 1.0, 6.0, 0.0)),
    (
        PiecewiseSchedule([(0.0, 1.0), (0.2, 3.0), (0.9, 0.0)]),
        lambda p: np.interp(p, [0.0, 0.2, 0.9], [1.0, 3.0, 0.0]),
    ),
    (PiecewiseSchedule([(0.3, 1.0), (0.6, 2.0)]), lambda p: np.interp(p, [0.3, 0.6], [1.0, 2.0])),
    (PiecewiseSchedule([(0.5, 4.0)]), lambda p: np.full_like(p, 4.0)),
    (
        CyclicSchedule(1.0, 3.0, cycles=2, rise=0.25),
        lambda p: np.interp(p, [0, 0.125, 0.5, 0.625, 1.0], [1.0, 3.0, 1.0, 3.0, 1.0]),
    ),
    (CyclicSchedule(3.0, 1.0), lambda p: 1.0 + 2.0 * np.abs(2 * p - 1)),
    (
        CosineRestartsSchedule(3.0, 1.0, cycles=3),
        lambda p: half_cosine(3.0, 1.0, np.where(p == 1.0, 1.0, 3 * p - np.floor(3 * p + 1e-12))),
    ),
    (
        CosineRestartsSchedule(3.0, 1.0, cycles=3, growth=2.0),
        lambda p: half_cosine(
            3.0, 1.0, np.select([p < 1 / 7 - 1e-12, p < 3 / 7 - 1e-12], [7 * p, (7 * p - 1) / 2], (7 * p - 3) / 4)
        ),
    ),
    (
        OneCycleSchedule(1.0, 5.0, 0.5, rise=0.3),
        lambda p: np.where(p < 0.3, half_cosine(1.0, 5.0, p / 0.3), half_cosine(5.0, 0.5, (p - 0.3) / 0.7)),
    ),
    (
        WarmupSchedule(0.2, LinearSchedule(4.0, 2.0)),
        lambda p: np.interp(p, [0.0, 0.2, 1.0], [0.0, 4.0, 2.0]),
    ),
    (WarmupSchedule(0.2, ConstantSchedule(4.0), start=0.5), lambda p: np.interp(p, [0.0, 0.2], [2.0, 4.0])),
    (WarmupSchedule(0.0, LinearSchedule(4.0, 2.0)), lambda p: 4.0 - 2.0 * p),
    (
        SequenceSchedule([ConstantSchedule(2.0), LinearSchedule(1.0, 3.0), CosineSchedule(3.0, 0.0)], [0.25, 0.5]),
        lambda p: np.select([p < 0.25, p < 0.5], [2.0, 1.0 + 8 * (p - 0.25)], half_cosine(3.0, 0.0, 2 * p - 1)),
    ),
    (SequenceSchedule([LinearSchedule(1.0, 3.0)], []), lambda p: 1.0 + 2.0 * p),
]


@pytest.mark.parametrize(
    ("schedule", "closed_form"), CLOSED_FORMS, ids=[repr(schedule)[:60] for schedule, _ in CLOSED_FORMS]
)
def test_schedule_equals_its_closed_form(schedule: Schedule, closed_form: Callable[[np.ndarray], np.ndarray]) -> None:
    np.testing.assert_allclose(values(schedule), closed_form(PROGRESS), rtol=1e-13, atol=1e-13)
    assert all(type(schedule(progress)) is float for progress in (0.0, 0.5, 1.0))


# OneCycleLR counts its steps from 1: its rise ends at step pct_start * total_steps - 1.
ONE_CYCLE = {"pct_start": 15 / 61, "div_factor": 10, "final_div_factor": 10, "cycle_momentum": False}


def lr_curve(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], lr: float, steps: int) -> np.ndarray:
    """Return what a torch scheduler sets in steps 0 to `steps`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler, curve = make(optimizer), []
    for step in range(steps + 1):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps:  # OneCycleLR allows no more
            scheduler.step()
    return np.array(curve)


STEPS = 60
TORCH_SCHEDULERS = [
    (
        OneCycleSchedule(0.2, 2.0, 0.02, rise=14 / STEPS),
        2.0,
        lambda o: lr_scheduler.OneCycleLR(o, 2.0, total_steps=STEPS + 1, **ONE_CYCLE),
    ),
    (CosineSchedule(2.0, 0.1), 2.0, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1)),
    (PolynomialSchedule(2.0, 0.0, 1.7), 2.0, lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=1.7)),
    (ExponentialSchedule(2.0, 0.5), 2.0, lambda o: lr_scheduler.ExponentialLR(o, 0.25 ** (1 / STEPS))),
    (LinearSchedule(0.2, 2.0), 2.0, lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, STEPS)),
    (
        CyclicSchedule(0.5, 2.0, cycles=3, rise=0.25),
        0.5,
        lambda o: lr_scheduler.CyclicLR(o, 0.5, 2.0, step_size_up=5, step_size_down=15),
    ),
    (
        StepSchedule([0.25, 0.5], [0.1, 0.1], start=2.0),
        2.0,
        lambda o: lr_scheduler.MultiStepLR(o, [15, 30], gamma=0.1),
    ),
    (
        WarmupSchedule(0.25, CosineSchedule(2.0, 0.0), start=0.1),
        2.0,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 15), lr_scheduler.CosineAnnealingLR(o, 45)], [15]
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "lr", "make"), TORCH_SCHEDULERS, ids=lambda value: type(value).__name__)
def test_schedule_equals_the_torch_scheduler_of_its_shape(
    schedule: Schedule, lr: float, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    curve = lr_curve(make, lr, STEPS)
    np.testing.assert_allclose(values(schedule, np.arange(STEPS + 1) / STEPS), curve, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("growth", "cycles"), [(1, 3), (1, 7), (1, 11), (2, 3), (3, 4)])
def test_restarts_equal_torch_up_to_the_last_step(growth: int, cycles: int) -> None:
    last = 10 * sum(growth**cycle for cycle in range(cycles))
    reference = lr_curve(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, growth, 0.1), 2.0, last)
    ours = values(CosineRestartsSchedule(2.0, 0.1, cycles=cycles, growth=growth), np.arange(last + 1) / last)
    np.testing.assert_allclose(ours[:-1], reference[:-1], rtol=1e-12)
    assert ours[-1] == 0.1  # torch begins another cycle here


def test_inverse_square_root_after_warmup_is_the_transformer_schedule() -> None:
    warmup, last = 20, 200
    schedule = WarmupSchedule(warmup / last, InverseSquareRootSchedule(3.0, timescale=warmup / (last - warmup)))
    steps = np.arange(last + 1)
    # Vaswani et al. (2017), equation 3, with the step counted so that its peak is at `warmup`
    expected = 3.0 * np.sqrt(warmup) * np.minimum(steps * warmup**-1.5, np.maximum(steps, 1) ** -0.5)
    np.testing.assert_allclose(values(schedule, steps / last), expected, rtol=1e-12)


positive = st.floats(1e-12, 1e12)
multiplier = st.just(0.0) | positive
fraction = st.floats(0.0, 1.0)
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


@given(positive, fraction)
def test_equal_ends_make_a_constant(value: float, progress: float) -> None:
    for schedule in (LinearSchedule, CosineSchedule, ExponentialSchedule):
        assert schedule(value, value)(progress) == value


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


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in CLOSED_FORMS], ids=repr)
@pytest.mark.parametrize("progress", [-1e-9, 1.0 + 1e-9, math.nan, math.inf, 2])
def test_progress_outside_the_training_is_an_error(schedule: Schedule, progress: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `progress` to be within \[0, 1\], got .* 0 at the first"):
        schedule(progress)


VALUE = r"Expected `{}` to be finite and at least 0, got"
ABOVE = r"Expected `{}` to be finite and above 0, got"
MILESTONES = r"needs `{}` that increase strictly within \[0, 1\], but got .*not steps or epochs"
PLATEAU = {"monitor": "val_loss"}

MISUSES = [
    (lambda: ConstantSchedule(-1.0), ValueError, VALUE.format("value")),
    (lambda: LinearSchedule(math.nan, 1.0), ValueError, VALUE.format("start")),
    (lambda: LinearSchedule(1.0, math.inf), ValueError, VALUE.format("end")),
    (lambda: CosineSchedule(1.0, -0.1), ValueError, VALUE.format("end")),
    (lambda: ExponentialSchedule(0.0, 1.0), ValueError, ABOVE.format("start")),
    (lambda: ExponentialSchedule(1.0, 0.0), ValueError, ABOVE.format("end")),
    (lambda: PolynomialSchedule(1.0, 0.0, 0.0), ValueError, ABOVE.format("power")),
    (lambda: InverseSquareRootSchedule(1.0, 0.0), ValueError, ABOVE.format("timescale")),
    (lambda: StepSchedule([0.5, 0.5], [1.0, 1.0]), ValueError, MILESTONES.format("milestones")),
    (lambda: StepSchedule([30, 60], [0.1, 0.1]), ValueError, MILESTONES.format("milestones")),
    (lambda: StepSchedule([math.nan], [0.1]), ValueError, MILESTONES.format("milestones")),
    (lambda: StepSchedule([0.5], [0.1, 0.1]), ValueError, "one factor for each milestone, but got 2 .* for 1"),
    (lambda: StepSchedule([0.5], [-0.1]), ValueError, r"`factors\[0\]` to be finite and at least 0"),
    (lambda: StepSchedule([0.1, 0.2], [1e200, 1e200]), ValueError, r"`start \* product\(factors\)`"),
    (lambda: PiecewiseSchedule([]), ValueError, "at least one point"),
    (lambda: PiecewiseSchedule([(0.5, 1.0), (0.2, 1.0)]), ValueError, MILESTONES.format("points")),
    (lambda: PiecewiseSchedule([(0.5, -1.0)]), ValueError, r"`points\[0\]\[1\]` to be finite and at least 0"),
    (lambda: WarmupSchedule(1.0, ConstantSchedule()), ValueError, r"`fraction` within \[0, 1\), but got 1.0.*steps"),
    (lambda: WarmupSchedule(0.1, ConstantSchedule(), start=-1), ValueError, VALUE.format("start")),
    (lambda: WarmupSchedule(0.1, LRSchedule()), TypeError, "Schedule as `then`, but got LRSchedule.* can't be a part"),
    (lambda: SequenceSchedule([math.sin], []), TypeError, r"Schedule as `schedules\[0\]`"),
    (lambda: SequenceSchedule([ConstantSchedule()], [0.5]), ValueError, "1 `milestones` for 1 `schedules`"),
    (lambda: SequenceSchedule([], []), ValueError, "one milestone between each two schedules"),
    (lambda: SequenceSchedule([ConstantSchedule()] * 2, [1.0]), ValueError, "above 0 and below 1.*no place"),
    (lambda: SequenceSchedule([ConstantSchedule()] * 3, [0.6, 0.5]), ValueError, MILESTONES.format("milestones")),
    (lambda: CyclicSchedule(1.0, 2.0, cycles=0), ValueError, "from 1 to 1000 `cycles`, but got 0"),
    (lambda: CosineRestartsSchedule(1.0, 2.0, cycles=1001), ValueError, "from 1 to 1000 `cycles`"),
    (lambda: CyclicSchedule(1.0, 2.0, cycles=1.5), TypeError, "`cycles` to be int, but got 1.5"),
    (lambda: CyclicSchedule(1.0, 2.0, rise=0.0), ValueError, "`rise` to be finite and above 0, got 0.0"),
    (lambda: OneCycleSchedule(1.0, 2.0, 1.0, rise=1.0), ValueError, "`rise` to be at least 0 and below 1"),
    (lambda: CosineRestartsSchedule(1.0, 0.0, cycles=2, growth=0.0), ValueError, ABOVE.format("growth")),
    (lambda: CosineRestartsSchedule(1.0, 0.0, cycles=2, growth=1e-17), ValueError, "`growth` that leaves each of 2"),
    (lambda: CosineRestartsSchedule(1.0, 0.0, cycles=99, growth=1e9), ValueError, "`growth` that leaves each of 99"),
    (lambda: PlateauSchedule(**PLATEAU, mode="up"), ValueError, r"`mode` to be 'min' or 'max', got 'up'"),
    (lambda: PlateauSchedule(**PLATEAU, threshold_mode="x"), ValueError, "`threshold_mode` to be 'rel' or 'abs'"),
    (lambda: PlateauSchedule(**PLATEAU, factor=0.0), ValueError, ABOVE.format("factor")),
    (lambda: PlateauSchedule(**PLATEAU, factor=1.0), ValueError, "`factor` other than 1.*changes nothing"),
    (lambda: PlateauSchedule(**PLATEAU, patience=-1), ValueError, "`patience` to be at least 0, got -1"),
    (lambda: PlateauSchedule(**PLATEAU, threshold=math.nan), ValueError, "`threshold` to be at least 0"),
    (lambda: PlateauSchedule(**PLATEAU, min_multiplier=-0.1), ValueError, VALUE.format("min_multiplier")),
    (lambda: PlateauSchedule(**PLATEAU, min_multiplier=2.0), ValueError, "multiplier of 1, which is not within"),
    (lambda: PlateauSchedule(**PLATEAU, max_multiplier=0.5), ValueError, "`max_multiplier` 0.5"),
    (lambda: LRSchedule(max_lr=0.0), ValueError, ABOVE.format("max_lr")),
]


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES, ids=range(len(MISUSES)))
def test_misuse_is_a_clear_error(misuse: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        misuse()


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("schedule", {type(schedule): schedule for schedule, _ in CLOSED_FORMS}.values(), ids=repr)
def test_every_multiplier_of_every_schedule_is_checked(schedule: Schedule, value: float) -> None:
    multipliers = {"value", "start", "end", "peak"} & set(vars(schedule))
    for name in multipliers:
        with pytest.raises(ValueError, match=rf"Expected `{name}` to be finite and"):
            replace(schedule, **{name: value})


FEEDBACK = [PlateauSchedule("val_loss", factor=2.0, max_multiplier=8.0), LRSchedule(), LRSchedule(max_lr=0.1)]


@pytest.mark.parametrize("schedule", [*(schedule for schedule, _ in CLOSED_FORMS), *FEEDBACK], ids=repr)
def test_schedules_are_values(schedule: Schedule | FeedbackSchedule) -> None:
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert repr(twin) == repr(schedule)
    with pytest.raises(FrozenInstanceError):
        schedule.__setattr__("anything", 1)


class Owner:
    """Hold a schedule as a callback does."""

    def __init__(self, schedule: Schedule | FeedbackSchedule) -> None:
        """Keep the schedule.

        Args:
            schedule: what to follow
        """
        self.schedule = schedule


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Owner, "owner")
    return parser


def as_config(schedule: object) -> object:
    """Write a schedule as a user would in YAML."""
    if isinstance(schedule, (Schedule, FeedbackSchedule)):
        arguments = {name: as_config(value) for name, value in vars(schedule).items()}
        return {"class_path": f"lightning_l2.schedules.{type(schedule).__name__}", "init_args": arguments}
    return [as_config(item) for item in schedule] if isinstance(schedule, tuple) else schedule


def through_yaml(schedule: object) -> tuple[object, str]:
    once = parser().parse_string(json.dumps({"owner": {"schedule": as_config(schedule)}}))
    printed = parser().dump(once)
    again = parser().parse_string(printed)
    assert parser().dump(again) == printed
    return parser().instantiate(again).owner.schedule, printed


@pytest.mark.parametrize("schedule", [*(schedule for schedule, _ in CLOSED_FORMS), *FEEDBACK], ids=repr)
def test_yaml_gives_the_schedule_and_prints_public_paths(schedule: Schedule | FeedbackSchedule) -> None:
    parsed, printed = through_yaml(schedule)
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


@settings(max_examples=25, deadline=None)
@given(nested, fraction)
def test_nested_schedules_survive_yaml(schedule: Schedule, progress: float) -> None:
    parsed, _ = through_yaml(schedule)
    assert parsed == schedule
    assert parsed(progress) == schedule(progress)


def test_command_line_overrides_yaml_and_short_names_do() -> None:
    arguments = ["--owner.schedule=CosineSchedule", "--owner.schedule.start=1", "--owner.schedule.end=10"]
    parsed = parser().instantiate(parser().parse_args([*arguments, "--owner.schedule.end=5"]))
    assert parsed.owner.schedule == CosineSchedule(1.0, 5.0)


def test_misspelt_argument_is_an_error_that_names_it() -> None:
    config = {"class_path": "lightning_l2.schedules.CosineSchedule", "init_args": {"start": 1.0, "stop": 2.0}}
    with pytest.raises(Exception, match="stop"):
        parser().parse_object({"owner": {"schedule": config}})


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for schedule in [*(schedule for schedule, _ in CLOSED_FORMS), *FEEDBACK]:
        documented = dict(re.findall(r"^ +(\w+): (.+)$", type(schedule).__doc__.partition("Args:")[2], re.MULTILINE))
        with pytest.raises(SystemExit):
            parser().parse_args([f"--owner.schedule.help=lightning_l2.schedules.{type(schedule).__name__}"])
        text = " ".join(capsys.readouterr().out.split())
        for argument in vars(schedule):
            assert documented[argument] in text


class Groups:
    """An optimizer as a feedback schedule sees it."""

    def __init__(self, *groups: dict[str, object]) -> None:
        self.param_groups = list(groups)
        self.state: dict[object, object] = {}


metric = st.integers(-20, 20).map(lambda tenths: tenths / 10) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(deadline=None)
@given(
    st.lists(metric, min_size=1, max_size=40),
    st.sampled_from(["min", "max"]),
    st.sampled_from(["rel", "abs"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-4, 0.3]),
    st.sampled_from([0.0, 0.04]),
)
def test_plateau_equals_reduce_lr_on_plateau(
    metrics: list[float], mode: str, threshold_mode: str, patience: int, cooldown: int, threshold: float, low: float
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"mode": mode, "factor": 0.5, "patience": patience, "threshold": threshold, "cooldown": cooldown}
    options["threshold_mode"] = threshold_mode
    reference = lr_scheduler.ReduceLROnPlateau(optimizer, **options, min_lr=low, eps=0.0)
    schedule, state, groups = PlateauSchedule("loss", **options, min_multiplier=low), {}, Groups({}, {})
    for value in metrics:
        reference.step(value)
        assert schedule.multipliers(groups, {"loss": value}, state) == [optimizer.param_groups[0]["lr"]] * 2


def test_plateau_strengthens_up_to_its_maximum() -> None:
    schedule, state = PlateauSchedule("acc", mode="max", factor=3.0, patience=0, max_multiplier=5.0), {}
    seen = [schedule.multipliers(Groups({}), {"acc": value}, state)[0] for value in (0.5, 0.5, 0.6, 0.6, 0.6)]
    assert seen == [1.0, 3.0, 3.0, 5.0, 5.0]


def test_plateau_continues_from_a_saved_state() -> None:
    losses = [1.0, 0.9, 0.95, 0.9, 0.9, 0.9, 0.7, 0.8, 0.8, 0.8]
    schedule = PlateauSchedule("loss", patience=1, cooldown=1)
    whole, first = {}, {}
    expected = [schedule.multipliers(Groups({}), {"loss": loss}, whole) for loss in losses]
    for loss in losses[:4]:
        schedule.multipliers(Groups({}), {"loss": loss}, first)
    resumed = json.loads(json.dumps(first))
    assert [schedule.multipliers(Groups({}), {"loss": loss}, resumed) for loss in losses[4:]] == expected[4:]


def test_a_metric_that_was_not_logged_is_an_error_with_those_that_were() -> None:
    with pytest.raises(ValueError, match=r"PlateauSchedule monitors 'val_loss', which was not logged. Logged: \['a'"):
        PlateauSchedule("val_loss").multipliers(Groups({}), {"b": 1.0, "a": 2.0}, {})


@pytest.mark.parametrize(
    ("make", "peak"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 20), 0.5),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)), 0.5),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.8, total_steps=22, cycle_momentum=False), 0.8),
    ],
    ids=["cosine", "warmup", "one_cycle"],
)
def test_lr_schedule_is_lr_over_its_peak(make: Callable[..., lr_scheduler.LRScheduler], peak: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
    scheduler, state = make(optimizer), {}
    LRSchedule().check(optimizer)
    for _ in range(20):
        expected = optimizer.param_groups[0]["lr"] / peak
        # Asked for again in the same step, the answer is the same
        for _ in range(2):
            assert LRSchedule().multipliers(optimizer, {}, state) == [pytest.approx(expected, rel=1e-15)]
        optimizer.step()
        scheduler.step()


def test_lr_schedule_learns_a_peak_that_no_group_tells_and_keeps_it_by_name() -> None:
    body, head, state = {"name": "body", "lr": 0.1}, {"name": "head", "lr": 3.0}, {}
    assert LRSchedule().multipliers(Groups(body, head), {}, state) == [1.0, 1.0]
    body["lr"] = 0.4
    assert LRSchedule().multipliers(Groups(body, head), {}, state) == [1.0, 1.0]
    body["lr"] = 0.2
    # Another layout after a resume: the peak belongs to the group's name, not its place
    resumed = json.loads(json.dumps(state))
    assert LRSchedule().multipliers(Groups(head, {"name": "late", "lr": 0.3}, body), {}, resumed) == [1.0, 1.0, 0.5]
    assert LRSchedule(max_lr=0.8).multipliers(Groups(body), {}, {}) == [0.25]
    assert LRSchedule().multipliers(Groups({"lr": 0.0}), {}, {}) == [0.0]
    assert LRSchedule().multipliers(Groups({"lr": torch.tensor(0.5), "initial_lr": 1.0}), {}, {}) == [0.5]


def test_lr_schedule_refuses_groups_without_lr() -> None:
    with pytest.raises(ValueError, match=r"LRSchedule reads the learning rate .* group 1 of Groups has no `lr`"):
        LRSchedule().check(Groups({"lr": 0.1}, {}))
