"""What jsonargparse says of a wrong configuration, in one sentence with the way out."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module

from lightning_l2.arguments import check_keys

_UNION = "Does not validate against any of the Union subtypes"
_INIT_ARGS = "The arguments of a class stand under `init_args`, beside its class_path."


def in_short(message: str) -> str:
    r"""Return what is wrong, without all the types that a value could have had as well.

    Args:
        message: Of an error of jsonargparse. One of another form is returned as it is.

    >>> print(in_short('''Parser key "rules":
    ...   Does not validate against any of the Union subtypes
    ...   Subtypes: [<class 'str'>, list[lightning_l2.rules.rule.DecayRule | str]]
    ...   Errors:
    ...     - Expected a <class 'str'>
    ...     - Expected a <class 'list'>
    ...   Given value type: <class 'int'>
    ...   Given value: 3'''))
    Expected `rules` to be str | list[DecayRule | str], got 3.
    """
    lines = _tree(message)
    if not lines or (len(lines) == 1 and not lines[0].below):
        return message
    try:
        text = _told(lines).text
    except LookupError:
        return message
    return text if text.endswith((".", "?")) else f"{text}."


@dataclass
class _Line:
    text: str
    below: list[_Line] = field(default_factory=list)


@dataclass(frozen=True)
class _Told:
    """What lines say, and how much: 0 that a value has another type, 1 which class it isn't, 2 what is wrong in it."""

    text: str
    weight: int = 2


def _tree(message: str) -> list[_Line]:
    """Return the lines of a message by their indentation; an item of a list has its lines below a line `-`."""
    top: list[_Line] = []
    trail: list[tuple[int, list[_Line]]] = [(-1, top)]
    for line in message.splitlines():
        text = line.lstrip(" ")
        depth = len(line) - len(text)
        while text.startswith("- "):
            _append(trail, depth, "-")
            depth, text = depth + 2, text[2:]
        if text.strip():
            _append(trail, depth, text.strip())
    return top


def _append(trail: list[tuple[int, list[_Line]]], depth: int, text: str) -> None:
    while depth <= trail[-1][0]:
        trail.pop()
    line = _Line(text)
    trail[-1][1].append(line)
    trail.append((depth, line.below))


def _told(lines: Sequence[_Line]) -> _Told:
    if lines[0].text == "-":
        # where a value may also be the path of a file, what is said of the value begins as an item and isn't indented
        lines = [part for line in lines for part in (line.below if line.text == "-" else [line])]
        lines = lines[next((place for place, line in enumerate(lines) if line.text == _UNION), 0) :]
    first = lines[0]
    if first.text == _UNION:
        return _of_union(lines)
    if (key := re.fullmatch(r'Parser key "(.*)":', first.text)) and first.below:
        told = _told(first.below)
        return _Told(_within(f"`{key[1]}`", told.text) if told.weight else f"Expected `{key[1]}` to be {told.text}")
    if (path := re.fullmatch(r"Problem with given class_path '(.*)':", first.text)) and first.below:
        return _of_class(path[1], _told(first.below))
    return _of_value(first.text, " ".join(line.text for line in lines))


def _of_union(lines: Sequence[_Line]) -> _Told:
    """Return the best of what is said of each type."""
    said = {line.text.partition(": ")[0]: line for line in lines[1:]}
    told = [_told(item.below) for item in said["Errors:"].below if item.below]
    weight = max((one.weight for one in told), default=0)
    if weight:
        text = "; ".join(dict.fromkeys(one.text for one in told if one.weight == weight))
        return _Told(f"{text}. {_INIT_ARGS}" if text.endswith("is abstract") else text, weight)
    types = said["Subtypes"].text.partition(": ")[2][1:-1]
    value = said["Given value"].text.partition(": ")[2]
    is_text = said["Given value type"].text.endswith("<class 'str'>")
    return _Told(f"{_types(types)}, got {textwrap.shorten(repr(value) if is_text else value, 100)}", 0)


def _of_class(path: str, told: _Told) -> _Told:
    """Return what is wrong with a class or its arguments, and what may be meant."""
    if option := re.fullmatch(r"Option '(.*)' is not accepted", told.text):
        return _Told(_INIT_ARGS if option[1] == "class_path" else _unknown(path, option[1]))
    if re.fullmatch(r"module '.*' has no attribute '.*'|No module named '.*'", told.text):
        meant = next(_meant(path), None)
        return _Told(f"There is no class {path!r}." + (f" Did you mean {meant!r}?" if meant else f" {told.text}."))
    return _Told(_within(path, told.text))


def _of_value(first: str, text: str) -> _Told:
    value = re.fullmatch(
        r"(?:Expected an? <class '(.*?)'>|Not a valid subclass of (\w+)).*?(?:Got value: (.*))?", first
    )
    if value is not None:
        return _Told(_types(value[1] or value[2]) + (f", got {value[3]}" if value[3] else ""), 0)
    if first.startswith(("Expected a path", "Expected a dot import path")):
        return _Told("another type", 0)
    if choice := re.fullmatch(r"Expected a typing\.Literal\[(.*)\](?:\. Got value: (.*))?", first):
        return _Told(f"one of {choice[1]}" + (f", got {choice[2]!r}" if choice[2] else ""), 0)
    if abstract := re.fullmatch(r"Expected an instantiatable class, but (.* is abstract)", first):
        return _Told(abstract[1], 1)
    if kind := re.fullmatch(r"Import path (.*) does not correspond to a subclass of (.*)", first):
        return _Told(f"{kind[1]} is no {kind[2]}", 1)
    return _Told(text)


def _within(place: str, text: str) -> str:
    """Return what is wrong after the place where it is."""
    begins = text.startswith(("Expected ", "The ", "There "))
    return f"{place}: {text[0].lower() if begins else text[0]}{text[1:]}"


def _unknown(path: str, option: str) -> str:
    try:
        known = list(inspect.signature(_found(path)).parameters)
        check_keys(path, known, {option: None})
    except TypeError as error:
        return str(error) if known else f"{path} has no {option!r}. {_INIT_ARGS}"
    except (ImportError, AttributeError, ValueError):
        pass
    return f"{path} has no {option!r}"


def _found(path: str) -> Callable[..., object]:
    module, _, name = path.rpartition(".")
    found: Callable[..., object] = getattr(import_module(module), name)
    return found


def _meant(path: str) -> Iterator[str]:
    """Yield classes of a similar name beside the one that isn't there, or of its name elsewhere in the package."""
    place, _, name = path.rpartition(".")
    yield from (f"{place}.{close}" for close in get_close_matches(name, dir(sys.modules.get(place)), n=1))
    package = place.partition(".")[0]
    modules = [other for other in sys.modules if other.partition(".")[0] == package]
    yield from sorted((f"{other}.{name}" for other in modules if hasattr(sys.modules[other], name)), key=len)


def _types(text: str) -> str:
    """Return types as they are written in code, None at the end, where older versions have it first."""
    short = re.sub(r"<class '(.*?)'>", r"\1", text).replace("NoneType", "None")
    types = re.split(r",\s(?![^[]*\])", re.sub(r"\b[a-z]\w*\.", "", short))
    return " | ".join(sorted(types, key=lambda name: name == "None"))
