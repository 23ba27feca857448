"""`python -m lightning_l2 search` on a project that trains by LightningCLI."""

import csv
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_l2 import L2Penalty, WeightDecay
from lightning_l2.__main__ import main
from lightning_l2.cli.project import Project
from lightning_l2.search import SearchResult, Trial
from tests.processes.forked import python

ROOT = Path(__file__).parents[2]
PROJECT = "tests.cli.project"
BASE = {
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False},
    "model": {"class_path": f"{PROJECT}.Model", "init_args": {"hidden": 4}},
    "data": {"class_path": f"{PROJECT}.Data"},
}
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
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Work in a folder of the test's own, and draw where it is the pictures that a test is about: they take long."""

    def save_table(result: SearchResult, folder: Path) -> list[Path]:
        folder.mkdir(exist_ok=True)
        result.to_csv(folder / "trials.csv")
        return [folder / "trials.csv"]

    monkeypatch.chdir(tmp_path)
    if request.node.name != "test_a_project_gets_the_search_without_code":
        monkeypatch.setattr(SearchResult, "save", save_table)


def write(name: str, *parts: dict[str, Any]) -> str:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            merged[key] = {**merged.get(key, {}), **value}
    Path(name).write_text(yaml.safe_dump(merged))
    return name


def search(*arguments: str, trials: int = 2, seeds: int = 1) -> int:
    return main(["search", *arguments, f"--search.trials={trials}", f"--search.seeds={seeds}"])


