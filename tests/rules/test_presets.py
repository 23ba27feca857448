"""What each preset decides on an ordinary model of its kind, written by hand."""

import pytest
import torch
from torch import nn

from lightning_l2.rules import PRESETS, DecayRule, assign_rules


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2)
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.cls_token = nn.Embedding(3, 4), nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed, self.register_tokens = nn.Parameter(torch.zeros(1, 9, 4)), nn.Parameter(torch.zeros(1, 2, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 4)
        self.class_proj = nn.Linear(4, 2, bias=False)


def rnn():
    return nn.ModuleDict(
        {"embedding": nn.Embedding(3, 2), "lstm": nn.LSTM(2, 2, proj_size=1), "cell": nn.GRUCell(2, 2)}
    )


def tabular():
    return nn.ModuleDict({"category": nn.Embedding(3, 2), "body": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))})


NORMS_AND_BIASES = {
    cnn: ["0.bias", "1.weight", "1.bias", "3.bias", "5.bias"],
    Transformer: [f"layer.{name}" for name in ("self_attn.in_proj_bias", "self_attn.out_proj.bias", "linear1.bias",
                  "linear2.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")],
    rnn: ["lstm.bias_ih_l0", "lstm.bias_hh_l0", "cell.bias_ih", "cell.bias_hh"],
    tabular: ["body.0.bias", "body.1.weight", "body.1.bias"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "build", "expected"),
    [
        ("default", cnn, {"0.weight": 1.0, "3.weight": 1.0, "5.weight": 1.0}),
        ("per_matrix", cnn, {"0.weight": 1.0, "3.weight": 1.0, "5.weight": 1.0}),
        ("cnn", cnn, {"0.weight": 1.0, "3.weight": 1.0, "5.weight": 1.0}),
        ("weaker_before_norm", cnn, {"0.weight": 0.1, "3.weight": 1.0, "5.weight": 1.0}),
        ("cnn", tabular, {"category.weight": 0.0, "body.0.weight": 1.0}),
        ("fully_connected", tabular, {"category.weight": 0.0, "body.0.weight": 1.0}),
        ("default", tabular, {"category.weight": 1.0, "body.0.weight": 1.0}),
        (
            "transformer",
            Transformer,
            {
                "tokens.weight": 0.0,
                "cls_token": 0.0,
                "pos_embed": 0.0,
                "register_tokens": 0.0,
                "layer.self_attn.in_proj_weight": 1.0,
                "layer.self_attn.out_proj.weight": 1.0,
                "layer.linear1.weight": 1.0,
                "layer.linear2.weight": 1.0,
                "class_proj.weight": 1.0,
            },
        ),
        (
            "rnn",
            rnn,
            {
                "embedding.weight": 1.0,
                "lstm.weight_ih_l0": 1.0,
                "lstm.weight_hh_l0": 0.1,
                "lstm.weight_hr_l0": 0.1,
                "cell.weight_ih": 1.0,
                "cell.weight_hh": 0.1,
            },
        ),
    ],
)
def test_weight_decay_of_each_parameter(preset, build, expected):
    found = {name: rule.resolve(1.0) for name, rule in assign_rules(build(), preset).items()}
    assert found == expected | dict.fromkeys(NORMS_AND_BIASES[build], 0.0)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "exempt"])
def test_a_preset_serves_every_model_and_its_exempt_groups_say_so(preset):
    for model in (cnn(), Transformer(), rnn(), tabular(), nn.ReLU(), nn.Linear(1, 1), nn.LayerNorm(1)):
        assert list(assign_rules(model, preset)) == [name for name, _ in model.named_parameters()]
    for rule in PRESETS[preset]:
        assert rule.optional
        assert rule.name.endswith("no_decay") is (rule.weight_decay == 0.0)


def test_exempt_stands_before_other_rules():
    """By itself it says nothing of what decays."""
    rules = ["exempt", DecayRule("all_else")]
    for model in (cnn(), Transformer(), rnn(), tabular()):
        found = {name: rule.resolve(1.0) for name, rule in assign_rules(model, rules).items()}
        assert found == {name: rule.resolve(1.0) for name, rule in assign_rules(model).items()}


POSITIONS = ["pos_embed", "pos_embed_1", "position_embedding", "position_embeddings", "cls_token", "class_token"]
TOKENS = ["class_embedding", "dist_token", "distillation_token", "mask_token", "reg_token", "register_tokens"]


@pytest.mark.parametrize("name", [*POSITIONS, *TOKENS])
def test_positions_and_tokens_that_are_parameters(name):
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.zeros(1, 2, 2)))
    assert assign_rules(nn.ModuleDict({"model": module}), "transformer")[f"model.{name}"].resolve(1.0) == 0.0


@pytest.mark.parametrize("name", ["class_proj", "position", "tokenizer", "repos_embed", "token_mixer", "pos_embed_w"])
def test_other_parameters_stay_decayed(name):
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
    assert assign_rules(module, "transformer")[name].resolve(1.0) == 1.0


def test_an_own_rule_before_a_preset():
    rules = [DecayRule("head", pattern=r"^5\.weight", multiplier=2.0), "weaker_before_norm"]
    found = {name: rule.resolve(1.0) for name, rule in assign_rules(cnn(), rules).items()}
    assert (found["0.weight"], found["3.weight"], found["5.weight"], found["5.bias"]) == (0.1, 1.0, 2.0, 0.0)
