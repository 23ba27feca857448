"""A module that brings its own rules: through real Trainers, against numbers worked out by hand."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_l2 import DecayRule, WeightDecay, WeightDecayMixin
from lightning_l2.convert import Timescale
from lightning_l2.param_groups.decay_groups import decay_groups
from tests.helpers import DecayWatch, Shrinking, batches, make_trainer
from tests.processes import forked, sharded_mixin

RULES = [DecayRule("head", pattern=r"^head\.weight", multiplier=0.5), "default"]


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.in_force = None

    def training_step(self, batch, batch_idx):
        (optimizer,) = self.trainer.optimizers
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        parts = decay_groups(optimizer).groups
        self.in_force = {names[id(p)]: part.weight_decay for part in parts for p in part.params}
        return nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.3)


class Net(WeightDecayMixin, Plain):
    decay_rules = RULES


class ByHand(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.decay_param_groups(0.8), lr=0.1)


def fit(model, callbacks=(), **options):
    trainer = make_trainer(list(callbacks), **options)
    trainer.fit(model, batches(2))
    return trainer


def values(body, head):
    return {"body.weight": body, "body.bias": 0.0, "head.weight": head, "head.bias": 0.0}


def decays(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightDecay)]


def test_the_modules_rules_hold_without_a_callback_on_the_trainer():
    model = Net()
    trainer = fit(model)
    assert model.in_force == values(0.3, 0.15)
    assert [row.group for row in decays(trainer)[0].summary()] == ["decay", "no_decay", "head"]


def test_a_base_weight_decay_of_the_class_or_the_instance():
    model = Net()
    model.weight_decay = 0.6
    fit(model)
    assert model.in_force == values(0.6, 0.3)


def test_a_conversion_as_the_base():
    """Two steps an epoch at lr 0.1: a timescale of 5 epochs is lambda = 1 / (0.1 * 5 * 2)."""
    model = Net()
    model.weight_decay = Timescale(epochs=5)
    fit(model)
    assert model.in_force == pytest.approx(values(1.0, 0.5))


@pytest.mark.parametrize("kind", [WeightDecay, type("Own", (WeightDecay,), {})])
def test_a_trainers_own_callback_goes_first(kind):
    model, own = Net(), kind(0.9, summary=False)
    trainer = fit(model, [own])
    assert decays(trainer) == [own]
    assert model.in_force == values(0.9, 0.9)


def test_a_callback_of_the_module_itself_goes_first():
    class Own(Net):
        def configure_callbacks(self):
            return [*super().configure_callbacks(), pl.callbacks.DeviceStatsMonitor()]

    class Base(Plain):
        def configure_callbacks(self):
            return WeightDecay(0.7, summary=False)

    class Derived(WeightDecayMixin, Base):
        decay_rules = RULES

    assert [type(callback).__name__ for callback in Own().configure_callbacks()] == [
        "ModuleWeightDecay",
        "DeviceStatsMonitor",
    ]
    assert [callback.weight_decay for callback in Derived().configure_callbacks()] == [0.7]


TIMER = pl.callbacks.Timer()


@pytest.mark.parametrize(
    ("returned", "kept"), [(None, []), ([], []), ((), []), (TIMER, [TIMER]), ([TIMER], [TIMER]), ((TIMER,), [TIMER])]
)
def test_what_the_base_class_configures_is_kept(returned, kept):
    class Base(Plain):
        def configure_callbacks(self):
            return returned

    class Derived(WeightDecayMixin, Base):
        pass

    configured = Derived().configure_callbacks()
    assert configured[:-1] == kept
    assert type(configured[-1]).__name__ == "ModuleWeightDecay"


def test_no_rules_no_callback():
    model = Net()
    model.decay_rules = None
    trainer = fit(model)
    assert decays(trainer) == []
    assert model.in_force == dict.fromkeys(values(0, 0), 0.3)


def test_one_trainer_fits_tests_and_fits_again():
    first, second = Net(), Net()
    second.decay_rules = "default"
    trainer = fit(first)
    callback = decays(trainer)[0]
    trainer.test(first, batches(1), verbose=False)
    assert decays(trainer) == [callback]
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(first, batches(2))
    assert decays(trainer) == [callback]
    assert first.in_force == values(0.3, 0.15)
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(second, batches(2))
    assert len(decays(trainer)) == 1
    assert second.in_force == values(0.3, 0.3)


def test_an_order_in_which_the_mixin_does_nothing_is_refused():
    with pytest.raises(TypeError) as caught:
        type("Wrong", (Plain, WeightDecayMixin), {})
    assert str(caught.value) == (
        "Wrong has WeightDecayMixin after LightningModule, where it does nothing. "
        "Write class Wrong(WeightDecayMixin, LightningModule)."
    )
    assert issubclass(type("Mixed", (WeightDecayMixin,), {}), WeightDecayMixin)


def test_hand_written_groups_keep_their_weight_decay():
    """A multiplier of a rule must not act twice: in the groups and again in the callback."""
    model = ByHand()
    trainer = fit(model)
    assert model.in_force == values(0.8, 0.4)
    assert [(group["name"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups] == [
        ("decay", 0.8),
        ("no_decay", 0.0),
        ("head", 0.4),
    ]


def test_hand_written_groups_leave_a_trainers_own_callback_alone():
    own = WeightDecay(0.9, summary=False)
    model = ByHand()
    fit(model, [own])
    assert own.weight_decay == 0.9
    assert model.in_force == values(0.9, 0.9)


def test_groups_without_rules_of_the_module_are_the_default_ones():
    model = Net()
    model.decay_rules = None
    assert [(group["name"], group["weight_decay"]) for group in model.decay_param_groups(0.1)] == [
        ("decay", 0.1),
        ("no_decay", 0.0),
    ]


def test_groups_take_the_base_of_the_module_and_some_parameters():
    model = Net()
    model.weight_decay = 0.2
    model.body.bias.requires_grad_(False)
    groups = model.decay_param_groups(parameters=model.body.parameters())
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [("decay", 0.2, 1)]
    assert groups[0]["params"][0] is model.body.weight
    assert [group["name"] for group in model.decay_param_groups(0.1)] == ["decay", "head", "no_decay"]


@pytest.mark.parametrize("ask", [lambda model: model.decay_param_groups(), lambda model: model.l2_penalty()])
@pytest.mark.parametrize("base", [None, Timescale(epochs=5)])
def test_a_missing_base_is_an_error(ask, base):
    model = Net()
    model.weight_decay = base
    with pytest.raises(ValueError, match="weight decay") as caught:
        ask(model)
    assert str(caught.value) == (
        f"Net has no number as its weight decay, but {base!r}. Give `weight_decay`, or set the attribute of that name."
    )


def test_norm_and_penalty_of_the_module():
    model = Net().requires_grad_(True)
    model.body.bias.requires_grad_(False)
    arrays = {name: p.detach().double().numpy() for name, p in model.named_parameters() if p.requires_grad}
    norm = np.sqrt(sum((array**2).sum() for array in arrays.values()))
    penalty = 0.2 / 2 * (arrays["body.weight"] ** 2).sum() + 0.1 / 2 * (arrays["head.weight"] ** 2).sum()
    assert model.l2_norm().shape == model.l2_penalty(0.2).shape == ()
    assert float(model.l2_norm()) == pytest.approx(norm, rel=1e-6)
    assert float(model.l2_penalty(0.2)) == pytest.approx(penalty, rel=1e-6)
    model.weight_decay = 0.4
    assert float(model.l2_penalty()) == pytest.approx(2 * penalty, rel=1e-6)
    model.decay_rules = None
    assert float(model.l2_penalty()) == pytest.approx(
        sum(0.2 * (arrays[f"{n}.weight"] ** 2).sum() for n in ("body", "head"))
    )


def test_norm_and_penalty_can_be_logged_in_training():
    class Logging(Net):
        weight_decay = 0.2

        def training_step(self, batch, batch_idx):
            self.log("norm", self.l2_norm())
            self.log("penalty", self.l2_penalty())
            return super().training_step(batch, batch_idx)

    metrics = fit(Logging()).callback_metrics
    assert metrics["norm"] > 0
    assert metrics["penalty"] > 0


@pytest.mark.parametrize("first", [Net, Plain])
def test_checkpoints_are_shared_with_a_trainers_callback(first, tmp_path):
    """Saved with the module's callback and resumed with the Trainer's, or the other way round."""
    own = WeightDecay(rules=RULES, on_resume="checkpoint", summary=False)
    trainer = fit(first(), [own] if first is Plain else [], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model = (Net if first is Plain else Plain)()
    again = make_trainer([] if first is Plain else [copy.deepcopy(own)], max_epochs=2)
    again.fit(model, batches(2), ckpt_path=tmp_path / "one.ckpt")
    assert model.in_force == values(0.3, 0.15)


def test_norm_and_penalty_of_a_sharded_module(tmp_path):
    forked.ranks(sharded_mixin.work, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["sharded"] == pytest.approx(found["whole"], rel=1e-6)
        assert found["groups"] == [["decay", 2], ["no_decay", 2]]


SCRIPT = """
import pytorch_lightning as pl, torch
from lightning_l2 import weight_decay_in_force
from lightning_l2.mixin import WeightDecayMixin

