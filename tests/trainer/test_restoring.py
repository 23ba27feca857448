"""Where the start is found again when a training is resumed, and where that is impossible."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_l2 import L2Penalty, WeightDecay
from lightning_l2.trainer.restoring import before_restoring
from tests.helpers import DECAYED, Net, assert_same_weights, batches, data, make_trainer, weights

pytestmark = [
    # Penalty and decay at once shrink twice, which here is meant.
    pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]
OURS: dict[str, Callable[[], list[pl.Callback]]] = {
    "decay": lambda: [WeightDecay(0.5, towards="start", summary=False)],
    "cautious": lambda: [WeightDecay(0.5, apply="cautious", towards="start", summary=False)],
    "cpu": lambda: [WeightDecay(0.5, apply="decoupled", towards="start", start_device="cpu", summary=False)],
    "penalty": lambda: [L2Penalty(0.5, towards="start")],
    "both": lambda: [WeightDecay(0.2, towards="start", summary=False), L2Penalty(0.5, towards="start")],
}
EVERY = pytest.mark.parametrize("ours", OURS.values(), ids=OURS.keys())


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)


def made(seed: int = 3, make: Callable[..., Any] = Net) -> Any:
    torch.manual_seed(seed)
    return make(adamw)


def fit(model: Any, callbacks: list[pl.Callback], folder: Path, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Train for two epochs, with a checkpoint after each of them."""
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    options = {"max_epochs": 2, "enable_checkpointing": True, **options}
    trainer = make_trainer([*callbacks, saving], **options)
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return trainer


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@EVERY
def test_resumed_bit_equal_without_a_copy_in_the_checkpoint(ours: Any, tmp_path: Path) -> None:
    whole = made()
    origin = weights(whole)
    fit(whole, ours(), tmp_path)
    path = tmp_path / "epoch=0.ckpt"
    saved = load(path)
    states = {key: state for key, state in saved["callbacks"].items() if key in ("WeightDecay", "L2Penalty")}
    assert len(states) == len(ours())
    for state in states.values():
        assert state["start"] == {name: pytest.approx(origin[name].norm().item(), rel=1e-6) for name in DECAYED}
        assert tensors_in(state) == []
    fit(made(), [], tmp_path / "without")
    without = load(tmp_path / "without" / "epoch=0.ckpt")
    assert [t.shape for t in tensors_in(saved)] == [t.shape for t in tensors_in(without)]
    resumed = made()
    fit(resumed, ours(), tmp_path / "again", path)
    assert_same_weights(resumed, whole)
    first, second = load(tmp_path / "epoch=1.ckpt"), load(tmp_path / "again" / "epoch=1.ckpt")
    for key in states:
        assert first["callbacks"][key]["start"] == second["callbacks"][key]["start"] == states[key]["start"]


@EVERY
def test_another_start_is_an_error_before_the_first_step(ours: Any, tmp_path: Path) -> None:
    fit(made(), ours(), tmp_path, max_epochs=1)
    path, other = tmp_path / "epoch=0.ckpt", made(seed=4)
    kept = weights(other)
    with pytest.raises(
        RuntimeError, match=r"^2 parameters don't start from the weights that training began with: the "
    ):
        fit(other, ours(), tmp_path / "again", path)
    assert_same_weights(other, load(path)["state_dict"])
    assert not torch.equal(kept["head.weight"], weights(other)["head.weight"])
    # the same callbacks and modules then train on as if nothing had been
    fresh, again = made(), ours()
    with pytest.raises(RuntimeError, match="don't start from"):
        fit(made(seed=4), again, tmp_path / "more", path)
    fit(fresh, again, tmp_path / "fresh")
    expected = made()
    fit(expected, ours(), tmp_path / "expected")
    assert_same_weights(fresh, expected)


class Loading(Net):
    """Loads its pretrained weights in one of its hooks, all of them or those of its body."""

    hook, part = "setup", ""

    def load(self) -> None:
        generator = torch.Generator().manual_seed(11)
        module = getattr(self, self.part) if self.part else self
        state = {key: torch.randn(value.shape, generator=generator) for key, value in module.state_dict().items()}
        module.load_state_dict(state)

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self.load()

    def configure_model(self) -> None:
        if self.hook == "configure_model":
            self.load()


