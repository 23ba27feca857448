"""The metrics of a training as plain lists, read back from what a logger wrote."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Steps, ascending, and as many values."""
History: TypeAlias = Mapping[str, Curve]
"""Metric name -> curve."""


def read_history(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read the metrics that a CSVLogger or a TensorBoardLogger wrote, during a training or after it.

    Args:
        path: A `metrics.csv`, a TensorBoard event file, or the logger's directory (`logger.log_dir`).

    Returns:
        Metric name -> (steps, values). A step that was logged twice, as after a resume, keeps its last value.

    Raises:
        ValueError: If there are no such files at `path`, or the table has no column `step`.
        ModuleNotFoundError: If only TensorBoard's files are there and tensorboard is not installed.
    """
    path = Path(path)
    table = path / "metrics.csv" if path.is_dir() else path
    if table.suffix == ".csv" and table.is_file():
        return _sorted(_read_csv(table))
    if (path.is_file() and "tfevents" in path.name) or any(path.glob("*tfevents*")):
        return _sorted(_read_tensorboard(path))
    raise ValueError(
        f"No metrics at '{path}'. Expected a metrics.csv, TensorBoard event files, or the directory that holds them, "
        "such as 'lightning_logs/version_0'."
    )


def curves_of(history: History, prefix: str, order: Sequence[str] | None = None) -> History:
    """Return what was logged under `prefix`, without the prefix, totals aside.

    Args:
        history: The metrics of a training.
        prefix: The part of the key before the slash, such as `"l2_norm"`.
        order: Names in the order wanted; others follow. By default names sort with their numbers as numbers.

    Raises:
        ValueError: If nothing was logged under `prefix`.
    """
    names = [key.removeprefix(f"{prefix}/") for key in history if key.startswith(f"{prefix}/")]
    layers = [name for name in names if name != "total"] or names
    if not layers:
        raise ValueError(
            f"The history has no '{prefix}/...' metric, but: {', '.join(sorted(history)) or 'nothing'}. "
            "L2NormMonitor logs it; its options say which quantities."
        )
    rank = {name: position for position, name in enumerate(order or ())}
    layers.sort(key=lambda name: (rank.get(name, len(rank)), natural_order(name)))
    return {name: history[f"{prefix}/{name}"] for name in layers}


def as_grid(curves: History) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return all steps that were logged and the values as layers x steps, NaN where a layer has none."""
    import numpy as np

    steps = np.unique(np.concatenate([np.asarray(at, dtype=float) for at, _ in curves.values()]))
    grid = np.full((len(curves), len(steps)), np.nan)
    for row, (at, values) in zip(grid, curves.values(), strict=True):
        row[np.searchsorted(steps, at)] = values
    return steps, grid


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that counts: `layers.2` before `layers.10`.

    >>> sorted(["layers.10", "layers.2", "head"], key=natural_order)
    ['head', 'layers.2', 'layers.10']
    """
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part)


def _read_csv(table: Path) -> dict[str, dict[int, float]]:
    history: dict[str, dict[int, float]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        names = list(rows.fieldnames or ())
        if "step" not in names:
            raise ValueError(
                f"'{table}' has no column `step`, but: {', '.join(names) or 'none'}. "
                "Give the metrics.csv of a CSVLogger."
            )
        names.remove("step")
        for row in rows:
            step = _number(row["step"])
            for name in names:
                value = _number(row[name])
                if step is not None and value is not None:
                    history.setdefault(name, {})[int(step)] = value
    return history


def _number(cell: str | None) -> float | None:
    try:
        return float(cell or "")
    except ValueError:
        return None


def event_accumulator(path: str | Path) -> Any:
    """Return TensorBoard's class that reads its event files.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed; TensorBoardLogger can also write by tensorboardX.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"'{path}' holds TensorBoard events, and tensorboard, which reads them, is not installed. "
            "Install it with `pip install tensorboard`, or log with a CSVLogger."
        ) from error
    return EventAccumulator


def _read_tensorboard(path: Path) -> dict[str, dict[int, float]]:
    events = event_accumulator(path)(str(path), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def _sorted(history: Mapping[str, Mapping[int, float]]) -> dict[str, tuple[list[int], list[float]]]:
    return {key: (sorted(by_step), [by_step[step] for step in sorted(by_step)]) for key, by_step in history.items()}
