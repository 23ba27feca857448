"""Schedules that read the training, against torch's LR schedulers."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from lightning_l2.schedules import (
    LRSchedule,
    PlateauSchedule,
)
from tests.schedules.every import ABOVE, VALUE

PLATEAU = {"monitor": "val_loss"}
MISUSES = [
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


class Groups:
    """An optimizer as a feedback schedule sees it."""

    def __init__(self, *groups: dict[str, object]) -> None:
        self.param_groups = list(groups)
        self.state: dict[object, object] = {}


metric = st.integers(-20, 20).map(lambda tenths: tenths / 10) | st.sampled_from([math.nan, math.inf, -math.inf])


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
