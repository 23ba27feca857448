"""`python -m lightning_l2 preview`."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_l2 import DecayRule
from lightning_l2.__main__ import main
from tests.figures import labelled_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_preview_draws_what_a_configuration_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lambda.png"
    assert main(["preview", str(ROOT / "examples" / "digits.yaml"), "--output", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


SCHEDULED = """
trainer:
  callbacks:
    - class_path: lightning_l2.WeightDecayScheduler
      init_args: {{schedule: {{class_path: lightning_l2.schedules.{}, init_args: {{{}}}}}}}
"""


def test_preview_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "no_such.yaml"]) == 1
    assert "no_such.yaml" in capsys.readouterr().err
    Path("plain.yaml").write_text("trainer: {max_epochs: 1}")
    assert main(["preview", "plain.yaml"]) == 1
    assert "no WeightDecayScheduler" in capsys.readouterr().err
    assert main(["preview", "."]) == 1
    assert "Is a directory: '.'" in capsys.readouterr().err
    Path("picture.png").write_bytes(b"\x89PNG")
    assert main(["preview", "picture.png"]) == 1
    assert "'picture.png' is no YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: [1", "'wrong.yaml' is no YAML"),
        (SCHEDULED.format("CosinSchedule", "start: 1, end: 2"), "'wrong.yaml': Parser key \"schedule\": "),
        (SCHEDULED.format("CosinSchedule", "start: 1, end: 2"), "Did you mean 'CosineSchedule'?\n"),
        (SCHEDULED.format("CosineSchedule", "strat: 1, end: 2"), "'strat' is not accepted"),
        (
            SCHEDULED.format("CosineSchedule", "start: 1, end: 2").replace("{schedule", "{groups: [a], schedule"),
            "Given value: ['a']\n",
        ),
        (
            SCHEDULED.format("CosineSchedule", "start: -1, end: 2"),
            "`start` to be finite and at least 0, got -1",
        ),
    ],
)
def test_preview_of_a_wrong_configuration_says_so(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text(text)
    assert main(["preview", "wrong.yaml"]) == 1
    assert message in capsys.readouterr().err


def test_help_of_preview_is_for_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["preview", "--help"])
    help_text = capsys.readouterr().out
    assert "Draw lambda over the training" in help_text
    assert "Args:" not in help_text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """First and last value of each curve that is drawn."""
    lines: dict[str, Any] = {}

    def save(figure: Any, path: Any, **_: Any) -> None:
        lines.update({name: (ys[0], ys[-1]) for name, (_, ys) in labelled_lines(figure.axes[0]).items()})

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    return lines


def test_preview_of_several_files_is_of_what_they_make_together(
    drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("base.yaml").write_text(SCHEDULED.format("CosineSchedule", "start: 1, end: 2"))
    decay = {"class_path": "lightning_l2.WeightDecay", "init_args": {"weight_decay": 0.1}}
    Path("best.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [decay]}}))
    assert main(["preview", "--config", "base.yaml", "--config", "best.yaml"]) == 0
    assert capsys.readouterr().out.strip() == "best.png"
    assert drawn["decay"] == pytest.approx((0.1, 0.2))
    Path("later.yaml").write_text(SCHEDULED.format("CosineSchedule", "start: 1, end: 4"))
    assert main(["preview", "base.yaml", "best.yaml", "later.yaml"]) == 0
    assert drawn["multiplier"] == pytest.approx((1.0, 4.0)), "a plain list takes the place of the earlier one"
    with pytest.raises(SystemExit):
        main(["preview"])
    assert "give a YAML file, or --config FILE" in capsys.readouterr().err


def test_preview_draws_each_layer(drawn: dict[str, Any]) -> None:
    """Two linear layers, `layers.0` and `layers.2`: the last one has 0.1, the one two before it a quarter of that."""
    (ratio,) = (field.name for field in dataclasses.fields(DecayRule) if field.name.startswith("layer_"))
    rules = [{"name": "deep", "pattern": r"layers\.(\d+)\.weight", ratio: 0.5}, "default"]
    callbacks = yaml.safe_load(SCHEDULED.format("CosineSchedule", "start: 1, end: 2"))["trainer"]["callbacks"]
    callbacks.append({"class_path": "lightning_l2.WeightDecay", "init_args": {"weight_decay": 0.1, "rules": rules}})
    config = {"trainer": {"callbacks": callbacks}, "model": {"class_path": "tests.cli.project.Model"}}
    Path("deep.yaml").write_text(yaml.safe_dump(config))
    assert main(["preview", "deep.yaml"]) == 0
    deep = sorted(ends for name, ends in drawn.items() if name.startswith("deep"))
    assert deep == [pytest.approx((0.025, 0.05)), pytest.approx((0.1, 0.2))]


def test_a_missing_file_is_told_in_one_line() -> None:
    command = [sys.executable, "-m", "lightning_l2", "preview", "no_such.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "No such file or directory: 'no_such.yaml'" in done.stderr
    assert "Traceback" not in done.stderr
