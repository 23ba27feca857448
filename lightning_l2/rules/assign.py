"""Which parameter gets which weight decay: ordered rules, the first that matches wins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lightning_l2.rules.exemptions import class_names
from lightning_l2.rules.parameters import ParameterInfo, describe_parameters
from lightning_l2.rules.presets import PRESETS
from lightning_l2.rules.rule import DecayRule

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DecayRule",
    "Rules",
    "assign_rules",
    "decay_param_groups",
    "resolve_rules",
    "rules_by_parameter",
]

Rules = str | Sequence[DecayRule | Mapping[str, Any] | str]


def resolve_rules(rules: Rules = "default") -> tuple[DecayRule, ...]:
    """Return the rules that a preset's name, or a list of rules and presets' names, stands for.

    Args:
        rules: Name of a preset, or rules in the order in which they are tried; a preset's name expands in place, and a
            mapping stands for the rule that has these arguments, as in YAML.

    Raises:
        TypeError: If an entry is none of these, or a rule has no such argument.
        ValueError: If there is no such preset, no rule at all, or two rules have one name.

    >>> [rule.name for rule in resolve_rules([DecayRule("head", pattern="head"), "default"])]
    ['head', 'no_decay', 'decay']
    """
    if not isinstance(rules, (str, Sequence)):
        raise TypeError(f"rules must be the name of a preset or a list of rules, got {rules!r}.")
    resolved: list[DecayRule] = []
    for entry in [rules] if isinstance(rules, str) else rules:
        if isinstance(entry, DecayRule):
            resolved.append(entry)
        elif isinstance(entry, str):
            resolved.extend(_preset(entry))
        elif isinstance(entry, Mapping):
            resolved.append(_rule(entry))
        else:
            raise TypeError(f"A rule must be a DecayRule or the name of a preset, got {entry!r}.")
    if not resolved:
        raise ValueError("rules is empty. Give at least one rule, or the preset 'default'.")
    # a preset may bring a rule that stands there already, as `exempt` does before `default`
    resolved = list(dict.fromkeys(resolved))
    _check_unique(resolved)
    return tuple(resolved)


def rules_by_parameter(
    model: nn.Module, rules: Rules = "default", root: nn.Module | None = None
) -> list[tuple[str, nn.Parameter, DecayRule]]:
    """Return name, parameter and rule of every parameter, frozen ones too, in the order of the model.

    Args:
        model: Any module; names are free of what wrappers put into them.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    Raises:
        ValueError: If a rule matches nothing, no rule covers a parameter, or a flat parameter mixes rules.
        RuntimeError: If the shape of a parameter is not known.
    """
    infos = describe_parameters(model, root)
    chosen = _choose(infos, resolve_rules(rules))
    flat: dict[int, tuple[str, nn.Parameter, DecayRule]] = {}
    for info, rule in zip(infos, chosen, strict=True):
        name, _, first = flat.setdefault(id(info.parameter), (info.name, info.parameter, rule))
        if first != rule:
            raise ValueError(
                f"FSDP has flattened {name!r} (rule {first.name!r}) and {info.name!r} (rule {rule.name!r}) into one "
                "parameter, which can have only one weight decay. Use FSDP with use_orig_params=True."
            )
    return list(flat.values())


def assign_rules(model: nn.Module, rules: Rules = "default", root: nn.Module | None = None) -> dict[str, DecayRule]:
    """Return the rule of every parameter by its qualified name, frozen ones too, tied ones once.

    Args:
        model: Any module; names are free of what wrappers put into them.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    Raises:
        ValueError: If a rule matches nothing, or no rule covers a parameter.
        RuntimeError: If the shape of a parameter is not known.

    >>> from torch import nn
    >>> {name: rule.name for name, rule in assign_rules(nn.Linear(2, 1)).items()}
    {'weight': 'decay', 'bias': 'no_decay'}
    """
    infos = describe_parameters(model, root)
    return dict(zip((info.name for info in infos), _choose(infos, resolve_rules(rules)), strict=True))


def decayed_exemptions(
    model: nn.Module, rules: Rules = "default", root: nn.Module | None = None
) -> dict[str, list[str]]:
    """Return what rules with conditions decay although the default exempts it, by the rule's name.

    Args:
        model: Any module.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    >>> from torch import nn
    >>> decayed_exemptions(nn.Linear(2, 1), [DecayRule("all_of_it", modules=("Linear",)), "default"])
    {'all_of_it': ['bias']}
    """
    infos = describe_parameters(model, root)
    found: dict[str, list[str]] = {}
    for info, rule in zip(infos, _choose(infos, resolve_rules(rules)), strict=True):
        if info.exempt and rule.resolve(1.0) and not rule.is_catch_all:
            found.setdefault(rule.name, []).append(info.name)
    return found


def decay_param_groups(
    model: nn.Module, weight_decay: float, rules: Rules = "default", root: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: one for each rule that has trainable parameters, or as it says.

    Args:
        model: Any module.
        weight_decay: Base weight decay, as of torch optimizers.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    Raises:
        ValueError: If the weight decay is negative or not finite, a rule matches nothing, or no rule covers a
            parameter.

    >>> import torch
    >>> groups = decay_param_groups(torch.nn.Linear(2, 1), weight_decay=0.1)
    >>> [(group["name"], group["weight_decay"]) for group in torch.optim.SGD(groups, lr=0.1).param_groups]
    [('decay', 0.1), ('no_decay', 0.0)]
    """
    groups: dict[str, dict[str, Any]] = {}
    for parameter_name, parameter, rule in rules_by_parameter(model, rules, root):
        if parameter.requires_grad:
            name = rule.group_of(parameter_name)
            new = {"params": [], "name": name, "weight_decay": rule.resolve(weight_decay)}
            groups.setdefault(name, new)["params"].append(parameter)
    return list(groups.values())


