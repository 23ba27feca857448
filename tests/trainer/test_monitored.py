"""What EarlyStopping and ModelCheckpoint find under our keys, within the first window and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_l2 import L2NormMonitor, L2Penalty, NormConstraint
from tests.helpers import DECAYED, ValidatedNet, batches, make_trainer

MAKE: dict[str, Any] = {
    "l2_norm/total": lambda every: L2NormMonitor(every_n_steps=every),
    "l2_penalty/loss": lambda every: L2Penalty(0.5, every_n_steps=every),
    "l2_penalty/objective": lambda every: L2Penalty(0.5, log_objective=True, every_n_steps=every),
    "norm_constraint/slack": lambda every: NormConstraint(100.0, every_n_steps=every),
}
EXACT: dict[str, Any] = {
    "l2_norm/total": lambda w: sum(p.square().sum() for name, p in w.items() if name != "loss").sqrt(),
    "l2_penalty/loss": lambda w: 0.25 * sum(w[name].square().sum() for name in DECAYED),
    "l2_penalty/objective": lambda w: EXACT["l2_penalty/loss"](w) + w["loss"],
    "norm_constraint/slack": lambda w: 100.0 - max(w[name].norm() for name in DECAYED),
}
KEYS = pytest.mark.parametrize("key", MAKE)


class Watched(ValidatedNet):
    """Notes the value of a key, and the weights that it is of, at each validation."""

    def __init__(self, key: str) -> None:
        torch.manual_seed(0)
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.1))
        self.key = key
        self.seen: dict[int, float] = {}
        self.exact: dict[int, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.loss = super().training_step(batch, batch_idx)
        return self.loss

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
            values = {name: p.detach().double() for name, p in self.named_parameters()} | {"loss": self.loss.detach()}
            self.exact[batch] = float(EXACT[self.key](values))
            self.seen[batch] = float(self.trainer.callback_metrics[self.key])


@KEYS
@pytest.mark.parametrize("first", [False, True], ids=["monitored first", "monitored last"])
def test_it_is_there_at_a_validation_within_the_first_window(key: str, first: bool, tmp_path: Path) -> None:
    module = Watched(key)
    callbacks = [EarlyStopping(key, patience=9), MAKE[key](1)][:: -1 if first else 1]
    saving = ModelCheckpoint(tmp_path, monitor=key)
    trainer = make_trainer(
        [*callbacks, saving], accumulate_grad_batches=4, val_check_interval=2, enable_checkpointing=True
    )
    trainer.fit(module, batches(8), batches(1))
    assert module.seen[1] == pytest.approx(module.exact[1], rel=1e-6)
    assert saving.best_model_score is not None


@KEYS
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_decides_on_what_the_whole_one_would(key: str, accumulate: int, tmp_path: Path) -> None:
    def fit(resume: Path | None = None) -> Watched:
        module = Watched(key)
        saving = ModelCheckpoint(tmp_path, "{step}", monitor=key, every_n_train_steps=1, save_top_k=-1)
        callbacks: list[pl.Callback] = [MAKE[key](3), EarlyStopping(key, patience=99), saving]
        trainer = make_trainer(
            callbacks, max_epochs=2, accumulate_grad_batches=accumulate, val_check_interval=2, enable_checkpointing=True
        )
        trainer.fit(module, batches(6), batches(1), ckpt_path=resume)
        return module

    whole = fit()
    for step in (1, 3, 4):
        resumed = fit(tmp_path / f"step={step}.ckpt")
        assert resumed.seen == {batch: value for batch, value in whole.seen.items() if batch in resumed.seen}
        assert resumed.seen


def test_checkpoints_keep_what_is_monitored_and_nothing_else(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "last", monitor="l2_norm/total")
    callbacks = [L2NormMonitor(every_n_steps=1, updates=True), L2Penalty(0.5), NormConstraint(2.0), saving]
    make_trainer(callbacks, enable_checkpointing=True).fit(Watched("l2_norm/total"), batches(2), batches(1))
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    kept = {key: state["monitored"] for key, state in states.items() if "monitored" in state}
    assert list(kept) == ["L2NormMonitor"]
    assert list(kept["L2NormMonitor"]) == ["l2_norm/total"]
