"""Several schedulers in one Trainer, each for groups of its own; what values and lengths mean there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler, weight_decay_in_force
from lightning_l2.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    LRSchedule,
    PlateauSchedule,
    WarmupSchedule,
)
from tests.helpers import DecayWatch, Net, Rows, Shrinking, batches, data, make_trainer

BODY, HEAD, EXEMPT = "body.0.weight", "head.weight", "head.bias"
HEAD_RULES = ["exempt", DecayRule("head", pattern="^head"), "default"]


class Muon(torch.optim.SGD):
    """Stands in for one: an optimizer of another class for the matrices of the body."""


class TwoOptimizers(Shrinking):
    """Steps both by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        rest = [parameter for name, parameter in self.named_parameters() if name != BODY]
        optimizers = [Muon([self.body[0].weight], lr=0.1), torch.optim.AdamW(rest, lr=0.2, weight_decay=0.9)]
        self.watches = [DecayWatch(self, optimizer) for optimizer in optimizers]
        return optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss())
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("order", [1, -1])
def test_two_optimizers_with_a_lambda_and_a_schedule_each(order: int) -> None:
    """A warm-up of three steps for one, a line of lambdas for the other, both to the step, in any order."""
    model, logger = TwoOptimizers(), Rows()
    callbacks = [
        WeightDecay(
            0.1, rules=["exempt", DecayRule("muon", optimizer="Muon", weight_decay=0.5), "default"], summary=False
        ),
        WeightDecayScheduler(WarmupSchedule(steps=3), groups="^muon$"),
        WeightDecayScheduler(LinearSchedule(0.2, 0.0), groups="^decay$", values="weight_decay"),
        L2NormMonitor(every_n_steps=1),
    ][::order]
    make_trainer(callbacks, max_epochs=2, logger=logger).fit(model, batches(4))
    muon = [0.5 * min(step / 3, 1.0) for step in range(8)]
    decay = [0.2 - 0.2 * step / 7 for step in range(8)]
    assert model.watches[0].of(BODY) == pytest.approx(muon, abs=1e-12)
    assert model.watches[1].of(HEAD) == pytest.approx(decay, abs=1e-12)
    assert model.watches[1].of(EXEMPT) == [0.0] * 8
    assert logger.of("weight_decay/muon") == pytest.approx(muon, abs=1e-12)
    assert logger.of("weight_decay/decay") == pytest.approx(decay, abs=1e-12)


