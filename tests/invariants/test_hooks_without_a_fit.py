"""Steps, batches and hosts that don't keep to the order of an ordinary fit run as they do without the callbacks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
from torch.utils.data import DataLoader

from lightning_l2 import DecayRule, L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Net, Rows, Shrinking, assert_same_weights, batches, data, make_trainer, plain, weights
from tests.others import LAMBDA, STEPS, WAYS, TwoGroups, assert_left, before, decay, ramp
from tests.processes.forked import python

Callbacks = Callable[[], list[pl.Callback]]

# What watches or acts, set so that no weight may change.
NEUTRAL: dict[str, Callbacks] = {
    "decay": lambda: [WeightDecay(0.0, summary=False)],
    "independent": lambda: [WeightDecay(0.0, apply="independent", summary=False)],
    "before clipping": lambda: [WeightDecay(0.0, apply="coupled", before_clipping=True, summary=False)],
    "schedule": lambda: [WeightDecay(0.0, summary=False), WeightDecayScheduler(LinearSchedule(0.0, 1.0))],
    "penalty": lambda: [L2Penalty(0.0)],
    "constraint": lambda: [NormConstraint(1e6)],
    "monitor": lambda: [L2NormMonitor(gradients=True, updates=True, every_n_steps=1)],
}


class Manual(TwoGroups):
    """Steps by hand wherever it is told to."""

    def __init__(self, pull: float = 1.0) -> None:
        super().__init__(pull)
        self.automatic_optimization = False

    def back(self, step: bool = True) -> None:
        with torch.enable_grad():
            self.manual_backward(self.loss())
        if step:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.back()


class Adapting(Manual):
    """Adapts its weights before it is evaluated."""

    def __init__(self, step: bool, only_in_the_sanity_check: bool = False, pull: float = 1.0) -> None:
        super().__init__(pull)
        self.step, self.only_in_the_sanity_check = step, only_in_the_sanity_check

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.sanity_checking or not self.only_in_the_sanity_check:
            self.back(self.step)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.back(self.step)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.back(self.step)
        return batch


@pytest.mark.parametrize("stage", ["fit", "validate", "validate after fit", "test after fit", "predict after fit"])
@pytest.mark.parametrize("callbacks", NEUTRAL)
def test_backward_and_steps_in_any_loop(callbacks: str, stage: str) -> None:
    """Before there is an optimizer, in the sanity check, between the epochs and after the fit."""
    for step in (False, True):
        assert_same_weights(adapted(stage, step, NEUTRAL[callbacks]), adapted_without(stage, step))


def adapted(stage: str, step: bool, callbacks: Callbacks = list) -> dict[str, Tensor]:
    model = Adapting(step and stage != "validate")
    trainer = make_trainer(callbacks(), max_epochs=2, inference_mode=False)
    if stage != "validate":
        trainer.fit(model, batches(3), batches(1))
    if stage != "fit":
        loop = getattr(trainer, stage.split()[0])
        loop(model, batches(2), **{} if "predict" in stage else {"verbose": False})
    return weights(model)


adapted_without = functools.cache(adapted)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "constraint"])
@pytest.mark.parametrize("when", ["on_fit_start", "sanity check"])
def test_steps_before_the_training_decay_nothing(when: str, way: str) -> None:
    model = Adapting(True, only_in_the_sanity_check=True, pull=0.0)
    if when == "on_fit_start":
        before(model, when, lambda model: [model.back() for _ in range(3)])
    trainer = make_trainer(WAYS[way].callbacks(), inference_mode=False)
    trainer.fit(model, batches(STEPS), batches(2) if when == "sanity check" else None)
    assert_left(model, way, STEPS)


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_fit_end"]
)
@pytest.mark.parametrize("callbacks", NEUTRAL)
def test_steps_in_hooks_around_the_batches(callbacks: str, hook: str) -> None:
    assert_same_weights(stepped(hook, NEUTRAL[callbacks]), stepped_without(hook))


def stepped(hook: str, callbacks: Callbacks = list) -> dict[str, Tensor]:
    model = Manual()
    before(model, hook, lambda model: [model.back() for _ in range(3)])
    make_trainer(callbacks()).fit(model, batches(STEPS))
    return weights(model)


stepped_without = functools.cache(stepped)


def some_are_none(pattern: str) -> DataLoader[Any]:
    """One batch for each character of the pattern, none where it is a dot."""
    return DataLoader(range(len(pattern)), collate_fn=lambda at: None if pattern[at[0]] == "." else torch.ones(1))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize(
    ("pattern", "accumulate", "steps"),
    [(".xxx", 1, 6), ("x..x", 1, 4), ("....", 1, 0), ("x.xx", 2, 2)],
)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "schedule"])
def test_batches_that_are_none(way: str, pattern: str, accumulate: int, steps: int) -> None:
    """Two epochs of them; a window of two batches whose second one is none makes no step."""
    model = Shrinking(lambda params: torch.optim.SGD(params, lr=0.1))
    monitor = L2NormMonitor(gradients=True, updates=True, every_n_steps=1)
    trainer = make_trainer([*WAYS[way].callbacks(), monitor], max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(model, some_are_none(pattern))
    assert len(model.watches[0].steps) == steps
    if steps:
        assert_left(model, way, steps)


@pytest.mark.parametrize("callbacks", NEUTRAL)
@pytest.mark.parametrize("skip", [0, 2], ids=["first batch", "third batch"])
def test_an_epoch_that_a_hook_ends(skip: int, callbacks: str) -> None:
    """`on_train_batch_start` returns -1: the rest of that epoch is left out."""

    class Skipping(TwoGroups):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == skip else None

    models = [Skipping(1.0), Skipping(1.0)]
    for model, mine in zip(models, ([], NEUTRAL[callbacks]()), strict=True):
        make_trainer(mine, max_epochs=2).fit(model, batches(STEPS))
    assert len(models[0].rates) == STEPS + skip
    assert models[1].rates == models[0].rates
    assert_same_weights(models[1], models[0])


class Late(Shrinking):
    """Makes its steps in one of its hooks instead of in `training_step`, and notes how far each batch moves it."""

    def __init__(self, hook: str | None, steps: int = 1) -> None:
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.1))
        self.automatic_optimization, self.steps, self.moved = False, steps, []
        if hook is not None:
            before(self, hook, Late.advance)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def advance(self) -> None:
        at = torch.nn.utils.parameters_to_vector(self.parameters()).detach()
        optimizer = self.optimizers()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()
        self.moved.append((torch.nn.utils.parameters_to_vector(self.parameters()) - at).norm().item())


class Advances(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Late, *args: Any) -> None:
        pl_module.advance()


@pytest.mark.parametrize(
    ("hook", "steps"), [("on_train_batch_end", 1), ("on_train_batch_end", 2), ("on_train_batch_start", 1), (None, 1)]
)
def test_the_lambda_of_a_step_in_another_hook_is_the_logged_one(hook: str | None, steps: int) -> None:
    """None: a callback that stands last makes the steps."""
    model, logger = Late(hook, steps), Rows()
    monitor = L2NormMonitor(updates=True, per="total", every_n_steps=1)
    others = [] if hook else [Advances()]
    make_trainer([monitor, *ramp(), *others], logger=logger).fit(model, batches(STEPS))
    lambdas = LAMBDA * np.arange(STEPS) / (STEPS - 1)
    np.testing.assert_allclose(model.watches[0].of("head.weight"), np.repeat(lambdas, steps), atol=1e-12)
    np.testing.assert_allclose(logger.of("weight_decay/decay"), lambdas, atol=1e-12)
    if steps == 1:
        np.testing.assert_allclose(logger.of("update_norm/total"), model.moved, rtol=1e-6, atol=1e-12)


IN_A_FILE = {
    "WeightDecay": "{weight_decay: 0.1, summary: false}",
    "L2Penalty": "{weight_decay: 1.0e-4}",
    "NormConstraint": "{bound: 10.0}",
    "L2NormMonitor": "{}",
}


def attached(name: str, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """Those of this name, after a fit of a Trainer that is made with the very list."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=callbacks, max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(Net(lambda params: torch.optim.SGD(params, lr=0.1)), data())
    return [callback for callback in trainer.callbacks if type(callback).__name__ == name]


