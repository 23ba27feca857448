"""The vectors that a constraint holds on one optimizer: their names, and what is remembered of them by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lightning_l2.constraints.vectors import ConstrainedVectors, Per
from lightning_l2.sharding import is_flat_parameter, local_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from lightning_l2.constraints.bounds import Bound, State
    from lightning_l2.constraints.methods import Method
    from lightning_l2.param_groups.parts import DecayGroup

Memory = dict[str, dict[str, Any]]


class HeldVectors:
    """The vectors that a constraint holds on one optimizer, from their first step on.

    Args:
        groups: The optimizer's groups.
        names: The name of each constrained parameter, None of each other one.
        per: "parameter", "row" or "group"; see `ConstrainedVectors`.
        memory: What bounds and multipliers remember, by parameter name and quantity: a number, or one a row. A group
            shares its memory among its parameters, and begins anew with other ones.
        shards: The process group that FSDP1 has spread a parameter over, by the parameter's `id`.

    Raises:
        RuntimeError: If FSDP1 has flattened what is to be constrained.

    Attributes:
        groups: The groups that have constrained parameters.
        labels: A name for each vector, or for each tensor with its rows.
        parents: The user's group of each of these.
        state: What bounds and multipliers remember, one a vector.
    """

    def __init__(
        self,
        groups: Sequence[DecayGroup],
        names: Mapping[Tensor, str | None],
        per: Per,
        memory: Memory,
        shards: Mapping[int, ProcessGroup],
    ) -> None:
        held = [(group, [p for p in group.params if names.get(p) and p.requires_grad]) for group in groups]
        held = [(group, tensors) for group, tensors in held if tensors]
        every = [tensor for _, tensors in held for tensor in tensors]
        pieces = [shards.get(id(tensor)) for tensor in every]
        self._per = per
        self._memory = memory
        self.groups = [group for group, _ in held]
        self.state: State = {}
        if per == "group":
            self._members = [[names[tensor] or "" for tensor in tensors] for _, tensors in held]
            self.labels = [group.name for group in self.groups]
            self.parents = [group.parent for group in self.groups]
        else:
            self._members = [[names[tensor] or ""] for tensor in every]
            self.labels = [name for name, *_ in self._members]
            self.parents = [group.parent for group, tensors in held for _ in tensors]
        _check_whole(every, [name for members in self._members for name in members], per == "row" and any(pieces))
        counts = [len(members) for members in self._members] if per == "group" else None
        self.vectors = ConstrainedVectors(every, per, counts, pieces if any(pieces) else None)

    def start(self, bound: Bound, method: Method) -> None:
        """Begin with the state before the first step of each vector, or with the one remembered of it.

        Raises:
            RuntimeError: If the method or the bound can't begin with these weights.
        """
        vectors = self.vectors
        squares = vectors.squares()
        self.state = dict(bound.start(squares.sqrt()))
        recalled = list(map(self._recalled, self._members))
        self._check_first(bound, method, squares, recalled)
        if method.quantity:
            self.state[method.quantity] = torch.zeros_like(squares)
        for key, values in self.state.items():
            parts = vectors.whole(values)
            for index, known in enumerate(recalled):
                if key in known:
                    parts[index] = values.new_tensor(known[key]).view(-1)
                elif self._per == "row":
                    # once and for all, since this takes a collective and rows remember only what stays as it is
                    self._remember(self.labels[index], key, parts[index].tolist())
            if self._per == "row":
                parts = [local_rows(part, tensor) for part, tensor in zip(parts, vectors.tensors, strict=True)]
            self.state[key] = torch.cat(parts)
        self._check_bounds(bound)

    def memorise(self) -> None:
        """Write down what bounds and multipliers remember; of rows that is done already."""
        if self._per == "row":
            return
        for key, values in self.state.items():
            for members, value in zip(self._members, values.tolist(), strict=True):
                for name in members:
                    self._remember(name, key, value)
                    if self._per == "group":
                        self._remember(name, "members", len(members))

    def _remember(self, name: str, key: str, value: Any) -> None:
        self._memory.setdefault(name, {})[key] = value

    def _recalled(self, members: list[str]) -> Mapping[str, Any]:
        """Return what is remembered of a vector, nothing of a group that had other members."""
        first, *others = (self._memory.get(name, {}) for name in members)
        if self._per == "group" and (first.get("members") != len(members) or any(one != first for one in others)):
            return {}
        return first

    def _check_first(
        self, bound: Bound, method: Method, squares: Tensor, recalled: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse weights that the method can't begin with."""
        objection = method.objection(self.vectors, squares, bound.bounds(self.state, self.vectors.sizes))
        if objection is None:
            return
        extents, message = objection
        worst = [float(part.max()) if part.numel() else 0.0 for part in self.vectors.whole(extents)]
        wrong = {
            label: extent
            for label, extent, known in zip(self.labels, worst, recalled, strict=True)
            if extent >= 1 and not known
        }
        if wrong:
            raise RuntimeError(message.format(names=_listed(list(wrong)), bound=bound, worst=max(wrong.values())))

    def _check_bounds(self, bound: Bound) -> None:
        """Refuse bounds of 0, under which weights stay 0."""
        if not self.state:
            return
        bounds = torch.as_tensor(bound.bounds(self.state, self.vectors.sizes))
        parts = self.vectors.whole(bounds.expand_as(next(iter(self.state.values()))))
        least = [float(part.min()) if part.numel() else math.inf for part in parts]
        zero = [label for label, smallest in zip(self.labels, least, strict=True) if smallest == 0]
        if zero:
            raise RuntimeError(
                f"{bound} makes the bound of {_listed(zero)} 0, the norm at the start, so that it would stay 0. "
                "Exempt it by a rule with weight_decay=0, or use a number or WarmupBound as the bound."
            )


def _check_whole(tensors: list[Tensor], names: list[str], rows_are_cut: bool) -> None:
    """Refuse what FSDP1 has flattened beyond recognition."""
    for tensor, name in zip(tensors, names, strict=True):
        if is_flat_parameter(tensor):
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
