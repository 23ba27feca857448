"""Which rule decides on which parameter: ordinary models, the libraries' own defaults, messages, properties."""

import functools
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_l2 import L2Penalty, NormConstraint, WeightDecay
from lightning_l2.rules import DecayRule, assign_rules, decay_param_groups
from lightning_l2.rules.assign import check_without_optimizers, resolve_rules, rules_by_parameter
from tests.transformers_models import MODELS


def names_by_rule(model, rules="default"):
    chosen = assign_rules(model, rules)
    return {
        rule: {name for name, won in chosen.items() if won.name == rule} for rule in {r.name for r in chosen.values()}
    }


def decayed(model):
    return {name for name, rule in assign_rules(model).items() if rule.resolve(1.0) > 0}


class LlamaRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, size))


class Gain(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(2, size))


class Everything(nn.Module):
    """The list of the first issue: parameters that other classifiers decide wrong."""

    def __init__(self):
        super().__init__()
        norms = {
            "bn1": nn.BatchNorm1d(3),
            "bn2": nn.BatchNorm2d(3),
            "bn3": nn.BatchNorm3d(3),
            "ln": nn.LayerNorm((2, 3)),
        }
        norms |= {"sync": nn.SyncBatchNorm(3), "gn": nn.GroupNorm(1, 3), "inst": nn.InstanceNorm2d(3, affine=True)}
        self.norms_of_torch = nn.ModuleDict({**norms, "rms": nn.RMSNorm((2, 3)), "lrn": nn.LocalResponseNorm(2)})
        self.llama, self.norm1, self.gain = LlamaRMSNorm(3), Gain(3), Gain(3)
        self.attention, self.lstm = nn.MultiheadAttention(4, 2), nn.LSTM(3, 4)
        self.embedding, self.debias_proj, self.normalize_proj = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.gamma, self.logit_scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))
        self.queries = nn.Parameter(torch.ones(2, 3))


def test_each_parameter_that_others_decide_wrong():
    assert decayed(Everything()) == {
        "gain.gamma",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "embedding.weight",
        "debias_proj.weight",
        "normalize_proj.weight",
        "queries",
    }


@functools.cache
def built(name):
    return MODELS[name][0]()


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_decided_as_by_an_expert(name):
    model, (_, norms, others) = built(name), MODELS[name]
    owner = {full: type(model.get_submodule(full.rpartition(".")[0])).__name__ for full, _ in model.named_parameters()}
    expected = {full for full in owner if owner[full] in norms or full.endswith("bias") or full in others}
    assert norms <= set(owner.values())
    assert others <= set(owner)
    assert decayed(model) == set(owner) - expected
    assert list(assign_rules(model)) == list(owner)


# Names ending so differ from what transformers' own Trainer decays.
WRONG_IN_TRANSFORMERS = {
    # a BatchNorm called `normalization` is none of its patterns
    "resnet": {"normalization.weight"},
    # GRN is a normalisation; ConvNeXt V2's authors exempt its parameters
    "convnextv2": {"grn.weight"},
    # the authors of Mamba exempt A_log and D; norm_f is an RMSNorm
    "mamba": {"A_log", "mixer.D", "norm_f.weight"},
    "mamba2": {"A_log", "mixer.D", "norm_f.weight"},
    # vectors and scalars
    "clip": {"logit_scale", "class_embedding"},
    "gpt_oss": {"sinks"},
    # the authors of ViT exempt it; it is a vector stored as (1, 1, C)
    "vit": {"cls_token"},
    # a vector, and the gain of a weight norm
    "wav2vec2": {"masked_spec_embed", "original0"},
}


@pytest.mark.parametrize("name", MODELS)
def test_where_transformers_decides_otherwise_it_decays_what_it_should_not(name):
    model = built(name)
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model)) & dict(model.named_parameters()).keys()
    ours = decayed(model)
    endings = WRONG_IN_TRANSFORMERS.get(name, set())
    assert ours <= theirs
    assert theirs - ours == {full for full in theirs if full.endswith(tuple(endings))}
    assert all(any(full.endswith(ending) for full in theirs - ours) for ending in endings)


