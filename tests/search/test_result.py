import csv
import math
from pathlib import Path

import pytest

from lightning_l2.search import Range, Run, SearchPlan, SearchResult, Trial


def run(seed: int, val: float, train: float, norm: float) -> Run:
    metrics = {"val_loss": val, "train_loss_epoch": train}
    return Run(seed, val, metrics, {name: [9.0, value] for name, value in metrics.items()}, norm, seconds=2.0)


TRIALS = [
    Trial(0, 1e-3, {"lr": 0.1}, runs=(run(0, 1.0, 0.5, 3.0), run(1, 2.0, 0.5, 5.0))),
    Trial(1, 1e-2, {"lr": 0.2}, runs=(run(0, 1.0, 0.9, 1.0), run(1, 2.1, 1.1, 1.0))),
    Trial(2, 1e-5, {"lr": 0.3}, state="failed", runs=(run(0, 4.0, 0.1, 9.0),), error="RuntimeError: nan"),
    Trial(3, 5e-3, {"lr": 0.4}, state="waiting"),
]
PLAN = SearchPlan(seeds=2, also={"lr": Range(0.01, 1.0)})


def test_the_suggestion_and_the_best() -> None:
    result = SearchResult(TRIALS, PLAN)
    assert result.best is TRIALS[0]
    # differences 0 and 0.1: mean and standard error are both 0.05
    assert result.suggestion is TRIALS[1]
    assert result.weight_decay == 1e-2


def test_the_generalisation_gap() -> None:
    result = SearchResult(TRIALS, PLAN)
    assert result.train_metric == "train_loss_epoch"
    assert result.gap(TRIALS[0]) == pytest.approx(1.5 - 0.5)
    higher_is_better = SearchResult(TRIALS, SearchPlan(mode="max"))
    assert higher_is_better.gap(TRIALS[0]) == pytest.approx(0.5 - 1.5)


@pytest.mark.parametrize(
    ("monitor", "logged", "twin"),
    [
        ("val_loss", ["train_loss"], "train_loss"),
        ("val/acc", ["train/acc", "training/acc"], "train/acc"),
        ("validation_loss", ["training_loss"], "training_loss"),
        ("loss/valid", ["loss/train_epoch", "loss/train"], "loss/train_epoch"),
        ("val_loss", ["loss"], None),
        ("loss", ["train_loss"], None),
    ],
)
def test_the_training_metric_is_found_by_its_name(monitor: str, logged: list[str], twin: str | None) -> None:
    trial = Trial(0, 0.1, runs=(Run(0, 1.0, dict.fromkeys([*logged, monitor], 1.0)),))
    assert SearchResult([trial], SearchPlan(monitor=monitor)).train_metric == twin


def test_the_table() -> None:
    left = [
        "trial  lambda  eta*lambda*T   lr  val_loss  spread  ",
        "    2   1e-05        0.0002  0.3         4       -  ",
        "    0   0.001          0.02  0.1       1.5  0.7071  ",
        "    3   0.005           0.1  0.4         -       -  ",
        "    1    0.01           0.2  0.2      1.55  0.7778  ",
    ]
    right = [
        "difference to the best  its standard error  l2_norm     state",
        "                     -                   -        9    failed",
        "                     0                   0        4  complete  <- best",
        "                     -                   -        -   waiting",
        "                  0.05                0.05        1  complete  <- suggested",
    ]
    *lines, paired, remark = SearchResult(TRIALS, PLAN, lr_steps=20.0).table().splitlines()
    assert lines == [one + other for one, other in zip(left, right, strict=True)]
    assert paired == "Differences are paired by seed; positive is worse."
    assert remark.startswith("The suggested lambda is the upper end of the range")
    assert "eta" not in SearchResult(TRIALS, PLAN).table(), "the learning rate and the steps aren't known"


@pytest.mark.parametrize(
    ("best", "remark"), [(1e-5, "lower end of the range: a smaller one"), (1e-3, None), (1e-1, "raise `high`")]
)
def test_the_table_says_where_the_range_is_too_small(best: float, remark: str | None) -> None:
    lambdas = (1e-5, 1e-3, 1e-1)
    trials = [Trial(number, value, runs=(Run(0, float(value != best)),)) for number, value in enumerate(lambdas)]
    remarks = SearchResult(trials, SearchPlan(seeds=1)).table().splitlines()[4:]
    assert len(remarks) == (remark is not None)
    assert all(remark in line for line in remarks)


def test_the_table_says_that_lambda_does_not_matter_rather_than_to_raise_it() -> None:
    trials = [Trial(number, value, runs=(Run(0, 1.0),)) for number, value in enumerate((0.0, 1e-5, 1e-1))]
    text = SearchResult(trials).table()
    assert "val_loss does not depend on lambda at all" in text
    assert "raise" not in text


def test_a_trial_that_was_stopped_early_has_no_last_value(tmp_path: Path) -> None:
    """What it had in the middle of its training can't be compared with the end of the others."""
    stopped = Trial(2, 1e-4, state="pruned", runs=(run(0, 0.1, 0.1, 9.0),))
    result = SearchResult([*TRIALS[:2], stopped], SearchPlan(seeds=2))
    (line,) = (line for line in result.table().splitlines() if "pruned" in line)
    assert line.split() == ["2", "0.0001", *"----", "9", "pruned"]
    (row,) = (row for row in result.rows() if row["state"] == "pruned")
    assert math.isnan(row["val_loss"])
    assert math.isnan(row["generalisation_gap"])
    assert row["val_loss/seed_0"] == 0.1


def test_a_table_without_a_complete_trial() -> None:
    assert "<-" not in SearchResult(TRIALS[2:], PLAN).table()


def test_the_csv_file(tmp_path: Path) -> None:
    SearchResult(TRIALS, PLAN).to_csv(tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        failed, complete, waiting, other = csv.DictReader(file)
    assert list(complete) == [
        *["trial", "weight_decay", "lr", "eta_lambda_T", "state", "val_loss", "spread"],
        *["difference_to_best", "difference_standard_error", "seeds", "val_loss/seed_0", "val_loss/seed_1"],
        *["train_loss_epoch", "generalisation_gap", "l2_norm", "seconds", "error"],
    ]
    assert complete["val_loss/seed_1"] == "2.0"
    assert complete["generalisation_gap"] == "1.0"
    assert complete["seconds"] == "4.0"
    assert float(other["difference_to_best"]) == pytest.approx(0.05)
    assert failed["error"] == "RuntimeError: nan"
    assert failed["val_loss/seed_1"] == failed["spread"] == waiting["val_loss"] == ""