class Configured(Net):
    """Has no parameters before `configure_model`."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        del self.body, self.head

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            torch.manual_seed(12)
            self.body, self.head = Net().body, Net().head


class PretrainedConfigured(Configured):
    def configure_model(self) -> None:
        super().configure_model()
        state = {key: torch.full_like(value, 0.25) for key, value in self.state_dict().items()}
        self.load_state_dict(state)


def loading(hook: str, part: str) -> type[Loading]:
    return type("Loaded", (Loading,), {"hook": hook, "part": part})


MODULES = {
    "setup": loading("setup", ""),
    "setup, body": loading("setup", "body"),
    "configure_model": loading("configure_model", ""),
    "configure_model, body": loading("configure_model", "body"),
    "made there": Configured,
    "made and loaded there": PretrainedConfigured,
}


class Note(pl.Callback):
    """What the weights are when training begins."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights(pl_module)


@pytest.mark.parametrize("ours", [OURS["decay"], OURS["penalty"]], ids=["decay", "penalty"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_modules_that_load_pretrained_weights_by_themselves(make: Any, ours: Any, tmp_path: Path) -> None:
    """Seeds differ, so that only what they load is the same: norms of what isn't loaded make it an error."""
    whole, note = made(make=make), Note()
    fit(whole, [*ours(), note], tmp_path)
    state = load(tmp_path / "epoch=0.ckpt")["callbacks"][type(ours()[0]).__name__]
    assert state["start"] == {name: pytest.approx(note.weights[name].norm().item(), rel=1e-6) for name in DECAYED}
    resumed = made(make=make)
    fit(resumed, ours(), tmp_path / "again", tmp_path / "epoch=0.ckpt")
    assert_same_weights(resumed, whole)
    other = made(seed=4, make=make)
    if getattr(make, "part", ""):
        with pytest.raises(RuntimeError, match=r"^1 parameters don't start .* the norm of 'head\.weight'"):
            fit(other, ours(), tmp_path / "other", tmp_path / "epoch=0.ckpt")
    else:
        fit(other, ours(), tmp_path / "other", tmp_path / "epoch=0.ckpt")
        assert_same_weights(other, whole)


@EVERY
def test_goes_on_from_a_checkpoint_made_without_it(ours: Any, tmp_path: Path) -> None:
    """Towards the weights that the module was made with."""
    fit(made(), [], tmp_path, max_epochs=1)
    model, ours = made(), ours()
    origin = weights(model)
    trainer = fit(model, ours, tmp_path / "again", tmp_path / "epoch=0.ckpt")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callbacks = load(tmp_path / "last.ckpt")["callbacks"]
    for callback in ours:
        norms = callbacks[type(callback).__name__]["start"]
        assert norms == {name: pytest.approx(origin[name].norm().item(), rel=1e-6) for name in DECAYED}


def test_second_fit_starts_anew() -> None:
    """Without a checkpoint, from what the first has left; the same as a new module made of that."""
    for ours in OURS.values():
        model, callbacks = made(), ours()
        make_trainer(callbacks).fit(model, data())
        again = made()
        again.load_state_dict(model.state_dict())
        make_trainer(callbacks).fit(model, data())
        make_trainer(ours()).fit(again, data())
        assert_same_weights(model, again)


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 5:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path")
@pytest.mark.parametrize("position", ["before", "after"])
def test_checkpoints_after_a_fit_and_of_an_exception_have_the_norms(position: str, tmp_path: Path) -> None:
    origin = weights(made())
    norms = {name: pytest.approx(origin[name].norm().item(), rel=1e-6) for name in DECAYED}
    for kind, ours in OURS.items():
        saving = OnExceptionCheckpoint(tmp_path / kind, "failed")
        callbacks = [saving, *ours()] if position == "before" else [*ours(), saving]
        with pytest.raises(ZeroDivisionError):
            make_trainer(callbacks, enable_checkpointing=True).fit(made(make=Failing), data())
        trainer = make_trainer(ours())
        trainer.fit(made(), data())
        trainer.save_checkpoint(tmp_path / kind / "after.ckpt")
        for name in ("failed", "after"):
            states = load(tmp_path / kind / f"{name}.ckpt")["callbacks"]
            for callback in ours():
                assert states[type(callback).__name__]["start"] == norms


class Lazy(Net):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.body[0] = nn.LazyLinear(8)


@EVERY
def test_lazy_layers_train_and_cannot_be_resumed(ours: Any, tmp_path: Path) -> None:
    class Shape(pl.Callback):
        """What comes first of all: the weights after the forward pass that gave them a shape."""

        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            if trainer.global_step == 0:
                self.first = pl_module.body[0].weight.detach().clone()

    shape = Shape()
    fit(made(make=Lazy), [shape, *ours()], tmp_path, max_epochs=1)
    for callback in ours():
        state = load(tmp_path / "epoch=0.ckpt")["callbacks"][type(callback).__name__]
        assert state["start"]["body.0.weight"] == pytest.approx(shape.first.norm().item(), rel=1e-6)
    with pytest.raises(RuntimeError, match=r"^Nobody knows the weights .*shape \(8, 4\) started from.*before `fit`\.$"):
        fit(made(make=Lazy), ours(), tmp_path / "again", tmp_path / "epoch=0.ckpt")


@EVERY
def test_nothing_is_kept_after_a_fit_or_one_that_failed(ours: Any) -> None:
    for make in (Net, Failing):
        model, callbacks = made(make=make), ours()
        trainer = make_trainer(callbacks)
        with suppress(ZeroDivisionError):
            trainer.fit(model, data())
        assert [callback._start for callback in callbacks] == [None] * len(callbacks)
        assert not model._load_state_dict_pre_hooks
        kept = weakref.ref(model.body[0].weight)
        del model, trainer
        for callback in callbacks:
            for name in ("_log", "_log_dict"):
                vars(callback).pop(name, None)
        gc.collect()
        assert kept() is None


def test_the_module_has_no_hook_left_while_it_trains(tmp_path: Path) -> None:
    """A module may load weights at any time, and nobody copies them then."""

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            assert not pl_module._load_state_dict_pre_hooks
            assert trainer.callbacks[0]._start._found == {}

    fit(made(), [*OURS["both"](), Look()], tmp_path)


def test_seen_before_a_checkpoint_is_loaded_and_until_it_ends() -> None:
    model = made()
    trainer = make_trainer()
    trainer.strategy.connect(model)
    seen: list[float] = []
    end = before_restoring(trainer, model, lambda: seen.append(model.head.weight[0, 0].item()))
    first = model.head.weight[0, 0].item()
    other = {name: value + 1 for name, value in weights(model).items()}
    model.load_state_dict(other)
    assert seen == [first]
    model.load_state_dict(other)
    assert seen == [first, pytest.approx(first + 1)]
    end()
    model.load_state_dict(other)
    assert len(seen) == 2


@pytest.mark.parametrize("ours", [OURS["decay"], OURS["penalty"]], ids=["decay", "penalty"])
def test_deepspeed_is_refused(ours: Any) -> None:
    class DeepSpeedStrategy(SingleDeviceStrategy):
        """Called like that of DeepSpeed, which need not be installed."""

    trainer = make_trainer(ours(), strategy=DeepSpeedStrategy("cpu"), accelerator="auto")
    with pytest.raises(
        MisconfigurationException, match=r"^DeepSpeed keeps the weights .* Use towards='zero', or FSDP\.$"
    ):
        trainer.fit(made(), batches(2))


def test_two_devices_for_one_copy() -> None:
    callbacks = [WeightDecay(0.1, towards="start", summary=False), L2Penalty(0.1, towards="start", start_device="cpu")]
    with pytest.raises(
        ValueError, match=r"^Expected `start_device` to be 'same', as of the callback before, got 'cpu'"
    ):
        make_trainer(callbacks).fit(made(), batches(2))