def test_where_transformers_spares_a_weight_matrix():
    """Its patterns are parts of names: `debias_proj` has "bias" in it and `layernorm_head` "layernorm"."""
    model = nn.ModuleDict({"debias_proj": nn.Linear(2, 2, bias=False), "layernorm_head": nn.Linear(2, 2, bias=False)})
    assert transformers.Trainer.get_decay_parameter_names(None, model) == []
    assert decayed(model) == {"debias_proj.weight", "layernorm_head.weight"}


def test_embeddings_are_one_rule_away_from_no_decay():
    model = built("bert")
    chosen = names_by_rule(
        model, [DecayRule("embedding_no_decay", modules=("Embedding",), weight_decay=0.0), "default"]
    )
    assert chosen["embedding_no_decay"] == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }


def small():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(3, 2),
            "body": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
            "head": nn.Linear(2, 2),
        }
    )


def test_the_first_rule_that_matches_wins():
    rules = [
        DecayRule("embedding", modules=("Embedding",), multiplier=0.2),
        DecayRule("no_decay", max_ndim=1, weight_decay=0.0),
        DecayRule("head", pattern=r"^head\.", weight_decay=0.1),
        DecayRule("decay"),
    ]
    assert names_by_rule(small(), rules) == {
        "embedding": {"embedding.weight"},
        "no_decay": {"body.0.bias", "body.1.weight", "body.1.bias", "head.bias"},
        "head": {"head.weight"},
        "decay": {"body.0.weight"},
    }
    assert names_by_rule(small(), rules[-1:]) == {"decay": {name for name, _ in small().named_parameters()}}


def test_a_preset_expands_in_place():
    first, last = DecayRule("first", pattern="head"), DecayRule("last")
    assert [rule.name for rule in resolve_rules("default")] == ["no_decay", "decay"]
    assert resolve_rules() == resolve_rules("default")
    assert [rule.name for rule in resolve_rules([first, "default", last])] == ["first", "no_decay", "decay", "last"]
    assert resolve_rules(resolve_rules("rnn")) == resolve_rules("rnn")


def test_a_tied_parameter_matches_under_each_of_its_names():
    model = small()
    model["head"].weight = nn.Parameter(model["embedding"].weight[:2].clone())
    model["embedding"].weight = model["head"].weight
    for rule in (DecayRule("tied", pattern=r"^head\.weight"), DecayRule("tied", modules=("Embedding",))):
        assert names_by_rule(model, [rule, "default"])["tied"] == {"embedding.weight"}


def test_patterns_see_clean_names():
    model = nn.ModuleDict({"model": torch.compile(small(), backend="eager")})
    assert names_by_rule(model, [DecayRule("head", pattern=r"^model\.head\.weight$"), "default"])["head"] == {
        "model.head.weight"
    }


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([DecayRule("l", pattern=r"^layers\.(\d+)", layer_multiplier=0.5)], [0.25, 0.5, 1.0]),
        ([DecayRule("l", pattern=r"^layers\.(\d+)", layer_multiplier=0.5, multiplier=2)], [0.5, 1.0, 2.0]),
        ([DecayRule("l", pattern=r"^layers\.(\d+)", layer_multiplier=0.5, weight_decay=8)], [2.0, 4.0, 8.0]),
        ([DecayRule("l", pattern=r"^layers\.(\d+)", layer_multiplier=2, weight_decay=0.0)], [0.0, 0.0, 0.0]),
        ([DecayRule("l", pattern=r"layers\.([01])\.", layer_multiplier=0.5), DecayRule("rest")], [0.5, 1.0, 1.0]),
    ],
)
def test_layer_multiplier(rules, expected):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])})
    chosen = assign_rules(model, rules)
    assert [chosen[f"layers.{i}.weight"].resolve(1.0) for i in range(3)] == expected
    assert chosen["layers.0.bias"] == chosen["layers.0.weight"]
    assert chosen["layers.1.weight"].name == "l_1"