def fit_cli(*arguments: str, **classes: Any) -> LightningCLI:
    """What the project's own command would build."""

    class BuildOnly(LightningCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_args(args)

    return BuildOnly(
        **classes, args=list(arguments), run=False, save_config_callback=None, seed_everything_default=False
    )


def lambdas(cli: LightningCLI) -> list[float]:
    return [callback.weight_decay for callback in cli.trainer.callbacks if isinstance(callback, WeightDecay)]


def rows(folder: str = "weight_decay_search") -> list[dict[str, str]]:
    with Path(folder, "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_project_gets_the_search_without_code(capsys: pytest.CaptureFixture[str]) -> None:
    config, more = write("fit.yaml", BASE), write("more.yaml", {"model": {"init_args": {"lr": 0.05}}})
    arguments = ["--config", config, "--config", more, "--trainer.max_epochs=2"]
    assert search(*arguments, trials=3, seeds=2) == 0
    folder = Path("weight_decay_search")
    names = {"trials.csv", "best.yaml", "metric.png", "curves.png", "l2_norm.png", "gap.png", "study.db"}
    assert names <= {path.name for path in folder.iterdir()}
    # SGD(lr=0.05) for 2 epochs of 4 batches: eta T = 0.4, and the middle of 0.025 to 25
    assert [float(row["weight_decay"]) for row in rows()] == [0.0, 0.025, 0.790569, 25.0]
    assert [float(row["eta_lambda_T"]) for row in rows()] == pytest.approx([0.0, 0.01, 0.316, 10.0], rel=1e-3)
    assert {row["seeds"] for row in rows()} == {"2"}
    captured = capsys.readouterr()
    assert "<- " in captured.out
    assert f"append  --config {folder / 'best.yaml'}" in captured.out
    assert "Weight decay\n" not in captured.out, "no table of groups for each training"
    assert "8/8" in captured.err
    assert "GPU available" not in captured.err
    best = fit_cli(*arguments, "--config", str(folder / "best.yaml"))
    suggested = (folder / "best.yaml").read_text().splitlines()[0]
    assert suggested.startswith(f"# suggested: weight_decay={lambdas(best)[0]:g}: val_loss=")
    assert suggested.endswith(" over 2 seeds")


def test_trainings_are_those_of_the_configuration() -> None:
    config = write("fit.yaml", BASE)
    search("--config", config, trials=1)
    cli = fit_cli("--config", config, "--seed_everything=0", "--trainer.enable_checkpointing=false")
    assert rows()[1]["weight_decay"] == "0.790569"
    cli.trainer.callbacks.append(WeightDecay(0.790569, summary=False))
    cli.trainer.fit(cli.model, cli.datamodule)
    assert float(rows()[1]["val_loss"]) == float(cli.trainer.callback_metrics["val_loss"])


def test_the_callback_of_the_configuration_takes_lambda() -> None:
    config = write("fit.yaml", BASE, {"trainer": {**BASE["trainer"], **WITH_CALLBACKS["trainer"]}})
    assert search("--config", config, "--search.low=0.01", "--search.high=0.1", "--search.first=0.05") == 0
    best = fit_cli("--config", config, "--config", "weight_decay_search/best.yaml")
    plain = fit_cli("--config", config)
    assert lambdas(best)[0] == 0 or 0.01 <= lambdas(best)[0] <= 0.1
    assert lambdas(plain) == [5.0]
    assert len(lambdas(best)) == 1
    assert [type(one) for one in best.trainer.callbacks] == [type(one) for one in plain.trainer.callbacks]
    assert best.trainer.callbacks[1].rules == plain.trainer.callbacks[1].rules
    assert best.trainer.callbacks[1].print_summary


@pytest.mark.parametrize("with_weight_decay", [False, True])
@pytest.mark.filterwarnings("ignore:L2Penalty penalises:UserWarning")
def test_a_penalty_of_the_configuration_takes_lambda_where_nothing_decays(with_weight_decay: bool) -> None:
    penalty = {"class_path": "lightning_l2.L2Penalty", "init_args": {"weight_decay": 5.0}}
    callbacks = [penalty, *(["lightning_l2.WeightDecay"] if with_weight_decay else [])]
    config = write("fit.yaml", BASE, {"trainer": {**BASE["trainer"], "callbacks": callbacks}})
    assert search("--config", config, trials=1) == 0
    best = fit_cli("--config", config, "--config", "weight_decay_search/best.yaml")
    penalties = [callback.weight_decay for callback in best.trainer.callbacks if isinstance(callback, L2Penalty)]
    found = {0.0, 0.790569}
    assert set(penalties) <= ({5.0} if with_weight_decay else found)
    assert set(lambdas(best)) <= (found if with_weight_decay else set())
    assert len(penalties + lambdas(best)) == 1 + with_weight_decay


def test_lambda_and_others_by_their_keys() -> None:
    config = write(
        "fit.yaml",
        BASE,
        {
            "search": {
                "key": "model.init_args.weight_decay",
                "also": {"model.init_args.lr": {"low": 0.01, "high": 0.02}},
                "trials": 7,
            }
        },
    )
    assert search("--config", config, "--search.folder=elsewhere", trials=3) == 0
    best = fit_cli("--config", write("plain.yaml", BASE), "--config", "elsewhere/best.yaml")
    assert lambdas(best) == []
    assert best.model.weight_decay in [float(row["weight_decay"]) for row in rows("elsewhere")]
    assert 0.01 <= best.model.lr <= 0.02
    assert best.model.lr in [float(row["model.init_args.lr"]) for row in rows("elsewhere")]
    assert best.model.layers[0].out_features == 4
    assert len(rows("elsewhere")) == 3, (
        "no lambda = 0 in a joint search; the command line wins over the section of the file"
    )


def test_a_cli_of_fixed_classes() -> None:
    config = write("fit.yaml", {"trainer": BASE["trainer"], "model": {"hidden": 4}, "data": {"batch_size": 16}})
    classes = ["--model_class", f"{PROJECT}.Model", "--data_class", f"{PROJECT}.Data"]
    assert search(*classes, "--config", config, trials=1) == 0
    from tests.cli.project import Data, Model

    fixed = {"model_class": Model, "datamodule_class": Data}
    assert len(lambdas(fit_cli("--config", config, "--config", "weight_decay_search/best.yaml", **fixed))) == 1


def test_the_projects_own_cli() -> None:
    config = write("fit.yaml", BASE, {"data": {**BASE["data"], "init_args": {"inputs": 6}}})
    assert search("--cli", f"{PROJECT}.LinkedCLI", "--config", config, "--note=hello", trials=1) == 0


def test_the_optimizer_of_the_configuration() -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 7.0}}
    scheduler = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}}
    config = write("fit.yaml", BASE, {"optimizer": optimizer, "lr_scheduler": scheduler})
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden"):
        assert search("--config", config, "--search.key=optimizer.init_args.weight_decay", trials=1) == 0
    best = yaml.safe_load(Path("weight_decay_search/best.yaml").read_text())
    # lr=0.01 for 4 steps: eta T = 0.04, and the middle of 0.25 to 250
    assert best["optimizer"]["init_args"]["weight_decay"] in (0.0, 7.90569)
    assert list(best) == ["optimizer"]
    assert list(best["optimizer"]) == ["init_args"]


def test_the_same_command_continues_and_another_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    config = write("fit.yaml", BASE)
    search("--config", config, trials=2)
    before = rows()
    search("--config", config, trials=2)
    assert rows() == before, "nothing was trained: the durations are the same"
    search("--config", config, trials=3)
    assert len(rows()) == 4
    assert search("--config", config, "--model.init_args.hidden=9") == 1
    assert "another search: config.model.init_args.hidden=9 (there: 4)" in capsys.readouterr().err


