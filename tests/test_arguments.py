"""Whatever is given as any argument of anything public: it works, or an error says which argument was wrong."""

from __future__ import annotations

import copy
import inspect
import math
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_l2
from lightning_l2 import adaptive, convert, schedules
from lightning_l2.arguments import (
    check_at_least,
    check_choice,
    check_fraction,
    check_not_negative,
    check_pattern,
    check_positive,
    check_types,
)
from lightning_l2.cli.project import SearchOptions
from lightning_l2.constraints import bounds, methods
from lightning_l2.monitor import NormAlarms
from lightning_l2.search.plan import Range, SearchPlan
from tests.schedules.every import CLOSED_FORMS

LINEAR = schedules.LinearSchedule(1.0, 2.0)
# Everything that a user builds, with arguments, at least those that it can't do without.
PUBLIC: dict[Any, dict[str, Any]] = {
    lightning_l2.WeightDecay: {},
    lightning_l2.WeightDecayScheduler: {"schedule": LINEAR},
    lightning_l2.L2NormMonitor: {},
    lightning_l2.L2Penalty: {"weight_decay": 0.1},
    lightning_l2.NormConstraint: {"bound": 1.0},
    lightning_l2.NormPlots: {},
    lightning_l2.DecayRule: {"name": "a"},
    NormAlarms: {},
    Range: {"low": 0.1, "high": 1.0},
    SearchPlan: {},
    SearchOptions: {},
    **{type(schedule): vars(schedule) for schedule, _ in CLOSED_FORMS},
    schedules.PlateauSchedule: {"monitor": "val_loss"},
    schedules.LRSchedule: {},
    adaptive.AlphaDecay: {},
    adaptive.AutoL2Decay: {"monitor": "val_loss"},
    adaptive.CorrectedDecay: {},
    adaptive.AdaptiveDecay: {},
    adaptive.StableDecay: {},
    convert.Timescale: {"epochs": 2.0},
    convert.GaussianPrior: {"sigma": 0.1},
    convert.Normalised: {"weight_decay": 0.1},
    convert.TrainingSetup: {"lr": 0.1},
    bounds.FixedBound: {"norm": 1.0},
    bounds.InitialBound: {},
    bounds.RmsBound: {"rms": 0.1},
    methods.AugmentedLagrangian: {},
    bounds.WarmupBound: {"steps": 2},
    bounds.InflectionBound: {},
}
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
NUMBERS = [0, 1, -1, 3, 2.5, -0.5, 0.0, 1.0, math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e308, 1e-320, 1j]
TEXTS = ["", "0.5", "default", "x", "(", "é\n", b"x", pathlib.Path("x")]
LISTS = [[], [1.0], ["x"], [None], (), (0.1, "a"), [(0.5,)], [LINEAR], range(2), set(), np.ones(2), ENDLESS]
MAPPINGS = [{}, {"a": 1}, {"a": True}, {1: 2}, {"name": "a"}]
OURS = [LINEAR, schedules.PlateauSchedule("x"), convert.Timescale(2.0), NormAlarms(), lightning_l2.DecayRule("a")]
OTHERS = [None, True, False, object, object(), nn.Linear, torch.tensor(0.5), torch.ones(2), np.float32(0.5), math.sin]
ODD = [*NUMBERS, *TEXTS, *LISTS, *MAPPINGS, *OURS, *OTHERS]


def test_everything_public_is_here() -> None:
    offered = {
        getattr(module, name)
        for module in (lightning_l2, schedules, adaptive, convert)
        for name in module.__all__
        if inspect.isclass(getattr(module, name)) and not inspect.isabstract(getattr(module, name))
    }
    not_built_by_users = {lightning_l2.WeightDecayMixin, schedules.OptimizerLike}
    assert offered - not_built_by_users <= set(PUBLIC)


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_an_argument_works_or_is_named_in_the_error(kind: Any) -> None:
    unclear = []
    for name in inspect.signature(kind).parameters:
        # rules and presets are refused by what is wrong with them
        words = ["rule", "preset"] if name == "rules" else [name]
        for value in ODD:
            try:
                made = kind(**{**PUBLIC[kind], name: value})
            except (TypeError, ValueError, MisconfigurationException) as error:
                if not any(word in str(error) for word in words):
                    unclear.append((name, value, error))
            else:
                usable(made)
    assert not unclear


def usable(made: Any) -> None:
    assert repr(pickle.loads(pickle.dumps(made)))
    copy.deepcopy(made)
    if isinstance(made, schedules.Schedule):
        for progress in (0.0, 0.3, 0.5, 1.0):
            assert type(made(progress)) is float
            assert 0.0 <= made(progress) < math.inf


