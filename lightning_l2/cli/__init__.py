"""The command line, `python -m lightning_l2 COMMAND`; a command is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence


def search_command(arguments: Sequence[str]) -> int:
    """Choose lambda by trainings with several values of it, and return the exit code."""
    from lightning_l2.cli.search import run

    return run(arguments)


def preview_command(arguments: Sequence[str]) -> int:
    """Draw lambda over the training that YAML files ask for, and return the exit code."""
    from lightning_l2.cli.preview import run

    return run(arguments)


__all__ = ["preview_command", "search_command"]


def __dir__() -> list[str]:
    return __all__
