"""Values that other callbacks monitor: there from the first step on, and after a resume as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_l2.trainer.callback import Callback

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl


class MonitoredCallback(Callback):
    """A callback that puts values into `trainer.callback_metrics`.

    Those that somebody monitors are kept in checkpoints: between two logged steps a resumed training decides on what
    the whole one would.
    """

    def __init__(self) -> None:
        self._offered: set[str] = set()
        self._restored: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; here, since states are restored after it."""
        if stage == "fit":
            self._offered, self._restored = set(), {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back what was monitored; the sanity check is over, which forgets all metrics."""
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self._restored.items()})

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is monitored; another callback of the kind may have it in the same state."""
        keys = self._offered & _monitored_keys(trainer) & trainer.callback_metrics.keys()
        if keys:
            state = checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, {})
            state.setdefault("monitored", {}).update(
                {key: float(trainer.callback_metrics[key]) for key in sorted(keys)}
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember what was monitored."""
        self._restored = dict(checkpoint.get("callbacks", {}).get(self.state_key, {}).get("monitored", {}))
        self._offered |= self._restored.keys()

    def _offer(self, values: Mapping[str, float], *, is_logged: bool) -> dict[str, float]:
        """Return what may be monitored of a step: of one that isn't logged, what a resumed training doesn't know."""
        self._offered |= values.keys()
        return {key: value for key, value in values.items() if is_logged or key not in self._restored}


def _monitored_keys(trainer: Any) -> set[str]:
    watching = [*trainer.callbacks, *(getattr(callback, "schedule", None) for callback in trainer.callbacks)]
    return {str(getattr(one, "monitor", None)) for one in (*watching, *trainer.lr_scheduler_configs)}
