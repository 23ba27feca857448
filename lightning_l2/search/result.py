"""The answer of a search as data, as a table and as files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.suggestion import (
    Difference,
    best_trial,
    complete_trials,
    difference,
    suggested_trial,
    verdict,
    zero_trial,
)
from lightning_l2.search.trials import Trial


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        trials: All trials in the order of their numbers.
        plan: What was searched.
        lr_steps: Peak of the learning rate times optimizer steps, or None where they weren't known.
    """

    trials: Sequence[Trial]
    plan: SearchPlan = field(default_factory=SearchPlan)
    lr_steps: float | None = None

    @property
    def best(self) -> Trial:
        """The trial with the best mean of the metric, which may be that of lambda = 0."""
        return best_trial(self.trials, self.plan.sign)

    @property
    def suggestion(self) -> Trial:
        """The trial with the largest lambda that is as good as the best within one standard error, paired by seed."""
        return suggested_trial(self.trials, self.plan.sign)

    @property
    def weight_decay(self) -> float:
        """The suggested lambda, dimensionless; 0 where every lambda does harm or none acts."""
        return self.suggestion.weight_decay

    @property
    def remark(self) -> str | None:
        """What is to be said of the suggestion: that decay doesn't help, or that the range should go on."""
        if not complete_trials(self.trials):
            return None
        if told := verdict(self.trials, self.plan.monitor, self.plan.sign):
            return told
        tried = [trial.weight_decay for trial in self.trials if trial.weight_decay > 0]
        low, high = self.plan.low or min(tried), self.plan.high or max(tried)
        if len(tried) > 1 and self.weight_decay >= high:
            return "The suggested lambda is the upper end of the range: a larger one may do as well, so raise `high`."
        if len(tried) > 1 and self.weight_decay <= low:
            return "The suggested lambda is the lower end of the range: a smaller one may do better, so lower `low`."
        return None

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

    def to_best(self, trial: Trial) -> Difference:
        """Return how much worse a trial is than the best one, paired by seed; nan where it hasn't ended."""
        ended = trial.state == "complete"
        return difference(trial, self.best, self.plan.sign) if ended else Difference(math.nan, math.nan)

    def to_zero(self, trial: Trial) -> Difference:
        """Return how much worse a trial is than that of lambda = 0, or without one the best, paired by seed."""
        return difference(trial, zero_trial(self.trials) or self.best, self.plan.sign)

    def gap(self, trial: Trial) -> float:
        """Return the generalisation gap of a trial: how much worse the monitored metric is than the training's."""
        train = self.train_metric
        return math.nan if train is None else self.plan.sign * (trial.mean - trial.average(train))

    def strength(self, trial: Trial) -> float:
        """Return eta * lambda * T of a trial, nan where it isn't known."""
        return math.nan if self.lr_steps is None else self.lr_steps * trial.weight_decay

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
        from lightning_l2.search.pictures import plot_curves, plot_gap, plot_metric, plot_norm

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_csv(folder / "trials.csv")
        written = [folder / "trials.csv"]
        complete = complete_trials(self.trials)
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

    def _by_lambda(self) -> list[Trial]:
        return sorted(self.trials, key=lambda trial: trial.weight_decay)

    def _marks(self) -> dict[int, str]:
        if not complete_trials(self.trials):
            return {}
        best, suggestion = self.best.number, self.suggestion.number
        if best == suggestion:
            return {best: "<- best, suggested"}
        return {best: "<- best", suggestion: "<- suggested"}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
