"""What one training step shows of the watched parameters, read on their device and fetched at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_l2.norms.squared import local_squared_norms
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.sharding import gradient_of, local_part, process_groups, sum_over_shards, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.optim import Optimizer

    from lightning_l2.decay.start import Start
    from lightning_l2.monitor.layers import Watched

Values: TypeAlias = dict[int, Any]
"""What was read of watched parameters, by their index."""


@dataclass(frozen=True)
class Reading:
    """What logged quantities are made of: something that is read of each parameter, or of each parameter group.

    Args:
        of: What `read` is given, and when. `"weights"`: the parameters before a step. `"gradients"`: the gradients.
            `"moves"`: the weights before minus those after a step, and those after it. For these it returns one number
            each, to be added up where a parameter is spread over processes. `"wholes"`: one logged weight, gathered;
            it returns a tensor, or None. `"groups"`: an optimizer, and a part of its groups that decays alike, when
            the optimizer has updated; it returns a number on the host. `"distances"`: the parameters before a step and
            what this process holds of them when training began. `"start"`: nothing; it stands for `WEIGHTS` when
            training began.
        read: The function.
        found: With `"wholes"`: what the host makes of the list of numbers that was read.
    """

    of: Literal["weights", "gradients", "moves", "wholes", "groups", "distances", "start"]
    read: Callable[..., Any]
    found: Callable[[list[float]], Any] = list


WEIGHTS = Reading("weights", local_squared_norms)


@dataclass
class Step:
    """What was read in a step, on the host.

    Args:
        watched: The parameters.
        values: By reading, a value for each parameter that it was made of.
        groups: By reading, a number for each watched parameter group.
        loss: The loss, if it was read.
    """

    watched: Watched
    values: dict[Reading, Values]
    groups: dict[Reading, list[Any]]
    loss: float | None = None
    _layers: dict[Reading, dict[str, float]] = field(default_factory=dict)

    def layers(self, reading: Reading) -> dict[str, float]:
        """Add up what was read of each layer's parameters, and of all under `total`."""
        if reading not in self._layers:
            self._layers[reading] = self.watched.by_layer(self.values[reading])
        return self._layers[reading]

    def owners(self, reading: Reading) -> Values:
        """Return what was read of each parameter's group, of those that have one."""
        numbers = self.groups[reading]
        return {index: numbers[owner] for index, owner in enumerate(self.watched.owners) if owner is not None}

    def has(self, readings: Iterable[Reading]) -> bool:
        """Return whether all of these were made."""
        return all(reading in self.values or reading in self.groups for reading in readings)


