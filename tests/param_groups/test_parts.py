"""What a part of a group says of its lambda."""

from typing import Any

import pytest
import torch

from lightning_l2.param_groups.parts import DecayGroup, Decision
from lightning_l2.rules import DecayRule


def part(rule: DecayRule | None = None, base: float | None = None, **options: Any) -> DecayGroup:
    parameter = torch.zeros(1)
    decisions = [] if rule is None else [Decision("head.weight", "head.weight", rule, base)]
    return DecayGroup({"params": [parameter], "weight_decay": 0.2}, [parameter], [0], decisions, **options)


def test_without_a_rule_it_follows_its_group() -> None:
    made = part()
    assert made.base == made.weight_decay == 0.2
    made.parent["weight_decay"] = 0.6
    assert made.base == 0.6
    assert (made.rule, made.label) == ("", None)


def test_a_rule_multiplies_what_the_group_says() -> None:
    made = part(DecayRule("head", multiplier=0.5))
    assert (made.rule, made.label, made.base) == ("head", "head", 0.1)
    made.parent["weight_decay"] = 0.6
    assert made.base == 0.3


def test_what_was_built_holds_until_somebody_writes() -> None:
    made = part(configured=((0.2,), 0.7))
    assert made.base == 0.7
    made.parent["weight_decay"] = 0.3
    assert made.base == 0.3


@pytest.mark.parametrize(("multiplier", "expected"), [(1.0, 0.4), (0.0, 0.0), (2.5, 1.0)])
def test_lambda_in_force_is_the_product(multiplier: float, expected: float) -> None:
    assert part(DecayRule("head"), 0.4, given=0.4, multiplier=multiplier).weight_decay == expected


def test_a_schedule_of_lambda_gives_each_its_share() -> None:
    assert part(given=0.1, absolute=(0.08, 0.4)).weight_decay == 0.02
    assert part(given=0.0, absolute=(0.08, 0.0)).weight_decay == 0.0


def test_a_group_for_each_parameter_has_a_name_of_its_own() -> None:
    assert part(DecayRule("own", per_parameter=True)).label == "own/head.weight"


def test_options_of_its_own_hold_until_somebody_writes_to_its_group() -> None:
    made = part()
    made.parent["d"] = first = 0.125
    made.own_options["d"] = 0.5, first
    assert made.options() == {"d": 0.5}
    made.parent["d"] = 0.25
    assert made.options() == {}
