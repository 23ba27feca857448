"""What WeightDecay does beyond the invariants: the ways to act, conversions, the table, late and lazy parameters."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_l2 import DecayRule, WeightDecay, WeightDecayScheduler, weight_decay_in_force
from lightning_l2.convert import GaussianPrior, Normalised, Timescale
from lightning_l2.schedules import LinearSchedule
from tests.helpers import (
    DECAYED,
    EXEMPT,
    Net,
    Shrinking,
    assert_same_weights,
    batches,
    data,
    hand_grouped,
    make_trainer,
    stream,
    weights,
)

LR, DECAY = 0.1, 0.3


@pytest.mark.parametrize(
    ("apply", "optimizer", "factor"),
    [
        ("optimizer", torch.optim.SGD, 1 - LR * DECAY),
        ("coupled", torch.optim.SGD, 1 - LR * DECAY),
        ("decoupled", torch.optim.SGD, 1 - LR * DECAY),
        ("independent", torch.optim.SGD, 1 - DECAY),
        ("cautious", torch.optim.SGD, 1 - LR * DECAY),
        ("optimizer", torch.optim.AdamW, 1 - LR * DECAY),
        ("decoupled", torch.optim.Adam, 1 - LR * DECAY),
        ("decoupled", torch.optim.RMSprop, 1 - LR * DECAY),
        ("decoupled", torch.optim.Rprop, 1 - LR * DECAY),
        ("independent", torch.optim.Adam, 1 - DECAY),
    ],
)
def test_a_weight_without_gradient_shrinks_by_the_factor_of_the_way(apply, optimizer, factor) -> None:
    model = Shrinking(lambda parameters: optimizer(parameters, lr=LR))
    make_trainer([WeightDecay(DECAY, apply=apply)]).fit(model, batches(3))
    for name, parameter in model.named_parameters():
        expected = factor**3 if name in DECAYED else 1.0
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected), rtol=1e-12, atol=0)


def test_independent_decay_may_keep_the_shape_of_the_lr_schedule() -> None:
    lr = [1.0, 0.5, 0.25]
    model = Shrinking(
        lambda parameters: torch.optim.SGD(parameters, lr=LR),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    make_trainer([WeightDecay(DECAY, apply="independent", peak_lr="initial")]).fit(model, batches(3))
    expected = torch.tensor([1 - DECAY * share for share in lr], dtype=torch.float64).prod().item()
    torch.testing.assert_close(model.head.weight, torch.full_like(model.head.weight, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("before", [True, False])
def test_coupled_decay_joins_before_or_after_clipping(before) -> None:
    """Of a zero gradient, lambda w has norm lambda sqrt(n); clipped to 0.1 it is 0.1 / sqrt(n) in each element."""
    model = Shrinking(lambda parameters: torch.optim.SGD(parameters, lr=LR))
    callback = WeightDecay(DECAY, apply="coupled", before_clipping=before)
    make_trainer([callback], gradient_clip_val=0.1).fit(model, batches(1))
    count = model.body[0].weight.numel() + model.head.weight.numel()
    gradient = 0.1 / count**0.5 if before else DECAY
    expected = torch.full_like(model.head.weight, 1 - LR * gradient)
    torch.testing.assert_close(model.head.weight, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.head.bias, torch.ones_like(model.head.bias), rtol=0, atol=0)


def test_a_conversion_reads_the_training_and_each_groups_lr(capsys: pytest.CaptureFixture[str]) -> None:
    """lambda = 1 / (lr * epochs * steps per epoch), with 8 steps an epoch."""
    model = Net(
        grouped=lambda net: [
            {"params": net.body.parameters(), "lr": 0.1},
            {"params": net.head.parameters(), "lr": 0.01},
        ]
    )
    callback = WeightDecay(Timescale(epochs=4))
    make_trainer([callback], max_epochs=2).fit(model, data())
    found = {row.group: row.weight_decay for row in callback.summary()}
    assert found == pytest.approx(
        {
            "group0/decay": 1 / (0.1 * 4 * 8),
            "group1/decay": 1 / (0.01 * 4 * 8),
            "group0/no_decay": 0,
            "group1/no_decay": 0,
        }
    )
    assert "0.3125" in capsys.readouterr().out


def test_a_conversion_knows_the_samples() -> None:
    """lambda = 1 / (N sigma^2), with 32 samples."""
    callback = WeightDecay(GaussianPrior(sigma=0.5), summary=False)
    make_trainer([callback]).fit(Net(), data())
    assert callback.summary()[0].weight_decay == pytest.approx(1 / (32 * 0.25))


def test_a_conversion_asks_for_what_data_without_a_length_cannot_tell() -> None:
    callback = WeightDecay(GaussianPrior(sigma=0.5), summary=False)
    with pytest.raises(ValueError, match=r"samples"):
        make_trainer([callback]).fit(Net(), stream(4))


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"max_epochs": 2}, 2), ({"max_epochs": -1, "max_steps": 4}, 0.5), ({"max_epochs": 2, "max_steps": 4}, 0.5)],
    ids=str,
)
def test_a_conversion_knows_the_length(options: dict[str, int], epochs: float) -> None:
    """lambda = normalised sqrt(batch / (samples epochs)), with 32 samples in 8 steps an epoch."""
    callback = WeightDecay(Normalised(0.4), summary=False)
    make_trainer([callback], **options).fit(Net(), data())
    assert callback.summary()[0].weight_decay == pytest.approx(0.4 * (4 / (32 * epochs)) ** 0.5)


def test_a_conversion_takes_no_length_from_the_steps_of_several_optimizers() -> None:
    """Under manual optimization `max_steps` counts those of all of them, so only `max_epochs` tells the length."""

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    callback = WeightDecay(Normalised(0.4), summary=False)
    make_trainer([callback], max_epochs=2, max_steps=4).fit(Manual(), data())
    assert callback.summary()[0].weight_decay == pytest.approx(0.4 * (4 / (32 * 2)) ** 0.5)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own use
def test_a_conversion_comes_from_yaml_and_is_printed_as_the_number_it_became(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_l2.WeightDecay
      init_args:
        weight_decay: {class_path: lightning_l2.convert.Timescale, init_args: {epochs: 4}}
"""
    )

    class Module(Net):
        def __init__(self) -> None:
            super().__init__()

        def train_dataloader(self) -> Any:
            return data()

    LightningCLI(Module, args=["fit", "--config", str(config)], save_config_callback=None)
    assert "0.3125" in capsys.readouterr().out  # 1 / (0.1 * 4 * 8)