@pytest.fixture
def in_a_file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name, path = request.param, tmp_path / "callbacks.yaml"
    path.write_text(f"callbacks:\n  - class_path: lightning_l2.{name}\n    init_args: {IN_A_FILE[name]}\n")
    monkeypatch.setenv("LIGHTNING_L2_CONFIG", str(path))
    return name


@pytest.mark.parametrize("again", [None, list, copy.deepcopy], ids=["the same list", "copied", "deep-copied"])
@pytest.mark.parametrize("in_a_file", IN_A_FILE, indirect=True)
def test_a_list_of_callbacks_for_several_trainers_gets_ours_once(in_a_file: str, again: Any) -> None:
    callbacks = [EarlyStopping("loss", strict=False)]
    for _ in range(3):
        callbacks = callbacks if again is None else again(callbacks)
        assert len(attached(in_a_file, callbacks)) == 1


@pytest.mark.parametrize("in_a_file", ["L2NormMonitor"], indirect=True)
def test_a_monitor_of_the_users_own_stays_beside_that_of_the_file(in_a_file: str) -> None:
    own = L2NormMonitor(per="total")
    callbacks = [own]
    for _ in range(2):
        monitors = attached(in_a_file, callbacks)
        assert len(monitors) == 2
        assert own in monitors


@pytest.mark.parametrize("second", [WeightDecay, type("Own", (WeightDecay,), {})])
def test_a_second_weight_decay_is_refused_with_the_way_out(second: type[WeightDecay]) -> None:
    two = [WeightDecay(0.1, summary=False), second(0.2, rules=[DecayRule("all")], summary=False)]
    model = Shrinking()
    with pytest.raises(Exception, match="one list of rules") as error:
        make_trainer(two).fit(model, batches(2))
    assert type(error.value).__name__ in {"ValueError", "RuntimeError", "MisconfigurationException"}
    assert not model.watches or model.watches[0].steps == []


