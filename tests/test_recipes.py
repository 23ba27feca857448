"""Each recipe trains a network of its kind through LightningCLI, and decays what its text says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_l2 import DecayRule, WeightDecay, weight_decay_in_force
from tests.helpers import data, make_trainer

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))

# By recipe: (regular expression for parameters, base lambda), the first that matches; written down by hand.
BASE: dict[str, list[tuple[str, float]]] = {
    "fully_connected": [("bias", 0.0), ("weight", 0.05)],
    "dropout": [("bias", 0.0), ("weight", 0.005)],
    "cnn": [(r"bias|network\.(1|4|7)\.", 0.0), (r"network\.(0|3|6)\.weight", 0.005), (r"network\.11\.weight", 0.05)],
    "residual": [(r"bias|bn\d|network\.1\.weight$", 0.0), ("weight", 0.05)],
    "transformer": [
        (r"bias|norm", 0.0),
        ("token_embedding|pos_embedding", 0.0),
        (r"self_attn\.(in_proj_weight|out_proj\.weight)", 0.05),
        (r"linear[12]\.weight|head\.weight", 0.1),
    ],
    "lstm": [("bias", 0.0), ("weight_hh", 0.005), ("weight_ih|head", 0.05)],
    "finetuning": [
        (r"bias|norm|embedding", 0.0),
        (r"layers\.0\.", 0.05 * 0.7**3),
        (r"layers\.1\.", 0.05 * 0.7**2),
        (r"layers\.2\.", 0.05 * 0.7),
        (r"layers\.3\.", 0.05),
        (r"head", 0.05),
    ],
    "dino": [(r"bias|norm", 0.0), ("", 0.04)],
    "muon": [(r"bias|norm|embedding", 0.0), (r"encoder\..*weight", 0.1), (r"head\.weight", 0.05)],
    "mup": [(r"bias|norm|embedding", 0.0), ("weight", 0.0003)],
    "lora": [("bias", 0.0), (r"lora_[AB]", 0.5), ("weight", 0.05)],
    "bf16_finetuning": [(r"bias|norm", 0.0), ("", 0.1)],
    # three steps at a learning rate of 0.003
    "wsd": [(r"bias|norm|embedding", 0.0), ("weight", 1 / (0.003 * 0.2 * 3))],
}
# By recipe and group: lambda at the three steps. DINO's cosine, and a learning rate on a cosine to 0 at a fourth step.
OVER_TIME = {
    "dino": {"decay": [0.04, 0.22, 0.4], "no_decay": [0.0] * 3},
    "residual": {"decay": [0.05, 0.05 * 0.75, 0.05 * 0.25], "head": [0.05] * 3, "no_decay": [0.0] * 3},
    "muon": {"muon": [0.1] * 3, "adamw": [0.05, 0.025, 0.0], "no_decay": [0.0] * 3, "no_decay_embedding": [0.0] * 3},
}


def command(recipe: Path) -> list[str]:
    """Return the arguments of the command that a recipe gives in its head."""
    (line,) = re.findall(r"^#   python examples/architectures\.py (.*)$", recipe.read_text(), re.MULTILINE)
    return [argument.replace("examples/recipes/", f"{recipe.parent}/") for argument in line.split()]


def run(arguments: list[str], monkeypatch: Any, **options: Any) -> LightningCLI:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI calls what was renamed there
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["architectures.py", *arguments])
    from architectures import Classifier, Digits

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    brief = {"enable_checkpointing": False, "max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}
    return LightningCLI(
        Classifier,
        Digits,
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={**quiet, **brief, **options},
    )


def decay_of(cli: LightningCLI) -> dict[str, float]:
    """Return lambda by the name of each parameter."""
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, WeightDecay))
    return {name: group.weight_decay for group in callback.summary() for name in group.names}


# a fifth of three steps
@pytest.mark.filterwarnings("ignore:.*takes all of the weights in one step")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_decays_what_it_says(recipe: Path, monkeypatch: Any) -> None:
    cli = run(command(recipe), monkeypatch)
    decays = decay_of(cli)
    assert set(decays) == {name for name, _ in cli.model.named_parameters()}
    for name, decay in decays.items():
        expected = next(value for pattern, value in BASE[recipe.stem] if re.search(pattern, name))
        assert decay == pytest.approx(expected), name
    assert cli.trainer.global_step == 3 * len(cli.trainer.optimizers)


class TorchvisionBlock(nn.Module):
    """A basic block with the names and the order of torchvision's."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))


class TorchvisionResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3)
        self.layer1 = nn.Sequential(TorchvisionBlock(4, 4))
        self.layer2 = nn.Sequential(TorchvisionBlock(4, 8))
        self.fc = nn.Linear(8, 2)


class TextLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.rnn = nn.LSTM(4, 4, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(8, 2)


HALF, FULL = 0.05, 0.1
TRANSFORMER = [(r"bias|[Nn]orm|ln_|embed|wte|wpe|shared|cls_token", 0.0)]
# By recipe and model: (regular expression for parameters, lambda), the first that matches; written down by hand.
REAL: dict[tuple[str, str], list[tuple[str, float]]] = {
    ("transformer", "bert"): [
        *TRANSFORMER,
        (r"attention\.(self\.(query|key|value)|output\.dense)\.weight", HALF),
        (r"(layer\.\d\.intermediate|layer\.\d\.output|transform)\.dense", FULL),
    ],
    ("transformer", "gpt2"): [*TRANSFORMER, (r"attn\.c_(attn|proj)", HALF), (r"mlp\.c_(fc|proj)", FULL)],
    ("transformer", "llama"): [*TRANSFORMER, (r"self_attn\.[qkvo]_proj", HALF), (r"mlp|lm_head", FULL)],
    ("transformer", "vit"): [
        (r"patch_embeddings\.projection\.weight", FULL),
        *TRANSFORMER,
        (r"attention\.[qkvo]_proj", HALF),
        (r"mlp|classifier", FULL),
    ],
    ("transformer", "t5"): [*TRANSFORMER, (r"(Self|EncDec)Attention\.[qkvo]\.", HALF), ("DenseReluDense", FULL)],
    ("finetuning", "bert"): [
        *TRANSFORMER,
        (r"layer\.0\.", 0.05 * 0.7),
        (r"layer\.1\.", 0.05),
        (r"cls\.predictions\.transform", 0.05),
    ],
    ("finetuning", "gpt2"): [*TRANSFORMER, (r"\.h\.0\.", 0.05 * 0.7), (r"\.h\.1\.", 0.05)],
    ("finetuning", "llama"): [
        *TRANSFORMER,
        (r"layers\.0\.", 0.05 * 0.7),
        (r"layers\.1\.", 0.05),
        (r"lm_head", 0.05),
    ],
    ("finetuning", "vit"): [
        *TRANSFORMER,
        (r"layers\.0\.", 0.05 * 0.7),
        (r"layers\.1\.", 0.05),
        (r"classifier", 0.05),
    ],
    ("cnn", "torchvision"): [(r"bias|bn|downsample\.1", 0.0), (r"conv|downsample\.0", 0.005), (r"fc", 0.05)],
    ("residual", "torchvision"): [(r"bias|bn|downsample\.1", 0.0), (r"conv|downsample\.0|fc", 0.05)],
    ("lstm", "text"): [(r"bias", 0.0), (r"weight_hh", 0.005), (r"weight_ih|embedding|fc", 0.05)],
}


def real_model(name: str) -> nn.Module:
    """Return a small model of this kind with two layers and random weights."""
    if name in ("torchvision", "text"):
        return TorchvisionResNet() if name == "torchvision" else TextLSTM()
    text = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**text, **size))
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**text, n_embd=8, n_layer=2, n_head=2))
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, **size))
    if name == "t5":
        t5 = transformers.T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        return transformers.T5ForConditionalGeneration(t5)
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **size))


@pytest.mark.parametrize(("recipe", "name"), REAL, ids=["-".join(case) for case in REAL])
def test_recipe_fits_the_names_of_real_models(recipe: str, name: str) -> None:
    (options, *_) = yaml.safe_load((EXAMPLES / "recipes" / f"{recipe}.yaml").read_text())["trainer"]["callbacks+"]
    options = options["init_args"]
    rules = options["rules"]
    rules = rules if isinstance(rules, str) else [DecayRule(**r) if isinstance(r, dict) else r for r in rules]
    model = real_model(name)
    trainer = make_trainer([decay := WeightDecay(options["weight_decay"], rules=rules, summary=False)])
    trainer.fit(Holding(model), data(), data())
    decays = {name.removeprefix("model."): group.weight_decay for group in decay.summary() for name in group.names}
    assert set(decays) == {parameter for parameter, _ in model.named_parameters()}
    for parameter, value in decays.items():
        expected = next(value for pattern, value in REAL[recipe, name] if re.search(pattern, parameter))
        assert value == pytest.approx(expected), parameter


class Holding(pl.LightningModule):
    """Has a model, and learns the scale of its first parameter, so that no input of its own is needed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return next(self.model.parameters()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Validate nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.001)


class Watch(Callback):
    """Notes lambda of each group at each step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, value in weight_decay_in_force(optimizer).items():
            self.steps.setdefault(name, []).append(value)


@pytest.mark.parametrize("name", OVER_TIME)
def test_recipe_moves_lambda_as_it_says(name: str, monkeypatch: Any) -> None:
    watch = Watch()
    run(command(EXAMPLES / "recipes" / f"{name}.yaml"), monkeypatch, callbacks=[watch])
    assert watch.steps == {group: pytest.approx(steps) for group, steps in OVER_TIME[name].items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_why_and_names_a_source(recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert sum(line.startswith(("# Why: ", "#      ")) for line in head) >= 3
    assert any(re.match(r"# Source: .*\d{4}|# Source: .*", line) for line in head)
    assert re.search(r"arXiv \d{4}\.\d{4,5}|\b(19|20)\d\d\b", recipe.read_text())


def test_all_kinds_are_there() -> None:
    assert {path.stem for path in RECIPES} == set(BASE)
