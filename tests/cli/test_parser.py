"""Classes by their paths, and what a parser's complaint is given on its way to the user."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest

from lightning_l2 import WeightDecay
from lightning_l2.cli.parser import explain, import_class, is_a


def test_a_class_by_its_path() -> None:
    assert import_class("collections.OrderedDict") is OrderedDict


@pytest.mark.parametrize("path", ["nowhere.Model", "collections.Nothing", "OrderedDict", ""])
def test_a_path_to_nothing_is_told(path: str) -> None:
    with pytest.raises(ValueError, match=rf"There is no class '{path}' .*Give package\.module\.Class\."):
        import_class(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lightning_l2.WeightDecay", True),
        (f"{__name__}.Derived", True),
        ("lightning_l2.L2Penalty", False),
        (f"{__name__}.made", False),
    ],
)
def test_a_class_of_a_name_or_derived_from_it(path: str, expected: bool) -> None:
    assert is_a(path, "WeightDecay") == expected


class Derived(WeightDecay):
    """A user's own."""


def made() -> WeightDecay:
    """A function that makes one, of which nothing is known before it is called."""
    return WeightDecay(0.1)


PARSER = SimpleNamespace(get_defaults=lambda: {"search.trials": 5, "trainer.max_epochs": None})


@pytest.mark.parametrize(
    ("message", "absent", "expected"),
    [
        (
            "unrecognized arguments: --search.trails=3",
            ["model"],
            "unrecognized arguments: --search.trails=3. Closest options: --search.trials.",
        ),
        (
            "Unrecognized arguments: --qqq",
            [],
            "Unrecognized arguments: --qqq. Closest options: none.",
        ),
        ("something else", ["model", "data"], "something else"),
        ('key "model" is required', [], 'key "model" is required'),
    ],
)
def test_a_complaint_names_the_closest_options(message: str, absent: list[str], expected: str) -> None:
    assert explain(message, absent, PARSER) == expected


@pytest.mark.parametrize(
    ("message", "absent", "options"),
    [
        ('key "model": not valid', ["model", "data"], "--model_class package.module.Class and --data_class"),
        ('key "data": not valid', ["model", "data"], "--data_class package.module.Class."),
        ("fit.model is required", ["model"], "--model_class package.module.Class."),
    ],
)
def test_classes_that_were_not_given_have_an_option(message: str, absent: list[str], options: str) -> None:
    told = explain(message, absent, PARSER)
    assert told.startswith(f"{message}\nWhere the program names its classes itself")
    assert f"give them here too: {options}" in told
