"""The answer of a search as data, as a table and as files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.suggestion import Trial, best_trial, suggested_trial


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        trials: all trials in the order of their numbers.
        plan: what was searched.

    Example:
        >>> def fit(run):
        ...     return (run.weight_decay - 0.01) ** 2
        >>> from lightning_l2.search import search_weight_decay
        >>> result = search_weight_decay(fit=fit, first=0.01, trials=3, seeds=1, progress=False)
        >>> result.weight_decay
        0.01
        >>> print(result.table())
        trial  lambda  val_loss  spread  l2_norm     state
            1   1e-05  9.98e-05       -        -  complete
            0    0.01         0       -        -  complete  <- best, suggested
            2     0.1    0.0081       -        -  complete
    """

    trials: Sequence[Trial]
    plan: SearchPlan = field(default_factory=SearchPlan)

    @property
    def best(self) -> Trial:
        """The trial with the best mean of the metric."""
        return best_trial(self.trials, self.plan.sign)

    @property
    def suggestion(self) -> Trial:
        """The trial with the largest lambda that is as good as the best within one standard error."""
        return suggested_trial(self.trials, self.plan.sign)

    @property
    def weight_decay(self) -> float:
        """The suggested lambda, dimensionless."""
        return self.suggestion.weight_decay

    @property
    def train_metric(self) -> str | None:
        """The training metric that belongs to the monitored one (`train_loss` for `val_loss`), or None."""
        names = sorted({name for trial in self.trials for run in trial.runs for name in run.metrics})
        for word in ("validation", "valid", "val"):
            if word in self.plan.monitor:
                for twin in (self.plan.monitor.replace(word, to) for to in ("train", "training")):
                    found = [name for name in (f"{twin}_epoch", twin) if name in names]
                    if found:
                        return found[0]
        return None

    def gap(self, trial: Trial) -> float:
        """Return the generalisation gap of a trial: how much worse the monitored metric is than the training's."""
        train = self.train_metric
        return math.nan if train is None else self.plan.sign * (trial.mean - trial.average(train))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each trial, in the order of lambda, with the column names of the CSV file."""
        rows = []
        for trial in sorted(self.trials, key=lambda trial: trial.weight_decay):
            row = {"trial": trial.number, **trial.parameters, "state": trial.state}
            row |= {self.plan.monitor: trial.mean, "spread": trial.spread, "seeds": len(trial.runs)}
            values = {run.seed: run.value for run in trial.runs}
            row |= {f"{self.plan.monitor}/seed_{seed}": values.get(seed) for seed in self.plan.all_seeds}
            if self.train_metric is not None:
                row |= {self.train_metric: trial.average(self.train_metric), "generalisation_gap": self.gap(trial)}
            row |= {"l2_norm": trial.l2_norm, "seconds": sum(run.seconds for run in trial.runs), "error": trial.error}
            rows.append(row)
        return rows

    def table(self) -> str:
        """Return the trials as text, in the order of lambda, with the best and the suggested one marked.

        A last line says where the suggested lambda is an end of the range.
        """
        others = list(self.plan.also)
        lines = [["trial", "lambda", *others, self.plan.monitor, "spread", "l2_norm", "state", ""]]
        marks = self._marks()
        for trial in sorted(self.trials, key=lambda trial: trial.weight_decay):
            numbers = [trial.weight_decay, *(trial.others[name] for name in others)]
            numbers += [trial.mean, trial.spread, trial.l2_norm]
            cells = ["-" if math.isnan(number) else f"{number:.4g}" for number in numbers]
            lines.append([str(trial.number), *cells, trial.state, marks.get(trial.number, "")])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
        text = ["  ".join([*map(str.rjust, line, widths), line[-1]]).rstrip() for line in lines]
        return "\n".join(text + self._remarks(set(marks)))

    def _remarks(self, marked: set[int]) -> list[str]:
        if not marked or self.plan.trials == 1:
            return []
        if self.weight_decay >= self.plan.high:
            return ["The suggested lambda is the upper end of the range: a larger one may do as well, so raise `high`."]
        if self.weight_decay <= self.plan.low:
            return ["The suggested lambda is the lower end of the range: a smaller one may do better, so lower `low`."]
        return []

    def _marks(self) -> dict[int, str]:
        if not any(trial.state == "complete" for trial in self.trials):
            return {}
        best, suggestion = self.best.number, self.suggestion.number
        if best == suggestion:
            return {best: "<- best, suggested"}
        return {best: "<- best", suggestion: "<- suggested"}

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

        Args:
            folder: where to; made if it isn't there.

        Returns:
            The files, the table first. Without a complete trial there are no pictures.
        """
        from lightning_l2.search.pictures import plot_curves, plot_gap, plot_metric, plot_norm

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_csv(folder / "trials.csv")
        written = [folder / "trials.csv"]
        complete = [trial for trial in self.trials if trial.state == "complete"]
        pictures: dict[str, Callable[[SearchResult], Any]] = {}
        if complete:
            pictures |= {"metric": plot_metric, "curves": plot_curves}
        if any(not math.isnan(trial.l2_norm) for trial in complete):
            pictures["l2_norm"] = plot_norm
        if complete and self.train_metric is not None:
            pictures["gap"] = plot_gap
        for name, plot in pictures.items():
            written.append(folder / f"{name}.png")
            plot(self).savefig(written[-1], dpi=150)
        return written


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
