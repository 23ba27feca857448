"""Which parameter gets which weight decay: ordered rules, the first that matches wins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lightning_l2.arguments import check_keys
from lightning_l2.rules.closest import unused_message
from lightning_l2.rules.memberships import Membership, memberships
from lightning_l2.rules.parameters import ParameterInfo, describe_parameters
from lightning_l2.rules.presets import PRESETS
from lightning_l2.rules.rule import DecayRule

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    Optimizers = Optimizer | Sequence[Optimizer]

__all__ = [
    "DecayRule",
    "Rules",
    "assign_rules",
    "decay_param_groups",
    "resolve_rules",
    "rules_by_group",
    "rules_by_parameter",
]

Rules = str | Sequence[DecayRule | Mapping[str, Any] | str]


_A_LIST = "Write rules=[{'name': 'head', 'pattern': '^head', 'weight_decay': 0.1}, 'default'], or in YAML the same."


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
        raise TypeError(f"rules must be the name of a preset or a list of rules, got {rules!r}. {_A_LIST}")
    resolved: list[DecayRule] = []
    for entry in [rules] if isinstance(rules, str) else rules:
        if isinstance(entry, DecayRule):
            resolved.append(entry)
        elif isinstance(entry, str):
            resolved.extend(_preset(entry))
        elif isinstance(entry, Mapping):
            resolved.append(_rule(entry))
        else:
            raise TypeError(f"A rule must be a DecayRule or the name of a preset, got {entry!r}. {_A_LIST}")
    if not resolved:
        raise ValueError("rules is empty. Give at least one rule, or the preset 'default'.")
    # a preset may bring a rule that stands there already, as `exempt` does before `default`
    resolved = list(dict.fromkeys(resolved))
    _check_unique(resolved)
    return tuple(resolved)


def check_without_optimizers(rules: Sequence[DecayRule], owner: str) -> None:
    """Refuse rules that ask for a group or an optimizer, where parameters are taken whichever optimizer has them.

    Args:
        rules: The rules.
        owner: Who is to have them, for the message.

    Raises:
        ValueError: If there is one.
    """
    for rule in rules:
        if rule.asks_optimizers:
            given = rule.conditions()
            asked = " and ".join(f"{name}={given[name]!r}" for name in ("group", "optimizer") if name in given)
            raise ValueError(
                f"Rule {rule.name!r} of {owner} asks for {asked}, which only WeightDecay can tell: {owner} takes "
                "parameters whichever optimizer has them. Say which by `pattern` or `modules`."
            )


def rules_by_parameter(
    model: nn.Module, rules: Rules = "default", root: nn.Module | None = None
) -> list[tuple[str, nn.Parameter, DecayRule]]:
    """Return name, parameter and rule of every parameter, frozen ones too, in the order of the model.

    Args:
        model: Any module; names are free of what wrappers put into them.
        rules: See `resolve_rules`; none of them asks for optimizers.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    Raises:
        ValueError: If a rule matches nothing or asks for optimizers, no rule covers a parameter, or a flat parameter
            mixes rules.
        RuntimeError: If the shape of a parameter is not known.
    """
    return [(info.name, info.parameter, rule) for info, rule in rules_by_group(model, rules, root)]


def rules_by_group(
    model: nn.Module, rules: Rules = "default", root: nn.Module | None = None, optimizers: Optimizers | None = None
) -> list[tuple[ParameterInfo, DecayRule]]:
    """Return the rule of every parameter, and where rules ask for it, in each group that has the parameter.

    Args:
        model: Any module; names are free of what wrappers put into them.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.
        optimizers: Those that rules with `group` or `optimizer` go by.

    Raises:
        ValueError: If a rule matches nothing or asks for optimizers that are not given, no rule covers a parameter, or
            a flat parameter mixes rules.
        RuntimeError: If the shape of a parameter is not known.
    """
    flat: dict[tuple[int, int], tuple[ParameterInfo, DecayRule]] = {}
    for info, rule in _assigned(model, rules, root, optimizers):
        key = id(info.parameter), id(info.member and info.member.group)
        known, first = flat.setdefault(key, (info, rule))
        if first != rule:
            raise ValueError(
                f"FSDP has flattened {known.name!r} (rule {first.name!r}) and {info.name!r} (rule {rule.name!r}) into "
                "one parameter, which can have only one weight decay. Use FSDP with use_orig_params=True."
            )
    return list(flat.values())


def assign_rules(
    model: nn.Module,
    rules: Rules = "default",
    root: nn.Module | None = None,
    *,
    optimizers: Optimizers | None = None,
) -> dict[str, DecayRule]:
    """Return the rule of every parameter by its qualified name, frozen ones too, tied ones once.

    Of a parameter that several groups have it is the rule in the first of them.

    Args:
        model: Any module; names are free of what wrappers put into them.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.
        optimizers: One or several, which rules with `group` or `optimizer` go by.

    Raises:
        ValueError: If a rule matches nothing or asks for optimizers that are not given, or no rule covers a parameter.
        RuntimeError: If the shape of a parameter is not known.

    >>> from torch import nn
    >>> {name: rule.name for name, rule in assign_rules(nn.Linear(2, 1)).items()}
    {'weight': 'decay', 'bias': 'no_decay'}
    """
    assigned: dict[str, DecayRule] = {}
    for info, rule in _assigned(model, rules, root, optimizers):
        assigned.setdefault(info.name, rule)
    return assigned


def decayed_exemptions(
    model: nn.Module, rules: Rules = "default", root: nn.Module | None = None, optimizers: Optimizers | None = None
) -> dict[str, list[str]]:
    """Return what rules with conditions decay although the default exempts it, by the rule's name.

    Args:
        model: Any module.
        rules: See `resolve_rules`.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.
        optimizers: Those that rules with `group` or `optimizer` go by.

    >>> from torch import nn
    >>> decayed_exemptions(nn.Linear(2, 1), [DecayRule("all_of_it", modules=("Linear",)), "default"])
    {'all_of_it': ['bias']}
    """
    found: dict[str, list[str]] = {}
    for info, rule in _assigned(model, rules, root, optimizers):
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
        rules: See `resolve_rules`; none can ask for an optimizer, which these groups are still to make.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.

    Raises:
        ValueError: If the weight decay is negative or not finite, a rule matches nothing or asks for optimizers, or no
            rule covers a parameter.

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
    check_keys("A rule", [field.name for field in fields(DecayRule)], arguments)
    if "name" not in arguments:
        raise TypeError(f"A rule needs a `name`, which becomes that of its parameter group, got {dict(arguments)!r}.")
    return DecayRule(**arguments)


def _check_unique(rules: Sequence[DecayRule]) -> None:
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two rules are called {name!r}. Names become those of parameter groups, so give each its own. "
                f"Rules in order: {', '.join(map(repr, names))}."
            )


def _assigned(
    model: nn.Module, rules: Rules, root: nn.Module | None, optimizers: Optimizers | None = None
) -> list[tuple[ParameterInfo, DecayRule]]:
    """Return the rule of each parameter; where rules ask for it, in each group that has the parameter."""
    resolved = resolve_rules(rules)
    infos = describe_parameters(model, root)
    asking = next((rule for rule in resolved if rule.asks_optimizers), None)
    if asking is not None:
        if optimizers is None:
            raise ValueError(
                f"Rule {asking.name!r} asks for a group or an optimizer (group={asking.group!r}, "
                f"optimizer={asking.optimizer!r}), and no optimizer is known here. Use the rule in WeightDecay, or "
                "give `optimizers` to assign_rules."
            )
        groups = memberships(optimizers)
        nowhere: list[Membership | None] = [None]
        infos = [replace(info, member=one) for info in infos for one in groups.get(info.parameter, nowhere)]
    return list(zip(infos, _choose(infos, resolved), strict=True))


def _choose(infos: list[ParameterInfo], rules: tuple[DecayRule, ...]) -> list[DecayRule]:
    """Return for each parameter the first rule that matches."""
    winners = [next((rule for rule in rules if rule.matches(info)), None) for info in infos]
    chosen = [rule for rule in winners if rule is not None]
    used = {rule.name for rule in chosen}
    for rule in rules:
        if rule.name not in used and not rule.optional and not rule.is_catch_all:
            raise ValueError(unused_message(rule, rules, infos))
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
