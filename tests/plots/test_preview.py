"""What `preview` draws of a configuration, and refuses to."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from lightning_l2.plots import (
    preview,
)
from tests.figures import labelled_lines

SCHEDULER = """
    - class_path: lightning_l2.WeightDecayScheduler
      init_args:
        schedule: {class_path: lightning_l2.schedules.LinearSchedule, init_args: {start: 1.0, end: 10.0}}
"""
DECAY = """
    - class_path: lightning_l2.WeightDecay
      init_args:
        weight_decay: 0.05
        rules:
          - {name: head, modules: [Linear], multiplier: 2.0}
          - {name: fixed, pattern: conv, weight_decay: 0.01}
          - default
"""


def previewed(tmp_path: Any, text: str, monkeypatch: Any) -> dict[str, tuple[float, float, float, float]]:
    """Return first and last step and value of each curve that `preview` draws."""
    drawn = {}

    def save(figure: Any, path: Any, **_: Any) -> None:
        for name, (steps, values) in labelled_lines(figure.axes[0]).items():
            drawn[name] = steps[0], steps[-1], values[0], values[-1]

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    config = tmp_path / "config.yaml"
    config.write_text(text)
    preview(config)
    return {name: pytest.approx(ends) for name, ends in drawn.items()}


def test_preview_draws_lambda_of_each_rule(tmp_path, monkeypatch) -> None:
    drawn = previewed(tmp_path, f"trainer:\n  max_steps: 100\n  callbacks:{DECAY}{SCHEDULER}", monkeypatch)
    assert drawn == {
        "head": (0, 99, 0.1, 1.0),
        "fixed": (0, 99, 0.01, 0.1),
        "no_decay": (0, 99, 0.0, 0.0),
        "decay": (0, 99, 0.05, 0.5),
    }


def test_preview_of_absolute_values_stand_for_the_base(tmp_path, monkeypatch) -> None:
    absolute = SCHEDULER.replace("init_args:\n", "init_args:\n        values: weight_decay\n", 1)
    drawn = previewed(tmp_path, f"fit:\n  trainer:\n    callbacks:{DECAY}{absolute}".replace("\n", "\n  "), monkeypatch)
    assert drawn["head"] == (0, 1, 2.0, 20.0)
    assert drawn["decay"] == (0, 1, 1.0, 10.0)


def test_preview_takes_lambda_of_the_optimizer(tmp_path, monkeypatch) -> None:
    optimizer = "optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    weight_decay: 0.2\n"
    trainer = f"trainer:\n  max_epochs: 3\n  callbacks+:{SCHEDULER}"
    assert previewed(tmp_path, optimizer + trainer, monkeypatch) == {"all parameters": (0, 3, 0.2, 2.0)}
    assert previewed(tmp_path, trainer, monkeypatch) == {"multiplier": (0, 3, 1.0, 10.0)}


@pytest.mark.parametrize(
    ("optimizer", "options", "apply", "share"),
    [
        ("torch.optim.AdamW", {"lr": 0.01}, None, 0.01),
        ("torch.optim.SGD", {"lr": 0.01, "momentum": 0.5}, None, 0.02),
        ("torch.optim.Adam", {"lr": 0.01}, "decoupled", 0.01),
        ("torch.optim.Adam", {"lr": 0.01}, "independent", 1.0),
        ("torch.optim.Adam", {"lr": 0.01}, None, None),
        ("torch.optim.AdamW", {}, None, None),
    ],
)
def test_preview_draws_what_decay_will_leave(optimizer, options, apply, share, tmp_path, monkeypatch) -> None:
    """The product over 200 steps of 1 - eta lambda, lambda rising from 0.05 to 0.5, at most 1 % off for its points."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    config = tmp_path / "config.yaml"
    how = f"\n        apply: {apply}" if apply else ""
    decay = f"\n    - class_path: lightning_l2.WeightDecay\n      init_args:\n        weight_decay: 0.05{how}"
    trainer = f"trainer:\n  max_steps: 200\n  callbacks:{decay}{SCHEDULER}"
    config.write_text(f"optimizer:\n  class_path: {optimizer}\n  init_args: {options}\n{trainer}")
    preview(config)
    (figure,) = figures
    if share is None:
        assert len(figure.axes) == 1
        return
    left = labelled_lines(figure.axes[1])
    lambdas = [0.05 * (1 + 9 * step / 199) for step in range(200)]
    assert left["decay"][1][-1] == pytest.approx(math.prod(1 - share * value for value in lambdas), rel=0.01)
    assert set(left["no_decay"][1]) == {1.0}