def test_layer_multiplier_of_a_single_layer_and_of_a_tied_one():
    model = nn.ModuleDict({"head": nn.Linear(1, 1, bias=False), "layers": nn.ModuleList([nn.Linear(1, 1, bias=False)])})
    rules = [DecayRule("l", pattern=r"^layers\.(\d+)", layer_multiplier=0.5), DecayRule("rest")]
    assert assign_rules(model, rules)["layers.0.weight"].resolve(1.0) == 1.0
    model["head"].weight = model["layers"][0].weight
    assert {name: rule.name for name, rule in assign_rules(model, rules).items()} == {"head.weight": "l_0"}


def test_layer_multiplier_over_more_than_nine_layers():
    model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(11)])
    groups = decay_param_groups(model, 1.0, [DecayRule("layer", pattern=r"^(\d+)", layer_multiplier=0.5)])
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        (f"layer_{i}", 0.5 ** (10 - i)) for i in range(11)
    ]


def test_a_group_of_each_parameter():
    model = small()
    rules = [DecayRule("head", pattern=r"^head\.weight", multiplier=0.5), "per_matrix"]
    names = [name for name, rule in assign_rules(model, rules).items() if rule.name == "decay"]
    assert len(names) > 1
    groups = decay_param_groups(model, 0.3, rules)
    expected = {f"decay/{name}": 0.3 for name in names} | {"head": 0.15, "no_decay": 0.0}
    assert {group["name"]: group["weight_decay"] for group in groups} == expected
    of_name = dict(model.named_parameters())
    for name in names:
        (group,) = [group for group in groups if group["name"] == f"decay/{name}"]
        assert group["params"] == [of_name[name]]


def test_a_group_of_each_parameter_of_each_layer():
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(2)])
    rules = [DecayRule("layer", pattern=r"^(\d+)", layer_multiplier=0.5, per_parameter=True)]
    assert {group["name"]: group["weight_decay"] for group in decay_param_groups(model, 1.0, rules)} == {
        "layer_0/0.weight": 0.5,
        "layer_0/0.bias": 0.5,
        "layer_1/1.weight": 1.0,
        "layer_1/1.bias": 1.0,
    }