class Net(WeightDecayMixin, pl.LightningModule):
    weight_decay = 0.5

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        print(weight_decay_in_force(self.trainer.optimizers[0]))
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 2)), batch_size=2)
pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False).fit(Net(), data)
"""


def test_modules_of_the_other_package():
    done = forked.python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "{'decay': 0.5, 'no_decay': 0.0}" in done.stdout


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


class TwoBases(WeightDecayMixin, Shrinking):
    """Two optimizers stepped by hand, each with groups of its own base."""

    def __init__(self, *bases: float | None) -> None:
        super().__init__()
        self.automatic_optimization, self.bases = False, bases

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.body.parameters(), self.head.parameters())
        made = [sgd(self.decay_param_groups(base, part)) for base, part in zip(self.bases, parts, strict=True)]
        self.watches = [DecayWatch(self, optimizer) for optimizer in made]
        return made


class OneOptimizer(TwoBases):
    """The groups of both bases in one optimizer, which the Trainer steps."""

    def __init__(self, *bases: float | None) -> None:
        super().__init__(*bases)
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss()

    def configure_optimizers(self) -> Any:
        parts = (self.body.parameters(), self.head.parameters())
        made = [self.decay_param_groups(base, part) for base, part in zip(self.bases, parts, strict=True)]
        optimizer = sgd([group for groups in made for group in groups])
        self.watches = [DecayWatch(self, optimizer)]
        return optimizer


class OfTheModule(TwoBases):
    """The second base is the module's attribute."""

    weight_decay = 0.02


