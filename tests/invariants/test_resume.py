"""A resumed run goes on as the uninterrupted one: the same lambda at every real step, the same weights at the end."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DecayWatch, Net, Shrinking, assert_same_weights, batches, make_trainer, weights

pytestmark = [
    # What Lightning says of any such resume: equal batches need no resumable loader, saving callbacks may go.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # Said to everyone who has an OnExceptionCheckpoint, of which Lightning looks for the last one.
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint"),
    pytest.mark.filterwarnings("ignore:..fit.ckpt_path=None.. was called without a model"),
]


def ours(interval: str = "step") -> list[pl.Callback]:
    return [
        WeightDecay(0.2, summary=False),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), interval=interval),
    ]


class SaveIn(pl.Callback):
    """Write a checkpoint in one hook, once a given number of steps is done."""

    def __init__(self, hook: str, after: int, path: Path) -> None:
        self.after, self.path = after, path
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after and not self.path.exists():
            trainer.save_checkpoint(self.path)


def annealed(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def fit(callbacks: list[pl.Callback], ckpt_path: Path | None = None, **options: Any) -> Shrinking:
    model = Shrinking(scheduler=annealed)
    trainer = make_trainer(callbacks, max_epochs=3, **options)
    trainer.fit(model, batches(6), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    ("hook", "after"),
    [
        ("on_train_batch_end", 1),
        ("on_train_batch_end", 8),
        ("on_train_batch_end", 12),
        ("on_train_epoch_end", 6),
        ("on_train_epoch_end", 12),
        ("on_validation_end", 6),
        ("on_validation_epoch_end", 12),
    ],
)
def test_from_a_checkpoint_saved_in(hook: str, after: int, interval: str, position: str, tmp_path: Path) -> None:
    class Validated(Shrinking):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    path = tmp_path / "saved.ckpt"
    save = SaveIn(hook, after, path)
    everybody = [save, *ours(interval)] if position == "before" else [*ours(interval), save]

    def run(callbacks: list[pl.Callback], ckpt_path: Path | None = None) -> Shrinking:
        model = Validated(scheduler=annealed)
        trainer = make_trainer(callbacks, max_epochs=3, num_sanity_val_steps=0)
        trainer.fit(model, batches(6), batches(1), ckpt_path=ckpt_path)
        return model

    whole = run(everybody)
    expected = 0.2 * (np.arange(18) / 17 if interval == "step" else np.repeat([0.0, 0.5, 1.0], 6))
    np.testing.assert_allclose(whole.watches[0].of("head.weight"), expected, rtol=1e-8, atol=1e-12)
    resumed = run(ours(interval), path)
    np.testing.assert_allclose(resumed.watches[0].of("head.weight"), expected[after:], rtol=1e-8, atol=1e-12)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("steps", [4, 7, 12])
def test_from_the_checkpoints_of_model_checkpoint(steps: int, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit([saving, *ours()], enable_checkpointing=True)
    resumed = fit(ours(), tmp_path / f"step={steps}.ckpt")
    np.testing.assert_allclose(
        resumed.watches[0].of("head.weight"), 0.2 * np.arange(steps, 18) / 17, rtol=1e-8, atol=1e-12
    )
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("stop_at", [5, 6, 12])
def test_after_an_exception_the_saved_checkpoint_goes_on(stop_at: int, tmp_path: Path) -> None:
    class Power(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == stop_at:
                raise RuntimeError("power cut")

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="power cut"):
        fit([*ours(), Power(), saving], enable_checkpointing=True)
    resumed = fit(ours(), tmp_path / f"step={stop_at}.ckpt")
    assert_same_weights(resumed, fit(ours()))


IN_A_BATCH = [
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
]
BETWEEN_EPOCHS = ["on_train_epoch_start", "on_validation_start", "on_train_epoch_end"]


class Validated(Shrinking):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def validated(callbacks: list[pl.Callback], accumulate: int = 1, ckpt_path: Path | None = None) -> DecayWatch:
    model = Validated(scheduler=annealed)
    trainer = make_trainer(callbacks, max_epochs=3, num_sanity_val_steps=0, accumulate_grad_batches=accumulate)
    trainer.fit(model, batches(6), batches(1), ckpt_path=ckpt_path)
    return model.watches[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """A folder with a checkpoint of each hook, saved in one fit after so many steps."""

    @functools.cache
    def save(accumulate: int, after: int) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        saves = [SaveIn(hook, after, folder / f"{hook}.ckpt") for hook in IN_A_BATCH + BETWEEN_EPOCHS]
        validated([*saves, *ours()], accumulate)
        return folder

    return save


@pytest.mark.parametrize(
    ("accumulate", "after", "hook"),
    [
        *((1, 6, hook) for hook in IN_A_BATCH + BETWEEN_EPOCHS),
        *((1, 8, hook) for hook in IN_A_BATCH),
        *((3, 2, hook) for hook in IN_A_BATCH + BETWEEN_EPOCHS),
        *((3, 3, hook) for hook in IN_A_BATCH),
    ],
)
def test_wherever_it_was_saved_the_clock_is_that_of_lr(
    hook: str, accumulate: int, after: int, saved: Callable[[int, int], Path]
) -> None:
    """Lightning repeats or leaves out a batch after some of these; lambda and lr must still go together."""
    total = 18 // accumulate
    watch = validated(ours(), accumulate, saved(accumulate, after) / f"{hook}.ckpt")
    clock = 0.1 / np.array(watch.lrs) - 1
    assert len(clock) >= total - after - 6 // accumulate
    np.testing.assert_allclose(watch.of("head.weight"), 0.2 * clock / (total - 1), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("stop_in", ["training_step", "on_train_batch_start", "on_train_batch_end"])
def test_from_the_checkpoint_of_an_exception(stop_in: str, tmp_path: Path) -> None:
    """Lightning's OnExceptionCheckpoint saves in the middle of a batch."""
    broken = Shrinking(scheduler=annealed)

    def stop(*args: Any) -> Any:
        if broken.global_step == 8:
            raise RuntimeError("power cut")
        return broken.loss()

    setattr(broken, stop_in, stop)
    trainer = make_trainer([*ours(), OnExceptionCheckpoint(tmp_path, "cut")], max_epochs=3, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(broken, batches(6))
    watch = fit(ours(), tmp_path / "cut.ckpt").watches[0]
    clock = 0.1 / np.array(watch.lrs) - 1
    assert len(clock) >= 9
    np.testing.assert_allclose(watch.of("head.weight"), 0.2 * clock / 17, rtol=1e-7, atol=1e-12)


def test_in_the_middle_of_an_accumulation_window(tmp_path: Path) -> None:
    """Lightning loses the gradients of the window; the clock must still be the one lr follows."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.current_epoch == 1 and index == 4:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    fit([*ours(), Save()], accumulate_grad_batches=3)
    watch = fit(ours(), tmp_path / "saved.ckpt", accumulate_grad_batches=3).watches[0]
    clock = 0.1 / np.array(watch.lrs) - 1
    np.testing.assert_allclose(clock, [3, 4, 5])
    np.testing.assert_allclose(watch.of("head.weight"), 0.2 * clock / 5, rtol=1e-7, atol=1e-12)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01, weight_decay=0.1)


def test_twice_resumed_with_momentum(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None, save: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Net(adam)
        callbacks = [
            WeightDecay(0.2, summary=False),
            WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), total_steps=18),
        ]
        trainer = make_trainer(callbacks, max_epochs=epochs)
        trainer.fit(model, batches(6), ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(save)
        return weights(model)

    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    run(1, None, first)
    run(2, first, second)
    assert_same_weights(run(3, second, None), run(3, None, None))


def test_manual_optimizers_of_different_cadence(tmp_path: Path) -> None:
    class Manual(Shrinking):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            body, head = self.optimizers()
            for optimizer in [head] + [body] * (batch_idx % 2):
                optimizer.zero_grad()
                self.manual_backward(self.loss())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            optimizers = [self.make_optimizer(part.parameters()) for part in (self.body, self.head)]
            self.watches = [DecayWatch(self, optimizer) for optimizer in optimizers]
            return optimizers

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor=None)
    whole, resumed = Manual(), Manual()
    make_trainer([*ours(), saving], max_epochs=3, enable_checkpointing=True).fit(whole, batches(6))
    make_trainer(ours(), max_epochs=3).fit(resumed, batches(6), ckpt_path=tmp_path / "epoch=0.ckpt")
    clock = 0.2 * np.arange(18) / 17
    for model, start in ((whole, 0), (resumed, 6)):
        np.testing.assert_allclose(model.watches[1].of("head.weight"), clock[start:], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(model.watches[0].of("body.0.weight"), clock[start + 1 :: 2], rtol=1e-8, atol=1e-12)
    assert_same_weights(resumed, whole)
