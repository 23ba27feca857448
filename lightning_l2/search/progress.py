"""What a search shows while it runs: a bar for all trainings, and of each of dozens of trainings nothing."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from lightning_l2.search.suggestion import Comparison

LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "optuna")


class SearchProgress:
    """A bar on the standard error that counts trainings of all processes, with the best so far and the time left.

    Args:
        enabled: Whether to show it.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, found: Comparison) -> None:
        """Bring the bar up to date; what was done before the first call doesn't count for the time left."""
        if not self._enabled:
            return
        plan, ended = found.plan, {"complete", "pruned", "failed"}
        done = sum(plan.seeds if trial.state in ended else len(trial.runs) for trial in found.trials)
        if self._bar is None:
            self._bar = tqdm(desc="weight decay", total=plan.places * plan.seeds, initial=done, unit="training")
        if found.complete:
            words = f"best lambda={found.best.weight_decay:.3g} with {plan.monitor}={found.best.mean:.4g}"
            self._bar.set_postfix_str(words, refresh=words != self._bar.postfix)
        self._bar.update(done - self._bar.n)


@contextmanager
def quiet_trainings() -> Iterator[None]:
    """Hide what Trainers and Optuna tell of each training, and show each warning once, above the progress bar."""
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    for logger, level in levels.items():
        logger.setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            _show_once()
            yield
    finally:
        for logger, level in levels.items():
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