class Ruled(TwoBases):
    """A rule halves the base of the second optimizer's matrix."""

    decay_rules: ClassVar = [DecayRule("head", pattern=r"^head\.weight", multiplier=0.5, optional=True), "default"]


@pytest.mark.parametrize(
    ("kind", "bases", "body", "head"),
    [
        (TwoBases, (0.1, 0.02), 0.1, 0.02),
        (OneOptimizer, (0.1, 0.02), 0.1, 0.02),
        (OfTheModule, (0.1, None), 0.1, 0.02),
        (Ruled, (0.1, 0.04), 0.1, 0.02),
    ],
)
def test_each_call_keeps_the_base_that_it_was_given(kind: Any, bases: Any, body: float, head: float) -> None:
    model = kind(*bases)
    make_trainer().fit(model, batches(3))
    found = {name: watch.of(name) for watch in model.watches for name in watch.named}
    expected = dict.fromkeys(found, 0.0) | {"body.0.weight": body, "head.weight": head}
    for name, value in expected.items():
        assert found[name] == pytest.approx([value] * 3, abs=1e-12), name


def told(make: Callable[[], pl.LightningModule]) -> str:
    """What a fit says, whether as warnings or as an error, already when its class is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make_trainer().fit(make(), batches(2))
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
    return "\n".join(str(warning.message) for warning in caught if warning.category is UserWarning)


def module(base: type = Shrinking, configured: Callable[[Any], Any] | None = None, **attributes: Any) -> Any:
    """A module with the mixin whose own `configure_callbacks` is this one."""
    own = {} if configured is None else {"configure_callbacks": configured}
    return type("Overriding", (WeightDecayMixin, base), {**own, **attributes})(sgd)


def timer(self: Any) -> list[pl.Callback]:
    return [pl.callbacks.Timer()]


def nothing(self: Any) -> list[pl.Callback]:
    return []


def with_the_mixins(self: Any) -> list[pl.Callback]:
    return [*WeightDecayMixin.configure_callbacks(self), pl.callbacks.Timer()]


def its_own(self: Any) -> list[pl.Callback]:
    return [WeightDecay(0.3, summary=False)]


def inherited() -> Any:
    """The override stands in a class between the module and the mixin."""
    between = type("Between", (WeightDecayMixin, Shrinking), {"configure_callbacks": timer, "weight_decay": 0.3})
    return type("Inheriting", (between,), {})(sgd)


@pytest.mark.parametrize(
    "make",
    [lambda: module(configured=timer, weight_decay=0.3), lambda: module(configured=nothing), inherited],
    ids=["other callbacks", "none", "inherited"],
)
def test_an_override_that_forgets_the_mixin_is_told(make: Callable[[], Any]) -> None:
    assert "configure_callbacks" in told(make)


@pytest.mark.parametrize(
    "make",
    [
        lambda: module(configured=with_the_mixins, weight_decay=0.3),
        lambda: module(configured=its_own),
        lambda: module(configured=timer, decay_rules=None),
    ],
    ids=["with the mixin's", "a WeightDecay of its own", "without rules"],
)
def test_an_override_that_knows_what_it_does_is_not(make: Callable[[], Any]) -> None:
    assert "configure_callbacks" not in told(make)


class Mine(WeightDecayMixin, Shrinking):
    weight_decay = 0.5
    decay_rules: ClassVar = [DecayRule("all")]


class WithoutRules(WeightDecayMixin, Shrinking):
    decay_rules = None


class Others(WeightDecayMixin, Shrinking):
    weight_decay = 0.2


class Failing(Mine):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("a bug")


def lambdas(trainer: pl.Trainer, model: Shrinking) -> dict[str, float]:
    """Those of a step of one epoch more."""
    trainer.fit_loop.max_epochs = trainer.current_epoch + 1
    trainer.fit(model, batches(1))
    (watch,) = model.watches
    return {name: pytest.approx(watch.of(name)[-1], abs=1e-12) for name in watch.named}


ALL = {name: 0.1 for name, _ in Shrinking().named_parameters()}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (WithoutRules, ALL),
        (Shrinking, ALL),
        (Others, {name: 0.2 if name in {"body.0.weight", "head.weight"} else 0.0 for name in ALL}),
    ],
)
@pytest.mark.parametrize("first", [Mine, Failing])
def test_the_next_module_of_a_trainer_has_its_own_decay(first: Any, second: Any, expected: dict[str, float]) -> None:
    """Or none, then the optimizer's own 0.1 holds; also where the module before has failed or is fitted again."""
    trainer = make_trainer()
    if first is Failing:
        with pytest.raises(KeyError, match="a bug"):
            trainer.fit(first(), batches(1))
    else:
        assert lambdas(trainer, first()) == dict.fromkeys(ALL, 0.5)
    assert lambdas(trainer, second()) == expected
    assert lambdas(trainer, Mine()) == dict.fromkeys(ALL, 0.5)


def test_a_plain_module_is_tested_after_another_was_fitted() -> None:
    trainer, plain = make_trainer(), Shrinking()
    trainer.fit(Mine(), batches(1))
    plain.test_step = lambda batch, batch_idx: None
    trainer.test(plain, batches(1), verbose=False)
    assert all((parameter == 1).all() for parameter in plain.parameters())
