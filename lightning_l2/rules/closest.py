"""What a rule that decides on nothing may have meant: the names, classes, groups and optimizers that there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning_l2.arguments import as_regular_expression
from lightning_l2.rules.exemptions import class_names
from lightning_l2.rules.rule import DecayRule

if TYPE_CHECKING:
    from lightning_l2.rules.parameters import ParameterInfo


def unused_message(rule: DecayRule, rules: Sequence[DecayRule], infos: Sequence[ParameterInfo]) -> str:
    """Say why a rule decides on no parameter, and what it may have meant.

    Args:
        rule: The rule.
        rules: All rules, in the order in which they are tried.
        infos: The parameters that they were tried on.
    """
    conditions = ", ".join(f"{name}={value!r}" for name, value in rule.conditions().items())
    matched = [info for info in infos if rule.matches(info)]
    if matched:
        winner = next(other.name for other in rules if other.matches(matched[0]))
        return (
            f"Rule {rule.name!r} decides on no parameter ({conditions}): rules before it take all that it matches, "
            f"such as {matched[0].name!r}, taken by {winner!r}. Move it up."
        )
    return f"Rule {rule.name!r} matched no parameter ({conditions}). {_way_out(rule, infos)}"


def _way_out(rule: DecayRule, infos: Sequence[ParameterInfo]) -> str:
    conditions = rule.conditions()
    alone = [name for name, value in conditions.items() if _first({name: value}, infos) is None]
    if not infos or (alone and alone[0] not in ("pattern", "modules", "group", "optimizer")):
        return "If a model may have none, set optional=True."
    if not alone:
        some = [f"{name} matches {_first({name: value}, infos)!r}" for name, value in conditions.items()]
        return f"No parameter meets all of them: {', '.join(some)}."
    if alone[0] == "pattern":
        return meant(str(rule.pattern), [info.name for info in infos])
    if alone[0] == "modules":
        return f"Closest classes: {_listed(_closest_classes(rule, infos))}."
    members = [info.member for info in infos if info.member is not None]
    if alone[0] == "optimizer":
        return f"The optimizers are {_listed(kind.__name__ for member in members for kind in member.optimizers)}."
    return f"The groups are {_listed(member.group.get('name', member.place) for member in members)}."


def _first(condition: dict[str, Any], infos: Sequence[ParameterInfo]) -> str | None:
    """Return the name of the first parameter that meets a condition."""
    rule = DecayRule("alone", **condition)
    return next((info.name for info in infos if rule.matches(info)), None)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, dict.fromkeys(values)))


def meant(pattern: str, names: Sequence[str]) -> str:
    """Say what a regular expression that is found in none of the names may have meant.

    >>> meant("*head*", ["body.weight", "head.weight"])
    "As a glob it would match 'head.weight', but patterns are regular expressions: write 'head'."
    >>> meant("^bdy", ["head.weight", "body.weight"])
    "Closest names: 'body.weight', 'head.weight'."
    """
    return as_glob(pattern, names) or f"Closest names: {_listed(_closest_names(pattern, names))}."


def as_glob(pattern: str, names: Sequence[str]) -> str:
    """Explain a pattern that is found in none of the names, if it is a glob of one of them."""
    found = next((name for name in names if fnmatchcase(name, pattern)), None)
    if found is None:
        return ""
    return (
        f"As a glob it would match {found!r}, but patterns are regular expressions: write "
        f"{as_regular_expression(pattern)!r}."
    )


def _closest_names(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the three names with parts most like the words of a pattern."""
    words = re.findall(r"\w+", re.sub(r"\\[a-zA-Z]", " ", pattern).lower())
    ratios: dict[tuple[str, str], float] = {}

    def likeness(name: str) -> float:
        parts = name.lower().split(".")
        for pair in ((word, part) for word in words for part in parts):
            if pair not in ratios:
                ratios[pair] = SequenceMatcher(None, *pair).ratio()
        return sum(max(ratios[word, part] for part in parts) for word in words)

    return sorted(names, key=likeness, reverse=True)[:3]


def _closest_classes(rule: DecayRule, infos: Sequence[ParameterInfo]) -> list[str]:
    owners = list(dict.fromkeys(name for info in infos for name in class_names(info.places[0].owner)[:-2]))
    wanted = [module if isinstance(module, str) else module.__name__ for module in rule.modules]
    return [name for module in wanted for name in get_close_matches(module.rpartition(".")[2], owners)] or owners[:5]
