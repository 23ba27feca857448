"""Checkpoints look as if the plugin had never been there, and runs go on from them with and without it."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.optim import Optimizer

from lightning_l2 import (
    DecayRule,
    L2NormMonitor,
    L2Penalty,
    NormConstraint,
    WeightDecay,
    WeightDecayScheduler,
    weight_decay_in_force,
)
from lightning_l2.schedules import LinearSchedule
from tests.helpers import (
    DECAYED,
    DecayWatch,
    Net,
    Shrinking,
    ValidatedNet,
    assert_same_weights,
    batches,
    make_trainer,
    weights,
)

# What Lightning says when a checkpoint's callbacks aren't all there again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well"),
]

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "Adam-amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1, amsgrad=True),
    "SGD-momentum": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1, momentum=0.9),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, weight_decay=0.1),
}


def rules(decay: float = 0.3, **options: Any) -> list[pl.Callback]:
    return [WeightDecay(decay, summary=False, **options)]


class Expert(pl.Callback):
    """The reference: every parameter in a group of its own, lambda set by hand for each epoch."""

    def __init__(self, decay_of: Callable[[str, int], float]) -> None:
        self.decay_of = decay_of

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for (name, _), group in zip(pl_module.named_parameters(), trainer.optimizers[0].param_groups, strict=True):
            group["weight_decay"] = self.decay_of(name, trainer.current_epoch)


def one_group_each(module: torch.nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p]} for p in module.parameters()]


def fit(
    optimizer: Callable[[Any], Optimizer],
    callbacks: list[pl.Callback],
    epochs: int,
    ckpt_path: Path | None = None,
    save: Path | None = None,
    grouped: Any = None,
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Net(optimizer, grouped=grouped)
    saving = ModelCheckpoint(save.parent, save.stem) if save else None
    everybody = callbacks + [saving] * (saving is not None)
    trainer = make_trainer(everybody, max_epochs=epochs, enable_checkpointing=saving is not None)
    trainer.fit(model, batches(5), ckpt_path=ckpt_path)
    return weights(model)


@pytest.mark.parametrize("second", ["with", "without"])
@pytest.mark.parametrize("first", ["with", "without"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_and_without_the_plugin(name: str, first: str, second: str, tmp_path: Path) -> None:
    """Each half decays as its own set-up says; the optimizer's state goes through."""

    def decay_of(parameter: str, epoch: int) -> float:
        if (first, second)[epoch] == "without":
            return 0.1
        return 0.3 if parameter in DECAYED else 0.0

    make = OPTIMIZERS[name]
    expected = fit(make, [Expert(decay_of)], epochs=2, grouped=one_group_each)
    path = tmp_path / "half.ckpt"
    fit(make, rules() if first == "with" else [], epochs=1, save=path)
    actual = fit(make, rules() if second == "with" else [], epochs=2, ckpt_path=path)
    assert_same_weights(actual, expected)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def all_callbacks() -> list[pl.Callback]:
    return [
        *rules(),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0)),
        L2NormMonitor(every_n_steps=1),
        L2Penalty(0.01),
    ]


def by_the_user(module: torch.nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(module.head.parameters()), "lr": 0.03, "name": "top", "note": "mine"},
        {"params": list(module.body.parameters()), "weight_decay": 0.02, "name": "bottom", "note": "mine too"},
    ]


