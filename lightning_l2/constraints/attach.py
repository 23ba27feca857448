"""A norm constraint put into `optimizer.step()`, and what is logged of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from lightning_l2.arguments import check_choice
from lightning_l2.constraints.held import HeldVectors, Memory
from lightning_l2.constraints.methods import Method, Projection, constrain_
from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.optimizers.facts import step_size, torch_class
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import decay_groups, decay_groups_of
from lightning_l2.sharding import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from lightning_l2.constraints.bounds import Bound, State
    from lightning_l2.constraints.vectors import ConstrainedVectors, Per
    from lightning_l2.param_groups.parts import DecayGroup

PROJECTION = Projection()


def check_options(bound: Bound, method: Method, per: Per) -> None:
    """Check the options of `AttachedConstraint`, as soon as they are known.

    Raises:
        ValueError: If an option is unknown, or they don't go together.
    """
    check_choice(("parameter", "row", "group"), per=per)
    if per == "row" and (method.quantity or not bound.is_known_at_start):
        raise ValueError(
            f"per='row' takes 'projection' or 'sphere' as method and a bound that is known at the start, got {method} "
            f"and {bound}. Use per='parameter' or 'group' for bounds and multipliers that change."
        )
    if method.compares and not bound.is_known_at_start:
        raise ValueError(
            f"A sphere has its radius from the start on, got {bound}. Use None, a number, InitialBound or RmsBound."
        )


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
            written by `memorise`. A group shares its memory among its parameters, and begins anew with other ones.
        shards: The process group that FSDP1 has spread a parameter over, by the parameter's `id`.

    Raises:
        TypeError: If the optimizer has no step hooks.
        ValueError: If the options don't go together.

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
        check_options(bound, method, per)
        super().__init__(optimizer, "NormConstraint")
        self._names = names
        self._bound = bound
        self._per: Per = per
        self._method = method
        self._memory = memory if memory is not None else {}
        self._shards = shards or {}
        self._layout: tuple[int, list[bool]] | None = None
        self._held: HeldVectors | None = None
        self._before: ConstrainedVectors | None = None
        # the state that the last step was constrained with, and the squared norms before it was
        self._last: tuple[State, Tensor] | None = None
        self._is_told = False

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
            self._held = HeldVectors(known.groups, names, self._per, self._memory, self._shards)
            self._last, self._before = None, None
            if self._held.labels:
                if self._method.compares:
                    self._check_groups(self._held.groups)
                self._held.start(self._bound, self._method)
            self._layout = layout

    def memorise(self) -> None:
        """Write down what bounds and multipliers remember."""
        if self._held is not None:
            self._held.memorise()

    @property
    def labels(self) -> list[str]:
        """What the columns of `readout` belong to."""
        return [] if self._held is None else self._held.labels

    @property
    def quantities(self) -> list[str]:
        """What the rows of `readout` are."""
        return ["bound", "slack", *([self._method.quantity] if self._method.quantity else [])]

    @torch.no_grad()
    def readout(self, *, before_step: bool = False) -> Tensor | None:
        """Return bounds, slacks and what else the method remembers of the last step, as rows of one entry a label.

        A slack is the bound minus the norm between the optimizer's step and the constraint, the smallest one of rows.

        Args:
            before_step: Whether to return those of the weights as they are, where no step was made yet.
        """
        if self._held is None or not self._held.labels or not (before_step or self._last):
            return None
        vectors = self._held.vectors
        state, squares = self._last or (self._held.state, vectors.squares())
        bounds = self._bound.bounds(state, vectors.sizes)
        bounds = torch.as_tensor(bounds, dtype=squares.dtype, device=squares.device).expand_as(squares)
        table = torch.stack([bounds, bounds - squares.sqrt()])
        if self._per == "row":
            # tensors without a row here have those of other processes
            none = table.new_full((2, 1), math.inf)
            rows = torch.split_with_sizes(table, vectors.counts, dim=1)
            table = torch.stack([torch.cat([part, none], dim=1).amin(1) for part in rows], dim=1)
            if any(map(is_sharded, vectors.tensors)):
                dist.all_reduce(table, dist.ReduceOp.MIN)
        own = [self._held.state[self._method.quantity]] if self._method.quantity else []
        return torch.stack([*table, *own])

    @property
    def undecided(self) -> bool:
        """Whether it is still open what there is to constrain."""
        return self._layout is None

    def begin(self, *, has_closure: bool) -> None:
        """Copy weights that may move before the closure is called, as no optimizer of torch's does."""
        self._before = None
        if has_closure and torch_class(self.optimizer) is None:
            self._copy()

    def before_update(self) -> None:
        """Copy weights before they move, once a step however often the closure is called."""
        if self._before is None:
            self._copy()

    @torch.no_grad()
    def after_update(self) -> None:
        """Constrain what there is to constrain."""
        self.prepare()
        held = self._held
        if held is not None and held.labels:
            # A fused optimizer is called even where the gradient scaler found an infinity, and skips the step itself.
            found_inf = getattr(self.optimizer, "found_inf", None)
            stepped = None if found_inf is None else (found_inf == 0).reshape(())
            size = held.vectors.operand(list(map(step_size, held.parents))) if self._method.compares else 0.0
            state, before, self._before = held.state, self._before, None
            held.state, squares = constrain_(
                held.vectors, state, self._bound, self._method, before=before, size=size, stepped=stepped
            )
            self._last = state, squares

    def warn(self, quantity: str, values: Mapping[str, float]) -> None:
        """Warn once if what the method remembers has come to do harm.

        Args:
            quantity: One of `quantities`.
            values: It by label.
        """
        label, largest = max(values.items(), key=lambda item: item[1], default=("", -math.inf))
        text = self._method.warning(largest) if quantity == self._method.quantity else ""
        if text and not self._is_told:
            self._is_told = True
            rank_zero_warn(f"NormConstraint of {label!r}: {text}")

    @torch.no_grad()
    def _copy(self) -> None:
        if self._method.compares:
            self.prepare()
            if self._held is not None and self._held.labels:
                self._before = self._held.vectors.copied()

    def _check_groups(self, groups: Sequence[DecayGroup]) -> None:
        """Refuse groups without a learning rate, and tell of those whose weights decay."""
        if any(group.parent.get("lr") is None for group in groups):
            raise RuntimeError(
                f"On a sphere weights turn by the learning rate, and a group of {type(self.optimizer).__name__} has no "
                "`lr`. Use method='projection'."
            )
        decaying = {group.name: float(group.weight_decay or group.base or 0.0) for group in groups}
        name, largest = max(decaying.items(), key=lambda item: item[1])
        if largest > 0 and not self._is_told:
            self._is_told = True
            rank_zero_warn(
                f"The weight decay of {largest:g} in group {name!r} has no effect to first order: its weights are held "
                "on a sphere, and decay only shortens and tilts the direction of their steps. Set it to 0 for them."
            )