def _preset(name: str) -> tuple[DecayRule, ...]:
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        if name.startswith(("[", "{")):
            # The command line hands over as text what is no valid list of rules.
            hint = "If it is meant as a list of rules, one of their keys or values is wrong. "
        raise ValueError(f"There is no preset {name!r}. {hint}Presets: {', '.join(map(repr, PRESETS))}.")
    return PRESETS[name]


def _rule(arguments: Mapping[str, Any]) -> DecayRule:
    known = [field.name for field in fields(DecayRule)]
    for name in arguments:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"A rule has no {name!r}. {hint}It takes {', '.join(known)}.")
    return DecayRule(**arguments)


def _check_unique(rules: Sequence[DecayRule]) -> None:
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two rules are called {name!r}. Names become those of parameter groups, so give each its own. "
                f"Rules in order: {', '.join(map(repr, names))}."
            )


def _choose(infos: list[ParameterInfo], rules: tuple[DecayRule, ...]) -> list[DecayRule]:
    """Return for each parameter the first rule that matches."""
    winners = [next((rule for rule in rules if rule.matches(info)), None) for info in infos]
    chosen = [rule for rule in winners if rule is not None]
    used = {rule.name for rule in chosen}
    for rule in rules:
        if rule.name not in used and not rule.optional and not rule.is_catch_all:
            raise ValueError(_unused_message(rule, rules, infos))
    if len(chosen) < len(infos):
        uncovered = [info for info, rule in zip(infos, winners, strict=True) if rule is None]
        owner = type(uncovered[0].places[0].owner).__name__
        raise ValueError(
            f"No rule covers {len(uncovered)} parameters, the first is {uncovered[0].name!r} ({uncovered[0].ndim}-D, "
            f"of {owner}). End the list with a rule without conditions, such as {{name: decay}}, or with 'default'."
        )
    return _expand_layers(infos, chosen)


