"""Arguments of a wrong type or value are refused where they are given, not where they are used."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
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
                f"type {type(arguments[name]).__name__}.{_number_meant(arguments[name])}"
            )


def check_positive(**values: float | None) -> None:
    """Raise a `ValueError` for the first of the named values that is not finite and above 0; None is let pass.

    >>> check_positive(radius=0.0)
    Traceback (most recent call last):
    ValueError: Expected `radius` to be finite and above 0, got 0.0.
    """
    _check("finite and above 0", lambda value: 0 < value < math.inf, values)


def check_not_negative(**values: float | None) -> None:
    """Raise a `ValueError` for the first of the named values that is negative or not finite; None is let pass.

    >>> check_not_negative(start=float("nan"))
    Traceback (most recent call last):
    ValueError: Expected `start` to be finite and at least 0, got nan.
    """
    _check("finite and at least 0", lambda value: 0 <= value < math.inf, values)


def check_fraction(**values: float | None) -> None:
    """Raise a `ValueError` for the first of the named values that is not at least 0 and below 1.

    >>> check_fraction(rise=1.0)
    Traceback (most recent call last):
    ValueError: Expected `rise` to be at least 0 and below 1, got 1.0.
    """
    _check("at least 0 and below 1", lambda value: 0 <= value < 1, values)


def check_at_least(least: int, **values: float | None) -> None:
    """Raise a `ValueError` for the first of the named values that is below the least one; None is let pass.

    >>> check_at_least(1, steps=0)
    Traceback (most recent call last):
    ValueError: Expected `steps` to be at least 1, got 0.
    """
    _check(f"at least {least}", lambda value: value >= least, values)


def check_choice(choices: Sequence[object], **values: object) -> None:
    """Raise a `ValueError` for the first of the named values that is none of the choices.

    >>> check_choice(("min", "max", None), mode="least")
    Traceback (most recent call last):
    ValueError: Expected `mode` to be 'min', 'max' or None, got 'least'.
    """
    *most, last = map(repr, choices)
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"Expected `{name}` to be {', '.join(most)} or {last}, got {value!r}.")


def check_pattern(owner: str = "", /, **values: str | None) -> None:
    """Raise a `ValueError` for the first of the named values that is no regular expression; None is let pass.

    Args:
        owner: Who is to have it, for the message.
        values: The values by name.

    >>> check_pattern(include="[")
    Traceback (most recent call last):
    ValueError: Expected `include` to be a regular expression, got '[': unterminated character set at position 0.
    """
    for name, value in values.items():
        try:
            re.compile(value or "")
        except re.error as error:
            glob = f" As one, the glob is {as_regular_expression(value)!r}." if value and "*" in value else ""
            raise ValueError(
                f"Expected `{name}`{owner and f' of {owner}'} to be a regular expression, got {value!r}: {error}.{glob}"
            ) from error


def as_regular_expression(glob: str) -> str:
    r"""Return the regular expression to search for that matches what a glob matches.

    Args:
        glob: A pattern in which `*` stands for any text and `?` for one character.

    >>> print(as_regular_expression("*.bias"), as_regular_expression("head.*"), as_regular_expression("a?c"))
    \.bias$ ^head\. ^a.c$
    """
    escaped = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in glob)
    return f"^{escaped}$".removeprefix("^.*").removesuffix(".*$")


def check_keys(what: str, known: Sequence[str], arguments: Mapping[str, object]) -> None:
    """Raise a `TypeError` for the first of the arguments that is none of the known ones.

    >>> check_keys("A rule", ["pattern", "modules"], {"patern": "bias"})
    Traceback (most recent call last):
    TypeError: A rule has no 'patern'. Did you mean 'pattern'? It takes pattern, modules.
    """
    for name in arguments:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"{what} has no {name!r}. {hint}It takes {', '.join(known)}.")


def _check(what: str, holds: Callable[[float], bool], values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and not holds(value):
            raise ValueError(f"Expected `{name}` to be {what}, got {value!r}.")


def _number_meant(value: object) -> str:
    """Say how to write a number that is text.

    >>> _number_meant("0.1"), _number_meant("5%"), _number_meant("strong")
    (' Write the number 0.1, without quotes.', ' Write the number 0.05, without quotes.', '')
    """
    text = value.strip() if isinstance(value, str) else ""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return ""
    return f" Write the number {number:g}, without quotes."


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
