"""The base lambda of each parameter of a module: decided once by rules, for each optimizer that has the parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_l2.param_groups.parts import UNASSIGNED, Decision
from lightning_l2.rules.assign import resolve_rules, rules_by_group
from lightning_l2.rules.parameters import is_undecided
from lightning_l2.rules.rule import DecayRule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_l2.param_groups.resume import Resuming
    from lightning_l2.rules.assign import Rules
    from lightning_l2.rules.parameters import ParameterInfo


class RuleBases:
    """Base lambdas by rules.

    Args:
        model: The module that the parameters belong to.
        rules: As of `assign_rules`.
        weight_decay: Gives the base that rules go by, from a parameter's group; None keeps the group's own.
        resuming: Knows those of a checkpoint.
        root: The module that a strategy wrapped the model in, for shapes under FSDP1.
        optimizers: Those that have the parameters, for rules that ask; see `follow`.

    >>> import torch
    >>> from lightning_l2.param_groups.resume import Resuming
    >>> model = torch.nn.Linear(2, 1)
    >>> bases = RuleBases(model, "default", lambda group: 0.01, Resuming("config"))
    >>> [bases.of(0, parameter, {}, 0.0).base for parameter in model.parameters()]
    [0.01, 0.0]
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        weight_decay: Callable[[Mapping[str, Any]], float | None],
        resuming: Resuming,
        root: nn.Module | None = None,
        optimizers: Sequence[Any] = (),
    ) -> None:
        self._model = model
        self._root = root
        self._optimizers = optimizers
        self._rules = resolve_rules(rules)
        self._weight_decay = weight_decay
        self._resuming = resuming
        self._known = self._look_up(self._rules)
        # by the key of a parameter and the name of its rule
        self._bases: dict[tuple[str, str], float | None] = {}
        # by parameter name, the number of the first optimizer that has it
        self._first: dict[str, int] = {}
        # by their `id`, parameters that are not the module's
        self._strangers: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def of(self, number: int, parameter: Tensor, group: Mapping[str, Any], own: float) -> Decision:
        """Return what is decided on a parameter.

        The module is looked through again for a parameter that it did not have before, and for one that a group did not
        have, where rules ask for groups. One of the same name and rule as another has its base.

        Args:
            number: The index of the optimizer.
            parameter: One of its parameters.
            group: The user's group that has it.
            own: That group's own weight decay, 0 where it has none.
        """
        place = id(group) if any(rule.asks_optimizers for rule in self._rules) else None
        if place not in self._known.get(parameter, ()) and self._strangers.get(id(parameter)) is not parameter:
            self._look_again(parameter)
        if parameter not in self._known:
            return Decision(UNASSIGNED, "", None, None)
        places = self._known[parameter]
        info, rule = places[place] if place in places else next(iter(places.values()))
        name = info.name
        is_first = self._first.setdefault(name, number) == number
        key = name if is_first else f"optimizer{number}/{name}"
        if (key, rule.name) not in self._bases:
            self._bases[key, rule.name] = self._base(key, rule, group, own)
        return Decision(name, key, rule, self._bases[key, rule.name])

    def follow(self, optimizers: Sequence[Any]) -> None:
        """Go by the groups of other optimizers from now on, for what is decided anew."""
        self._optimizers = optimizers

    def owns_any(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether any of the parameters is the module's."""
        return any(parameter in self._known for parameter in parameters)

    def _base(self, key: str, rule: DecayRule, group: Mapping[str, Any], own: float) -> float | None:
        base = self._weight_decay(group)
        configured = rule.resolve(own if base is None else base)
        chosen = self._resuming.choose(key, configured, group)
        return None if base is None and chosen == configured else chosen

    def _look_up(self, rules: Sequence[DecayRule]) -> dict[Tensor, dict[int | None, tuple[ParameterInfo, DecayRule]]]:
        """Return what is decided on each parameter, by the `id` of the group that has it, if that is asked for."""
        found: dict[Tensor, dict[int | None, tuple[ParameterInfo, DecayRule]]] = {}
        for info, rule in rules_by_group(self._model, rules, self._root, self._optimizers):
            place = None if info.member is None else id(info.member.group)
            found.setdefault(info.parameter, {})[place] = info, rule
        return found

    def _look_again(self, parameter: Tensor) -> None:
        if not is_undecided(self._model):
            # a module that changes while it trains may lose all that a rule is for
            self._known = self._look_up([replace(rule, optional=True) for rule in self._rules])
        if parameter not in self._known:
            self._strangers[id(parameter)] = parameter
