"""`python -m lightning_l2 preview`."""

from pathlib import Path

import pytest

from lightning_l2.__main__ import main

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
        (SCHEDULED.format("CosinSchedule", "start: 1, end: 2"), "has no attribute 'CosinSchedule'"),
        (SCHEDULED.format("CosineSchedule", "strat: 1, end: 2"), "'strat' is not accepted"),
        (SCHEDULED.format("CosineSchedule", "start: -1, end: 2"), "CosineSchedule needs a finite `start`"),
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