class Measurement:
    """The readings of one step, kept on the device until `fetch`.

    Args:
        step: The step's label.
        watched: The parameters.
        optimizers: Bare torch optimizers.
        readings: What to read, in the same order in all processes; the weights are read at any rate.
        start: The weights that training began with, for distances from them.
    """

    def __init__(
        self,
        step: int,
        watched: Watched,
        optimizers: Sequence[Optimizer],
        readings: Iterable[Reading] = (),
        start: Start | None = None,
    ) -> None:
        self.step = step
        self._start = start
        self._readings = list(dict.fromkeys([WEIGHTS, *readings]))
        # by the optimizer's number
        self._groups: dict[int, dict[Reading, list[Any]]] = {}
        # by reading, gradients by the optimizer's number too: indices of parameters and one number for each
        self._sums: dict[tuple[Reading, int], tuple[Sequence[int], Tensor]] = {}
        # by reading and the parameter's index
        self._wholes: dict[tuple[Reading, int], Tensor] = {}
        self._before: list[Tensor] | None = None
        self._loss: Tensor | None = None
        self.regroup(watched, optimizers)

    def regroup(self, watched: Watched, optimizers: Sequence[Optimizer]) -> None:
        """Read the groups of all optimizers; `watched` has the same parameters as before."""
        self.watched = watched
        for number, optimizer in enumerate(optimizers):
            self.read_groups(number, optimizer)

    def read_groups(self, number: int, optimizer: Optimizer) -> None:
        """Read lambda and what else is in force in the groups of the optimizer of that number."""
        parts, readings = decay_groups(optimizer).unnamed(), self._of("groups")
        self._groups[number] = {reading: [reading.read(optimizer, part) for part in parts] for reading in readings}

    def read_weights(self) -> None:
        """Read the weights; a copy of them, in fp32 or wider, is kept if their moves are to be read."""
        parameters = self.watched.parameters
        for reading in self._of("weights"):
            self._sums[reading, 0] = range(len(parameters)), reading.read(parameters)
        if self._start is not None:
            for reading in self._of("distances"):
                starts = map(self._start.of, parameters)
                self._sums[reading, 0] = range(len(parameters)), reading.read(parameters, starts)
        if self._of("moves"):
            self._before = [_wide_copy(local_part(parameter).detach()) for parameter in parameters]
        if wholes := self._of("wholes"):
            self._read_wholes(wholes)

    def read_gradients(self, number: int, optimizer: Optimizer) -> None:
        """Read the gradients of one optimizer's parameters; the last reading of an optimizer counts."""
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        indices, gradients = [], []
        for index, parameter in enumerate(self.watched.parameters):
            if id(parameter) not in mine:
                continue
            gradient = gradient_of(parameter)
            if gradient is None and self.watched.sharded and (self.watched.shards[index] or process_groups(parameter)):
                # Other processes may have a gradient for their part, and all must join the sum.
                gradient = torch.zeros(0, device=parameter.device)
            if gradient is not None:
                indices.append(index)
                gradients.append(gradient)
        for reading in self._of("gradients"):
            self._sums[reading, number] = indices, reading.read(gradients)

    def has_gradients(self, number: int) -> bool:
        """Return whether the gradients of an optimizer's parameters were read."""
        return any((reading, number) in self._sums for reading in self._of("gradients"))

    def read_loss(self, loss: Tensor) -> None:
        """Keep the loss, as it is on this process."""
        self._loss = loss

    @torch.no_grad()
    def read_moves(self) -> None:
        """Read how the weights moved since `read_weights`; the copy becomes the difference and is let go."""
        if self._before is None:
            return
        after = [local_part(parameter).detach() for parameter in self.watched.parameters]
        difference, self._before = self._before, None
        # one launch for all parameters, for which torch has no public name
        torch._foreach_sub_(difference, after)
        for reading in self._of("moves"):
            self._sums[reading, 0] = range(len(after)), reading.read(difference, after)

    def fetch(self) -> Step:
        """Bring everything to the host, by one collective where parameters are sharded and one transfer."""
        _, weights = self._sums[WEIGHTS, 0]
        # the sums of an optimizer without gradients, or with all of its parameters elsewhere, are on another device
        sums = torch.cat([values.to(weights, non_blocking=True) for _, values in self._sums.values()])
        if self.watched.sharded:
            parameters, shards = self.watched.parameters, self.watched.shards
            owners = [index for indices, _ in self._sums.values() for index in indices]
            sum_over_shards(sums, [parameters[owner] for owner in owners], [shards[owner] for owner in owners])
        others = [*self._wholes.values(), *([] if self._loss is None else [self._loss])]
        others = [other.detach().to(sums.device, sums.dtype, non_blocking=True).flatten() for other in others]
        numbers: list[float] = torch.cat([sums, *others]).tolist()
        groups = {
            reading: [one for number in sorted(self._groups) for one in self._groups[number][reading]]
            for reading in self._of("groups")
        }
        step = Step(self.watched, {}, groups, None if self._loss is None else numbers[-1])
        start = 0
        for (reading, _), (indices, _) in self._sums.items():
            step.values.setdefault(reading, {}).update(zip(indices, numbers[start:], strict=False))
            start += len(indices)
        for (reading, index), other in self._wholes.items():
            stop = start + other.numel()
            step.values.setdefault(reading, {})[index] = reading.found(numbers[start:stop])
            start = stop
        return step

    def _of(self, what: str) -> list[Reading]:
        return [reading for reading in self._readings if reading.of == what]

    def _read_wholes(self, readings: list[Reading]) -> None:
        for index, (parameter, layer) in enumerate(zip(self.watched.parameters, self.watched.layers, strict=True)):
            # The pieces that FSDP1 cuts are no matrices, and have no other place to be gathered from.
            if layer is None or self.watched.shards[index] is not None:
                continue
            weight = whole(parameter).detach()
            for reading in readings:
                if (found := reading.read(weight)) is not None:
                    self._wholes[reading, index] = found


def _wide_copy(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.clone()
