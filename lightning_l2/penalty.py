"""The L2 penalty as a part of the objective: in the gradients, in the loss that line searches read, and as metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_l2.decay_math import add_decay_gradient
from lightning_l2.norms import squared_norms
from lightning_l2.optimizer_facts import ascent_sign, reads_loss
from lightning_l2.param_groups import base_weight_decay
from lightning_l2.step_hooks import uncompiled, wrap_closure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


class Penalised(NamedTuple):
    """A parameter's part in the penalty.

    Args:
        name: Qualified name of the parameter.
        rule: Name of the rule that decided on it.
        weight_decay: Lambda, dimensionless.
    """

    name: str
    rule: str
    weight_decay: float


class L2Objective:
    r"""The term \(\frac{\lambda}{2} \lVert w \rVert_2^2\), summed over parameters, of what optimizers minimise.

    A step that nobody calls `join_gradients` for joins them itself, right before the update. An optimizer that looks at
    the loss, as a line search does, is told the penalised one. Both until `remove()`.

    Args:
        optimizers: The optimizers that train the parameters.
        follow_schedule: Whether lambda is multiplied with the `weight_decay_multiplier` of the parameter's group.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, follow_schedule: bool = False) -> None:
        self._optimizers = list(optimizers)
        self._follow_schedule = follow_schedule
        self._penalised: dict[int, Penalised] = {}
        self._shards: dict[int, ProcessGroup] = {}
        self._measured: _Measured | None = None
        # by `id`, the optimizers whose gradients have been joined for the step to come
        self._joined: set[int] = set()
        self._hooks = [optimizer.register_step_pre_hook(uncompiled(self._on_step)) for optimizer in optimizers]

    def penalise(self, penalised: Mapping[int, Penalised], shards: Mapping[int, ProcessGroup] | None = None) -> None:
        """Decide on parameters, at the latest when their first gradient is there.

        Args:
            penalised: What is penalised and how much, by the `id` of the parameter.
            shards: The process group that FSDP1 has cut a parameter over, by its `id`.
        """
        self._penalised = {key: entry for key, entry in penalised.items() if entry.weight_decay}
        self._shards = dict(shards or {})

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        while self._hooks:
            self._hooks.pop().remove()

    def join_gradients(self, optimizer: Optimizer, scale: float | Tensor = 1.0) -> None:
        """Add lambda w to the gradients of an optimizer's parameters, in place.

        Args:
            optimizer: The optimizer, about to step.
            scale: What the gradients are scaled with.
        """
        self._joined.add(id(optimizer))
        together: dict[float, list[Tensor]] = {}
        for param, weight_decay in self._in_force(optimizer):
            together.setdefault(weight_decay, []).append(param)
            if self._measured is not None and id(param) in self._measured.in_force:
                self._measured.in_force[id(param)] = weight_decay
        for weight_decay, params in together.items():
            add_decay_gradient(params, weight_decay * scale)

    def measure(self) -> None:
        """Take the squares of the weights as they are now, on their device, for `metrics`."""
        in_force = {id(p): (p, value) for optimizer in self._optimizers for p, value in self._in_force(optimizer)}
        params = [param for param, _ in in_force.values()]
        squares = squared_norms(params, [self._shards.get(id(param)) for param in params]) if params else torch.zeros(0)
        self._measured = _Measured(squares, {key: value for key, (_, value) in in_force.items()}, [])

    @property
    def is_measured(self) -> bool:
        """Whether `measure` was called since `metrics`."""
        return self._measured is not None

    def add_loss(self, loss: Tensor) -> None:
        """Take a part of the loss of the step that was measured.

        Args:
            loss: Shape `()`, as divided for accumulation.
        """
        if self._measured is not None:
            self._measured.losses.append(loss.detach().reshape(1))

    def metrics(self) -> dict[str, float]:
        """Return by its keys what was measured, with one transfer from the device, and forget it.

        Raises:
            RuntimeError: If nothing was measured.
        """
        measured, self._measured = self._measured, None
        if measured is None:
            raise RuntimeError("L2Objective has nothing to report. Call `measure()` first, before the step.")
        count = len(measured.in_force)
        numbers = torch.cat([measured.squares, *(loss.to(measured.squares) for loss in measured.losses)]).tolist()
        rules: dict[str, float] = {}
        total = 0.0
        for (key, weight_decay), square in zip(measured.in_force.items(), numbers[:count], strict=True):
            rule = self._penalised[key].rule
            rules[rule] = rules.get(rule, 0.0) + abs(weight_decay) / 2 * square
            total += weight_decay / 2 * square
        metrics = {"l2_penalty/loss": sum(rules.values())}
        if len(rules) > 1:
            metrics |= {f"l2_penalty/loss/{rule}": value for rule, value in rules.items()}
        if measured.losses:
            metrics["l2_penalty/objective"] = sum(numbers[count:]) + total
        return metrics

    def decayed_twice(self) -> list[str]:
        """Return the names of parameters that their optimizer decays too, now or once a schedule rises from 0."""
        return [
            self._penalised[id(param)].name
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if base_weight_decay(group)
            for param in group["params"]
            if id(param) in self._penalised
        ]

    def _in_force(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, float]]:
        """Yield the penalised parameters of an optimizer with lambda in force, negative where it maximises."""
        for group in optimizer.param_groups:
            factor: float = ascent_sign(optimizer, group)
            if self._follow_schedule:
                factor *= group.get("weight_decay_multiplier", 1.0)
            for param in group["params"]:
                entry = self._penalised.get(id(param))
                if entry is not None and param.requires_grad:
                    yield param, factor * entry.weight_decay

    def _on_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        with_closure = wrap_closure(args, kwargs, lambda closure: self._with_penalty(optimizer, closure))
        if with_closure is None:
            self._join_late(optimizer)
        return with_closure

    def _join_late(self, optimizer: Optimizer) -> None:
        """Join the gradients unless `join_gradients` was called for this step."""
        if id(optimizer) not in self._joined:
            # Where a GradScaler leaves unscaling to the optimizer, no hook before the step had unscaled gradients.
            scale = getattr(optimizer, "grad_scale", None)
            self.join_gradients(optimizer, 1.0 if scale is None else scale)
        self._joined.discard(id(optimizer))

    def _with_penalty(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that also joins the gradients, and returns the penalised loss to optimizers that read it."""

        def evaluate() -> Any:
            loss = closure()
            self._join_late(optimizer)
            in_force = list(self._in_force(optimizer)) if reads_loss(optimizer) and loss is not None else []
            if not in_force:
                return loss
            params = [param for param, _ in in_force]
            squares = squared_norms(params, [self._shards.get(id(param)) for param in params])
            half_lambdas = torch.tensor([value / 2 for _, value in in_force], dtype=squares.dtype)
            return loss + squares @ half_lambdas.to(squares.device, non_blocking=True)

        return evaluate


class _Measured(NamedTuple):
    """The squares of penalised weights, lambda of each by `id`, and the losses of one step's batches."""

    squares: Tensor
    in_force: dict[int, float]
    losses: list[Tensor]