def _expand_layers(infos: list[ParameterInfo], chosen: list[DecayRule]) -> list[DecayRule]:
    """Replace each rule with a layer multiplier by one rule a layer."""
    depths = [
        _depth(info, rule) if rule.layer_multiplier is not None else 0 for info, rule in zip(infos, chosen, strict=True)
    ]
    last: dict[str, int] = {}
    for rule, depth in zip(chosen, depths, strict=True):
        last[rule.name] = max(depth, last.get(rule.name, 0))
    expanded = {
        (rule.name, depth): _of_layer(rule, depth, last[rule.name]) for rule, depth in zip(chosen, depths, strict=True)
    }
    _check_unique(list(expanded.values()))
    return [expanded[rule.name, depth] for rule, depth in zip(chosen, depths, strict=True)]


def _of_layer(rule: DecayRule, depth: int, last: int) -> DecayRule:
    if rule.layer_multiplier is None:
        return rule
    factor = rule.layer_multiplier ** (last - depth)
    name = f"{rule.name}_{depth}"
    if rule.weight_decay is not None:
        return replace(rule, name=name, layer_multiplier=None, weight_decay=rule.weight_decay * factor)
    multiplier = 1.0 if rule.multiplier is None else rule.multiplier
    return replace(rule, name=name, layer_multiplier=None, multiplier=multiplier * factor)


def _depth(info: ParameterInfo, rule: DecayRule) -> int:
    for place in info.places:
        match = re.search(rule.pattern or "", place.name)
        if match is not None and (match[1] or "").isdecimal():
            return int(match[1])
    raise ValueError(
        f"Rule {rule.name!r} has a layer_multiplier, so the first group of its pattern {rule.pattern!r} must be the "
        rf"layer's number, as in 'layers\.(\d+)\.', but it is not for {info.name!r}."
    )


def _unused_message(rule: DecayRule, rules: tuple[DecayRule, ...], infos: list[ParameterInfo]) -> str:
    conditions = ", ".join(f"{name}={value!r}" for name, value in rule.conditions().items())
    matched = [info for info in infos if rule.matches(info)]
    if matched:
        winner = next(other.name for other in rules if other.matches(matched[0]))
        return (
            f"Rule {rule.name!r} decides on no parameter ({conditions}): rules before it take all that it matches, "
            f"such as {matched[0].name!r}, taken by {winner!r}. Move it up."
        )
    return f"Rule {rule.name!r} matched no parameter ({conditions}). {_closest(rule, infos)}"


def _closest(rule: DecayRule, infos: list[ParameterInfo]) -> str:
    """Say which names, or classes of modules, are most like what a rule looks for."""
    if rule.pattern is not None and (names := _closest_names(rule.pattern, infos)):
        return f"Closest names: {', '.join(map(repr, names))}."
    if rule.modules and infos:
        owners = {name: None for info in infos for name in class_names(info.places[0].owner)[:-2]}
        wanted = [module if isinstance(module, str) else module.__name__ for module in rule.modules]
        close = [name for module in wanted for name in get_close_matches(module.rpartition(".")[2], owners)]
        return f"Closest classes: {', '.join(map(repr, close or list(owners)[:5]))}."
    return "If a model may have none, set optional=True."


def _closest_names(pattern: str, infos: list[ParameterInfo]) -> list[str]:
    """Return up to three names with a part most like the literal part of a pattern."""
    literal = re.sub(r"\\[a-zA-Z]|[\\^$*+?()\[\]{}|]", "", pattern).strip(".")
    length = literal.count(".") + 1
    windows: dict[str, list[str]] = {}
    for info in infos:
        parts = info.name.split(".")
        for start in range(len(parts) - length + 1):
            windows.setdefault(".".join(parts[start : start + length]), []).append(info.name)
    close = [name for window in get_close_matches(literal, windows) for name in windows[window]]
    return list(dict.fromkeys(close))[:3]
