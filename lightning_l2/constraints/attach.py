"""A norm constraint put into `optimizer.step()`, and what it remembers of each parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_l2.constraints.methods import Method, Projection, constrain_
from lightning_l2.constraints.vectors import ConstrainedVectors
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import decay_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from lightning_l2.constraints.bounds import Bound, State
    from lightning_l2.constraints.vectors import Per

Memory = dict[str, dict[str, float]]
PROJECTION = Projection()


class AttachedConstraint(StepHook):
    """A constraint that acts right after each step of an optimizer, whoever makes it, on the parameters it then has.

    Args:
        optimizer: The optimizer, bare.
        names: Returns the name of each constrained parameter and None of each other one, or nothing as long as that is
            undecided.
        bound: Where the bounds come from.
        per: "parameter", "row" or "group"; see `ConstrainedVectors`.
        method: How norms are held at their bounds.
        memory: What bounds and multipliers remember, by parameter name and quantity; read where parameters are new,
            written by `memorise`. A group shares its memory among its parameters, and takes that of its first.
        shards: The process group that FSDP1 has spread a parameter over, by the parameter's `id`.

    Raises:
        TypeError: If the optimizer has no step hooks.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    >>> from lightning_l2.constraints import FixedBound
    >>> attached = AttachedConstraint(optimizer, lambda: {layer.weight: "weight"}, FixedBound(1.0))
    >>> layer(torch.ones(2)).backward(); optimizer.step(); attached.remove()
    >>> layer.weight.norm().item() <= 1.0
    True
    """

    turn = Turn.CONSTRAINT

    def __init__(
        self,
        optimizer: Optimizer,
        names: Callable[[], Mapping[Tensor, str | None]],
        bound: Bound,
        *,
        per: Per = "parameter",
        method: Method = PROJECTION,
        memory: Memory | None = None,
        shards: Mapping[int, ProcessGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, "NormConstraint")
        self._names = names
        self._bound = bound
        self._per: Per = per
        self._method = method
        self._memory = memory if memory is not None else {}
        self._shards = shards or {}
        self._layout: tuple[int, list[bool]] | None = None
        self._vectors: ConstrainedVectors | None = None
        self._members: list[list[str]] = []
        self._state: State = {}
        self.labels: list[str] = []
        # the state that the last step was constrained with, and the squared norms before it was
        self._last: tuple[State, Tensor] | None = None

    def remove(self) -> None:
        """Take it off the optimizer, and write down what it remembers."""
        self.memorise()
        super().remove()

    def prepare(self) -> None:
        """Look up what there is to constrain, before a step moves it."""
        known = decay_groups(self.optimizer)
        layout = known.current_version(), [p.requires_grad for group in known.unnamed() for p in group.params]
        if layout == self._layout:
            return
        names = self._names()
        if names:
            self.memorise()
            constrained = [
                (group.name, [tensor for tensor in group.params if names.get(tensor) and tensor.requires_grad])
                for group in known.groups
            ]
            self._take_up(constrained, names)
            self._layout = layout

    def memorise(self) -> None:
        """Write down what bounds and multipliers remember."""
        for key, values in self._state.items():
            for members, value in zip(self._members, values.tolist(), strict=True):
                for name in members:
                    self._memory.setdefault(name, {})[key] = value

    @property
    def quantities(self) -> list[str]:
        """What the rows of `readout` are."""
        return ["bound", "slack", *([self._method.quantity] if self._method.quantity else [])]

    @torch.no_grad()
    def readout(self) -> Tensor | None:
        """Return bounds, slacks and what else the method remembers of the last step, as rows of one entry a label.

        A slack is the bound minus the norm between the optimizer's step and the constraint, the smallest one of rows.
        """
        if self._last is None or self._vectors is None:
            return None
        state, squares = self._last
        bounds = torch.as_tensor(self._bound.bounds(state), dtype=squares.dtype, device=squares.device)
        slacks = bounds - squares.sqrt()
        if self._per == "row":
            # No slack is larger than the bound, which stands for tensors without a row here.
            rows = torch.split_with_sizes(slacks, self._vectors.counts)
            slacks = torch.stack([torch.cat([part, bounds.view(1)]).min() for part in rows])
            if any(hasattr(tensor, "placements") for tensor in self._vectors.tensors):
                dist.all_reduce(slacks, dist.ReduceOp.MIN)
        table = [bounds.expand_as(slacks), slacks]
        return torch.stack([*table, self._state[self._method.quantity]] if self._method.quantity else table)

    @property
    def undecided(self) -> bool:
        """Whether it is still open what there is to constrain."""
        return self._layout is None

    def after_update(self) -> None:
        """Constrain what there is to constrain."""
        self.prepare()
        if self._vectors is not None and self.labels:
            # A fused optimizer is called even where the gradient scaler found an infinity, and skips the step itself.
            found_inf = getattr(self.optimizer, "found_inf", None)
            stepped = None if found_inf is None else (found_inf == 0).reshape(())
            before = self._state
            self._state, squares = constrain_(self._vectors, before, self._bound, self._method, stepped=stepped)
            self._last = before, squares

    def _take_up(self, groups: list[tuple[str, list[Tensor]]], names: Mapping[Tensor, str | None]) -> None:
        """Begin to constrain other parameters than before."""
        tensors = [tensor for _, group in groups for tensor in group]
        shards = [self._shards.get(id(tensor)) for tensor in tensors]
        every = [names[tensor] or "" for tensor in tensors]
        _check_whole(tensors, every, self._per == "row" and any(shards))
        self._members, self.labels, counts = [[name] for name in every], every, None
        if self._per == "group":
            self._members = [[names[tensor] or "" for tensor in group] for _, group in groups if group]
            self.labels = [label for label, group in groups if group]
            counts = [len(members) for members in self._members]
        self._vectors = ConstrainedVectors(tensors, self._per, counts, shards if any(shards) else None)
        self._state, self._last = {}, None
        if tensors and self._per != "row":
            self._state = self._start(self._vectors)

    def _start(self, vectors: ConstrainedVectors) -> State:
        """Return the state before the first step of each vector, or the one remembered of it."""
        squares = vectors.squares()
        state = dict(self._bound.start(squares.sqrt()))
        self._check_first(vectors, squares, state)
        if self._method.quantity:
            state[self._method.quantity] = torch.zeros_like(squares)
        for key, values in state.items():
            known = [self._memory.get(members[0], {}).get(key) for members in self._members]
            if any(value is not None for value in known):
                fresh = zip(known, values.tolist(), strict=True)
                state[key] = values.new_tensor([new if old is None else old for old, new in fresh])
        self._check_bounds(state)
        return state

    def _check_bounds(self, state: State) -> None:
        bounds = torch.as_tensor(self._bound.bounds(state)).expand(len(self.labels)).tolist()
        zero = [label for label, bound in zip(self.labels, bounds, strict=True) if bound == 0]
        if zero:
            raise RuntimeError(
                f"{self._bound} makes the bound of {_listed(zero)} 0, the norm at the start, so that it would stay 0. "
                "Exempt it by a rule with weight_decay=0, or use a number or WarmupBound as the bound."
            )

    def _check_first(self, vectors: ConstrainedVectors, squares: Tensor, state: State) -> None:
        """Refuse a method whose first step would turn weights around."""
        shares = self._method.first(vectors, squares, self._bound.bounds(state))
        wild = (
            {
                label: share
                for label, members, share in zip(self.labels, self._members, shares.tolist(), strict=True)
                if share >= 1 and members[0] not in self._memory
            }
            if shares is not None
            else {}
        )
        if wild:
            raise RuntimeError(
                f"The weights of {_listed(list(wild))} are so far outside of {self._bound} that the first multiplier "
                f"would be {max(wild.values()):.3g}, and 1 or more turns them around. Use a larger bound, an "
                f"update_rate {max(wild.values()):.2g} times smaller, or method='projection'."
            )


def _check_whole(tensors: list[Tensor], names: list[str], rows_are_cut: bool) -> None:
    """Refuse what FSDP1 has flattened beyond recognition."""
    for tensor, name in zip(tensors, names, strict=True):
        if hasattr(tensor, "_param_infos"):
            raise RuntimeError(
                f"FSDP has flattened {name!r} and others into one parameter, whose norm is none of theirs. "
                "Use FSDP with use_orig_params=True, or ModelParallelStrategy with fully_shard."
            )
    if rows_are_cut:
        raise RuntimeError(
            "FSDP has cut the parameters into flat pieces, which have no rows. Use ModelParallelStrategy with "
            "fully_shard, or per='parameter'."
        )


def _listed(labels: list[str]) -> str:
    """Return the first of some labels, and how many there are."""
    return repr(labels[0]) if len(labels) == 1 else f"{labels[0]!r} and {len(labels) - 1} more"
