"""From what a step's reading measured to the metrics that are logged and the alarms that are raised, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lightning_l2.monitor.histograms import Histogram, histogram
from lightning_l2.monitor.quantities import (
    angular_updates,
    effective_lrs,
    norms,
    penalties,
    ratios,
    roots,
    spectral,
    squared_equilibria,
    strongest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_l2.monitor.alarms import Alarm
    from lightning_l2.monitor.measurement import Fetched, Reading, Values
    from lightning_l2.monitor.options import NormOptions


class Observed(NamedTuple):
    """What a step has shown.

    Args:
        metrics: Numbers by key.
        histograms: Histograms by key.
        alarms: What no earlier step has raised.
    """

    metrics: dict[str, float]
    histograms: dict[str, Histogram]
    alarms: list[Alarm]


class NormReport:
    """Turn readings into metrics, one after the other.

    Args:
        options: What to report.
        initial: Squared norm of each parameter at the start of training by name; the first reading fills it.
    """

    def __init__(self, options: NormOptions, initial: dict[str, float]) -> None:
        self._options = options
        self._initial = initial
        self._previous: dict[str, float] = {}
        self._raised: set[tuple[str, str]] = set()

    def report(self, reading: Reading, fetched: Fetched, batches: int = 1) -> Observed:
        """Return all that is to be logged of a reading.

        Args:
            reading: The reading.
            fetched: What it measured.
            batches: Over how many batches gradients accumulate, each with its part of the loss.
        """
        watched, squares = reading.watched, fetched.sums["weights"]
        layers, initial = watched.by_layer(squares), {}
        if self._options.keeps_initial:
            names = watched.names
            initial = watched.by_layer({i: self._initial.setdefault(names[i], squares[i]) for i in squares})
        shown = self._shown(layers)
        metrics = penalties(watched, squares, reading.groups)
        alarms = self._new_alarms(
            layers, initial, metrics["l2_penalty/total"], fetched.others.get(("loss", 0)), batches
        )
        self._previous = layers
        layers = {name: square for name, square in layers.items() if shown is None or name in shown}
        metrics |= norms("l2_norm", layers)
        if self._options.initial_ratio:
            metrics |= ratios("norm_ratio", layers, initial)
        if "gradients" in fetched.sums:
            gradients = watched.by_layer(fetched.sums["gradients"])
            metrics |= norms("grad_norm", {name: gradients[name] for name in gradients if name in layers})
        if "updates" in fetched.sums:
            metrics |= self._of_updates(reading, fetched.sums, layers)
        histograms = {}
        for (kind, index), numbers in fetched.others.items():
            name, is_shown = watched.names[index], watched.layers[index] in layers
            if kind == "spectra" and is_shown:
                metrics |= spectral(name, numbers, squares[index])
            if kind == "histogram" and is_shown:
                histograms[f"weights/{name}"] = histogram(numbers)
        return Observed(metrics, histograms, alarms)

    def _of_updates(
        self, reading: Reading, sums: Mapping[str, Values], layers: Mapping[str, float]
    ) -> dict[str, float]:
        watched, groups = reading.watched, reading.groups
        moved = {name: square for name, square in watched.by_layer(sums["updates"]).items() if name in layers}
        metrics: dict[str, float] = {}
        if self._options.updates:
            metrics |= norms("update_norm", moved) | ratios("update_ratio", moved, layers)
        if self._options.rotation:
            metrics |= angular_updates(layers, moved, watched.by_layer(sums["products"]))
            if expected := squared_equilibria(watched, sums["weights"], groups):
                metrics |= ratios("angular_equilibrium", watched.by_layer(expected), layers)
            metrics |= effective_lrs(watched, sums["weights"], groups, layers)
        return metrics

    def _new_alarms(
        self,
        layers: Mapping[str, float],
        initial: Mapping[str, float],
        penalty: float,
        loss: Sequence[float] | None,
        batches: int,
    ) -> list[Alarm]:
        if self._options.alarms is None:
            return []
        found = self._options.alarms.check(
            roots(layers), roots(self._previous), roots(initial), penalty, loss[0] * batches if loss else None
        )
        new = [alarm for alarm in found if (alarm.kind, alarm.layer) not in self._raised]
        self._raised.update((alarm.kind, alarm.layer) for alarm in new)
        return new

    def _shown(self, squares: Mapping[str, float]) -> set[str] | None:
        if self._options.top_k is None:
            return None
        previous = self._previous if self._options.top_k_by == "change" else None
        return strongest(self._options.top_k, squares, previous) | {"total"}
