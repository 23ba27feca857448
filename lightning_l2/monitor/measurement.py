"""What one training step shows of the watched parameters, measured on their device and fetched at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_l2.monitor.histograms import count
from lightning_l2.monitor.rotation import equilibrium_angle, learning_rate, norm_power
from lightning_l2.monitor.spectra import as_matrix, bidiagonal
from lightning_l2.norms.inner_products import local_inner_products
from lightning_l2.norms.layout import plain_part
from lightning_l2.norms.squared import local_squared_norms
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.sharding import local_part, process_groups, sum_over_shards, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.optim import Optimizer

    from lightning_l2.monitor.layers import Watched

Values: TypeAlias = dict[int, float]
"""One number a watched parameter, by its index."""


class GroupValues(NamedTuple):
    """What a parameter group's step goes by.

    Args:
        weight_decay: Lambda in force.
        lr: Learning rate.
        angle: `rotation.equilibrium_angle` of the group, in radians; None if it is unknown or not wanted.
        power: `rotation.norm_power` of the optimizer.
    """

    weight_decay: float
    lr: float
    angle: float | None
    power: int


class Fetched(NamedTuple):
    """What a reading found.

    Args:
        sums: Sums of squares or products of each parameter: `weights`, `gradients`, `updates`, `products`.
        others: Other measurements of a parameter, as one list of numbers each.
    """

    sums: dict[str, Values]
    others: dict[tuple[str, int], list[float]]


class Reading:
    """The measurements of one step, kept on the device until `fetch`.

    Args:
        watched: The parameters.
        optimizers: Bare torch optimizers.
        step: The step's label.
        rotation: Whether learning rates and the angles that they lead to are wanted.
    """

    def __init__(self, watched: Watched, optimizers: Sequence[Optimizer], step: int, *, rotation: bool = False) -> None:
        self.step = step
        self._rotation = rotation
        # by the optimizer's number
        self._groups: dict[int, list[GroupValues]] = {}
        # by quantity, gradients by the optimizer's number too: indices of parameters and one number for each
        self._sums: dict[tuple[str, int], tuple[Sequence[int], Tensor]] = {}
        # by quantity and the parameter's index
        self._others: dict[tuple[str, int], Tensor] = {}
        self._before: list[Tensor] | None = None
        self.regroup(watched, optimizers)

    @property
    def groups(self) -> list[GroupValues]:
        """What the step of each parameter group goes by, in the order of the watched groups."""
        return [values for number in sorted(self._groups) for values in self._groups[number]]

    def regroup(self, watched: Watched, optimizers: Sequence[Optimizer]) -> None:
        """Read the groups of all optimizers; `watched` has the same parameters as before."""
        self.watched = watched
        for number, optimizer in enumerate(optimizers):
            self.read_groups(number, optimizer)

    def read_groups(self, number: int, optimizer: Optimizer) -> None:
        """Read lambda and what else is in force in the groups of the optimizer of that number."""
        power = norm_power(optimizer) if self._rotation else 1
        self._groups[number] = [
            GroupValues(
                float(group.weight_decay),
                learning_rate(group.parent) if self._rotation else math.nan,
                equilibrium_angle(optimizer, {**group.parent, "weight_decay": float(group.weight_decay)})
                if self._rotation
                else None,
                power,
            )
            for group in decay_groups(optimizer).unnamed()
        ]

    def read_weights(self, keep: bool = False) -> None:
        """Measure the weights; `keep` a copy of them, in fp32 or wider, for `read_updates`."""
        parameters = self.watched.parameters
        self._sums["weights", 0] = range(len(parameters)), local_squared_norms(parameters)
        if keep:
            self._before = [_wide_copy(local_part(parameter).detach()) for parameter in parameters]

    def read_spectra(self) -> None:
        """Reduce each logged weight matrix to a bidiagonal one, which tells its extreme singular values."""
        for index, weight in self._whole_weights():
            matrix = as_matrix(weight)
            if matrix is not None:
                self._others["spectra", index] = bidiagonal(matrix)

    def read_histograms(self) -> None:
        """Count the entries of the logged weights; real and imaginary parts of complex ones."""
        for index, weight in self._whole_weights():
            if weight.numel():
                self._others["histogram", index] = count(plain_part(weight))

    def read_gradients(self, number: int, optimizer: Optimizer) -> None:
        """Measure the gradients of one optimizer's parameters; the last reading of an optimizer counts."""
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        indices, gradients = [], []
        for index, parameter in enumerate(self.watched.parameters):
            if id(parameter) not in mine:
                continue
            gradient = parameter.grad
            if gradient is None and self.watched.sharded and (self.watched.shards[index] or process_groups(parameter)):
                # Other processes may have a gradient for their part, and all must join the sum.
                gradient = torch.zeros(0, device=parameter.device)
            if gradient is not None:
                indices.append(index)
                gradients.append(gradient)
        self._sums["gradients", number] = indices, local_squared_norms(gradients)

    def has_gradients(self, number: int) -> bool:
        """Return whether the gradients of an optimizer's parameters were measured."""
        return ("gradients", number) in self._sums

    def read_loss(self, loss: Tensor) -> None:
        """Keep the loss, as it is on this process."""
        self._others["loss", 0] = loss

    @torch.no_grad()
    def read_updates(self) -> None:
        """Measure how the weights moved since `read_weights`; the copy becomes the difference and is let go."""
        if self._before is None:
            return
        after = [local_part(parameter).detach() for parameter in self.watched.parameters]
        difference, self._before = self._before, None
        # one launch for all parameters, for which torch has no public name
        torch._foreach_sub_(difference, after)
        indices = range(len(after))
        self._sums["updates", 0] = indices, local_squared_norms(difference)
        if self._rotation:
            self._sums["products", 0] = indices, local_inner_products(difference, after)

    def fetch(self) -> Fetched:
        """Bring everything to the host, by one collective where parameters are sharded and one transfer."""
        _, weights = self._sums["weights", 0]
        # the sums of an optimizer without gradients, or with all of its parameters elsewhere, are on another device
        sums = torch.cat([values.to(weights, non_blocking=True) for _, values in self._sums.values()])
        if self.watched.sharded:
            parameters, shards = self.watched.parameters, self.watched.shards
            owners = [index for indices, _ in self._sums.values() for index in indices]
            sum_over_shards(sums, [parameters[owner] for owner in owners], [shards[owner] for owner in owners])
        others = [other.detach().to(sums.device, sums.dtype, non_blocking=True) for other in self._others.values()]
        numbers: list[float] = torch.cat([sums, *(other.flatten() for other in others)]).tolist()
        fetched = Fetched({}, {})
        start = 0
        for (name, _), (indices, _) in self._sums.items():
            fetched.sums.setdefault(name, {}).update(zip(indices, numbers[start:], strict=False))
            start += len(indices)
        for key, other in self._others.items():
            fetched.others[key] = numbers[start : start + other.numel()]
            start += other.numel()
        return fetched

    def _whole_weights(self) -> Iterator[tuple[int, Tensor]]:
        for index, (parameter, layer) in enumerate(zip(self.watched.parameters, self.watched.layers, strict=True)):
            # The pieces that FSDP1 cuts are no matrices, and have no other place to be gathered from.
            if layer is not None and self.watched.shards[index] is None:
                yield index, whole(parameter).detach()


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.clone()