class AttachedConstraints:
    """A constraint on all optimizers of a training, whichever these are.

    Args:
        attach: Attaches it to one of them.
        look: As of `Attachments`.
    """

    def __init__(
        self, attach: Callable[[Optimizer], AttachedConstraint], look: Callable[[], Any] | None = None
    ) -> None:
        self._constraints = Attachments(lambda _, optimizer: attach(optimizer), look)

    @property
    def is_undecided(self) -> bool:
        """Whether lazy parameters put off what there is to constrain."""
        return any(constraint.undecided for constraint in self._constraints)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Go over to other optimizers, and look up what there is to constrain, before a step moves it."""
        decay_groups_of(optimizers)
        self._constraints.follow(optimizers)
        for constraint in self._constraints:
            constraint.prepare()

    def memorise(self) -> None:
        """Write down what bounds and multipliers remember."""
        for constraint in self._constraints:
            constraint.memorise()

    def remove(self) -> None:
        """Leave the optimizers alone."""
        self._constraints.remove()

    def metrics(self, prefix: str, *, before_step: bool = False) -> tuple[dict[str, float], dict[str, float]]:
        """Return the extremes and the values of each vector, by logged key, in one transfer."""
        read = [
            (one, table) for one in self._constraints if (table := one.readout(before_step=before_step)) is not None
        ]
        if not read:
            return {}, {}
        labels = [label for one, _ in read for label in one.labels]
        columns = torch.cat([table for _, table in read], dim=1).tolist()
        extremes, each = {}, {}
        for quantity, values in zip(read[0][0].quantities, columns, strict=True):
            # Bounds that are not known yet are infinite.
            finite = {label: value for label, value in zip(labels, values, strict=True) if math.isfinite(value)}
            each.update({f"{prefix}/{quantity}/{label}": value for label, value in finite.items()})
            if finite:
                extreme = min if quantity in ("bound", "slack") else max
                extremes[f"{prefix}/{quantity}"] = extreme(finite.values())
            read[0][0].warn(quantity, finite)
        return extremes, each
