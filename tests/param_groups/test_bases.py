"""Base lambdas by rules: decided once for each parameter, also for those that a module gets later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule
from lightning_l2.param_groups.bases import RuleBases
from lightning_l2.param_groups.resume import Resuming


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def test_rules_give_the_base_of_each_parameter() -> None:
    model = net()
    rules = [DecayRule("head", pattern=r"^2\.weight", multiplier=0.5), "default"]
    bases = RuleBases(model, rules, lambda group: 0.2, Resuming("config"))
    found = {d.name: (d.rule.name, d.base) for d in (bases.of(0, p, {}, 0.7) for p in model.parameters()) if d.rule}
    assert found == {
        "0.weight": ("decay", 0.2),
        "0.bias": ("no_decay", 0.0),
        "1.weight": ("no_decay", 0.0),
        "1.bias": ("no_decay", 0.0),
        "2.weight": ("head", 0.1),
        "2.bias": ("no_decay", 0.0),
    }


def test_without_a_base_the_group_and_the_rule_make_it_later() -> None:
    model = net()
    bases = RuleBases(model, "default", lambda group: None, Resuming("config"))
    assert bases.of(0, model[0].weight, {}, 0.7).base is None


def test_the_base_may_depend_on_the_group() -> None:
    model = net()
    bases = RuleBases(model, "default", lambda group: group["lr"] * 2, Resuming("config"))
    assert bases.of(0, model[0].weight, {"lr": 0.1}, 0.0).base == 0.2
    assert bases.of(0, model[2].weight, {"lr": 0.3}, 0.0).base == 0.6
    # decided once
    assert bases.of(0, model[0].weight, {"lr": 0.9}, 0.0).base == 0.2


def test_a_parameter_of_several_optimizers_has_a_key_for_each() -> None:
    model = net()
    bases = RuleBases(model, "default", lambda group: 0.2, Resuming("config"))
    keys = [bases.of(number, model[0].weight, {}, 0.0).key for number in (1, 0, 1)]
    assert keys == ["0.weight", "optimizer0/0.weight", "0.weight"]


def test_a_parameter_that_the_module_gets_later_and_one_in_the_place_of_another() -> None:
    model = net()
    rules = [DecayRule("first", pattern=r"^0\.weight"), "default"]
    bases = RuleBases(model, rules, lambda group: 0.2, Resuming("config"))
    bases.of(0, model[0].weight, {}, 0.0)
    model.append(nn.Linear(1, 1))
    late = bases.of(0, model[3].weight, {}, 0.0)
    assert (late.name, late.base) == ("3.weight", 0.2)
    model[0] = nn.Identity()  # then a rule matches nothing any more, which is no mistake now
    model[2].weight = nn.Parameter(torch.zeros(1, 3))
    replaced = bases.of(0, model[2].weight, {}, 0.0)
    assert (replaced.name, replaced.base) == ("2.weight", 0.2)


def test_parameters_that_are_nobodys_are_unassigned_until_they_are_somebodys() -> None:
    model, stranger = net(), nn.Parameter(torch.zeros(2, 2))
    bases = RuleBases(model, "default", lambda group: 0.2, Resuming("config"))
    decision = bases.of(0, stranger, {}, 0.7)
    assert (decision.name, decision.rule, decision.base) == ("unassigned", None, None)
    with pytest.MonkeyPatch.context() as patch:  # nor is the module looked through again for them
        patch.setattr(model, "named_modules", lambda *_, **__: pytest.fail("looked through"))
        patch.setattr(model, "named_parameters", lambda *_, **__: pytest.fail("looked through"))
        assert bases.of(0, stranger, {}, 0.7) == decision
    assert not bases.owns_any([stranger])
    assert bases.owns_any([stranger, model[0].bias])


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Rule 'x' matched no parameter"):
        RuleBases(net(), [DecayRule("x", pattern="nothing"), "default"], lambda group: 0.2, Resuming("config"))


@pytest.mark.parametrize(("on_resume", "expected"), [("config", 0.2), ("checkpoint", 0.5), ("error", 0.2)])
def test_what_a_checkpoint_says(on_resume: str, expected: float) -> None:
    model, resuming = net(), Resuming(on_resume)  # type: ignore[arg-type]
    resuming.has_restored, resuming.restored = True, {"0.weight": 0.5}
    bases = RuleBases(model, "default", lambda group: 0.2, resuming)
    assert bases.of(0, model[0].weight, {}, 0.0).base == expected
    assert bases.of(0, model[2].weight, {}, 0.0).base == 0.2
