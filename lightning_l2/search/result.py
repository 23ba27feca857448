"""The answer of a search as data, as a table and as files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_l2.search import pictures
from lightning_l2.search.suggestion import Comparison
from lightning_l2.search.trials import Trial


class SearchResult(Comparison):
    """What a search found.

    Args:
        trials: All trials in the order of their numbers.
        plan: What was searched.
        lr_steps: Peak of the learning rate times optimizer steps, or None where they weren't known.
    """

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each trial, in the order of lambda, with the column names of the CSV file."""
        rows = []
        for trial in self._by_lambda():
            away = self.to_best(trial)
            row = {"trial": trial.number, **trial.parameters, "eta_lambda_T": self.strength(trial)}
            row |= {"state": trial.state, self.plan.monitor: trial.mean, "spread": trial.spread}
            row |= {"difference_to_best": away.mean, "difference_standard_error": away.error, "seeds": len(trial.runs)}
            values = {run.seed: run.value for run in trial.runs}
            row |= {f"{self.plan.monitor}/seed_{seed}": values.get(seed) for seed in self.plan.all_seeds}
            if self.train_metric is not None:
                row |= {self.train_metric: trial.average(self.train_metric), "generalisation_gap": self.gap(trial)}
            row |= {"l2_norm": trial.l2_norm, "seconds": sum(run.seconds for run in trial.runs), "error": trial.error}
            rows.append(row)
        return rows

    def table(self) -> str:
        """Return the trials as text, with the best and the suggested one marked, and what is to be said of them."""
        others = list(self.plan.also)
        paired = ["difference to the best", "its standard error"]
        known = self.lr_steps is not None
        strength = ["eta*lambda*T"] if known else []
        lines = [["trial", "lambda", *strength, *others, self.plan.monitor, "spread", *paired, "l2_norm", "state", ""]]
        marks = self._marks()
        for trial in self._by_lambda():
            numbers = [trial.weight_decay, *([self.strength(trial)] if known else [])]
            numbers += [trial.others.get(name, math.nan) for name in others]
            numbers += [trial.mean, trial.spread, *self.to_best(trial), trial.l2_norm]
            cells = ["-" if math.isnan(number) else f"{number:.4g}" for number in numbers]
            lines.append([str(trial.number), *cells, trial.state, marks.get(trial.number, "")])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
        text = ["  ".join([*map(str.rjust, line, widths), line[-1]]).rstrip() for line in lines]
        if self.plan.seeds > 1:
            text.append("Differences are paired by seed; positive is worse.")
        return "\n".join([*text, *([self.remark] if self.remark else [])])

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a file, one column for each quantity that any trial has; missing values stay empty."""
        rows = self.rows()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            for row in rows:
                writer.writerow({name: "" if _is_missing(value) else value for name, value in row.items()})

    def save(self, folder: str | Path) -> list[Path]:
        """Write trials.csv, metric.png, curves.png and, where they were measured, l2_norm.png and gap.png.

        Returns:
            The files, the table first. Without a complete trial there are no pictures.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_csv(folder / "trials.csv")
        written = [folder / "trials.csv"]
        drawn: dict[str, Callable[[Comparison], Any]] = {}
        if self.complete:
            drawn |= {"metric": pictures.plot_metric, "curves": pictures.plot_curves}
        if any(not math.isnan(trial.l2_norm) for trial in self.complete):
            drawn["l2_norm"] = pictures.plot_norm
        if self.complete and self.train_metric is not None:
            drawn["gap"] = pictures.plot_gap
        for name, plot in drawn.items():
            written.append(folder / f"{name}.png")
            plot(self).savefig(written[-1], dpi=150)
        return written

    def _by_lambda(self) -> list[Trial]:
        return sorted(self.trials, key=lambda trial: trial.weight_decay)

    def _marks(self) -> dict[int, str]:
        if not self.complete:
            return {}
        best, suggestion = self.best.number, self.suggestion.number
        if best == suggestion:
            return {best: "<- best, suggested"}
        return {best: "<- best", suggestion: "<- suggested"}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
