"""Libraries that some features need, which the package's extras bring, and what they complain about."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from difflib import get_close_matches
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


# Of a value that may have several types, jsonargparse tells all of them.
_OF_ALL_TYPES = (
    *("Does not validate against", "Subtypes: ", "Errors:", "Given value", "Subclass types expect"),
    *("a class path (str)", "a dict with"),
)
_OF_A_TYPE = ("Expected a <class", "Expected a path", "Not a valid subclass")


def in_short(message: str) -> str:
    r"""Return what an error of jsonargparse says is wrong, in one line, without the types that a value isn't either.

    >>> in_short('''Parser key "rule":
    ...   Does not validate against any of the Union subtypes
    ...   Errors:
    ...     - Expected a <class 'str'>
    ...     - Problem with given class_path 'lightning_l2.DecayRule':
    ...         Option 'patern' is not accepted
    ...   Given value type: <class 'dict'>''')
    'Parser key "rule": Problem with given class_path \'lightning_l2.DecayRule\': Option \'patern\' is not accepted'
    """
    lines = [line.lstrip(" -") for line in message.splitlines()]
    told = [line for line in lines if line and not line.startswith(_OF_ALL_TYPES)]
    exact = [line for line in told if not line.startswith(_OF_A_TYPE)]
    if not exact or exact[-1].endswith(":"):
        exact = told + [line for line in lines if line.startswith("Given value: ")][:1]
    text = " ".join(dict.fromkeys(exact))
    if text.endswith("Option 'class_path' is not accepted"):
        return f"{text}: the arguments of a class stand under `init_args`, beside its class_path"
    absent = re.search(r"module '(.*)' has no attribute '(\w+)'$", text)
    close = get_close_matches(absent[2], dir(sys.modules.get(absent[1])), n=1) if absent else []
    return f"{text}. Did you mean {close[0]!r}?" if close else text
