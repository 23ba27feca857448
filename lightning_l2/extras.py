"""Libraries that some features need, which the package's extras bring."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def brought_by(extra: str, needed_for: str) -> Iterator[None]:
    """Say which extra brings a library that is imported within, where it is not installed.

    Args:
        extra: Name of the extra.
        needed_for: Beginning of a sentence that ends with the library's name, such as "Pictures need".

    Raises:
        ModuleNotFoundError: If it isn't installed, with the command that installs it.

    >>> with brought_by("plots", "Pictures need"):
    ...     import no_plots
    Traceback (most recent call last):
    ModuleNotFoundError: Pictures need no_plots, which isn't installed. Get it with `pip install "lightning_l2[plots]"`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{needed_for} {error.name}, which isn\'t installed. Get it with `pip install "lightning_l2[{extra}]"`.',
            name=error.name,
        ) from error