class Logging(Net):
    """Logs a loss that stops getting better, in every epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("plateau", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def both() -> list[Any]:
    schedules = {"^head$": PlateauSchedule("plateau", factor=0.5, patience=0), "^decay$": LRSchedule()}
    schedulers = [WeightDecayScheduler(schedule, groups=groups) for groups, schedule in schedules.items()]
    return [WeightDecay(0.3, rules=HEAD_RULES, summary=False), *schedulers]


def trained(tmp_path: Path, epochs: int, ckpt_path: str | None = None, order: int = 1) -> Logging:
    torch.manual_seed(0)
    model = Logging(
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7),
    )
    trainer = make_trainer(both()[::order], max_epochs=epochs)
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return model


def test_each_has_its_own_state_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path, 6).state_dict()
    trained(tmp_path, 3)
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    keys = [key for key in states if key.startswith("WeightDecayScheduler")]
    assert keys == [scheduler.state_key for scheduler in both()[1:]]
    # the second epoch without an improvement halves it, and so does the third
    assert states[keys[0]]["feedback"][0]["multipliers"] == [0.25]
    resumed = trained(tmp_path, 6, str(tmp_path / "last.ckpt"), order=-1).state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_without_groups_the_key_is_as_before() -> None:
    assert WeightDecayScheduler(ConstantSchedule()).state_key == "WeightDecayScheduler"


def lines(*patterns: str | None) -> list[WeightDecayScheduler]:
    return [WeightDecayScheduler(LinearSchedule(1.0, 2.0), groups=groups) for groups in patterns]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((None, None), r"The Trainer has 2 WeightDecayScheduler.*or give each `groups` of its own"),
        (("head", None), r"The Trainer has 2 WeightDecayScheduler.*or give each `groups` of its own"),
        (("head", "head"), r"The Trainer has 2 WeightDecayScheduler.*or give each `groups` of its own"),
        (
            ("^head$", "h", "^decay$"),
            r"2 schedules take the parameter group 'head', by groups='\^head\$' and groups='h'\. Let one",
        ),
        (("hed",), r"groups='hed'\) takes no parameter group\. The groups are 'decay', 'no_decay', 'head'\."),
        (("^head$", "^$"), r"groups='\^\$'\) takes no parameter group"),
        (
            ("^no_decay$",),
            r"weight decay of every parameter group that '\^no_decay\$' takes is 0\. Rules exempt all of",
        ),
        # it takes 'no_decay' too, which stays at 0 whoever takes it
        (("decay", "no_decay|head"), None),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_groups_that_two_take_or_none_are_an_error(patterns: Any, message: str | None, lazy: bool) -> None:
    class Counting(Shrinking):
        steps = 0

        def __init__(self) -> None:
            super().__init__()
            if lazy:
                self.body.append(nn.LazyLinear(3, bias=False, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.body(torch.ones(1, 3, dtype=torch.float64))
            return self.loss()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(self.count)
            return optimizer

        def count(self, *_: Any) -> None:
            self.steps += 1

    model = Counting()
    trainer = make_trainer([*lines(*patterns), WeightDecay(0.1, rules=HEAD_RULES, summary=False)])
    if message is None:
        trainer.fit(model, batches(2))
    else:
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(model, batches(2))
    assert model.steps == (2 if message is None else 0)


def test_a_pattern_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"Expected `groups` to be a regular expression, got '\(head': missing \)"):
        WeightDecayScheduler(ConstantSchedule(), groups="(head")


def lambdas(callbacks: list[Any], model: Any = None, **options: Any) -> Shrinking:
    model = Shrinking() if model is None else model
    make_trainer(callbacks, **options).fit(model, batches(3))
    return model


@pytest.mark.filterwarnings("ignore:WeightDecay.* acts on nothing")
@pytest.mark.parametrize(
    ("rules", "head", "body"),
    [
        # twice the value, whoever is the strongest
        (
            ["exempt", DecayRule("head", pattern="^head", multiplier=2.0), "default"],
            [0.08, 0.44, 0.8],
            [0.04, 0.22, 0.4],
        ),
        # 0.5 is 12.5 times the base of 0.04
        (
            ["exempt", DecayRule("head", pattern="^head", weight_decay=0.5), "default"],
            [0.5, 2.75, 5.0],
            [0.04, 0.22, 0.4],
        ),
        # no rule multiplies a base: in the place of the largest
        (
            ["exempt", DecayRule("head", pattern="^head", weight_decay=0.5), DecayRule("rest", weight_decay=0.25)],
            [0.04, 0.22, 0.4],
            [0.02, 0.11, 0.2],
        ),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_values_stand_for_the_base_that_was_configured(rules: Any, head: Any, body: Any, order: int) -> None:
    scheduler = WeightDecayScheduler(LinearSchedule(0.04, 0.4), values="weight_decay")
    model = lambdas([WeightDecay(0.04, rules=rules, summary=False), scheduler][::order])
    assert model.watches[0].of(HEAD) == pytest.approx(head, rel=1e-9)
    assert model.watches[0].of(BODY) == pytest.approx(body, rel=1e-9)


@pytest.mark.filterwarnings("ignore:WeightDecay.* acts on nothing")
@pytest.mark.parametrize("groups", ["head", None])
def test_values_of_one_group_stand_for_its_own_base(groups: str | None) -> None:
    rules = ["exempt", DecayRule("head", pattern="^head", weight_decay=0.5), DecayRule("rest", weight_decay=0.25)]
    scheduler = WeightDecayScheduler(LinearSchedule(0.04, 0.4), values="weight_decay", groups=groups)
    model = lambdas([WeightDecay(0.04, rules=rules, summary=False), scheduler])
    assert model.watches[0].of(HEAD) == pytest.approx([0.04, 0.22, 0.4], rel=1e-9)
    assert model.watches[0].of(BODY) == pytest.approx([0.25] * 3 if groups else [0.02, 0.11, 0.2], rel=1e-9)


class Late(Shrinking):
    """Has the head's weight from its second epoch on, with a lambda larger than any before."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.body[0].weight], lr=0.1, weight_decay=0.2)
        self.watches = [DecayWatch(self, optimizer)]
        return optimizer

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            optimizer = self.optimizers().optimizer
            optimizer.add_param_group({"params": [self.head.weight], "weight_decay": 0.8})
            self.watches.append(DecayWatch(self, optimizer))


def test_a_group_that_comes_late_is_no_new_base() -> None:
    scheduler = WeightDecayScheduler(ConstantSchedule(0.6), values="weight_decay")
    model = lambdas([scheduler], Late(), max_epochs=2)
    assert model.watches[0].of(BODY) == pytest.approx([0.6] * 6, rel=1e-9)
    assert model.watches[1].of(HEAD) == pytest.approx([2.4] * 3, rel=1e-9)


