"""Keeps dozens of trainings from saying the same each time."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


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