def test_preview_by_epoch(tmp_path, monkeypatch) -> None:
    by_epoch = SCHEDULER.replace("init_args:\n", "init_args:\n        interval: epoch\n        total_steps: 5\n", 1)
    assert previewed(tmp_path, f"trainer:\n  callbacks:{by_epoch}", monkeypatch) == {"multiplier": (0, 5, 1.0, 10.0)}


def test_preview_writes_a_picture(tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"trainer:\n  callbacks:{DECAY}{SCHEDULER}")
    assert preview(config) == tmp_path / "config.png"
    assert (tmp_path / "config.png").read_bytes().startswith(b"\x89PNG")
    assert preview(str(config), str(tmp_path / "other.svg")).read_text().startswith("<?xml")


@pytest.mark.parametrize("text", ["", "trainer: {}", f"trainer:\n  callbacks:{DECAY}"])
def test_preview_of_a_constant_lambda_is_an_error(text, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml' has no WeightDecayScheduler with a `schedule`"):
        preview(tmp_path / "config.yaml")


def test_preview_of_a_schedule_that_reads_the_training_is_an_error(tmp_path) -> None:
    scheduler = "\n    - {class_path: WeightDecayScheduler, init_args: {schedule: lightning_l2.schedules.LRSchedule}}"
    (tmp_path / "config.yaml").write_text(f"trainer:\n  callbacks:{scheduler}")
    with pytest.raises(ValueError, match=r"LRSchedule answers to the training itself, so it can't be drawn before it"):
        preview(tmp_path / "config.yaml")


def test_preview_without_jsonargparse_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer:\n  callbacks:{SCHEDULER}")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_l2\[cli\]"'):
        preview(tmp_path / "config.yaml")


def scheduled(kind: str, options: str) -> str:
    schedule = f"{{class_path: lightning_l2.schedules.{kind}}}"
    if kind == "LinearSchedule":
        schedule = schedule.replace("}", ", init_args: {start: 1.0, end: 10.0}}")
    return f"""
    - class_path: lightning_l2.WeightDecayScheduler
      init_args: {{{options}, schedule: {schedule}}}"""


HELD = scheduled("LinearSchedule", "groups: ^no_decay$").replace("end: 10.0", "end: 3.0")


def test_preview_draws_all_schedulers_each_in_its_groups(tmp_path, monkeypatch) -> None:
    both = scheduled("LinearSchedule", "groups: head|fixed") + HELD.replace("no_", "")
    drawn = previewed(tmp_path, f"trainer:\n  max_steps: 100\n  callbacks:{DECAY}{both}", monkeypatch)
    assert drawn == {"head": (0, 99, 0.1, 1.0), "fixed": (0, 99, 0.01, 0.1), "decay": (0, 99, 0.05, 0.15)}


def test_preview_of_groups_that_only_the_training_knows_draws_multipliers(tmp_path, monkeypatch) -> None:
    both = scheduled("LinearSchedule", "groups: ^muon") + HELD
    for decay in (DECAY, ""):
        drawn = previewed(tmp_path, f"trainer:\n  max_steps: 100\n  callbacks:{decay}{both}", monkeypatch)
        assert drawn == {"^muon": (0, 99, 1.0, 10.0), "^no_decay$": (0, 99, 1.0, 3.0)}


def test_preview_leaves_out_what_answers_to_the_training_and_says_so(tmp_path, monkeypatch) -> None:
    titles = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda f, *_, **__: titles.append(f.axes[0].get_title("left"))
    )
    both = scheduled("LRSchedule", "groups: head") + scheduled("LinearSchedule", "groups: fixed")
    (tmp_path / "config.yaml").write_text(f"trainer:\n  callbacks:{DECAY}{both}")
    preview(tmp_path / "config.yaml")
    assert titles == ["Weight decay: LinearSchedule, without LRSchedule"]


@pytest.mark.parametrize("option", ["total_steps: 7", "interval: epoch"])
def test_preview_of_schedulers_of_different_lengths_is_an_error(option, tmp_path) -> None:
    both = scheduled("LinearSchedule", "groups: head") + scheduled("LinearSchedule", f"groups: fixed, {option}")
    (tmp_path / "config.yaml").write_text(f"trainer:\n  max_epochs: 3\n  callbacks:{DECAY}{both}")
    with pytest.raises(ValueError, match=r"config.yaml': one picture can't show schedulers of different `interval` or"):
        preview(tmp_path / "config.yaml")
