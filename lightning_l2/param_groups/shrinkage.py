r"""What decay takes of the weights: the share $s_t$ of each step, and what all steps have left, $\prod_t (1 - s_t)$.

======================================  =================================
decay                                   share of a step
======================================  =================================
decoupled, and at most that: cautious   $s_t = \eta_t \lambda_t$
independent of the learning rate        $s_t = \lambda_t$
the same with a peak                    $s_t = \lambda_t \eta_t / \eta_{max}$
coupled, SGD with momentum m            $s_t = \eta_t \lambda_t / (1 - m)$
coupled, adaptive optimizers            none: each weight has its own
======================================  =================================

The timescale of decay is $1 / s$ steps. Where s is below a quarter of the epsilon of the weights' number format (bf16
2^-9, fp16 2^-12, fp32 2^-25), $w - s w$ rounds to w, and decay does nothing at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import DecayGroups, decay_groups

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_l2.param_groups.parts import DecayGroup


def vanishing_share(params: Sequence[Tensor]) -> float:
    """Return the share below which a step rounds away in the coarsest number format of some parameters.

    >>> vanishing_share([torch.ones(1), torch.ones(1, dtype=torch.bfloat16)]) == 2.0**-9
    True
    """
    return max((torch.finfo(dtype).eps / 4 for dtype in _dtypes(params)), default=0.0)


def coarsest(params: Sequence[Tensor]) -> str:
    """Return the name of the coarsest number format of some parameters.

    >>> coarsest([torch.ones(1), torch.ones(1, dtype=torch.bfloat16)])
    'bfloat16'
    """
    return str(max(_dtypes(params), key=lambda dtype: torch.finfo(dtype).eps, default="")).removeprefix("torch.")


def _dtypes(params: Sequence[Tensor]) -> set[torch.dtype]:
    return {param.dtype for param in params if param.is_floating_point() or param.is_complex()}


# What may round away before somebody is told: at the end of a learning-rate schedule, some always does.
_IS_LOSS = 0.01


@dataclass(eq=False, slots=True)
class Count:
    """What was counted of a group.

    Args:
        group: The group.
        vanishing: The share below which a step rounds away in the format of its parameters; 0 where none does.
        left: What decay has left of the weights, None where that is not known.
        lost: The sum of the shares that rounded away.
    """

    group: DecayGroup
    vanishing: float
    left: float | None = 1.0
    lost: float = 0.0


class Shrinkage(StepHook):
    r"""Count what decay leaves of the weights, $\prod_t (1 - s_t)$, in each group of an optimizer.

    `count_shrinkage` makes one for all that ask, each of whom removes it for himself. A step that a gradient scaler
    skips within a fused optimizer counts.

    Attributes:
        groups: The parts of the optimizer's groups.
        holders: How many want it.
        told: The names of the groups of which somebody was told that their decay rounds away.
    """

    turn = Turn.MONITOR

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, "weight_decay_left")
        self.groups: DecayGroups = decay_groups(optimizer)
        self.holders = 0
        self.told: set[str] = set()
        self._counts: list[Count] = []
        self._version = -1
        self._restored: dict[str, float | None] = {}

    def remove(self) -> None:
        """Stop counting, if nobody else wants it."""
        self.holders -= 1
        if self.holders == 0:
            _KNOWN.pop(self.optimizer, None)
            super().remove()

    def after_update(self) -> None:
        """Count the step."""
        groups = self.groups
        # the update has looked at the groups itself
        is_known = groups.is_held and self._version == groups.version
        counts = self._counts if is_known else self.counts()
        taken = None if groups.way is None else groups.way.taken
        shares: Sequence[Any] = taken or [groups.share(count.group) for count in counts]
        for count, share in zip(counts, shares, strict=True):
            if type(share) is not float:
                count.left = None
            elif 0 < share < count.vanishing:
                self._lose(count, share)
            elif count.left is not None:
                count.left *= 1 - share

    def _lose(self, count: Count, share: float) -> None:
        count.lost += share
        if count.lost >= _IS_LOSS and count.group.name not in self.told:
            self.told.add(count.group.name)
            rank_zero_warn(
                f"Weight decay of group {count.group.name!r} is lost: by now it should have taken {count.lost:.2g} of "
                f"the weights in steps of eta * lambda = {share:.2g} and less, and each rounded to nothing in "
                f"{coarsest(count.group.params)}. Use WeightDecay(rounding='accumulate')."
            )

    def counts(self) -> list[Count]:
        """Return the counts of the groups that there are now, each of which goes on with that of its name before."""
        if self._version != self.groups.current_version():
            known = {count.group.name: count for count in self._counts}
            self._counts = []
            for group in self.groups.groups:
                before = known.get(group.name)
                left = self._restored.pop(group.name, 1.0) if before is None else before.left
                lost = 0.0 if before is None else before.lost
                vanishing = vanishing_share(group.params) if self.groups.rounds_away else 0.0
                self._counts.append(Count(group, vanishing, left, lost))
            self._version = self.groups.current_version()
        return self._counts

    def left(self) -> dict[str, float]:
        """Return what decay has left of the weights, by the names of the groups for which it is known."""
        return {count.group.name: count.left for count in self.counts() if count.left is not None}

    def state_dict(self) -> dict[str, float | None]:
        """Return what decay has left by the names of all groups, None where it is not known."""
        return {count.group.name: count.left for count in self.counts()}

    def go_on(self, left: Mapping[str, float | None]) -> None:
        """Go on from what `state_dict` returned at another time."""
        self._counts, self._version, self._restored = [], -1, dict(left)


def left_of(optimizer: Optimizer, group: DecayGroup) -> float | None:
    """Return what decay has left of the weights of a part of an optimizer's groups; None if nobody has counted."""
    known = _KNOWN.get(optimizer)
    return None if known is None else next((one.left for one in known.counts() if one.group is group), None)


_KNOWN: weakref.WeakKeyDictionary[Any, Shrinkage] = weakref.WeakKeyDictionary()


def count_shrinkage(optimizer: Optimizer) -> Shrinkage:
    """Return what counts the shrinkage of an optimizer's groups, until its `remove()`.

    Args:
        optimizer: One that updates by itself; see `updating_optimizers`.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.zeros(1)
    >>> optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=1.0)
    >>> count = count_shrinkage(optimizer)
    >>> optimizer.step(); optimizer.step()
    >>> count.left()
    {'group0': 0.81}
    """
    known = _KNOWN.get(optimizer)
    if known is None:
        known = _KNOWN[optimizer] = Shrinkage(optimizer)
    known.holders += 1
    return known
