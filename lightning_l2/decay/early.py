"""Weight decay by rules where a strategy takes the optimizer over, groups and all: they are split for good before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_l2.param_groups.bases import RuleBases
from lightning_l2.param_groups.decay_groups import decay_groups, decay_groups_of
from lightning_l2.param_groups.summary import GroupSummary, summarize

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lightning_l2.param_groups.outlook import Outlook
    from lightning_l2.param_groups.resume import Resuming
    from lightning_l2.rules.assign import Rules

# What learning-rate schedulers keep one of for each parameter group: torch's, then timm's, then DeepSpeed's own.
PER_GROUP = frozenset(
    (
        *("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "default_min_lr"),
        *("max_lrs", "base_momentums", "max_momentums", "swa_lrs"),
        *("base_values", "warmup_steps"),
        *("min_lr", "delta_lrs", "min_moms", "max_moms", "org_lrs"),
    )
)


class EarlySplit:
    """Parameter groups that were split for good, as DeepSpeed needs them, which keeps them so, in checkpoints too.

    Args:
        model: The module.
        optimizers: Its optimizers, not taken over yet.
        weight_decay: Gives base lambda from a parameter group, None to keep the group's own.
        rules: As of `assign_rules`.
        resuming: Knows what a checkpoint says.
        schedulers: Learning-rate schedulers of the optimizers, which get one value for each new group.

    Raises:
        ValueError: If nobody knows whether a scheduler's list has one value for each group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        weight_decay: Callable[[Mapping[str, Any]], float | None],
        rules: Rules,
        resuming: Resuming,
        schedulers: Sequence[Any] = (),
    ) -> None:
        self._resuming = resuming
        bases = RuleBases(model, rules, weight_decay, resuming, optimizers=optimizers)
        found = decay_groups_of(optimizers)
        for one in found:
            one.decide(bases)
        self._summary = summarize(found)
        self._bases = {d.key: float(g.base) for one in found for g in one.unnamed() for d in g.decisions}
        for one in found:
            _split(one.optimizer, schedulers)
            one.decide(None)

    is_decided = True
    version: ClassVar[list[int]] = []

    def begin(self, optimizers: Sequence[Any]) -> None:
        """Put lambda into the groups of optimizers that were taken over, and perhaps restored with other values.

        Raises:
            ValueError: If a checkpoint has several lambdas for what is one group now.
        """
        self._bases = {key: self._resuming.choose(key, value) for key, value in self._bases.items()}
        values = [self._common(row) for row in self._summary]
        self._summary = [
            replace(row, weight_decay=value, outlook=_changed(row, value))
            for row, value in zip(self._summary, values, strict=True)
        ]
        rows = {row.group: row.weight_decay for row in self._summary}
        for optimizer in optimizers:
            groups = optimizer.param_groups
            decay_groups(optimizer).fix([rows.get(g.get("name"), g.get("weight_decay", 0.0)) for g in groups])

    def summary(self, steps: int | None = None) -> list[GroupSummary]:
        """Describe the groups.

        Args:
            steps: How many steps the training has, for what decay does over it.
        """
        return [replace(row, outlook=row.outlook and replace(row.outlook, steps=steps)) for row in self._summary]

    def warnings(self, summary: Sequence[GroupSummary]) -> list[str]:
        """Return what may be a mistake in what `summary` has returned."""
        return [text for row in summary if row.outlook is not None for text in row.outlook.warnings()]

    def weight_decay(self) -> dict[str, float]:
        """Return the base lambda of each parameter by name."""
        return dict(self._bases)

    def _common(self, row: GroupSummary) -> float:
        values = {name: self._bases.get(name, row.weight_decay) for name in row.names}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"The checkpoint has several weight decays for parameters of the group {row.group!r}, {values}, and "
                "DeepSpeed has made the group one piece. Set on_resume='config', or use the rules of the checkpoint."
            )
        return next(iter(values.values()), row.weight_decay)


def _changed(row: GroupSummary, value: float) -> Outlook | None:
    if row.outlook is None:
        return None
    share = row.outlook.share and row.outlook.share * value / row.weight_decay
    # DeepSpeed updates weights in fp32, whatever the module's are
    return replace(row.outlook, first=value, last=value, largest=value, strength=share, share=share, vanishing=0.0)


def _split(optimizer: Optimizer, schedulers: Iterable[Any]) -> None:
    places = {id(parent): index for index, parent in enumerate(optimizer.param_groups)}
    children, sources = [], []
    for group in decay_groups(optimizer).groups:
        child = {**group.parent, "params": group.params, "weight_decay": group.base, "name": group.name}
        if "param_names" in child:
            child["param_names"] = [child["param_names"][index] for index in group.indices]
        children.append(child)
        sources.append(places[id(group.parent)])
    if len(children) != len(places):
        _stretch([one for one in _nested(schedulers) if getattr(one, "optimizer", None) is optimizer], sources)
    optimizer.param_groups[:] = children


def _nested(schedulers: Iterable[Any]) -> Iterable[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _nested(getattr(scheduler, "_schedulers", ()))


def _stretch(schedulers: Iterable[Any], sources: Sequence[int]) -> None:
    """Let schedulers have a value for each new group, given the index of the one that it comes from."""
    count = max(sources, default=-1) + 1
    for scheduler in schedulers:
        lists = {key: value for key, value in vars(scheduler).items() if isinstance(value, list | tuple)}
        others = lists.keys() - PER_GROUP - {"_schedulers"}
        unknown = [key for key in lists if key in others and len(lists[key]) == count]
        if unknown and not type(scheduler).__module__.startswith(("torch.optim.", "deepspeed.")):
            raise ValueError(
                f"The learning-rate scheduler {type(scheduler).__name__} has {unknown}, as long as there are parameter "
                f"groups ({count}). If it is one value a group, it doesn't fit the groups that are split by weight "
                "decay, as they have to be before DeepSpeed takes the optimizer over. Use a scheduler of torch's or "
                "DeepSpeed's, or build the optimizer from `decay_param_groups`, without WeightDecay."
            )
        for key in lists.keys() & PER_GROUP:
            values = lists[key]
            # a list may be shorter: torch's schedulers learn nothing of a group that is added later
            setattr(scheduler, key, [values[source] for source in sources if source < len(values)])
