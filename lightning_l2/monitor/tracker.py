"""Measure and report single steps of a training for `L2NormMonitor`, one after the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_l2.monitor.histograms import Histogram
from lightning_l2.monitor.layers import Watched, check_include, frozen_squares, regroup, signature, watch
from lightning_l2.monitor.measurement import WEIGHTS, Measurement, Step
from lightning_l2.monitor.quantities import START, Quantity, logged, wanted
from lightning_l2.optimizers.attachments import Attachments
from lightning_l2.optimizers.inner import is_hookable
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.param_groups.shrinkage import Shrinkage, count_shrinkage
from lightning_l2.rules.parameters import is_undecided
from lightning_l2.sharding import show_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_l2.decay.start import Start
    from lightning_l2.monitor.alarms import Alarm
    from lightning_l2.monitor.options import NormOptions


class Observed(NamedTuple):
    """What a step has shown.

    Args:
        step: Its label.
        metrics: Numbers by key.
        histograms: Histograms by key.
        alarms: What no earlier step has raised.
    """

    step: int
    metrics: dict[str, float]
    histograms: dict[str, Histogram]
    alarms: list[Alarm]


class NormTracker:
    """Measure single steps: `begin` before the forward pass, `observe` after the optimizers have stepped.

    Args:
        options: What to measure.
        initial: Squared norm of each parameter at the start of training by name, of frozen ones too; the first
            measurement fills it.
        start: The weights that training began with, for distances from them.

    Attributes:
        seen: For the caller: the label of the last step that began, None at first.
        is_logged: Whether the step is to be logged; another is measured for its totals.
        has_updated: Whether an optimizer has updated since a step began.
    """

    def __init__(self, options: NormOptions, initial: dict[str, float], start: Start | None = None) -> None:
        self.seen: int | None = None
        self.is_logged = self.has_updated = False
        self._options = options
        self._initial = initial
        self._start = start
        self._counts: Attachments[Shrinkage] = Attachments(lambda _, optimizer: count_shrinkage(optimizer))
        self._measurement: Measurement | None = None
        self._wanted: list[Quantity] = []
        # of the alarms: norms at the previous step, and what was raised
        self._previous: dict[str, float] = {}
        self._raised: set[tuple[str, str]] = set()
        self._watched: Watched | None = None
        self._parameters: list[nn.Parameter] = []
        self._signature: tuple[object, ...] = ()
        self._groups: tuple[object, ...] = ()
        self._optimizers: Sequence[Optimizer] = ()
        self._holders: Sequence[Any] = ()
        self._hooks: list[_ReadingHook] = []
        self._is_checked = self._has_begun = False

    @property
    def step(self) -> int | None:
        """The step that is being measured, None between measurements."""
        return None if self._measurement is None else self._measurement.step

    def begin(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        root: nn.Module | None = None,
        order: int | None = None,
        holders: Sequence[Any] = (),
    ) -> None:
        """Measure the weights that a step's first forward pass is about to use.

        Args:
            step: The step's label.
            model: The model.
            optimizers: Its bare optimizers.
            root: The outermost module, where a strategy wrapped the model.
            order: How many steps were logged before this one, None if this one isn't to be.
            holders: Optimizers around the bare ones.
        """
        self.end()
        self.count(optimizers)
        self.is_logged, self._holders = order is not None, holders
        watched = self._watch(model, optimizers, root)
        if not watched.parameters:
            return
        self._groups = signature((), optimizers)
        self.has_updated = False
        self._wanted = wanted(self._options, order)
        readings = [reading for quantity in self._wanted for reading in quantity.reads]
        self._measurement = Measurement(step, watched, optimizers, readings, self._start)
        self._measurement.read_weights()
        if self._options.keeps_initial and not self._has_begun:
            self._initial.update(frozen_squares(model, root) | self._initial)
        self._has_begun = True
        for number, optimizer in enumerate(optimizers):
            if is_hookable(optimizer):
                self._hooks.append(_ReadingHook(self, number, optimizer))
        self._optimizers = optimizers

    def count(self, optimizers: Sequence[Optimizer]) -> None:
        """Count what decay leaves of the weights, in each step of the optimizers from now on."""
        self._counts.follow([optimizer for optimizer in optimizers if is_hookable(optimizer)])

    def left(self) -> dict[str, float | None]:
        """Return what decay has left of the weights, by the names of the groups; None where it is not known."""
        return {name: left for one in self._counts for name, left in one.state_dict().items()}

    def go_on(self, left: Mapping[str, float | None]) -> None:
        """Go on from what `left` returned at another time."""
        for one in self._counts:
            one.go_on(left)

    def remove(self) -> None:
        """Leave the optimizers alone."""
        self.end()
        self._counts.remove()

    def before_clipping(self, number: int, optimizer: Optimizer) -> None:
        """Read the gradients of an optimizer's parameters, complete and not clipped yet."""
        if self._measurement is not None and self._options.gradients == "before_clipping":
            self._measurement.read_gradients(number, optimizer)

    def after_update(self, number: int, optimizer: Optimizer) -> None:
        """Read what the step went by, which may have changed since its first batch, and its gradients."""
        self.has_updated = True
        if self._measurement is not None:
            self._read_groups(self._measurement, number)
            gradients = self._options.gradients
            if gradients == "after_clipping" or (gradients and not self._measurement.has_gradients(number)):
                self._measurement.read_gradients(number, optimizer)

    def take_loss(self, loss: Tensor | None, batches: int = 1) -> None:
        """Take the loss of the step's last batch, as far as alarms need it.

        Args:
            loss: The loss.
            batches: Over how many batches gradients accumulated, each with its part of the loss.
        """
        alarms = self._options.alarms
        if loss is not None and alarms is not None and alarms.penalty is not None and self._measurement is not None:
            self._measurement.read_loss(loss * batches)

    def observe(self) -> Observed:
        """Compare with the weights after the step, fetch everything, and say what is to be logged."""
        assert self._measurement is not None
        label = self._measurement.step
        self._measurement.read_moves()
        step = self._fetch(self._initial)
        found = logged(step, self._wanted)
        histograms = {key: value for key, value in found.items() if isinstance(value, Histogram)}
        metrics = {key: value for key, value in found.items() if key not in histograms}
        raised = self._new_alarms(step, metrics["l2_penalty/total"])
        self.end()
        return Observed(label, metrics, histograms, raised)

    def peek(self) -> dict[str, float]:
        """Return the totals that are known while a step is under way, which goes on."""
        found = logged(self._fetch(dict(self._initial)), self._wanted)
        return {key: value for key, value in found.items() if key.endswith("/total")}

    def end(self) -> None:
        """Leave the step, measured or not."""
        self._measurement = None
        while self._hooks:
            self._hooks.pop().remove()

    def _fetch(self, initial: dict[str, float]) -> Step:
        assert self._measurement is not None
        step = self._measurement.fetch()
        if self._options.keeps_initial:
            names = step.watched.names
            weights = step.values[WEIGHTS]
            step.values[START] = {i: initial.setdefault(names[i], square) for i, square in weights.items()}
        return step

    def _new_alarms(self, step: Step, penalty: float) -> list[Alarm]:
        if self._options.alarms is None:
            return []
        norms, first = (_roots(step.layers(one)) if step.has([one]) else {} for one in (WEIGHTS, START))
        found = self._options.alarms.check(norms, self._previous, first, penalty, step.loss)
        new = [alarm for alarm in found if (alarm.kind, alarm.layer) not in self._raised]
        self._raised.update((alarm.kind, alarm.layer) for alarm in new)
        self._previous = norms
        return new

    def _read_groups(self, measurement: Measurement, number: int) -> None:
        """Read an optimizer's groups, or those of all where some were added or split since the step began."""
        groups = signature((), self._optimizers)
        if groups == self._groups:
            measurement.read_groups(number, self._optimizers[number])
            return
        self._groups = groups
        watched = regroup(measurement.watched, self._optimizers, **self._rolling())
        measurement.regroup(watched, self._optimizers)

    def _watch(self, model: nn.Module, optimizers: Sequence[Optimizer], root: nn.Module | None) -> Watched:
        """Return what to watch, looked up again only if parameters or groups have changed: it takes a millisecond."""
        show_shards(model if root is None else root)
        if self._watched is None or self._signature != signature(self._parameters, optimizers):
            self._parameters = list(model.parameters())
            self._signature = signature(self._parameters, optimizers)
            self._watched = watch(model, optimizers, root=root, **self._rolling())
            if not self._is_checked and not is_undecided(model):
                self._is_checked = True
                options = self._options
                check_include(model, self._watched, per=options.per, depth=options.depth, include=options.include)
        return self._watched

    def _rolling(self) -> dict[str, Any]:
        options = self._options
        return {"per": options.per, "depth": options.depth, "include": options.include, "holders": self._holders}


class _ReadingHook(StepHook):
    """Has gradients and groups of one optimizer read in the step that is being measured."""

    turn = Turn.MONITOR

    def __init__(self, tracker: NormTracker, number: int, optimizer: Optimizer) -> None:
        super().__init__(optimizer, "L2NormMonitor")
        self._tracker, self._number = tracker, number

    def before_clipping(self) -> None:
        self._tracker.before_clipping(self._number, self.optimizer)

    @torch.no_grad()
    def after_update(self) -> None:
        self._tracker.after_update(self._number, self.optimizer)


def _roots(squares: Mapping[str, float]) -> dict[str, float]:
    return {name: math.sqrt(square) for name, square in squares.items()}