def test_numbers_of_numpy_are_numbers() -> None:
    values = np.logspace(-3, -1, 3)
    rule = lightning_l2.DecayRule("a", multiplier=values[1])
    assert type(rule.resolve(values[0])) is float
    assert type(schedules.LinearSchedule(*values[:2].astype(np.float32))(0.5)) is float
    assert lightning_l2.WeightDecay(values[0]).weight_decay == pytest.approx(1e-3)
    assert lightning_l2.WeightDecayScheduler(LINEAR, total_steps=np.int64(7)).total_steps == 7


@dataclass
class Everything:
    number: float
    whole: int = 0
    text: str | None = None
    word: Literal["a", "b"] = "a"
    several: Sequence[float] = ()
    pairs: Sequence[tuple[float, int]] = ()
    table: Mapping[str, bool] | None = None
    flag: bool = False
    kind: type = int
    path: str | pathlib.Path = ""


@pytest.mark.parametrize(
    "right",
    [
        {"number": 1},
        {"number": np.float32(1.0)},
        {"whole": np.int64(1)},
        {"text": None},
        {"path": pathlib.Path("a")},
        {"path": "a"},
        {"word": "c"},  # which word is not its business
        {"several": (1, 2.0)},
        {"pairs": [(1.0, 2), [1, 2]]},
        {"table": {"a": True}},
        {"flag": True},
        {"kind": nn.Linear},
        {"unknown": 1},
    ],
    ids=str,
)
def test_right_types(right: dict[str, Any]) -> None:
    check_types(Everything, right)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"number": "1"}, "Everything needs `number` to be float, but got '1' of type str."),
        ({"number": True}, "`number` to be float, but got True of type bool"),
        ({"number": None}, "`number` to be float, but got None of type NoneType"),
        ({"number": torch.ones(1)}, "of type Tensor"),
        ({"number": 10**400}, "`number` to be float, but got 1000.*of type int"),
        ({"whole": 1.0}, "`whole` to be int, but got 1.0 of type float"),
        ({"whole": False}, "`whole` to be int, but got False"),
        ({"text": pathlib.Path("a")}, "`text`"),
        ({"text": 3}, "`text` to be str | None, but got 3 of type int"),
        ({"word": 3}, "`word` to be Literal"),
        ({"several": "12"}, "`several` to be Sequence[float], but got '12' of type str"),
        ({"several": [1.0, "2"]}, "`several`"),
        ({"several": 1.0}, "`several`"),
        ({"pairs": [(1.0, 2, 3)]}, "`pairs`"),
        ({"pairs": [(1.0, 2.5)]}, "`pairs`"),
        ({"table": {"a": 1}}, "`table`"),
        ({"table": {1: True}}, "`table`"),
        ({"table": [("a", True)]}, "`table`"),
        ({"flag": 1}, "`flag` to be bool, but got 1 of type int"),
        ({"kind": 3}, "`kind` to be type, but got 3 of type int"),
    ],
    ids=str,
)
def test_wrong_types(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message.replace("[", r"\[").replace("|", r"\|")):
        check_types(Everything, {"number": 1.0, **wrong})


def test_long_values_are_cut_short() -> None:
    with pytest.raises(TypeError) as error:
        check_types(Everything, {"text": list(range(10_000))})
    assert re.search(r"got \[0, 1, 2, 3, 4, 5, \.\.\.\] of type list", str(error.value))


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (check_positive, [1e-320, 3, np.float32(2.0), None], [0.0, -1, math.nan, math.inf], "finite and above 0"),
        (check_not_negative, [0.0, 7, None], [-1e-9, math.nan, math.inf], "finite and at least 0"),
        (check_fraction, [0.0, 0.999, None], [1.0, -0.1, math.nan], "at least 0 and below 1"),
        (partial(check_at_least, 2), [2, 7.5, None], [1, math.nan], "at least 2"),
        (partial(check_choice, ("a", "b", None)), ["a", None], ["c", 1], "'a', 'b' or None"),
        (partial(check_pattern), ["^a", None], ["(", "*"], "a regular expression"),
    ],
    ids=range(6),
)
def test_values(check: Any, right: list[Any], wrong: list[Any], message: str) -> None:
    check(first=right[0], **{f"other{index}": value for index, value in enumerate(right)})
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^Expected `second` to be {message}, got {re.escape(repr(value))}[.:]"):
            check(first=right[0], second=value, third=value)
