"""Arguments of a wrong type are refused where they are given, not where they are used."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(owner: type, arguments: Mapping[str, object]) -> None:
    """Raise unless arguments are of the types that the owner's constructor is annotated with.

    A whole number will do as a float, a tuple as a list; True is no number. Of a `Literal` only the type is looked at.

    Args:
        owner: A class with annotated arguments.
        arguments: Their values by name; other names are ignored.

    Raises:
        TypeError: If a value is of another type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Ball:
    ...     radius: float
    >>> check_types(Ball, {"radius": "wide"})
    Traceback (most recent call last):
    TypeError: Ball needs `radius` to be float, but got 'wide' of type str.
    """
    # the fields of a dataclass may come from classes of several modules, which its constructor doesn't know
    annotated: Any = owner if is_dataclass(owner) else owner.__init__  # type: ignore[misc]  # of that very class
    for name, hint in get_type_hints(annotated).items():
        if name in arguments and not _fits(arguments[name], hint):
            raise TypeError(
                f"{owner.__name__} needs `{name}` to be {_named(hint)}, but got {reprlib.repr(arguments[name])} of "
                f"type {type(arguments[name]).__name__}."
            )


def _named(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_named, get_args(hint)))
    if get_origin(hint) is None and isinstance(hint, type):
        return "None" if hint is NoneType else hint.__name__
    return re.sub(r"\b[a-z]\w*\.", "", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is Literal:
        return type(value) in map(type, choices)
    if hint in (float, int):
        number = isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
        return number and not (isinstance(value, Integral) and abs(int(value)) > sys.float_info.max)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(entry, choice) for pair in value.items() for entry, choice in zip(pair, choices, strict=True)
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and _all_fit(value, choices)
    return not isinstance(hint, type) or isinstance(value, hint)


def _all_fit(values: Sequence[Any], choices: tuple[Any, ...]) -> bool:
    if len(choices) > 1 and choices[-1] is not ...:
        return len(values) == len(choices) and all(map(_fits, values, choices))
    return all(_fits(value, choices[0]) for value in values)
