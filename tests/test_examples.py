"""The examples run as their first lines say, and what they show is true."""

from __future__ import annotations

import ast
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_l2.plots import read_history
from tests.figures import assert_readable
from tests.processes.forked import python

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: str) -> str:
    """Run an example in a process of its own and return what it prints."""
    run = python(str(EXAMPLES / name), *arguments)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Run the first example for a tenth of its epochs; return what it prints and where it writes."""
    path = tmp_path_factory.mktemp("digits")
    brief = ["--trainer.max_epochs=3", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={path}"]
    printed = run_example("digits.py", "fit", "--config", str(EXAMPLES / "digits.yaml"), *brief)
    return printed, path / "lightning_logs" / "version_0"


def test_digits_module_knows_nothing_of_us() -> None:
    tree = ast.parse((EXAMPLES / "digits.py").read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {name for name in imported if name.startswith("lightning_l2")}


def test_digits_prints_the_table_and_the_test_accuracy(digits) -> None:
    printed, _ = digits
    for group, decay, parameters in (("decay", "0.05", "13,968"), ("no_decay", "0", "170"), ("head", "0.1", "1,280")):
        assert re.search(rf"\b{group}\b.*\b{decay}\b.*{parameters}", printed), group
    accuracy = float(re.search(r"test_accuracy\W+([\d.]+)", printed)[1])
    assert accuracy > 0.9
    assert "Pictures of the training: " in printed


def test_digits_logs_the_lambda_of_its_configuration(digits) -> None:
    """The cosine from 1 to 10 times each base, over 3 epochs of 19 steps, at every fifth step."""
    _, path = digits
    history = read_history(path)
    steps = list(range(4, 57, 5))
    cosine = [1 + 9 * (1 - math.cos(math.pi * step / 56)) / 2 for step in steps]
    for group, base in {"decay": 0.05, "head": 0.1, "no_decay": 0.0}.items():
        assert history[f"weight_decay/{group}"][0] == steps
        assert history[f"weight_decay/{group}"][1] == pytest.approx([base * value for value in cosine], rel=1e-6)
    assert {"l2_norm/conv1", "l2_norm/bn3", "l2_norm/head", "l2_norm/total", "val_accuracy"} <= set(history)


def test_digits_leaves_its_pictures(digits) -> None:
    _, path = digits
    assert {file.stem for file in path.glob("*.png")} == {"l2_norm_heatmap", "l2_norms", "l2_penalty"}


@pytest.fixture
def compare_lambda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import compare_lambda

    return compare_lambda


def test_comparison_runs_and_can_be_read(compare_lambda, monkeypatch, tmp_path, capsys) -> None:
    output = tmp_path / "compare.png"
    monkeypatch.setattr(sys, "argv", ["compare_lambda.py", "--fast", "--output", str(output)])
    figures = []
    draw = compare_lambda.draw
    monkeypatch.setattr(compare_lambda, "draw", lambda *arguments: figures.append(draw(*arguments)) or figures[0])
    compare_lambda.main()
    assert output.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("lambda 0 ", "lambda 0.003", "lambda 0.05", "L1", "dropout", "Picture: "))
    assert_readable(figures[0])


@pytest.mark.parametrize(("decay", "l1"), [(0.0, 0.0), (0.02, 0.0), (0.0, 0.002)])
def test_comparison_trains_as_a_plain_loop_does(compare_lambda, decay, l1) -> None:
    """The same in plain torch, the L2 penalty written into the loss, the L1 penalty as a step of its own."""
    run = compare_lambda.train(decay, steps=20, l1=l1)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    few = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:60]
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        loss = F.cross_entropy(model(images[few].float() / 16), labels[few])
        penalty = decay / 2 * sum(layer.weight.square().sum() for layer in layers)
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        for layer in layers:
            weight = layer.weight.data
            weight.copy_(weight.sign() * (weight.abs() - l1).clamp(min=0))  # lr / (1 - momentum) is 1
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    torch.testing.assert_close(run.weights, weights, rtol=1e-4, atol=1e-6)
    assert run.last("train_loss") == pytest.approx(loss.item(), rel=1e-5)
    assert bool((run.weights == 0).any()) == (l1 > 0)


def test_comparison_is_ridge_regression_on_a_linear_model(compare_lambda) -> None:
    ours, ridge = compare_lambda.ridge_path([100.0], steps=600)
    assert ours[0] == pytest.approx(ridge[0], abs=1e-6)
    assert max(map(abs, ours[0])) > 0.1


def test_architectures_are_a_command(monkeypatch, capsys) -> None:
    recipe = EXAMPLES / "recipes" / "cnn.yaml"
    arguments = ["fit", "--model=ConvolutionalNet", f"--config={recipe}", "--print_config"]
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["architectures.py", *arguments])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "architectures.py"), run_name="__main__")
    assert "kernels_before_norm" in capsys.readouterr().out


def test_grokking_needs_weight_decay() -> None:
    """Right on 99 % of what it never saw, and a smaller norm, with decay; at chance, 1/47, in as many steps without."""
    grokking = runpy.run_path(str(EXAMPLES / "grokking.py"))
    with_decay, without = (grokking["train"](weight_decay, steps=1600, every=50) for weight_decay in (1.0, 0.0))
    for history in (with_decay, without):
        assert history["train_accuracy"][1][-1] == 1.0
    assert with_decay["val_accuracy"][1][-1] >= 0.99
    assert max(without["val_accuracy"][1]) < 0.05
    assert with_decay["l2_norm/decay"][1][-1] < 0.5 * without["l2_norm/decay"][1][-1]


def test_number_formats_swallow_decay_and_rounding_mends_it() -> None:
    """AdamW takes 0.001 of the weights in a step: below half of bfloat16's 2^-8, and well above fp32's 2^-24."""
    example = runpy.run_path(str(EXAMPLES / "number_formats.py"))
    full, brain = example["PANELS"].values()
    norms = {run: example["train"](run, steps=300)[1][-1] for run in (*full, *brain)}
    without, with_decay, mixed = (norms[run] for run in full)
    assert with_decay < 0.9 * without
    assert mixed == pytest.approx(with_decay, rel=0.01)
    without, lost, accumulated, stochastic = (norms[run] for run in brain)
    assert lost == without
    assert accumulated == pytest.approx(stochastic, rel=0.01)
    assert stochastic < 0.9 * without