def test_a_modules_own_weight_decay_takes_the_place_of_the_trainers() -> None:
    """As Lightning has it for callbacks of one type; nothing is refused."""
    model = Shrinking(lambda params: torch.optim.SGD(params, lr=0.1))
    model.configure_callbacks = decay("optimizer")
    make_trainer([WeightDecay(0.9, summary=False)]).fit(model, batches(STEPS))
    assert_left(model, "optimizer", STEPS)


class Logs:
    """Something to call that has neither a name nor a signature of its own."""

    def __init__(self, log: Callable[..., None]) -> None:
        self.log = log

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.log(*args, **kwargs)


HOW_IT_LOGS: dict[str, Callable[[Any], Any]] = {
    "partial": lambda log: functools.partial(log, sync_dist=True),
    "lambda": lambda log: lambda *args, **kwargs: log(*args, **kwargs),
    "object": Logs,
}


@pytest.mark.parametrize("how", HOW_IT_LOGS)
@pytest.mark.parametrize("callbacks", NEUTRAL)
def test_a_module_that_logs_in_its_own_way(callbacks: str, how: str) -> None:
    class Logging(TwoGroups):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.log = HOW_IT_LOGS[how](self.log)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    models = [Logging(), Logging()]
    for model, mine in zip(models, ([], NEUTRAL[callbacks]()), strict=True):
        make_trainer(mine, logger=Rows(), log_every_n_steps=1).fit(model, batches(STEPS))
    assert_same_weights(models[1], models[0])
    assert models[1].trainer.callback_metrics["loss"] == models[0].trainer.callback_metrics["loss"]


class ByKeyword(Logger):
    """Takes its arguments as Lightning gives them, by keyword."""

    name, version = "by keyword", 0

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *, metrics: dict[str, float], step: int | None = None) -> None:
        self.keys |= metrics.keys()


class AnyKeywords(ByKeyword):
    def log_metrics(self, **kwargs: Any) -> None:
        self.keys |= kwargs["metrics"].keys()


