"""The L2 penalty as a part of the objective: in the gradients, in the loss that line searches read, and as metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_l2.decay.arithmetic import add_decay_gradient
from lightning_l2.decay.start import squared_distances
from lightning_l2.norms.squared import squared_norms
from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.optimizers.facts import ascent_sign, reads_loss
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.decay_groups import decay_groups

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
        start: What this process holds of the weights that it is pulled towards, None for 0.
    """

    name: str
    rule: str
    weight_decay: float
    start: Tensor | None = None


class L2Objective:
    r"""The term $\frac{\lambda}{2} \lVert w - w_0 \rVert_2^2$, summed over parameters, of what optimizers minimise.

    The weights $w_0$ that it pulls towards are 0, or those that training began with.

    The gradient joins that of the data before clipping where somebody tells that it is complete
    (`gradients_are_complete`), and right before the update otherwise. An optimizer that looks at the loss, as a line
    search does, is told the penalised one. Both until `remove()`.

    Args:
        optimizers: The optimizers that train the parameters; see `updating_optimizers`.
        follow_schedule: Whether lambda is multiplied with the multiplier that schedules give the parameter's group.
        look: As of `Attachments`.

    Raises:
        TypeError: If an optimizer has no step hooks.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], *, follow_schedule: bool = False, look: Callable[[], Any] | None = None
    ) -> None:
        self._follow_schedule = follow_schedule
        self._penalised: dict[int, Penalised] = {}
        self._starts: dict[int, Tensor] = {}
        self._shards: dict[int, ProcessGroup] = {}
        self._measured: _Measured | None = None
        self._parts = Attachments(lambda _, optimizer: _Joining(self, optimizer), look)
        self.follow(optimizers)

    def follow(self, optimizers: Sequence[Optimizer]) -> bool:
        """Go over to other optimizers; return whether they are others."""
        self._optimizers = list(optimizers)
        return self._parts.follow(optimizers)

    def version(self) -> tuple[int, ...]:
        """Return what changes when parameter groups or their parameters do."""
        return tuple(decay_groups(optimizer).current_version() for optimizer in self._optimizers)

    def penalise(self, penalised: Mapping[int, Penalised], shards: Mapping[int, ProcessGroup] | None = None) -> None:
        """Decide on parameters, at the latest when their first gradient is there.

        Args:
            penalised: What is penalised and how much, by the `id` of the parameter.
            shards: The process group that FSDP1 has cut a parameter over, by its `id`.
        """
        self._penalised = {key: entry for key, entry in penalised.items() if entry.weight_decay}
        self._starts = {key: entry.start for key, entry in penalised.items() if entry.start is not None}
        self._shards = dict(shards or {})

    def remove(self) -> None:
        """Leave the optimizers alone."""
        self._parts.remove()

    def join_gradients(self, optimizer: Optimizer, scale: float | Tensor = 1.0) -> None:
        """Add lambda w to the gradients of an optimizer's parameters, in place.

        Args:
            optimizer: The optimizer, about to step.
            scale: What the gradients are scaled with.
        """
        together: dict[float, list[Tensor]] = {}
        for param, weight_decay in self._in_force(optimizer):
            together.setdefault(weight_decay, []).append(param)
            if self._measured is not None and id(param) in self._measured.in_force:
                self._measured.in_force[id(param)] = weight_decay
        for weight_decay, params in together.items():
            starts = {param: self._starts[id(param)] for param in params if id(param) in self._starts}
            add_decay_gradient(params, weight_decay * scale, starts)

    def objective(self, optimizer: Optimizer, loss: Any) -> Any:
        """Return a closure's loss with the penalty, for optimizers that read it."""
        in_force = list(self._in_force(optimizer)) if reads_loss(optimizer) and loss is not None else []
        if not in_force:
            return loss
        params = [param for param, _ in in_force]
        squares = self._squares(params)
        half_lambdas = torch.tensor([value / 2 for _, value in in_force], dtype=squares.dtype)
        return loss + squares @ half_lambdas.to(squares.device, non_blocking=True)

    def measure(self) -> None:
        """Take the squares of the weights as they are now, on their device, for `metrics`."""
        in_force = {id(p): (p, value) for optimizer in self._optimizers for p, value in self._in_force(optimizer)}
        params = [param for param, _ in in_force.values()]
        squares = self._squares(params) if params else torch.zeros(0)
        self._measured = _Measured(squares, {key: value for key, (_, value) in in_force.items()}, [])

    def _squares(self, params: list[Tensor]) -> Tensor:
        pulled = [index for index, param in enumerate(params) if id(param) in self._starts]
        free = [index for index, param in enumerate(params) if id(param) not in self._starts]
        parts = []
        if free:
            parts.append(squared_norms([params[i] for i in free], [self._shards.get(id(params[i])) for i in free]))
        if pulled:
            starts = [self._starts[id(params[index])] for index in pulled]
            parts.append(squared_distances([params[index] for index in pulled], starts, self._shards))
        order = torch.tensor(free + pulled).argsort().to(parts[0].device, non_blocking=True)
        return torch.cat(parts)[order] if pulled else parts[0]

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
        metrics = self.peek()
        self._measured = None
        return metrics

    def peek(self, batches: int = 0) -> dict[str, float]:
        """Return the same of a step that is under way, which goes on.

        Args:
            batches: How many parts its loss will have, each about as large as those so far; 0 where it has them all.

        Raises:
            RuntimeError: If nothing was measured.
        """
        measured = self._measured
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
            parts = len(measured.losses)
            metrics["l2_penalty/objective"] = sum(numbers[count:]) * ((batches or parts) / parts) + total
        return metrics

    def decayed_twice(self) -> list[str]:
        """Return the names of parameters that their optimizer decays too, now or once a schedule rises from 0."""
        return [
            self._penalised[id(param)].name
            for optimizer in self._optimizers
            for group in decay_groups(optimizer).unnamed()
            if group.base
            for param in group.params
            if id(param) in self._penalised
        ]

    def _in_force(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, float]]:
        """Yield the penalised parameters of an optimizer with lambda in force, negative where it maximises."""
        for group in decay_groups(optimizer).unnamed():
            factor: float = ascent_sign(optimizer, group.parent)
            if self._follow_schedule:
                factor *= group.multiplier
            for param in group.params:
                entry = self._penalised.get(id(param))
                if entry is not None and param.requires_grad:
                    yield param, factor * entry.weight_decay


class _Joining(StepHook):
    """The part that joins the steps of one optimizer."""

    turn = Turn.PENALTY

    def __init__(self, penalty: L2Objective, optimizer: Optimizer) -> None:
        super().__init__(optimizer, "L2Penalty")
        self._penalty = penalty
        self._has_joined = False

    @torch.no_grad()
    def before_clipping(self) -> None:
        """Join the gradients, which clipping is then to see."""
        self._penalty.join_gradients(self.optimizer)
        self._has_joined = True

    def objective(self, loss: Any) -> Any:
        """Add the penalty."""
        return self._penalty.objective(self.optimizer, loss)

    def before_update(self) -> None:
        """Join the gradients of a step of which nobody told."""
        if not self._has_joined:
            # Where a GradScaler leaves unscaling to the optimizer, no hook before the step had unscaled gradients.
            scale = getattr(self.optimizer, "grad_scale", None)
            self._penalty.join_gradients(self.optimizer, 1.0 if scale is None else scale)
        self._has_joined = False


class _Measured(NamedTuple):
    """The squares of penalised weights, lambda of each by `id`, and the losses of one step's batches."""

    squares: Tensor
    in_force: dict[int, float]
    losses: list[Tensor]