def test_the_summary_is_data_a_table_and_a_file(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "folder" / "decay.csv"
    callback = WeightDecay(0.25, summary_file=str(path))
    with pytest.raises(RuntimeError, match=r"once a fit has begun.*assign_rules"):
        callback.summary()
    make_trainer([callback]).fit(Net(), data())
    decay, no_decay = callback.summary()
    assert (decay.group, decay.rule, decay.weight_decay, decay.tensors, decay.parameters) == (
        "decay",
        "decay",
        0.25,
        2,
        48,
    )
    assert (no_decay.group, no_decay.weight_decay, no_decay.tensors, no_decay.parameters) == ("no_decay", 0.0, 4, 26)
    assert set(decay.names) == DECAYED
    assert set(no_decay.names) == EXEMPT
    printed = capsys.readouterr().out
    for text in ("group", "weight decay", "0.25", "no_decay", "body.0.weight"):
        assert text in printed
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["parameter"]: (row["group"], float(row["weight decay"])) for row in rows} == {
        **dict.fromkeys(DECAYED, ("decay", 0.25)),
        **dict.fromkeys(EXEMPT, ("no_decay", 0.0)),
    }


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("summary", [True, "parameters", False])
def test_the_table_is_printed_as_asked(summary, rich, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not rich:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    make_trainer([WeightDecay(0.25, summary=summary)]).fit(Net(), data())
    printed = capsys.readouterr().out
    assert ("decay" in printed) == bool(summary)
    assert ("head.bias" in printed) == (summary == "parameters")


class Lazy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0]) * 0.0).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_are_decided_once_they_have_a_shape() -> None:
    model, callback = Lazy(), WeightDecay(DECAY, summary=False)
    before: dict[str, torch.Tensor] = {}

    class Remember(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if not before:
                before.update({name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()})

    make_trainer([callback, Remember()]).fit(model, batches(2))
    for name, parameter in model.named_parameters():
        factor = (1 - LR * DECAY) ** 2 if name.endswith("weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("apply", ["optimizer", "decoupled"])
def test_lazy_parameters_where_the_module_calls_backward_itself(apply: Any) -> None:
    """No hook comes between the forward pass and such a call."""

    class Own(Lazy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            super().training_step(batch, batch_idx).backward()
            self.before = self.net[0].weight.detach().cpu().clone()
            self.optimizers().step()

    model, callback = Own(), WeightDecay(DECAY, apply=apply, summary=False)
    make_trainer([callback]).fit(model, batches(1))
    torch.testing.assert_close(model.net[0].weight.detach(), model.before * (1 - LR * DECAY), rtol=1e-6, atol=0)
    assert [row.group for row in callback.summary()] == ["decay", "no_decay"]


class WithLoss(Net):
    """A module whose optimizer has a tensor more than the module's own parameters."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.outside = [nn.Parameter(torch.ones(2, 2))]
        return torch.optim.SGD([*self.parameters(), *self.outside], lr=LR, weight_decay=0.7)


def test_parameters_that_are_not_the_modules_keep_their_decay() -> None:
    callback = WeightDecay(0.1, summary=False)
    make_trainer([callback]).fit(WithLoss(), data())
    assert {row.group: row.weight_decay for row in callback.summary()} == {
        "decay": 0.1,
        "no_decay": 0.0,
        "unassigned": 0.7,
    }


class Growing(Net):
    """Gets a second head in its second epoch, and gives the optimizer a group for it."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.second = nn.Linear(2, 2, device=self.device)
            self.optimizers().optimizer.add_param_group({"params": list(self.second.parameters())})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return self.second(y) if hasattr(self, "second") else y


def test_rules_decide_on_parameters_that_a_module_gets_in_training() -> None:
    callback = WeightDecay(0.25, summary=False)
    make_trainer([callback], max_epochs=2).fit(Growing(), data())
    decided = {name: row.weight_decay for row in callback.summary() for name in row.names}
    assert {name: decided[name] for name in ("second.weight", "second.bias")} == {
        "second.weight": 0.25,
        "second.bias": 0.0,
    }


def test_an_empty_group_of_the_users_trains() -> None:
    model, callback = Net(grouped=lambda net: [{"params": []}, {"params": list(net.parameters())}]), WeightDecay(0.25)
    make_trainer([callback]).fit(model, data())
    assert [(row.group, row.rule, row.weight_decay, row.tensors) for row in callback.summary()] == [
        ("group0", "empty", 0.1, 0),
        ("decay", "decay", 0.25, 2),
        ("no_decay", "no_decay", 0.0, 4),
    ]


@pytest.mark.parametrize(
    ("model", "callback", "error", "message"),
    [
        (
            Net(lambda p: torch.optim.Rprop(p)),
            WeightDecay(0.1),
            MisconfigurationException,
            r"Rprop has no weight decay of its own. Use WeightDecay\(apply='decoupled'\)",
        ),
        (
            Net(lambda p: torch.optim.Rprop(p)),
            WeightDecay(apply="decoupled"),
            MisconfigurationException,
            r"Rprop has no weight decay of its own to keep, which rule 'decay' goes by. Give WeightDecay a",
        ),
        (
            Net(),
            WeightDecay(0.1, rules=[DecayRule("x", pattern="nothing"), "default"]),
            ValueError,
            r"Rule 'x' matched",
        ),
    ],
)
def test_misuse_is_refused_before_the_first_step(model, callback, error, message) -> None:
    class NoStep(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("a batch began")

    with pytest.raises(error, match=message):
        make_trainer([callback, NoStep()]).fit(model, data())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, r"finite and at least 0, got -0.1"),
        ({"weight_decay": float("nan")}, ValueError, r"finite and at least 0, got nan"),
        ({"weight_decay": np.float32(-1.0)}, ValueError, r"finite and at least 0, got"),
        ({"weight_decay": True}, TypeError, r"to be float \| Conversion \| None, but got True"),
        ({"weight_decay": "0.1"}, TypeError, r"to be float \| Conversion \| None, but got '0.1'"),
        ({"on_resume": "maybe"}, ValueError, r"'config', 'checkpoint' or 'error', got 'maybe'"),
        ({"summary": "all"}, ValueError, r"True, False or 'parameters', got 'all'"),
        ({"apply": "couple"}, ValueError, r"couple"),
        ({"before_clipping": True}, ValueError, r"before_clipping"),
        ({"peak_lr": 0.1}, ValueError, r"peak_lr"),
    ],
)
def test_arguments_are_checked_at_once(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        WeightDecay(**arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    callback = WeightDecay(
        np.float32(0.25), rules=[DecayRule("head", pattern="head.weight", multiplier=np.float32(2)), "default"]
    )
    make_trainer([callback]).fit(Net(), data())
    assert {row.group: row.weight_decay for row in callback.summary()} == {"decay": 0.25, "no_decay": 0.0, "head": 0.5}
    assert all(type(row.weight_decay) is float for row in callback.summary())


def test_the_summary_file_may_be_in_a_folder_to_be_made(tmp_path: Path) -> None:
    path = tmp_path / "run" / "1" / "decay.csv"
    make_trainer([WeightDecay(0.25, summary=False, summary_file=path)]).fit(Net(), data())
    assert path.is_file()


@pytest.mark.parametrize("path", ["", "."])
def test_a_summary_file_that_cannot_be_written_is_refused_before_the_first_step(path: str) -> None:
    model = Net()
    before = weights(model)
    with pytest.raises(MisconfigurationException, match=r"`summary_file` '.?' \(.*\)\. Give the path of a file"):
        make_trainer([WeightDecay(0.25, summary=False, summary_file=path)]).fit(model, data())
    assert_same_weights(model, before)


def test_a_conversion_asks_for_a_learning_rate() -> None:
    class Relative(torch.optim.SGD):
        """Finds its steps itself and has None as learning rate, as Adafactor of transformers."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.param_groups[0]["lr"] = None

    with pytest.raises(MisconfigurationException, match=r"no learning rate.*Give `weight_decay` as a number"):
        make_trainer([WeightDecay(Timescale(epochs=1))]).fit(Net(Relative), data())


class Own(WeightDecay):
    """A user's own kind."""


@pytest.mark.parametrize("kinds", [(WeightDecay, Own), (Own, WeightDecay)])
def test_one_of_a_derived_class_is_a_second_one(kinds: Any) -> None:
    trainer = make_trainer([kind(0.1, summary=False) for kind in kinds])
    with pytest.raises(MisconfigurationException, match=r"The Trainer has 2 WeightDecay callbacks.*Keep one"):
        trainer.fit(Net(), data())


def test_group_names_are_unique_over_optimizers() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]

    callback = WeightDecay(0.1, summary=False)
    make_trainer([callback]).fit(Two(), data())
    assert [row.group for row in callback.summary()] == [
        *("optimizer0/decay", "optimizer0/no_decay", "optimizer1/decay", "optimizer1/no_decay")
    ]


@pytest.mark.parametrize(
    "make", [lambda: WeightDecay(0.1, summary=False), lambda: WeightDecayScheduler(LinearSchedule(1.0, 2.0))]
)
def test_a_second_one_that_comes_after_the_trainer_is_refused(make: Any) -> None:
    trainer = make_trainer([make()])
    trainer.callbacks.append(make())
    with pytest.raises(MisconfigurationException, match=r"The Trainer has 2 \w+ callbacks.*Keep one"):
        trainer.fit(Net(), data())


def test_a_rollback_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Callbacks that go back to a checkpoint after a bad batch restore the optimizer in the user's layout."""

    class Rollback(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "good.ckpt")
            if batch_idx == 4:
                trainer._checkpoint_connector.resume_start(tmp_path / "good.ckpt", weights_only=True)
                trainer._checkpoint_connector.restore_callbacks()
                trainer._checkpoint_connector.restore_model()
                trainer._checkpoint_connector.restore_optimizers()
                trainer._checkpoint_connector.resume_end()
            if batch_idx > 4:
                assert weight_decay_in_force(trainer.optimizers[0]) == {"decay": 0.3, "no_decay": 0.0}

    model = Net()
    make_trainer([WeightDecay(0.3, summary=False), Rollback()]).fit(model, batches(8))
    plain = Net(grouped=hand_grouped(0.3))
    plain.load_state_dict(torch.load(tmp_path / "good.ckpt", weights_only=True)["state_dict"])
    make_trainer().fit(plain, batches(3))
    assert_same_weights(model, plain)


def test_a_base_that_no_rule_follows_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rules = [DecayRule("head", pattern="head.weight", weight_decay=0.2), DecayRule("rest", multiplier=0.0)]
    make_trainer([WeightDecay(rules=rules, summary=False)]).fit(Net(), data())
    make_trainer([WeightDecay(DECAY, rules=[rules[0], "default"], summary=False)]).fit(Net(), data())
    assert "acts on nothing" not in caplog.text
    make_trainer([WeightDecay(DECAY, rules=rules, summary=False)]).fit(Net(), data())
    told = "weight_decay=0.3 acts on nothing, since no rule multiplies it. They give 0.2 by 'head', 0 by 'rest'."
    assert told in caplog.text
