"""Measure and report single steps of a training for `L2NormMonitor`, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_l2.monitor.layers import Watched, regroup, signature, watch
from lightning_l2.monitor.measurement import Reading
from lightning_l2.monitor.report import NormReport, Observed
from lightning_l2.optimizers.inner import is_hookable
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.sharding import show_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_l2.monitor.options import NormOptions


class NormTracker:
    """Measure single steps: `begin` before the forward pass, `observe` after the optimizers have stepped.

    Args:
        options: What to measure.
        initial: Squared norm of each parameter at the start of training by name; the first measurement fills it.

    Attributes:
        seen: For the caller: the label of the last step that began, None at first.
        has_updated: Whether an optimizer has updated since a step began.
    """

    def __init__(self, options: NormOptions, initial: dict[str, float]) -> None:
        self.seen: int | None = None
        self._options = options
        self._initial = initial
        self._report = NormReport(options, initial)
        self._reading: Reading | None = None
        self.has_updated = False
        self._watched: Watched | None = None
        self._parameters: list[nn.Parameter] = []
        self._signature: tuple[object, ...] = ()
        self._groups: tuple[object, ...] = ()
        self._optimizers: Sequence[Optimizer] = ()
        self._hooks: list[_ReadingHook] = []

    @property
    def step(self) -> int | None:
        """The step that is being measured, None between measurements."""
        return None if self._reading is None else self._reading.step

    def begin(
        self, step: int, model: nn.Module, optimizers: Sequence[Optimizer], root: nn.Module | None, order: int | None
    ) -> None:
        """Measure the weights that a step's first forward pass is about to use.

        Args:
            step: The step's label.
            model: The model.
            optimizers: Its bare optimizers.
            root: The outermost module, where a strategy wrapped the model.
            order: How many steps were logged before this one, None if this one isn't.
        """
        self.end()
        watched = self._watch(model, optimizers, root)
        if not watched.parameters:
            return
        options = self._options
        self._groups = signature((), optimizers)
        self.has_updated = False
        self._reading = Reading(watched, optimizers, step, rotation=options.rotation)
        self._reading.read_weights(keep=options.keeps_weights)
        if order is not None and options.spectra and order % options.spectra == 0:
            self._reading.read_spectra()
        if order is not None and options.histograms and order % options.histograms == 0:
            self._reading.read_histograms()
        for number, optimizer in enumerate(optimizers):
            if is_hookable(optimizer):
                self._hooks.append(_ReadingHook(self, number, optimizer))
        self._optimizers = optimizers

    def before_clipping(self, number: int, optimizer: Optimizer) -> None:
        """Measure the gradients of an optimizer's parameters, complete and not clipped yet."""
        if self._reading is not None and self._options.gradients == "before_clipping":
            self._reading.read_gradients(number, optimizer)

    def observe(self, loss: Tensor | None = None, batches: int = 1) -> Observed:
        """Compare with the weights after the step, and fetch and report everything.

        Args:
            loss: The loss of the step's last batch, as far as alarms need it.
            batches: Over how many batches gradients accumulated.
        """
        assert self._reading is not None
        reading, options = self._reading, self._options
        if loss is not None and options.alarms is not None and options.alarms.penalty is not None:
            reading.read_loss(loss)
        if options.keeps_weights:
            reading.read_updates()
        observed = self._report.report(reading, reading.fetch(), batches)
        self.end()
        return observed

    def peek(self) -> dict[str, float]:
        """Return the metrics that are known while a step is under way, which goes on."""
        assert self._reading is not None
        return NormReport(self._options, dict(self._initial)).report(self._reading, self._reading.fetch()).metrics

    def end(self) -> None:
        """Leave the step, measured or not."""
        self._reading = None
        while self._hooks:
            self._hooks.pop().remove()

    def after_update(self, number: int, optimizer: Optimizer) -> None:
        """Read what the step went by, which may have changed since its first batch, and its gradients."""
        self.has_updated = True
        if self._reading is not None:
            self._read_groups(self._reading, number, self._optimizers)
            gradients = self._options.gradients
            if gradients == "after_clipping" or (gradients and not self._reading.has_gradients(number)):
                self._reading.read_gradients(number, optimizer)

    def _read_groups(self, reading: Reading, number: int, optimizers: Sequence[Optimizer]) -> None:
        """Read an optimizer's groups, or those of all where some were added or split since the step began."""
        groups = signature((), optimizers)
        if groups == self._groups:
            reading.read_groups(number, optimizers[number])
            return
        options, self._groups = self._options, groups
        watched = regroup(reading.watched, optimizers, per=options.per, depth=options.depth, include=options.include)
        reading.regroup(watched, optimizers)

    def _watch(self, model: nn.Module, optimizers: Sequence[Optimizer], root: nn.Module | None) -> Watched:
        """Return what to watch, looked up again only if parameters or groups have changed: it takes a millisecond."""
        show_shards(model if root is None else root)
        if self._watched is None or self._signature != signature(self._parameters, optimizers):
            options = self._options
            self._parameters = list(model.parameters())
            self._signature = signature(self._parameters, optimizers)
            self._watched = watch(
                model, optimizers, per=options.per, depth=options.depth, include=options.include, root=root
            )
        return self._watched


class _ReadingHook(StepHook):
    """Has gradients and groups of one optimizer read in the step that is being measured."""

    turn = Turn.MONITOR

    def __init__(self, tracker: NormTracker, number: int, optimizer: Optimizer) -> None:
        super().__init__(optimizer, "L2NormMonitor")
        self._tracker, self._number = tracker, number

    def before_clipping(self) -> None:
        self._tracker.before_clipping(self._number, self.optimizer)

    def after_update(self) -> None:
        self._tracker.after_update(self._number, self.optimizer)