def test_a_group_that_comes_in_a_batch_follows_at_once() -> None:
    class InStep(Shrinking):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([self.body[0].weight], lr=0.1)
            self.watches = [DecayWatch(self, optimizer)]
            return optimizer

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                self.optimizers().optimizer.add_param_group({"params": [self.head.weight]})
            return self.loss()

    rules = ["exempt", DecayRule("head", pattern="^head", multiplier=2.0), "default"]
    scheduler = WeightDecayScheduler(ConstantSchedule(5.0), groups="^(head|decay)$")
    model = lambdas([WeightDecay(0.1, rules=rules, summary=False), scheduler], InStep())
    assert model.watches[0].of(BODY) == pytest.approx([0.5] * 3, rel=1e-9)
    # in the second and the third step, with a lambda of 2 * 5 * 0.1
    assert model.head.weight[0, 0].item() == pytest.approx((1 - 0.1 * 1.0) ** 2, rel=1e-9)


def test_multipliers_that_start_at_the_base_are_told() -> None:
    message = (
        r"CosineSchedule starts at a multiplier of 0\.04, and the base weight decay is 0\.04, so lambda starts at "
        r"0\.04 \* 0\.04 = 0\.0016\. If its values are weight decays, set values='weight_decay'\."
    )
    dino = CosineSchedule(0.04, 0.4)
    with pytest.warns(UserWarning, match=message) as told:
        lambdas([WeightDecay(0.04, summary=False), WeightDecayScheduler(dino)])
    assert len([one for one in told if "starts at" in str(one.message)]) == 1
    for quiet in (
        [WeightDecay(0.04, summary=False), WeightDecayScheduler(dino, values="weight_decay")],
        [WeightDecay(1.0, summary=False), WeightDecayScheduler(LinearSchedule(1.0, 0.5))],
        [WeightDecay(0.05, summary=False), WeightDecayScheduler(dino)],
        [WeightDecay(0.0, summary=False), WeightDecayScheduler(LinearSchedule(0.0, 1.0))],
    ):
        lambdas(quiet)


@pytest.mark.parametrize("values", ["multiplier", "weight_decay"])
def test_nothing_to_decay_in_the_groups_is_an_error(values: Any) -> None:
    class ByHand(Shrinking):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": [self.body[0].weight], "weight_decay": 0.1},
                {"params": [self.head.weight], "name": "h"},
            ]
            optimizer = torch.optim.SGD(groups, lr=0.1)
            self.watches = [DecayWatch(self, optimizer)]
            return optimizer

    model = ByHand()
    with pytest.raises(MisconfigurationException, match=r"weight decay of every parameter group that 'h' takes is 0"):
        lambdas([WeightDecayScheduler(LinearSchedule(1.0, 2.0), groups="h", values=values)], model)
    assert model.watches[0].steps == []


def test_lambda_goes_back_when_the_fit_ends() -> None:
    model = Net()
    trainer = make_trainer([WeightDecay(0.1, rules=HEAD_RULES, summary=False), *lines("^head$", "^decay$")])
    trainer.fit(model, batches(2))
    assert weight_decay_in_force(trainer.optimizers[0]) == {"group0": 0.1}


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_l2.WeightDecay
      init_args:
        weight_decay: 0.1
        summary: false
        rules:
          - exempt
          - {name: first, group: 0, optimizer: SGD, pattern: "^head", weight_decay: 0.5}
          - default
    - class_path: lightning_l2.WeightDecayScheduler
      init_args:
        groups: ^first$
        schedule: {class_path: lightning_l2.schedules.WarmupSchedule, init_args: {steps: 2}}
    - class_path: lightning_l2.WeightDecayScheduler
      init_args:
        groups: ^decay$
        schedule: {class_path: lightning_l2.schedules.LinearSchedule, init_args: {start: 1.0, end: 0.0}}
"""


class Watched(Shrinking):
    """Takes no arguments, which no YAML could hold."""

    def __init__(self) -> None:
        super().__init__()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own use
def test_yaml_with_two_schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed and read again, it trains the same."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    for _ in range(2):
        cli = LightningCLI(
            Watched, run=False, save_config_callback=None, seed_everything_default=False, args=["--config", str(config)]
        )
        cli.trainer.fit(cli.model, batches(3))
        assert cli.model.watches[0].of(HEAD) == pytest.approx([0.0, 0.25, 0.5], abs=1e-12)
        assert cli.model.watches[0].of(BODY) == pytest.approx([0.1, 0.05, 0.0], abs=1e-12)
        config.write_text(cli.parser.dump(cli.config))
