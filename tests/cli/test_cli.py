"""The YAML of users through the real LightningCLI of both packages, in processes of their own."""

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_l2
from tests.processes.forked import python

PACKAGES = ["lightning", "pytorch_lightning"]
CALLBACKS = ["WeightDecay", "WeightDecayScheduler", "L2NormMonitor", "L2Penalty", "NormConstraint"]
STEPS = 8

# As a person reads it in the documentation
DOCUMENTED = r"""
trainer:
  callbacks:
    - class_path: lightning_l2.WeightDecay
      init_args:
        weight_decay: 0.05
        rules:
          - {name: embedding, modules: [Embedding], multiplier: 0.2}
          - {name: no_decay, max_ndim: 1, weight_decay: 0.0}
          - {name: head, pattern: "^head\\.", weight_decay: 0.1}
          - {name: decay}
    - class_path: lightning_l2.WeightDecayScheduler
      init_args:
        schedule: {class_path: lightning_l2.schedules.CosineSchedule, init_args: {start: 1.0, end: 10.0}}
    - lightning_l2.L2NormMonitor
"""


def decay(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "lightning_l2.WeightDecay", "init_args": {"summary": False, **init_args}}


def scheduler(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "lightning_l2.WeightDecayScheduler", "init_args": init_args}


def schedule(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_l2.schedules.{name}", "init_args": init_args}


CONFIGURATIONS: dict[str, Any] = {
    "documented": yaml.safe_load(DOCUMENTED)["trainer"]["callbacks"],
    "null": [decay(weight_decay=None)],
    "bare": ["lightning_l2.WeightDecay", "lightning_l2.L2NormMonitor"],
    "number": [decay(weight_decay=0.05)],
    "preset": [decay(weight_decay=0.05, rules="transformer")],
    "rule and preset": [
        decay(
            weight_decay=0.05,
            rules=[{"name": "embedding", "modules": ["Embedding"], "weight_decay": 0.0}, "default"],
        )
    ],
    "nested schedule": [
        decay(weight_decay=0.05),
        scheduler(
            schedule=schedule("WarmupSchedule", fraction=0.5, then=schedule("LinearSchedule", start=2.0, end=1.0))
        ),
    ],
    "all": [
        decay(weight_decay=0.05, apply="decoupled", on_resume="checkpoint"),
        scheduler(schedule=schedule("LinearSchedule", start=0.0, end=1.0), interval="step", total_steps=15),
        {"class_path": "lightning_l2.L2NormMonitor", "init_args": {"every_n_steps": 2, "per": "parameter"}},
        {"class_path": "lightning_l2.L2Penalty", "init_args": {"weight_decay": 0.01}},
        {"class_path": "lightning_l2.NormConstraint", "init_args": {"bound": 100.0, "method": "projection"}},
    ],
    "misspelt argument": [decay(weight_deccay=0.05)],
    "misspelt key of a rule": [decay(weight_decay=0.05, rules=[{"name": "decay", "patern": "^head"}])],
    "misspelt preset": [decay(weight_decay=0.05, rules="transfromer")],
    "misspelt schedule": [scheduler(schedule=schedule("CosinSchedule", start=1.0, end=2.0))],
    "misspelt argument of a schedule": [scheduler(schedule=schedule("CosineSchedule", begin=1.0, end=2.0))],
    "misspelt way": [decay(weight_decay=0.05, apply="decoupld")],
    "text for lambda": [decay(weight_decay="strong")],
    "negative lambda": [decay(weight_decay=-0.05)],
    "no schedule": [scheduler()],
    "null schedule": [scheduler(schedule=None)],
}

COMMANDS: dict[str, list[str]] = {
    "build from the command line": [
        "--trainer.callbacks+=lightning_l2.WeightDecay",
        "--trainer.callbacks.weight_decay=0.2",
        "--trainer.callbacks.summary=false",
        "--trainer.callbacks+=lightning_l2.L2NormMonitor",
        "--trainer.callbacks.per=group",
    ],
    "override the last": ["--config", "number", "--trainer.callbacks.init_args.weight_decay=0.7"],
    "override inside the schedule": [
        "--config",
        "nested schedule",
        "--trainer.callbacks.schedule.init_args.fraction=0.25",
    ],
    "misspelt override": ["--config", "number", "--trainer.callbacks.init_args.weight_deccay=0.7"],
}


class Program:
    """Answers of the training script, by name; one process for all command lines of a package."""

    def __init__(self, package: str, folder: Path) -> None:
        self.folder = folder
        for name, callbacks in CONFIGURATIONS.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        (folder / "documented.yaml").write_text(DOCUMENTED)
        lines = {name: ["fit", "--config", name] for name in CONFIGURATIONS}
        lines |= {name: ["fit", *rest] for name, rest in COMMANDS.items()}
        lines |= {f"print {name}": ["fit", "--config", name, "--print_config"] for name in ("documented", "all")}
        lines |= {f"help {name}": ["fit", f"--trainer.callbacks.help=lightning_l2.{name}"] for name in CALLBACKS}
        self.answers = self.run(package, lines)
        printed = {name: self.answers[f"print {name}"]["out"] for name in ("documented", "all")}
        for name, text in printed.items():
            (folder / f"printed {name}.yaml").write_text(text)
        again = {f"printed {name}": ["fit", "--config", f"printed {name}"] for name in printed}
        again |= {f"print printed {name}": ["fit", "--config", f"printed {name}", "--print_config"] for name in printed}
        self.answers |= self.run(package, again)

    def run(self, package: str, lines: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        common = {
            "--trainer.accelerator": "cpu",
            "--trainer.max_epochs": "2",
            "--trainer.logger": "false",
            "--trainer.enable_checkpointing": "false",
            "--trainer.enable_progress_bar": "false",
            "--trainer.enable_model_summary": "false",
            "--trainer.default_root_dir": str(self.folder),
        }
        own = [f"{key}={value}" for key, value in common.items()]
        full = []
        for line in lines.values():
            before = ["", *line]
            line = [
                str(self.folder / f"{part}.yaml") if before[i] == "--config" else part for i, part in enumerate(line)
            ]
            full.append(line if any("help" in part for part in line) else line + own)
        file = self.folder / "lines.json"
        file.write_text(json.dumps(full))
        done = python("-m", "tests.cli.program", package, str(file), environment={"COLUMNS": "200"})
        assert "ANSWERS" in done.stdout, done.stderr[-3000:]
        return dict(zip(lines, json.loads(done.stdout.split("ANSWERS")[1]), strict=True))

    def seen(self, name: str) -> dict[str, list[float]]:
        """The weight decay of each parameter in each step of a fit that went well."""
        answer = self.answers[name]
        assert answer["code"] == 0, answer["err"][-2000:]
        return answer["seen"]

    def refusal(self, name: str) -> str:
        answer = self.answers[name]
        assert answer["code"] != 0, answer["seen"]
        assert not answer["seen"], "a step was taken"
        return answer["err"] + answer["out"]


@pytest.fixture(scope="module", params=PACKAGES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(request.param, tmp_path_factory.mktemp(request.param))


def expect(seen: dict[str, list[float]], of: Callable[[str], float], shape: Callable[[float], float]) -> None:
    """``of`` gives each parameter's base, ``shape`` its multiplier at a progress from 0 to 1."""
    assert len(seen) == 7
    for name, values in seen.items():
        expected = [of(name) * shape(t / (STEPS - 1)) for t in range(STEPS)]
        assert values == pytest.approx(expected, rel=1e-12, abs=1e-15), name


def flat(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 10.0 + (1.0 - 10.0) * (1 + math.cos(math.pi * progress)) / 2


def documented(name: str) -> float:
    bases = {"embedding.weight": 0.2 * 0.05, "head.weight": 0.1, "body.0.weight": 0.05}
    return bases.get(name, 0.0)


def by_default(base: float) -> Callable[[str], float]:
    return lambda name: base if name in ("embedding.weight", "head.weight", "body.0.weight") else 0.0


def test_the_documented_yaml(program: Program) -> None:
    expect(program.seen("documented"), documented, cosine)


def test_the_table_is_printed(program: Program) -> None:
    text = program.answers["documented"]["out"] + program.answers["documented"]["err"]
    for group in ("embedding", "no_decay", "head", "decay"):
        assert group in text


@pytest.mark.parametrize(
    ("name", "base"),
    [("null", 0.3), ("bare", 0.3), ("number", 0.05), ("build from the command line", 0.2), ("override the last", 0.7)],
)
def test_values_and_overrides(name: str, base: float, program: Program) -> None:
    expect(program.seen(name), by_default(base), flat)


def test_a_preset_by_name(program: Program) -> None:
    seen = program.seen("preset")
    assert set(seen["head.weight"]) == set(seen["body.0.weight"]) == {0.05}
    assert set(seen["head.bias"]) == set(seen["body.1.weight"]) == {0.0}


def test_an_own_rule_before_a_preset(program: Program) -> None:
    expect(program.seen("rule and preset"), lambda name: 0.0 if "embedding" in name else by_default(0.05)(name), flat)


def warmup(fraction: float, start: float, end: float) -> Callable[[float], float]:
    """Linear from 0 to the start of what follows, which has the rest of training to itself."""
    return lambda p: start * p / fraction if p < fraction else start + (end - start) * (p - fraction) / (1 - fraction)


def test_a_schedule_in_a_schedule(program: Program) -> None:
    expect(program.seen("nested schedule"), by_default(0.05), warmup(0.5, 2.0, 1.0))


def test_an_override_inside_the_schedule(program: Program) -> None:
    expect(program.seen("override inside the schedule"), by_default(0.05), warmup(0.25, 2.0, 1.0))


def test_every_callback_at_once(program: Program) -> None:
    expect(program.seen("all"), by_default(0.05), lambda progress: progress / 2)


@pytest.mark.parametrize("name", ["documented", "all"])
def test_print_config_goes_round(name: str, program: Program) -> None:
    first, second = (yaml.safe_load(program.answers[f"print {n}"]["out"]) for n in (name, f"printed {name}"))
    assert first == second
    assert len(first["trainer"]["callbacks"]) == len(CONFIGURATIONS[name])
    assert program.seen(f"printed {name}") == program.seen(name)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_help_tells_of_every_argument(callback: str, program: Program) -> None:
    answer = program.answers[f"help {callback}"]
    assert answer["code"] == 0, answer["err"]
    entry = re.compile(r"^  --trainer\.callbacks\.(\w+)(?: [^\n]*)?\n((?:   .*\n?)+)", re.MULTILINE)
    entries = dict(entry.findall(answer["out"]))
    names = list(inspect.signature(getattr(lightning_l2, callback).__init__).parameters)[1:]
    assert entries.keys() == set(names)
    for name, text in entries.items():
        description = text.split("(type:")[0].split("(required, type:")[0]
        assert len(description.split()) > 2, f"{name} is not described: {text}"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("misspelt argument", ["weight_deccay"]),
        ("misspelt key of a rule", ["patern"]),
        ("misspelt preset", ["transfromer", "transformer"]),
        ("misspelt schedule", ["CosinSchedule"]),
        ("misspelt argument of a schedule", ["begin"]),
        ("misspelt way", ["decoupld"]),
        ("misspelt override", ["weight_deccay"]),
        ("text for lambda", ["strong"]),
        ("negative lambda", ["-0.05"]),
        ("no schedule", ["schedule"]),
        ("null schedule", ["schedule"]),
    ],
)
def test_mistakes_are_refused_with_their_name(name: str, parts: list[str], program: Program) -> None:
    text = program.refusal(name)
    for part in parts:
        assert part in text, text[-1500:]