def test_the_dashboard_opens_the_study() -> None:
    config = write("fit.yaml", BASE)
    assert search("--config", config, "--search.storage=study.db", "--search.name=mine", trials=1) == 0
    assert optuna.get_all_study_names("sqlite:///study.db") == ["mine"]
    assert not Path("weight_decay_search/study.db").exists()


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_continues(tmp_path: Path) -> None:
    """The interrupt comes in the third of four trainings; the Trainer handles it in its own way."""
    config = write("fit.yaml", BASE)
    command = ["-m", "lightning_l2", "search", "--config", config, "--search.trials=4", "--search.seeds=1"]
    stopped = python(*command, cwd=tmp_path, environment={"INTERRUPT_BY": "count"})
    assert stopped.returncode == 130, stopped.stderr
    assert "Stopped. 2 of 5 trials are finished and kept in weight_decay_search/study.db" in stopped.stderr
    assert "The same command continues." in stopped.stderr
    assert sorted(row["state"] for row in rows()) == ["complete", "complete", "waiting"]
    assert search("--config", config, trials=4) == 0
    assert [row["state"] for row in rows()] == ["complete"] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search.low=1", "--search.high=0.1"], "low=1.0, high=0.1 is upside down"),
        (["--search.trials=0"], "Expected `trials` to be at least 1, got 0"),
        (["--search.key=model.init_args.wd"], "no key 'model.init_args.wd' to search. Closest keys: model.init_args"),
        (["--model_class=nowhere.Model"], "There is no class 'nowhere.Model'"),
        (["--cli=tests.cli.project.Nothing"], "There is no class 'tests.cli.project.Nothing'"),
        (["--search.trails=3"], "unrecognized arguments: --search.trails=3. Closest options: --search.trials, --"),
        (["--search.mode=least"], 'Parser key "search.mode": Expected a'),
        (["--model.hidden=many"], "error: "),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["search", "--config", write("fit.yaml", BASE), *arguments])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert message in " ".join(told.split())
    assert len(told.splitlines()) < 20, "not all of the hundreds of options"
    assert not Path("weight_decay_search").exists()


@pytest.mark.parametrize("config", [{"model": {"hidden": 4}}, {}])
@pytest.mark.parametrize("own", [[], ["--cli", f"{PROJECT}.LinkedCLI"], ["--cli", f"{PROJECT}.PlainCLI"]])
def test_a_configuration_without_classes_is_told_which_options_name_them(
    own: list[str], config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["search", *own, "--config", write("fit.yaml", {"trainer": BASE["trainer"]}, config)])
    told = capsys.readouterr().err
    assert "give them here too: --model_class package.module.Class and --data_class package.module.Class." in told


def test_the_projects_own_cli_with_its_classes() -> None:
    config = write("fit.yaml", {"trainer": BASE["trainer"], "model": {"hidden": 4}, "data": {"batch_size": 16}})
    classes = ["--model_class", f"{PROJECT}.Model", "--data_class", f"{PROJECT}.Data"]
    assert search("--cli", f"{PROJECT}.PlainCLI", *classes, "--config", config, trials=1) == 0


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


def test_a_metric_that_never_appears_and_the_mended_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="Unless it comes later"):
        assert search("--config", write("fit.yaml", BASE), "--search.monitor=val_acc") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("python -m lightning_l2 search: error: The metric monitor='val_acc' never appeared")
    assert "Those that did: train_loss, val_loss" in told
    assert search("--config", "fit.yaml") == 0


def test_trainings_write_no_checkpoints() -> None:
    """They would stand among those of the training that comes later, and fill the disk."""
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "mine", "monitor": "val_loss"}}
    trainer = {**BASE["trainer"], "callbacks": [checkpoint], "enable_checkpointing": True}
    config = write("fit.yaml", BASE, {"trainer": trainer})
    assert search("--config", config) == 0
    assert not Path("mine").exists()
    assert not list(Path().rglob("*.ckpt"))
    best = fit_cli("--config", config, "--config", "weight_decay_search/best.yaml")
    assert best.trainer.checkpoint_callback.dirpath.endswith("mine")


def test_help_and_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["search", "--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    for words in ("Choose lambda", "--model_class", "--search.trials", "--trainer.max_epochs", "--ckpt_path"):
        assert words in out
    assert main(["--help"]) == 0
    assert "search" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["find"]) == 2
    assert "There is no command 'find'." in capsys.readouterr().err


def test_the_settings_are_plain_values() -> None:
    project = Project(["--config", write("fit.yaml", BASE), "--trainer.default_root_dir=here"])
    settings = project.settings()
    assert settings["config.model.init_args.hidden"] == 4
    assert settings["config.trainer.max_epochs"] == 1
    assert not [key for key in settings if "search" in key or "seed" in key or "root_dir" in key]


def test_without_jsonargparse_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit):
        main(["search", "--config", "fit.yaml"])
    assert 'needs jsonargparse, which isn\'t installed. Get it with `pip install "lightning_l2[search]"`.' in (
        capsys.readouterr().err
    )
