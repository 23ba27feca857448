"""What loggers have written, read back."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_l2.plots import (
    read_history,
)
from lightning_l2.plots.history import curves_of


def write_metrics(logger: Any) -> None:
    logger.log_metrics({"loss": 2.0}, step=4)
    logger.log_metrics({"loss": 1.0, "l2_norm/fc": 3.5}, step=9)
    logger.log_metrics({"l2_norm/fc": 3.0}, step=14)
    logger.log_metrics({"loss": 0.5}, step=9)  # logged again, as after a resume
    logger.log_metrics({"loss": float("nan")}, step=14)
    logger.save()


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_history_is_what_was_logged(make, tmp_path) -> None:
    logger = make(tmp_path)
    write_metrics(logger)
    history = read_history(logger.log_dir)
    steps, losses = history["loss"]
    assert (steps, losses[:2]) == ([4, 9, 14], [2.0, 0.5])
    assert math.isnan(losses[2])
    assert history["l2_norm/fc"] == ([9, 14], [3.5, 3.0])


def test_history_is_read_from_a_file_too(tmp_path) -> None:
    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    for logger, pattern in ((csv, "metrics.csv"), (board, "events*")):
        write_metrics(logger)
        (path,) = (path for path in tmp_path.rglob(pattern))
        assert read_history(path)["l2_norm/fc"] == ([9, 14], [3.5, 3.0])


def test_cells_that_are_no_numbers_are_no_metrics(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,note,empty\n9,0.5,fine,\n7,,,\n5,0.25,good,\n")
    assert read_history(tmp_path) == {"loss": ([5, 9], [0.25, 0.5])}


def test_no_metrics_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"No metrics at '.*'. Expected a metrics.csv, TensorBoard event files"):
        read_history(tmp_path)


def test_events_without_tensorboard_are_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ModuleNotFoundError, match=r"Install it with `pip install tensorboard`"):
        read_history(tmp_path)


def test_layers_count_unless_told_the_order() -> None:
    history = {f"l2_norm/{name}": ([0], [1.0]) for name in ("b.10", "b.9", "a", "total")}
    assert list(curves_of(history, "l2_norm")) == ["a", "b.9", "b.10"]
    assert list(curves_of(history, "l2_norm", ["b.10", "b.9"])) == ["b.10", "b.9", "a"]
    assert list(curves_of({"l2_norm/total": ([0], [1.0])}, "l2_norm")) == ["total"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [("trial,val_loss\n0,1.0\n", r"no column `step`, but: trial, val_loss\. Give the metrics\.csv"), ("", "but: none")],
)
def test_other_tables_are_refused(rows: str, message: str, tmp_path: Any) -> None:
    (tmp_path / "trials.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_history(tmp_path / "trials.csv")


def test_rows_without_a_step_and_cells_without_a_name_are_passed_over(tmp_path: Any) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0,7.0\n,2.0\n1,3.0\n")
    assert read_history(tmp_path) == {"loss": ([0, 1], [1.0, 3.0])}


def test_an_absent_event_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"No metrics at '.*events\.out\.tfevents\.1'"):
        read_history(tmp_path / "events.out.tfevents.1")
