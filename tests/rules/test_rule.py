"""A rule's values, conditions and messages, and its way through YAML."""

import dataclasses
import pickle

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lightning_l2.rules import DecayRule, assign_rules
from lightning_l2.rules.rule import is_of_class


@pytest.mark.parametrize(
    ("rule", "base", "expected"),
    [
        (DecayRule("a"), 0.3, 0.3),
        (DecayRule("a", multiplier=0.5), 0.3, 0.15),
        (DecayRule("a", multiplier=0.0), 0.3, 0.0),
        (DecayRule("a", multiplier=2), 0, 0.0),
        (DecayRule("a", weight_decay=0.1), 0.3, 0.1),
        (DecayRule("a", weight_decay=0.0), 0.3, 0.0),
    ],
)
def test_resolve(rule, base, expected):
    assert rule.resolve(base) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("base", [-0.1, float("nan"), float("inf")])
def test_resolve_rejects_a_base_that_is_no_weight_decay(base):
    with pytest.raises(ValueError, match="weight_decay must be finite and at least 0, got"):
        DecayRule("a").resolve(base)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": ""}, ValueError, "A rule needs a name, a non-empty string, but got ''."),
        ({"name": 3}, ValueError, "A rule needs a name, a non-empty string, but got 3."),
        ({"weight_decay": -0.1}, ValueError, "Rule 'a': weight_decay must be finite and at least 0, got -0.1."),
        ({"weight_decay": float("nan")}, ValueError, "Rule 'a': weight_decay must be finite and at least 0, got nan."),
        ({"multiplier": float("inf")}, ValueError, "Rule 'a': multiplier must be finite and at least 0, got inf."),
        ({"multiplier": -1}, ValueError, "Rule 'a': multiplier must be finite and at least 0, got -1."),
        ({"weight_decay": "1e-2"}, TypeError, "Rule 'a': weight_decay must be a number, got '1e-2' of type str."),
        ({"weight_decay": True}, TypeError, "Rule 'a': weight_decay must be a number, got True of type bool."),
        (
            {"weight_decay": 0.1, "multiplier": 2.0},
            ValueError,
            "Rule 'a' has both weight_decay=0.1 and multiplier=2.0. Give the absolute value or the one relative to the "
            "base, not both.",
        ),
        ({"max_ndim": -1}, ValueError, "Rule 'a': max_ndim must be an integer of at least 0, got -1."),
        ({"max_ndim": True}, ValueError, "Rule 'a': max_ndim must be an integer of at least 0, got True."),
        ({"max_ndim": 1.5}, ValueError, "Rule 'a': max_ndim must be an integer of at least 0, got 1.5."),
        ({"modules": [3]}, TypeError, "Rule 'a': modules must be classes or names of classes, got 3."),
        ({"modules": [""]}, TypeError, "Rule 'a': modules must be classes or names of classes, got ''."),
        ({"modules": 3}, TypeError, "Rule 'a': modules must be classes or names of classes, got 3."),
        (
            {"pattern": ["head"]},
            TypeError,
            "Rule 'a': pattern must be a string, got ['head']. One that means several names is '^head|^neck'.",
        ),
        ({"optional": "no"}, TypeError, "DecayRule needs `optional` to be bool, but got 'no' of type str."),
        (
            {"pattern": "(head"},
            ValueError,
            "Expected `pattern` of rule 'a' to be a regular expression, got '(head': missing ), unterminated "
            "subpattern at position 0.",
        ),
        (
            {"layer_multiplier": 0.9},
            ValueError,
            "Rule 'a' has layer_multiplier=0.9, so its pattern must have a group that is the layer's number, such as "
            r"'layers\.(\d+)\.', got None.",
        ),
        (
            {"layer_multiplier": 0.9, "pattern": r"layers\.\d+"},
            ValueError,
            "Rule 'a' has layer_multiplier=0.9, so its pattern must have a group that is the layer's number, such as "
            r"'layers\.(\d+)\.', got 'layers\\.\\d+'.",
        ),
        (
            {"layer_multiplier": -0.9, "pattern": r"(\d+)"},
            ValueError,
            "Rule 'a': layer_multiplier must be finite and at least 0, got -0.9.",
        ),
    ],
)
def test_messages(arguments, error, message):
    with pytest.raises(error) as caught:
        DecayRule(**{"name": "a", **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("rule", "conditions"),
    [
        (DecayRule("a"), {}),
        (DecayRule("a", weight_decay=0.0, optional=True), {}),
        (DecayRule("a", max_ndim=0), {"max_ndim": 0}),
        (DecayRule("a", modules="Linear", pattern=""), {"modules": ("Linear",), "pattern": ""}),
        (DecayRule("a", default_exemptions=True), {"default_exemptions": True}),
        (DecayRule("a", before_norm=True), {"before_norm": True}),
    ],
)
def test_a_rule_without_conditions_takes_all(rule, conditions):
    assert rule.conditions() == conditions
    assert rule.is_catch_all is (not conditions)


def test_only_the_name_is_positional():
    with pytest.raises(TypeError, match="positional"):
        DecayRule("head", "pattern")


def test_frozen_hashable_picklable():
    rule = DecayRule("a", modules=[nn.Linear, "Embedding"], multiplier=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.name = "b"
    assert rule == pickle.loads(pickle.dumps(rule))
    assert {rule: 1}[DecayRule("a", modules=(nn.Linear, "Embedding"), multiplier=0.5)] == 1


def test_a_single_module_needs_no_tuple():
    assert DecayRule("a", modules="Embedding").modules == ("Embedding",)
    assert DecayRule("a", modules=nn.Embedding).modules == (nn.Embedding,)


@pytest.mark.parametrize(
    ("module", "wanted", "expected"),
    [
        (nn.Embedding(2, 2), "Embedding", True),
        (nn.Embedding(2, 2), "torch.nn.Embedding", True),
        (nn.Embedding(2, 2), "torch.nn.modules.sparse.Embedding", True),
        (nn.Embedding(2, 2), "my.Embedding", False),
        (nn.Embedding(2, 2), "tor.Embedding", False),
        (nn.Embedding(2, 2), "Embed", False),
        (nn.Embedding(2, 2), nn.Embedding, True),
        (type("Mine", (nn.Embedding,), {})(2, 2), "Embedding", True),
        (type("Mine", (nn.Embedding,), {})(2, 2), nn.Embedding, True),
        (nn.Embedding(2, 2), nn.Linear, False),
        (nn.Conv2d(1, 1, 1), "_ConvNd", True),
        (nn.SyncBatchNorm(2), "BatchNorm2d", True),
        (nn.SyncBatchNorm(2), nn.BatchNorm1d, True),
        (nn.SyncBatchNorm(2), "InstanceNorm2d", False),
        (nn.BatchNorm2d(2), "SyncBatchNorm", False),
    ],
)
def test_is_of_class(module, wanted, expected):
    assert is_of_class(module, wanted) is expected


def test_synchronised_batch_norms_are_what_they_were():
    """`Trainer(sync_batchnorm=True)` converts them after the module is made."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2), nn.BatchNorm1d(2))
    rules = [DecayRule("norm", modules=(nn.BatchNorm2d, "BatchNorm1d"), weight_decay=0.01), "default"]
    before = assign_rules(model, rules)
    assert assign_rules(nn.SyncBatchNorm.convert_sync_batchnorm(model), rules) == before
    assert [rule.name for rule in before.values()].count("norm") == 4


def test_all_given_conditions_must_hold():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Embedding(2, 2)})
    rule = DecayRule("hit", pattern=r"^[ac]\.", modules=("Linear",), max_ndim=1)
    assert [name for name, won in assign_rules(model, [rule, "default"]).items() if won.name == "hit"] == ["a.bias"]


class Component:
    def __init__(self, weight_decay: float | None = None, *, rules: str | list[DecayRule | str] = "default") -> None:
        """Keep rules.

        Args:
            weight_decay: base value.
            rules: a preset's name or rules.
        """
        self.rules = rules


def parser():
    built = ArgumentParser(exit_on_error=False)
    built.add_class_arguments(Component, "component")
    return built


def instantiated(config: Namespace):
    return parser().instantiate(config)


YAML = r"""
component:
  rules:
    - {name: embedding, modules: [Embedding, torch.nn.EmbeddingBag], multiplier: 0.2}
    - {name: head, pattern: "^head\\.", weight_decay: 1e-4}
    - {name: layers, pattern: "layers\\.(\\d+)", layer_multiplier: 0.9, optional: true}
    - {name: own, modules: Conv2d, per_parameter: true}
    - default
"""
EXPECTED = [
    DecayRule("embedding", modules=("Embedding", "torch.nn.EmbeddingBag"), multiplier=0.2),
    DecayRule("head", pattern=r"^head\.", weight_decay=1e-4),
    DecayRule("layers", pattern=r"layers\.(\d+)", layer_multiplier=0.9, optional=True),
    DecayRule("own", modules=("Conv2d",), per_parameter=True),
    "default",
]


def test_rules_come_from_yaml_and_survive_print_config():
    config = parser().parse_string(YAML)
    assert instantiated(config).component.rules == EXPECTED
    printed = parser().dump(config)
    assert instantiated(parser().parse_string(printed)).component.rules == EXPECTED
    assert yaml.safe_load(printed)["component"]["rules"][1]["pattern"] == r"^head\."


def test_rules_come_from_the_command_line():
    config = parser().parse_args(["--component.rules=[{name: a, max_ndim: 1, weight_decay: 0}, cnn]"])
    assert instantiated(config).component.rules == [DecayRule("a", max_ndim=1, weight_decay=0.0), "cnn"]
    assert instantiated(parser().parse_args(["--component.rules=rnn"])).component.rules == "rnn"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{name: a, modul: [Embedding]}", "modul"),
        ("{modules: [Embedding]}", "name"),
        ("{name: a, weight_decay: strong}", "weight_decay"),
        ("{name: a, modules: 3}", "modules"),
    ],
)
def test_a_wrong_rule_in_yaml_is_refused_by_name(rule, message):
    with pytest.raises(Exception, match=message) as caught:
        parser().parse_string(f"component: {{rules: [{rule}]}}")
    assert type(caught.value).__name__ == "ArgumentError"


def test_a_wrong_value_in_yaml_gives_our_message():
    config = parser().parse_string("component: {rules: [{name: a, weight_decay: -1}]}")
    with pytest.raises(ValueError, match="Rule 'a': weight_decay must be finite and at least 0, got -1"):
        instantiated(config)


def test_the_help_explains_each_option(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--component.rules.help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(DecayRule):
        assert field.name in shown