@pytest.mark.parametrize("grouped", [None, by_the_user], ids=["one-group", "own-groups"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_have_the_layout_of_a_run_without_it(name: str, grouped: Any, tmp_path: Path) -> None:
    fit(OPTIMIZERS[name], all_callbacks(), 1, save=tmp_path / "with.ckpt", grouped=grouped)
    fit(OPTIMIZERS[name], [], 1, save=tmp_path / "without.ckpt", grouped=grouped)
    actual, expected = load(tmp_path / "with.ckpt"), load(tmp_path / "without.ckpt")
    assert actual["optimizer_states"][0]["param_groups"] == expected["optimizer_states"][0]["param_groups"]
    for group, reference in zip(
        actual["optimizer_states"][0]["param_groups"], expected["optimizer_states"][0]["param_groups"], strict=True
    ):
        assert list(group) == list(reference)
    states, references = (c["optimizer_states"][0]["state"] for c in (actual, expected))
    assert states.keys() == references.keys()
    for index, reference in references.items():
        assert {k: getattr(v, "shape", None) for k, v in states[index].items()} == {
            k: getattr(v, "shape", None) for k, v in reference.items()
        }
    assert actual["lr_schedulers"] == expected["lr_schedulers"]
    assert actual.keys() - {"callbacks"} == expected.keys() - {"callbacks"}


def test_lr_scheduler_states_have_the_layout_of_a_run_without_it(tmp_path: Path) -> None:
    def run(callbacks: list[pl.Callback], path: Path) -> Any:
        model = Net(scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20))
        make_trainer([*callbacks, ModelCheckpoint(path.parent, path.stem)], enable_checkpointing=True).fit(
            model, batches(5)
        )
        return load(path)["lr_schedulers"]

    assert run(all_callbacks(), tmp_path / "with.ckpt") == run([], tmp_path / "without.ckpt")


def test_optimizer_resumes_in_a_plain_torch_loop(tmp_path: Path) -> None:
    """The states load into the optimizer of someone who has only torch."""
    fit(OPTIMIZERS["AdamW"], all_callbacks(), 1, save=tmp_path / "with.ckpt")
    checkpoint = load(tmp_path / "with.ckpt")
    model = Net()
    model.load_state_dict(checkpoint["state_dict"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["step"] == 5
    assert set(optimizer.param_groups[0]) == set(torch.optim.AdamW(model.parameters()).param_groups[0])


def test_every_checkpoint_of_a_run_loads_without_the_package(tmp_path: Path) -> None:
    """Nothing in a checkpoint needs a class of the package, for any hook that saves."""
    saving = [
        ModelCheckpoint(tmp_path, "step-{step}", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(tmp_path, "last-{step}", save_last=True, save_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path, "val-{step}", every_n_epochs=2, save_on_train_epoch_end=False),
    ]
    make_trainer([*all_callbacks(), *saving], max_epochs=2, enable_checkpointing=True).fit(
        ValidatedNet(), batches(5), batches(1)
    )
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 7
    for file in files:
        assert len(load(file)["optimizer_states"][0]["param_groups"]) == 1


def test_checkpoints_written_in_the_background(tmp_path: Path) -> None:
    """What is written is the layout of the moment it was asked for, whatever the training does meanwhile."""
    make = OPTIMIZERS["AdamW"]

    def run(epochs: int, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Net(make)
        schedule = WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), total_steps=10)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(
            [*rules(), schedule, saving], max_epochs=epochs, enable_checkpointing=True, plugins=[AsyncCheckpointIO()]
        )
        trainer.fit(model, batches(5), ckpt_path=ckpt_path)
        return weights(model)

    expected = run(2)
    for file in tmp_path.glob("*.ckpt"):
        assert len(load(file)["optimizer_states"][0]["param_groups"]) == 1
        assert load(file)["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1
    assert_same_weights(run(2, tmp_path / "step=5.ckpt"), expected)


@contextmanager
def messages() -> Iterator[list[str]]:
    """Whatever is said, as a warning or through logging."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler()
    names = ("lightning_l2", "lightning", "lightning.pytorch", "pytorch_lightning", "")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(warning.message) for warning in caught]
    finally:
        for logger, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)


def shrink(
    callbacks: list[pl.Callback], epochs: int, ckpt_path: Path | None = None, save: Path | None = None
) -> Shrinking:
    model = Shrinking()
    trainer = make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(model, batches(4), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return model


@pytest.mark.parametrize(("policy", "expected"), [("config", 0.25), ("checkpoint", 0.05)])
def test_whose_lambda_wins(policy: str, expected: float, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    shrink(rules(0.05), 1, save=path)
    with messages() as said:
        model = shrink(rules(0.25, on_resume=policy), 2, path)
    np.testing.assert_allclose(model.watches[0].of("head.weight"), [expected] * 4, rtol=1e-9)
    assert model.watches[0].of("head.bias") == [0.0] * 4
    about = [text for text in said if "0.05" in text and "0.25" in text]
    assert about, f"no message names both values: {said}"


def test_edited_lambda_can_be_an_error(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    shrink(rules(0.05), 1, save=path)
    with pytest.raises(Exception, match=r"(?s)0\.05.*0\.25|0\.25.*0\.05") as error:
        shrink(rules(0.25, on_resume="error"), 2, path)
    assert "on_resume" in str(error.value)


@pytest.mark.parametrize("policy", ["config", "checkpoint", "error"])
def test_an_unchanged_lambda_needs_no_message(policy: str, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    both = [*rules(0.05), WeightDecayScheduler(LinearSchedule(start=0.5, end=2.0), total_steps=8)]
    shrink(both, 1, save=path)
    both = [*rules(0.05, on_resume=policy), WeightDecayScheduler(LinearSchedule(start=0.5, end=2.0), total_steps=8)]
    with messages() as said:
        model = shrink(both, 2, path)
    assert not [text for text in said if "weight decay" in text.lower() or "weight_decay" in text.lower()], said
    expected = 0.05 * (0.5 + 1.5 * np.arange(4, 8) / 7)
    np.testing.assert_allclose(model.watches[0].of("head.weight"), expected, rtol=1e-9)


@pytest.mark.parametrize(("policy", "base"), [("config", 0.25), ("checkpoint", 0.05)])
def test_the_schedule_multiplies_the_winning_lambda(policy: str, base: float, tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"

    def both(decay: float) -> list[pl.Callback]:
        return [
            *rules(decay, on_resume=policy),
            WeightDecayScheduler(LinearSchedule(start=0.5, end=2.0), total_steps=8),
        ]

    shrink(both(0.05), 1, save=path)
    with messages():
        model = shrink(both(0.25), 2, path)
    expected = base * (0.5 + 1.5 * np.arange(4, 8) / 7)
    np.testing.assert_allclose(model.watches[0].of("head.weight"), expected, rtol=1e-9)


@pytest.mark.parametrize("policy", ["config", "checkpoint", "error"])
def test_a_parameter_of_two_optimizers_keeps_the_lambda_of_each(policy: str, tmp_path: Path) -> None:
    class Shared(Shrinking):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            optimizers = [
                torch.optim.SGD(params, lr=0.1, weight_decay=weight_decay)
                for params, weight_decay in ((self.parameters(), 0.1), (self.head.parameters(), 0.4))
            ]
            self.watches = [DecayWatch(self, optimizer) for optimizer in optimizers]
            return optimizers

    path = tmp_path / "old.ckpt"
    for epochs, ckpt_path in ((1, None), (2, path)):
        model, trainer = Shared(), make_trainer([WeightDecay(on_resume=policy, summary=False)], max_epochs=epochs)
        trainer.fit(model, batches(4), ckpt_path=ckpt_path)
        for watch, expected in zip(model.watches, (0.1, 0.4), strict=True):
            np.testing.assert_allclose(watch.of("head.weight"), [expected] * 4, rtol=1e-9)
        trainer.save_checkpoint(path)


@pytest.mark.parametrize(("policy", "expected"), [("config", 0.4), ("checkpoint", 0.1)])
def test_lambda_edited_in_the_optimizer(policy: str, expected: float, tmp_path: Path) -> None:
    """Without a lambda of the callback's own the base is the optimizer's, and its edit counts too."""

    def run(decay: float, epochs: int, ckpt_path: Path | None = None, save: Path | None = None) -> Shrinking:
        model = Shrinking(lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=decay))
        trainer = make_trainer([WeightDecay(on_resume=policy, summary=False)], max_epochs=epochs)
        trainer.fit(model, batches(4), ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(save)
        return model

    run(0.1, 1, save=tmp_path / "old.ckpt")
    with messages():
        model = run(0.4, 2, tmp_path / "old.ckpt")
    np.testing.assert_allclose(model.watches[0].of("head.weight"), [expected] * 4, rtol=1e-9)


def test_lambda_of_a_rule_edited(tmp_path: Path) -> None:
    def custom(head: float) -> list[pl.Callback]:
        own = [DecayRule("head", pattern=r"^head\.weight", weight_decay=head), "default"]
        return rules(0.05, rules=own)

    path = tmp_path / "old.ckpt"
    shrink(custom(0.2), 1, save=path)
    with messages() as said:
        model = shrink(custom(0.6), 2, path)
    np.testing.assert_allclose(model.watches[0].of("head.weight"), [0.6] * 4, rtol=1e-9)
    np.testing.assert_allclose(model.watches[0].of("body.0.weight"), [0.05] * 4, rtol=1e-9)
    assert any("head" in text and "0.6" in text for text in said), said


def test_rules_edited_between_runs(tmp_path: Path) -> None:
    """Other groups than before: the optimizer's state still finds its parameters, by name, with a message."""

    def decay_of(parameter: str, epoch: int) -> float:
        if parameter == "head.weight":
            return (0.3, 0.6)[epoch]
        return 0.3 if parameter in DECAYED else 0.0

    make = OPTIMIZERS["AdamW"]
    expected = fit(make, [Expert(decay_of)], epochs=2, grouped=one_group_each)
    path = tmp_path / "half.ckpt"
    fit(make, rules(), epochs=1, save=path)
    edited = rules(rules=[DecayRule("head", pattern=r"^head\.weight", multiplier=2.0), "default"])
    with messages() as said:
        actual = fit(make, edited, epochs=2, ckpt_path=path)
    assert_same_weights(actual, expected)
    assert any("head" in text for text in said), said


def test_a_checkpoint_of_the_hand_grouped_optimizer_goes_on_with_the_scheduler_alone(tmp_path: Path) -> None:
    """lambda in a checkpoint is the base: resumed without the scheduler, training decays as configured."""

    def run(callbacks: list[pl.Callback], epochs: int, ckpt_path: Path | None = None) -> Shrinking:
        model = Shrinking()
        trainer = make_trainer(callbacks, max_epochs=epochs)
        trainer.fit(model, batches(4), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return model

    run([WeightDecayScheduler(LinearSchedule(start=0.0, end=3.0))], 1)
    group = load(tmp_path / "saved.ckpt")["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.1
    model = run([], 2, tmp_path / "saved.ckpt")
    np.testing.assert_allclose(model.watches[0].of("head.weight"), [0.1] * 4, rtol=1e-9)


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_after_backward",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_validation_end",
    ],
)
def test_states_that_nobody_saves_change_nothing(hook: str, position: str) -> None:
    """A person looks at `state_dict()`, or a checkpoint fails half-way and training goes on."""

    class Look(pl.Callback):
        pass

    def look(trainer: pl.Trainer, *args: Any) -> None:
        for callback in trainer.callbacks:
            callback.state_dict()

    def run(*mine: pl.Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = ValidatedNet(OPTIMIZERS["AdamW"], lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4))
        make_trainer(mine, max_epochs=2).fit(model, batches(3), batches(1))
        return weights(model)

    expected = run(*all_callbacks(), NormConstraint(0.9))
    looking = Look()
    setattr(looking, hook, look)
    mine = [*all_callbacks(), NormConstraint(0.9)]
    assert_same_weights(run(*([looking, *mine] if position == "first" else [*mine, looking])), expected)


def test_groups_of_a_rule_that_the_checkpoint_divides_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    shrink(rules(0.05, rules=[DecayRule("head", pattern=r"^head\.weight", weight_decay=0.2), "default"]), 1, save=path)
    seen: dict[str, float] = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            (optimizer,) = trainer.optimizers
            seen.update(weight_decay_in_force(optimizer))
            assert len(weight_decay_in_force(optimizer)) == 3

    model = shrink([*rules(0.05, on_resume="checkpoint"), Look()], 2, path)
    assert sorted(seen.values()) == [0.0, 0.05, 0.2]
    np.testing.assert_allclose(model.watches[0].of("head.weight"), [0.2] * 4, rtol=1e-9)
