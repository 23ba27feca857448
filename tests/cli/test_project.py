"""A configuration with lambda in it becomes a training, and the best one a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_l2 import L2Penalty, WeightDecay
from lightning_l2.cli.project import Project
from lightning_l2.search import Trial, TrialRun
from tests.cli.project import BASE, PROJECT, Data, Model, fit_cli, lambdas, write

WITH_CALLBACKS = {
    "trainer": {
        "callbacks": [
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}},
            {"class_path": "lightning_l2.WeightDecay", "init_args": {"weight_decay": 5.0, "rules": "transformer"}},
            {"class_path": "lightning_l2.WeightDecayScheduler", "init_args": {"schedule": "ConstantSchedule"}},
        ]
    }
}
# Lightning's own use
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def best_of(project: Project, weight_decay: float, **others: float) -> str:
    """Write what trains with these values and return the file's name."""
    Path("best.yaml").write_text(yaml.safe_dump(project.best(Trial(1, weight_decay, others))))
    return "best.yaml"


def test_trainings_are_those_of_the_configuration() -> None:
    config = write("fit.yaml", BASE)
    outcome: Any = Project(["--config", config]).fit(TrialRun(weight_decay=0.79, seed=3))
    cli = fit_cli("--config", config, "--seed_everything=3", "--trainer.enable_checkpointing=false")
    cli.trainer.callbacks.append(WeightDecay(0.79, summary=False))
    cli.trainer.fit(cli.model, cli.datamodule)
    assert outcome["val_loss"] == [float(cli.trainer.callback_metrics["val_loss"])]


def test_the_callback_of_the_configuration_takes_lambda() -> None:
    config = write("fit.yaml", BASE, {"trainer": {**BASE["trainer"], **WITH_CALLBACKS["trainer"]}})
    best = fit_cli("--config", config, "--config", best_of(Project(["--config", config]), 0.07))
    plain = fit_cli("--config", config)
    assert (lambdas(best), lambdas(plain)) == ([0.07], [5.0])
    assert [type(one) for one in best.trainer.callbacks] == [type(one) for one in plain.trainer.callbacks]
    assert best.trainer.callbacks[1].rules == plain.trainer.callbacks[1].rules
    assert best.trainer.callbacks[1].print_summary


@pytest.mark.parametrize("with_weight_decay", [False, True])
def test_a_penalty_of_the_configuration_takes_lambda_where_nothing_decays(with_weight_decay: bool) -> None:
    penalty = {"class_path": "lightning_l2.L2Penalty", "init_args": {"weight_decay": 5.0}}
    callbacks = [penalty, *(["lightning_l2.WeightDecay"] if with_weight_decay else [])]
    config = write("fit.yaml", BASE, {"trainer": {**BASE["trainer"], "callbacks": callbacks}})
    best = fit_cli("--config", config, "--config", best_of(Project(["--config", config]), 0.07))
    penalties = [callback.weight_decay for callback in best.trainer.callbacks if isinstance(callback, L2Penalty)]
    assert (penalties, lambdas(best)) == (([5.0], [0.07]) if with_weight_decay else ([0.07], []))


def test_lambda_and_others_by_their_keys() -> None:
    searched = {"key": "model.init_args.weight_decay", "also": {"model.init_args.lr": {"low": 0.01, "high": 0.02}}}
    config = write("fit.yaml", BASE, {"search": {**searched, "trials": 7}})
    project = Project(["--config", config, "--search.folder=elsewhere", "--search.trials=3"])
    assert (project.options.trials, project.options.folder) == (3, "elsewhere"), "the command line wins over the file"
    assert project.options.also["model.init_args.lr"].high == 0.02
    chosen = best_of(project, 0.3, **{"model.init_args.lr": 0.015})
    best = fit_cli("--config", write("plain.yaml", BASE), "--config", chosen)
    assert lambdas(best) == []
    assert (best.model.weight_decay, best.model.lr) == (0.3, 0.015)
    assert best.model.layers[0].out_features == 4


def test_a_cli_of_fixed_classes() -> None:
    config = write("fit.yaml", {"trainer": BASE["trainer"], "model": {"hidden": 4}, "data": {"batch_size": 16}})
    project = Project(["--config", config], model_class=f"{PROJECT}.Model", data_class=f"{PROJECT}.Data")
    classes = {"model_class": Model, "datamodule_class": Data}
    assert lambdas(fit_cli("--config", config, "--config", best_of(project, 0.2), **classes)) == [0.2]


def test_the_projects_own_cli() -> None:
    """Its links and arguments are there, and what it does after a training isn't done."""
    config = write("fit.yaml", BASE, {"data": {**BASE["data"], "init_args": {"inputs": 6}}})
    project = Project(["--config", config, "--note=hello"], cli=f"{PROJECT}.LinkedCLI")
    outcome: Any = project.fit(TrialRun(weight_decay=0.1, seed=0))
    assert len(outcome["val_loss"]) == 1
    assert project.settings()["config.note"] == "hello"


def test_the_optimizer_of_the_configuration() -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 7.0}}
    config = write("fit.yaml", BASE, {"optimizer": optimizer})
    project = Project(["--config", config, "--search.key=optimizer.init_args.weight_decay"])
    assert project.best(Trial(1, 0.25)) == {"optimizer": {"init_args": {"weight_decay": 0.25}}}


def test_trainings_write_no_checkpoints() -> None:
    """They would stand among those of the training that comes later, and fill the disk."""
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "mine", "monitor": "val_loss"}}
    trainer = {**BASE["trainer"], "callbacks": [checkpoint], "enable_checkpointing": True}
    config = write("fit.yaml", BASE, {"trainer": trainer})
    project = Project(["--config", config])
    project.fit(TrialRun(weight_decay=0.1, seed=0))
    assert not Path("mine").exists()
    assert not list(Path().rglob("*.ckpt"))
    best = fit_cli("--config", config, "--config", best_of(project, 0.1))
    assert best.trainer.checkpoint_callback.dirpath.endswith("mine")


def test_best_yaml_holds_what_differs_from_the_defaults() -> None:
    rules = [{"name": "own", "pattern": "layers.0", "multiplier": 2.0}, "default"]
    decay = {"class_path": "lightning_l2.WeightDecay", "init_args": {"weight_decay": 5.0, "rules": rules}}
    schedule = {"class_path": "lightning_l2.schedules.CosineSchedule", "init_args": {"start": 1.0, "end": 2.0}}
    callbacks = [
        {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "patience": 7}},
        decay,
        {"class_path": "lightning_l2.WeightDecayScheduler", "init_args": {"schedule": schedule}},
        {"class_path": "lightning_l2.L2NormMonitor"},
    ]
    config = write("fit.yaml", BASE, {"trainer": {**BASE["trainer"], "callbacks": callbacks}})
    project = Project(["--config", config])
    best = project.best(Trial(0, 0.25))
    expected = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": callbacks[0]["init_args"]}
    found = {"class_path": "lightning_l2.WeightDecay", "init_args": {"weight_decay": 0.25, "rules": rules}}
    assert best == {"trainer": {"callbacks": [expected, found, *callbacks[2:]]}}


def test_the_settings_are_plain_values() -> None:
    project = Project(["--config", write("fit.yaml", BASE), "--trainer.default_root_dir=here"])
    settings = project.settings()
    assert settings["config.model.init_args.hidden"] == 4
    assert settings["config.trainer.max_epochs"] == 1
    assert not [key for key in settings if "search" in key or "seed" in key or "root_dir" in key]
