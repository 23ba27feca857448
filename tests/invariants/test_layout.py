"""After fit, or whatever ends it, the optimizer is exactly the user's: groups, keys, values and their order."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_l2 import DecayRule, L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import ValidatedNet, batches, layout, make_trainer

# Penalty and decay at once shrink twice, which here is meant.
pytestmark = pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well")

HOOKS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "on_save_checkpoint",
    "state_dict",
]


def ours() -> list[pl.Callback]:
    return [
        WeightDecay(0.3, rules=[DecayRule("head", pattern="^head.weight", multiplier=2.0), "default"], summary=False),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=2.0)),
        L2NormMonitor(every_n_steps=1, gradients=True, updates=True),
        L2Penalty(0.01),
        NormConstraint(100.0),
    ]


def own_groups(module: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(module.head.parameters()), "name": "top", "lr": 0.03, "note": "mine", "weight_decay": 0.7},
        {"params": list(module.body.parameters()), "name": "bottom", "extra": 1.5},
    ]


def named_groups(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


class Kept(ValidatedNet):
    """Keeps its optimizer so that the test still sees it after fit."""

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        self.kept = configured["optimizer"] if isinstance(configured, dict) else configured
        self.at_first = layout(self.kept, self)
        return configured


GROUPED = {"one-group": None, "own-groups": own_groups, "named-parameters": named_groups}
SCHEDULERS = {
    "no-scheduler": None,
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)


def reference(grouped: Any, scheduler: Any, steps: int) -> list[dict[str, Any]]:
    """The layout that a run without any callback leaves."""
    torch.manual_seed(0)
    model = Kept(adamw, scheduler, grouped=grouped)
    make_trainer(max_steps=steps, max_epochs=-1).fit(model, batches(4), batches(1))
    return layout(model.kept, model)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("grouped", GROUPED.values(), ids=GROUPED.keys())
def test_after_fit(grouped: Any, scheduler: Any) -> None:
    model = Kept(adamw, scheduler, grouped=grouped)
    make_trainer(ours(), max_epochs=2).fit(model, batches(4), batches(1))
    actual, expected = layout(model.kept, model), reference(grouped, scheduler, steps=8)
    assert actual == expected
    assert [list(group) for group in actual] == [list(group) for group in expected], "the order of the keys"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("hook", HOOKS)
def test_after_an_exception_in_a_hook(hook: str, position: str, error: type[BaseException], tmp_path: Any) -> None:
    """In any callback's hook, before and after ours. Ctrl-C ends a fit; Lightning turns it into an exit."""

    class Failing(pl.Callback):
        pass

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("stopped")

    failing = Failing()
    setattr(failing, hook, fail)
    callbacks = [failing, *ours()] if position == "first" else [*ours(), failing]
    model = Kept(adamw, grouped=own_groups)
    trainer = make_trainer(callbacks, max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=True)
    with pytest.raises((error, SystemExit)):
        trainer.fit(model, batches(4), batches(1))
    if hasattr(model, "kept"):
        assert layout(model.kept, model) == model.at_first


# Called once in a fit
ONCE = [
    *("setup", "configure_model", "configure_callbacks", "train_dataloader", "val_dataloader"),
    *("on_fit_start", "on_train_start", "on_train_end", "on_fit_end"),
]
MODULE_HOOKS = [
    *("setup", "configure_model", "configure_callbacks", "train_dataloader", "val_dataloader", "state_dict"),
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "transfer_batch_to_device"),
    *("on_before_batch_transfer", "on_after_batch_transfer", "forward", "training_step", "backward"),
    *("on_before_backward", "on_after_backward", "on_before_zero_grad", "optimizer_zero_grad", "optimizer_step"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step"),
    *("on_train_batch_end", "on_validation_start", "validation_step", "on_validation_epoch_end", "on_save_checkpoint"),
    *("on_train_epoch_end", "on_train_end", "on_fit_end"),
]


