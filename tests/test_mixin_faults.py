"""The mixin where several optimizers, several modules or another `configure_callbacks` meet it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch

from lightning_l2 import DecayRule, WeightDecay, WeightDecayMixin
from tests.helpers import DecayWatch, Shrinking, batches, make_trainer


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