def test_groups_are_the_fewest_and_hold_trainable_parameters_in_order():
    model = small()
    model["body"].requires_grad_(False)
    groups = decay_param_groups(model, 0.3, [DecayRule("head", pattern=r"^head\.weight", multiplier=0.5), "default"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [(g["name"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups] == [
        ("decay", 0.3, ["embedding.weight"]),
        ("head", 0.15, ["head.weight"]),
        ("no_decay", 0.0, ["head.bias"]),
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.15, 0.0]


@pytest.mark.parametrize("weight_decay", [-0.1, float("inf"), float("nan")])
def test_groups_need_a_weight_decay(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be finite and at least 0, got"):
        decay_param_groups(small(), weight_decay)


def test_a_model_without_parameters():
    assert assign_rules(nn.ReLU()) == {}
    assert decay_param_groups(nn.ReLU(), 0.1) == []


A_LIST = "Write rules=[{'name': 'head', 'pattern': '^head', 'weight_decay': 0.1}, 'default'], or in YAML the same."


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            [DecayRule("no_decay", pattern=r"\.bais$"), DecayRule("decay")],
            ValueError,
            r"Rule 'no_decay' matched no parameter (pattern='\\.bais$'). Closest names: 'body.0.bias', 'body.1.bias', "
            "'head.bias'.",
        ),
        (
            [DecayRule("h", pattern=r"^haed\.weight$"), "default"],
            ValueError,
            r"Rule 'h' matched no parameter (pattern='^haed\\.weight$'). Closest names: 'head.weight', "
            "'embedding.weight', 'body.0.weight'.",
        ),
        (
            [DecayRule("e", modules=("Embeding",)), "default"],
            ValueError,
            "Rule 'e' matched no parameter (modules=('Embeding',)). Closest classes: 'Embedding'.",
        ),
        (
            [DecayRule("e", modules=("GRU",)), "default"],
            ValueError,
            "Rule 'e' matched no parameter (modules=('GRU',)). Closest classes: 'Embedding', 'Linear', 'LayerNorm'.",
        ),
        (
            [DecayRule("e", modules=(nn.EmbeddingBag,)), "default"],
            ValueError,
            "Rule 'e' matched no parameter (modules=(<class 'torch.nn.modules.sparse.EmbeddingBag'>,)). Closest "
            "classes: 'Embedding'.",
        ),
        (
            [DecayRule("b", pattern="bia$"), "default"],
            ValueError,
            "Rule 'b' matched no parameter (pattern='bia$'). Closest names: 'body.0.bias', 'body.1.bias', 'head.bias'.",
        ),
        (
            [DecayRule("b", pattern=r"^\w+\.bais$"), "default"],
            ValueError,
            r"Rule 'b' matched no parameter (pattern='^\\w+\\.bais$'). Closest names: 'body.0.bias', 'body.1.bias', "
            "'head.bias'.",
        ),
        (
            [DecayRule("e", pattern="head", modules=(nn.Embedding,)), "default"],
            ValueError,
            "Rule 'e' matched no parameter (pattern='head', modules=(<class 'torch.nn.modules.sparse.Embedding'>,)). "
            "No parameter meets all of them: pattern matches 'head.weight', modules matches 'embedding.weight'.",
        ),
        (
            [DecayRule("s", max_ndim=0), "default"],
            ValueError,
            "Rule 's' matched no parameter (max_ndim=0). If a model may have none, set optional=True.",
        ),
        (
            ["default", DecayRule("h", pattern="^head")],
            ValueError,
            "Rule 'h' decides on no parameter (pattern='^head'): rules before it take all that it matches, such as "
            "'head.weight', taken by 'decay'. Move it up.",
        ),
        (
            [DecayRule("h", pattern="^head")],
            ValueError,
            "No rule covers 5 parameters, the first is 'embedding.weight' (2-D, of Embedding). End the list with a "
            "rule without conditions, such as {name: decay}, or with 'default'.",
        ),
        (
            [DecayRule("a", pattern="head"), DecayRule("a")],
            ValueError,
            "Two rules are called 'a'. Names become those of parameter groups, so give each its own. Rules in order: "
            "'a', 'a'.",
        ),
        (
            [DecayRule("body_1", pattern="head"), DecayRule("body", pattern=r"y\.(\d)", layer_multiplier=1), "default"],
            ValueError,
            "Two rules are called 'body_1'. Names become those of parameter groups, so give each its own. Rules in "
            "order: 'decay', 'body_0', 'body_1', 'body_1'.",
        ),
        (
            [DecayRule("h", pattern=r"(\w+)\.", layer_multiplier=1)],
            ValueError,
            r"Rule 'h' has a layer_multiplier, so the first group of its pattern '(\\w+)\\.' must be the layer's "
            r"number, as in 'layers\.(\d+)\.', but it is not for 'embedding.weight'.",
        ),
        (
            "defualt",
            ValueError,
            "There is no preset 'defualt'. Did you mean 'default'? Presets: 'default', 'per_matrix', "
            "'exempt', 'fully_connected', 'cnn', 'weaker_before_norm', 'transformer', 'rnn'.",
        ),
        (
            ["mine"],
            ValueError,
            "There is no preset 'mine'. Presets: 'default', 'per_matrix', 'exempt', 'fully_connected', 'cnn', "
            "'weaker_before_norm', 'transformer', 'rnn'.",
        ),
        (
            "[{nam: a}]",
            ValueError,
            "There is no preset '[{nam: a}]'. If it is meant as a list of rules, one of their keys or values is wrong. "
            "Presets: 'default', 'per_matrix', 'exempt', 'fully_connected', 'cnn', 'weaker_before_norm', "
            "'transformer', 'rnn'.",
        ),
        ([], ValueError, "rules is empty. Give at least one rule, or the preset 'default'."),
        (None, TypeError, "rules must be the name of a preset or a list of rules, got None. " + A_LIST),
        (
            {"name": "a"},
            TypeError,
            "rules must be the name of a preset or a list of rules, got {'name': 'a'}. " + A_LIST,
        ),
        ([3], TypeError, "A rule must be a DecayRule or the name of a preset, got 3. " + A_LIST),
        (
            [{"pattern": "b"}],
            TypeError,
            "A rule needs a `name`, which becomes that of its parameter group, got {'pattern': 'b'}.",
        ),
        (
            [{"name": "a", "patern": "b"}],
            TypeError,
            "A rule has no 'patern'. Did you mean 'pattern'? It takes name, pattern, modules, max_ndim, group, "
            "optimizer, weight_decay, multiplier, default_exemptions, before_norm, optional, per_parameter, "
            "layer_multiplier, towards.",
        ),
    ],
)  # fmt: skip
def test_messages(rules, error, message):
    with pytest.raises(error) as caught:
        assign_rules(small(), rules)
    assert str(caught.value) == message


def test_a_mapping_stands_for_a_rule_as_in_yaml():
    rules = [{"name": "first", "pattern": r"^head\.", "multiplier": 0.5}, "default"]
    assert assign_rules(small(), rules) == assign_rules(
        small(), [DecayRule("first", pattern=r"^head\.", multiplier=0.5), "default"]
    )


@pytest.mark.parametrize(
    "make",
    [functools.partial(WeightDecay, 0.1), functools.partial(L2Penalty, 0.1), functools.partial(NormConstraint, 1.0)],
)
def test_callbacks_take_mappings_as_rules(make):
    assert make(rules=[{"name": "all"}]).rules == make(rules=[DecayRule("all")]).rules == (DecayRule("all"),)


def test_at_most_three_names_are_close():
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(5)])
    with pytest.raises(ValueError, match=r"Closest names: '0\.bias', '1\.bias', '2\.bias'\.$"):
        assign_rules(model, [DecayRule("b", pattern="bais"), "default"])


