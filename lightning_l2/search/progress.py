"""What a search shows while it runs: a bar for all trainings, and of each of dozens of trainings nothing."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from lightning_l2.search.plan import SearchPlan
from lightning_l2.search.suggestion import best_trial, complete_trials
from lightning_l2.search.trials import Trial

LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


class SearchProgress:
    """A bar on the standard error that counts trainings of all processes, with the best so far and the time left.

    Args:
        plan: What is searched.
        enabled: Whether to show it.
    """

    def __init__(self, plan: SearchPlan, *, enabled: bool = True) -> None:
        self._plan = plan
        self._enabled = enabled
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, trials: Sequence[Trial]) -> None:
        """Bring the bar up to date; what was done before the first call doesn't count for the time left."""
        if not self._enabled:
            return
        ended = {"complete", "pruned", "failed"}
        done = sum(self._plan.seeds if trial.state in ended else len(trial.runs) for trial in trials)
        if self._bar is None:
            total = self._plan.places * self._plan.seeds
            self._bar = tqdm(desc="weight decay", total=total, initial=done, unit="training", leave=True)
        best = self._best(trials)
        self._bar.set_postfix_str(best, refresh=best != self._bar.postfix)
        self._bar.update(done - self._bar.n)

    def _best(self, trials: Sequence[Trial]) -> str:
        if not complete_trials(trials):
            return ""
        best = best_trial(trials, self._plan.sign)
        return f"best lambda={best.weight_decay:.3g} with {self._plan.monitor}={best.mean:.4g}"


@contextmanager
def quiet_trainings() -> Iterator[None]:
    """Hide what Trainers tell about devices and the like, and show each warning once, above the progress bar."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            _show_once()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _show_once() -> None:
    """Show a warning of a place once, although the module `warnings` forgets that when `catch_warnings` is entered."""
    shown: set[tuple[str, str, int]] = set()
    show = warnings.showwarning

    def show_once(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        place = (str(message), filename, lineno)
        if place not in shown:
            shown.add(place)
            with tqdm.external_write_mode(file=sys.stderr):
                show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_once
