"""Rules from configuration libraries, blocks that hold weights of their own, and rules before the exemptions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule, WeightDecay, assign_rules
from tests.helpers import Net, batches, data, make_trainer


class Configured(Mapping):
    """What a configuration library gives for a mapping: none of its values is a dict or a list either."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_ = {key: configured(value) for key, value in values.items()}

    def __getitem__(self, key: str) -> Any:
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


class Listed(Sequence):
    def __init__(self, values: Sequence[Any]) -> None:
        self.values = [configured(value) for value in values]

    def __getitem__(self, index: Any) -> Any:
        return Listed(self.values[index]) if isinstance(index, slice) else self.values[index]

    def __len__(self) -> int:
        return len(self.values)


def configured(value: Any) -> Any:
    if isinstance(value, dict):
        return Configured(value)
    return Listed(value) if isinstance(value, list | tuple) else value


HEAD = {"name": "head", "modules": ["Linear"], "pattern": r"^head\.weight", "multiplier": 0.5}
RULE = DecayRule(**HEAD)

WRITTEN: dict[str, Callable[[], Any]] = {
    "dicts": lambda: [HEAD, "default"],
    "mappings in a list": lambda: [configured(HEAD), "default"],
    "mappings in a sequence": lambda: configured([HEAD, "default"]),
    "read-only mappings in a tuple": lambda: (MappingProxyType(HEAD), "default"),
    "a rule in a sequence": lambda: Listed([RULE, "default"]),
    "a sequence in a rule": lambda: [DecayRule(**{**HEAD, "modules": configured(["Linear"])}), "default"],
}


@pytest.mark.parametrize("how", WRITTEN)
def test_mappings_and_sequences_are_rules(how: str) -> None:
    model = Net()
    expected = {name: (rule.name, rule.resolve(0.2)) for name, rule in assign_rules(model, [RULE, "default"]).items()}
    found = {name: (rule.name, rule.resolve(0.2)) for name, rule in assign_rules(model, WRITTEN[how]()).items()}
    assert found == expected
    assert expected["head.weight"] == ("head", 0.1)


@pytest.mark.parametrize("how", [how for how in WRITTEN if "read-only" not in how])
def test_they_act_and_their_callback_can_be_copied(how: str) -> None:
    """Weights as with the rule itself, bit for bit."""

    def train(callback: WeightDecay) -> list[Any]:
        torch.manual_seed(0)
        model = Net()
        make_trainer([callback]).fit(model, data())
        return [parameter.tolist() for parameter in model.parameters()]

    expected = train(WeightDecay(0.2, rules=[RULE, "default"], summary=False))
    callback = WeightDecay(0.2, rules=WRITTEN[how](), summary=False)
    for twin in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert train(twin) == expected


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        (configured([{"name": "head", "multiplyer": 0.5}]), "multiplyer"),
        (configured([{"pattern": "x"}]), "name"),
        (configured([3]), "3"),
        (configured([["default"]]), "Listed"),
    ],
    ids=["unknown key", "no name", "a number", "a sequence within"],
)
def test_what_is_no_rule_there_is_named(rules: Any, part: str) -> None:
    with pytest.raises((TypeError, ValueError), match=part):
        WeightDecay(0.2, rules=rules)


class ConvNormAct(nn.Sequential):
    """Convolution, normalisation and activation, as several libraries of vision models name and build them."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


class ConvBN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)


class LayerNormLinear(nn.Module):
    """A fused layer with the weights of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight, self.layer_norm_bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.weight, self.bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.zeros(3))


class NormedLinear(nn.Linear):
    """A layer that normalises its own weight."""

    def __init__(self) -> None:
        super().__init__(3, 3)


class BatchNormAct(nn.BatchNorm2d):
    """A normalisation with an activation, which stays one."""

    def __init__(self) -> None:
        super().__init__(3)
        self.act = nn.ReLU()


class WrappedNorm(nn.Module):
    """So does one that holds nothing but another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)


@pytest.mark.parametrize("block", [ConvNormAct, ConvBN, LayerNormLinear, NormedLinear])
def test_a_block_with_weights_of_its_own_is_no_normalisation(block: type[nn.Module]) -> None:
    """Its matrices decay, and the layer before it isn't one before a normalisation."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), block())
    for preset in ("default", "weaker_before_norm"):
        rules = {name: rule.resolve(1.0) for name, rule in assign_rules(model, preset).items()}
        assert rules["0.weight"] == 1.0, preset
        within = 0.1 if preset == "weaker_before_norm" and block in (ConvNormAct, ConvBN) else 1.0
        for name, parameter in model.named_parameters():
            assert rules[name] == (1.0 if name == "0.weight" else within if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize("norm", [BatchNormAct, WrappedNorm, lambda: nn.BatchNorm2d(3)])
def test_a_normalisation_stays_one(norm: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm())
    rules = {name: rule.resolve(1.0) for name, rule in assign_rules(model, "weaker_before_norm").items()}
    assert rules.pop("0.weight") == 0.1
    assert set(rules.values()) == {0.0}


OWN = [
    DecayRule("head", pattern=r"^head\.", multiplier=2.0),
    DecayRule("linear", modules=("Linear",), multiplier=2.0),
    DecayRule("body", pattern=r"^body\.", weight_decay=0.3),
]


@pytest.mark.parametrize("own", OWN, ids=lambda rule: rule.name)
def test_the_exemptions_can_stand_first(own: DecayRule) -> None:
    """With `exempt` before it a rule leaves biases and normalisations alone; without, it takes them, which is told."""
    model = Net()
    taken = {name for name, rule in assign_rules(model, [own, "default"]).items() if rule.name == own.name}
    assert {name for name in taken if name.endswith("bias")}
    found = {name: rule.resolve(0.1) for name, rule in assign_rules(model, ["exempt", own, "default"]).items()}
    for name, parameter in model.named_parameters():
        assert (found[name] == 0.0) == (parameter.ndim < 2), name
    make_trainer([WeightDecay(0.1, rules=["exempt", own, "default"], summary=False)]).fit(Net(), batches(2))
    with pytest.warns(UserWarning, match=rf"(?s){own.name}.*exempt") as told:
        make_trainer([WeightDecay(0.1, rules=[own, "default"], summary=False)]).fit(Net(), batches(2))
    assert len([one for one in told if "exempt" in str(one.message)]) == 1
