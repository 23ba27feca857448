"""`python -m lightning_l2 search` on a project that trains by LightningCLI."""

import csv
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_l2.__main__ import main
from lightning_l2.search import SearchResult
from tests.cli.project import BASE, PROJECT, fit_cli, lambdas, write
from tests.processes.forked import python

ROOT = Path(__file__).parents[2]
# Lightning's own use
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # few steps, so that eta lambda T = 10 is more than one step can take
    pytest.mark.filterwarnings("ignore:.*takes all of the weights in one step"),
]


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


def search(*arguments: str, trials: int = 2, seeds: int = 1) -> int:
    return main(["search", *arguments, f"--search.trials={trials}", f"--search.seeds={seeds}"])


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
        (["--search.mode=least"], "Expected `search.mode` to be one of 'min', 'max', got 'least'."),
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


def test_a_metric_that_never_appears_and_the_mended_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="Unless it comes later"):
        assert search("--config", write("fit.yaml", BASE), "--search.monitor=val_acc") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("python -m lightning_l2 search: error: The metric monitor='val_acc' never appeared")
    assert "Those that did: train_loss, val_loss" in told
    assert search("--config", "fit.yaml") == 0


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


def test_without_jsonargparse_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit):
        main(["search", "--config", "fit.yaml"])
    assert 'needs jsonargparse, which isn\'t installed. Get it with `pip install "lightning_l2[search]"`.' in (
        capsys.readouterr().err
    )