@pytest.mark.parametrize("kind", [ByKeyword, AnyKeywords])
@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (lambda: L2NormMonitor(every_n_steps=1), "l2_norm/"),
        (lambda: L2Penalty(0.1, every_n_steps=1), "l2_penalty/"),
        (lambda: NormConstraint(0.1, every_n_steps=1), "norm_constraint/"),
    ],
    ids=["monitor", "penalty", "constraint"],
)
def test_a_logger_that_takes_metrics_by_keyword(make: Any, prefix: str, kind: type[ByKeyword]) -> None:
    logger = kind()
    model = Net(lambda params: torch.optim.SGD(params, lr=0.1))
    make_trainer([make()], logger=logger, log_every_n_steps=1).fit(model, data())
    assert any(key.startswith(prefix) for key in logger.keys)


ALIASED = """
import sys, types, lightning.pytorch as pl, torch
sys.modules["pytorch_lightning"] = {alias}
from lightning_l2 import WeightDecay
from tests.helpers import Shrinking, batches, make_trainer
model = Shrinking(lambda params: torch.optim.SGD(params, lr=0.1))
make_trainer([WeightDecay(0.3, summary=False)]).fit(model, batches(2))
assert abs(model.head.weight[0, 0].item() - 0.97**2) < 1e-12, model.head.weight
"""


@pytest.mark.parametrize("alias", ["pl", "types.ModuleType('pytorch_lightning')", "None"])
def test_another_module_under_the_name_of_pytorch_lightning(alias: str) -> None:
    """The usual alias for code that still says so, somebody's stub, and an import that is blocked."""
    done = python("-c", ALIASED.format(alias=alias))
    assert done.returncode == 0, done.stderr


class TakesTheState(pl.Callback):
    """Asks torch for the optimizer's state before the first step, for which torch makes a step of its own."""

    def __init__(self, hook: str, ask: Callable[[Any, Any], Any], announced: bool) -> None:
        self.ask, self.announced, self.state = ask, announced, None
        setattr(self, hook, self.take)

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.state is not None:
            return
        if self.announced:  # as Lightning does for a checkpoint
            for callback in trainer.callbacks:
                callback.state_dict()
        optimizer = trainer.optimizers[0]
        self.ask(pl_module, optimizer)
        if self.announced:
            for callback in trainer.callbacks:
                callback.on_save_checkpoint(trainer, pl_module, {})
        self.state = plain(copy.deepcopy(optimizer.state_dict()["state"]))
        self.weights = [parameter.tolist() for parameter in pl_module.parameters()]


MAKE = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
}


@pytest.mark.parametrize("announced", [True, False], ids=["as a checkpoint", "unannounced"])
@pytest.mark.parametrize(
    ("hook", "ask", "optimizer"),
    [
        ("on_train_batch_start", get_optimizer_state_dict, "SGD"),
        ("on_train_start", get_state_dict, "SGD"),
        ("on_train_batch_start", get_optimizer_state_dict, "Adam"),
    ],
    ids=["SGD", "SGD-both-states", "Adam"],
)
@pytest.mark.parametrize("way", ["penalty", "coupled", "before clipping", "decoupled", "independent", "constraint"])
def test_the_step_in_which_torch_takes_a_state(way: str, hook: str, ask: Any, optimizer: str, announced: bool) -> None:
    """Nothing is added to the state or taken from the weights, then or later."""

    def run(mine: list[pl.Callback], early: bool) -> tuple[Shrinking, TakesTheState]:
        model, taking = Shrinking(MAKE[optimizer]), TakesTheState(hook, ask, announced)
        make_trainer([*mine, *[taking] * early]).fit(model, batches(STEPS))
        return model, taking

    callbacks = WAYS[way].callbacks
    bare, beside = run([], True)[1], run(callbacks()[:1], True)[1]
    assert beside.state == bare.state
    assert beside.weights == bare.weights
    if optimizer == "SGD":  # Adam counts torch's own step
        assert_same_weights(run(callbacks(), True)[0], run(callbacks(), False)[0])