def test_a_name_is_close_by_all_words_of_the_pattern():
    model = nn.ModuleDict({"classifier": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"Closest names: 'head\.bias', 'classifier\.bias', 'head\.weight'\.$"):
        assign_rules(model, [DecayRule("b", pattern=r"^heda\.bias$"), "default"])


def test_rules_that_may_match_nothing():
    for rule in (DecayRule("lstm", modules=("LSTM",), optional=True), DecayRule("rest")):
        assert assign_rules(small(), [DecayRule("all", pattern=""), rule])["head.weight"].name == "all"


# Properties

LEAVES = {
    "linear": (lambda: nn.Linear(2, 2), {"weight": "decay", "bias": "no_decay"}),
    "layer_norm": (lambda: nn.LayerNorm((2, 2)), {"weight": "no_decay", "bias": "no_decay"}),
    "conv": (lambda: nn.Conv1d(2, 2, 1, bias=False), {"weight": "decay"}),
    "batch_norm": (lambda: nn.BatchNorm1d(2), {"weight": "no_decay", "bias": "no_decay"}),
    "embedding": (lambda: nn.Embedding(2, 2), {"weight": "decay"}),
    "relu": (nn.ReLU, {}),
    "gain": (lambda: Gain(2), {"gamma": "decay"}),
    "gru": (
        lambda: nn.GRU(2, 2),
        {"weight_ih_l0": "decay", "weight_hh_l0": "decay", "bias_ih_l0": "no_decay", "bias_hh_l0": "no_decay"},
    ),
}
CHILD_NAMES = ["body", "debias_proj", "normalize", "layers", "head", "model", "module", "denorm"]


@st.composite
def models(draw, depth=3):
    """A random module and, by construction, what the default rules decide in it."""
    kind = draw(st.sampled_from([*LEAVES, *(["tree", "list"] if depth else [])]))
    if kind in LEAVES:
        build, expected = LEAVES[kind]
        return build(), dict(expected)
    children = draw(st.lists(models(depth - 1), max_size=4))
    names = draw(st.permutations(CHILD_NAMES))[: len(children)]
    if kind == "list":
        names = [str(index) for index in range(len(children))]
    module = nn.Sequential() if kind == "list" else nn.ModuleDict()
    expected = {}
    for name, (child, of_child) in zip(names, children, strict=True):
        module.add_module(name, child)
        expected |= {f"{name}.{leaf}": rule for leaf, rule in of_child.items()}
    return module, expected


@given(models())
@settings(max_examples=100)
def test_random_models_by_default(built_model):
    model, expected = built_model
    assert {name: rule.name for name, rule in assign_rules(model).items()} == expected
    assert list(assign_rules(model)) == [name for name, _ in model.named_parameters()]


@given(models(), st.lists(st.sampled_from(["model", "net", "module", "_orig_mod", "_fsdp_wrapped_module"]), max_size=3))
@settings(max_examples=100)
def test_decisions_do_not_depend_on_a_prefix(built_model, prefix):
    model, expected = built_model
    for name in reversed(prefix):
        model = nn.ModuleDict({name: model})
    shown = "".join(f"{name}." for name in prefix if not name.startswith("_"))
    assert {name: rule.name for name, rule in assign_rules(model).items()} == {
        shown + name: rule for name, rule in expected.items()
    }


conditions = st.fixed_dictionaries(
    {},
    optional={
        "pattern": st.sampled_from([r"weight", r"^body", r"\.0\.", r"bias$", r"head|layers", r"l0"]),
        "modules": st.lists(st.sampled_from(["Linear", "Embedding", "LayerNorm", "_ConvNd", "GRU"]), max_size=2).map(
            tuple
        ),
        "max_ndim": st.integers(0, 3),
    },
)


def takes(condition, name, parameter, owner):
    """Say, on its own, whether conditions hold."""
    owners = {cls.__name__ for cls in type(owner).__mro__}
    return (
        ("pattern" not in condition or re.search(condition["pattern"], name) is not None)
        and (not condition.get("modules") or bool(owners & set(condition["modules"])))
        and parameter.ndim <= condition.get("max_ndim", 9)
    )


@given(models(), st.lists(conditions, max_size=4), st.floats(0, 1e3))
@settings(max_examples=150)
def test_random_rules_on_random_models(built_model, drawn, weight_decay):
    model, _ = built_model
    drawn = [*drawn, {}]
    rules = [DecayRule(f"r{i}", multiplier=i, optional=True, **condition) for i, condition in enumerate(drawn)]
    named = list(model.named_parameters())
    expected = [
        next(i for i, c in enumerate(drawn) if takes(c, name, p, model.get_submodule(name.rpartition(".")[0])))
        for name, p in named
    ]
    assert [(name, rule.name) for name, rule in assign_rules(model, rules).items()] == [
        (name, f"r{i}") for (name, _), i in zip(named, expected, strict=True)
    ]
    assert [id(parameter) for _, parameter, _ in rules_by_parameter(model, rules)] == [id(p) for _, p in named]
    groups = decay_param_groups(model, weight_decay, rules)
    assert sorted(group["name"] for group in groups) == sorted({f"r{i}" for i in expected})
    for group in groups:
        index = int(group["name"][1:])
        members = [id(p) for (_, p), i in zip(named, expected, strict=True) if i == index]
        assert [id(parameter) for parameter in group["params"]] == members
        assert group["weight_decay"] == weight_decay * index


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"optimizer": "Muon"}, "optimizer='Muon'"),
        ({"group": 0}, "group=0"),
        ({"group": "head", "optimizer": "Muon"}, "group='head' and optimizer='Muon'"),
    ],
)
@pytest.mark.parametrize("kind", [L2Penalty, NormConstraint])
def test_rules_that_ask_for_optimizers_are_refused_where_none_is_asked(kind, asked, told) -> None:
    name = kind.__name__
    message = f"Rule 'm' of {name} asks for {told}, which only WeightDecay can tell: {name} takes parameters whichever"
    with pytest.raises(
        ValueError, match=f"^{re.escape(message)} optimizer has them. Say which by `pattern` or `modules`.$"
    ):
        kind(0.1, rules=[DecayRule("m", **asked), "default"])
    check_without_optimizers(resolve_rules(), name)