# Said to everyone who has an OnExceptionCheckpoint, of which Lightning looks for the last one.
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")
@pytest.mark.filterwarnings("ignore:..fit.ckpt_path=None.. was called without a model")
@pytest.mark.parametrize(
    ("apply", "error"), [("optimizer", KeyboardInterrupt), ("optimizer", RuntimeError), ("cautious", RuntimeError)]
)
@pytest.mark.parametrize("where", MODULE_HOOKS)
def test_after_an_exception_in_the_module_or_its_data(
    where: str, apply: str, error: type[BaseException], tmp_path: Path
) -> None:
    """The second time it is called, if there is one; nothing is left behind, and every checkpoint is whole."""

    class Loaded(Kept):
        def train_dataloader(self) -> Any:
            return batches(4)

        def val_dataloader(self) -> Any:
            return batches(1)

    model = Loaded(adamw, SCHEDULERS["LambdaLR"], grouped=own_groups)
    function, calls = getattr(model, where), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (1 if where in ONCE else 2):
            raise error("stopped")
        return function(*args, **kwargs)

    setattr(model, where, fail)
    mine = [*ours()[1:], WeightDecay(0.3, apply=apply, summary=False)]
    saving = [ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1), OnExceptionCheckpoint(tmp_path, "cut")]
    trainer = make_trainer([*mine, *saving], max_epochs=2, enable_checkpointing=True, gradient_clip_val=1.0)
    with pytest.raises((error, SystemExit)):
        trainer.fit(model)
    assert all(callback._fit is None for callback in mine)
    files = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert files or where in ONCE
    for state in [state for file in files for state in file["optimizer_states"]]:
        assert [group["weight_decay"] for group in state["param_groups"]] == [0.7, 0.1]
    if hasattr(model, "kept"):
        left = [{**group, "lr": group["initial_lr"]} for group in layout(model.kept, model)]
        assert left == model.at_first
        assert not model.kept._optimizer_step_pre_hooks
        assert not model.kept._optimizer_step_post_hooks


def test_a_failed_step_in_the_middle_of_an_epoch_keeps_the_state() -> None:
    """Momentum and second moments stay with their parameters."""
    model = Kept(adamw)
    step = model.training_step

    def fails_at_last(batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            raise RuntimeError("stopped")
        return step(batch, batch_idx)

    model.training_step = fails_at_last
    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(ours()).fit(model, batches(4), batches(1))
    assert layout(model.kept, model) == model.at_first
    for parameter in model.parameters():
        assert model.kept.state[parameter]["exp_avg"].shape == parameter.shape
        assert model.kept.state[parameter]["step"] == 3


def test_a_fit_after_an_exception_works() -> None:
    model, callbacks = Kept(adamw), ours()
    step = model.training_step
    model.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks).fit(model, batches(4), batches(1))
    model.training_step = step
    make_trainer(callbacks).fit(model, batches(4), batches(1))
    assert layout(model.kept, model) == model.at_first


@pytest.mark.parametrize("name", ["OneCycleLR", "LambdaLR"])
def test_the_lr_scheduler_has_the_users_layout_again(name: str) -> None:
    scheduler = SCHEDULERS[name]
    model = Kept(adamw, scheduler, grouped=own_groups)
    made: list[Any] = []
    make = model.make_scheduler
    model.make_scheduler = lambda optimizer: made.append(make(optimizer)) or made[-1]
    make_trainer(ours()).fit(model, batches(4), batches(1))
    with_plugin = {k: v for k, v in made[0].state_dict().items() if k != "lr_lambdas"}
    make_trainer().fit(model, batches(4), batches(1))
    assert with_plugin == {k: v for k, v in made[1].state_dict().items() if k != "lr_lambdas"}
    made[0].step()


def test_hyperparameters_changed_by_the_user_during_fit_stay() -> None:
    """A callback of the user's that edits a group is obeyed, and its edit is still there after fit."""

    class Edit(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.005
                group["eps"] = 1e-6

    model = Kept(adamw)
    make_trainer([*ours(), Edit()]).fit(model, batches(4), batches(1))
    assert (model.kept.param_groups[0]["lr"], model.kept.param_groups[0]["eps"]) == (0.005, 1e-6)
