"""Which optimizers a Trainer has and which of them update, and what reaches into a module where no hook does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_l2.trainer.optimizers import (
    bare_optimizer,
    bare_optimizers,
    on_optimizers_configured,
    optimizers_in_use,
    unscales_in_step,
    uses_scaler,
)
from tests.helpers import Net, Shrinking, batches, fp16, make_trainer


def test_acting_on_configured_optimizers_happens_once() -> None:
    module, seen = Net(), []
    on_optimizers_configured(module, lambda optimizers, schedulers: seen.append(optimizers))
    optimizer = module.configure_optimizers()
    assert seen == [[optimizer]]
    module.configure_optimizers()
    assert len(seen) == 1


def test_a_fit_that_failed_before_it_configured_leaves_nothing_to_the_next_one() -> None:
    module, acted = Net(), []
    on_optimizers_configured(module, lambda *_: acted.append("failed"))
    on_optimizers_configured(module, lambda *_: acted.append("next"))
    module.configure_optimizers()
    assert acted == ["next"]
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize("failed_fits", [0, 1, 2])
def test_a_method_that_a_user_hung_on_the_module_stays(failed_fits: int) -> None:
    module, acted = Net(), []
    optimizer = module.configure_optimizers()

    def own() -> Any:
        return optimizer

    module.configure_optimizers = own
    for _ in range(failed_fits + 1):
        on_optimizers_configured(module, lambda optimizers, _: acted.extend(optimizers))
    assert module.configure_optimizers() is optimizer
    assert acted == [optimizer]
    assert module.configure_optimizers is own


def in_a_step(module: Shrinking, look: Callable[[pl.Trainer], Any], **options: Any) -> Any:
    """What is seen in the first step of a fit."""
    seen = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(look(trainer))

        on_train_batch_end = on_before_zero_grad

    make_trainer([Look()], **options).fit(module, batches(1))
    return seen[0]


def test_the_optimizer_of_the_module_without_what_lightning_wraps_it_in() -> None:
    module, made = Shrinking(), []
    make = module.make_optimizer
    module.make_optimizer = lambda params: made.append(make(params)) or made[0]
    assert in_a_step(module, lambda trainer: bare_optimizer(module.optimizers()) is trainer.optimizers[0] is made[0])
    assert in_a_step(Shrinking(), lambda trainer: optimizers_in_use(trainer) == bare_optimizers(trainer))


def test_a_module_without_an_optimizer_has_none() -> None:
    module = Shrinking()
    module.configure_optimizers = lambda: None
    with pytest.warns(UserWarning, match="configure_optimizers` returned `None`"):
        assert in_a_step(module, bare_optimizers) == []


class Wrapping(torch.optim.Optimizer):
    """Updates by another optimizer on the same groups, as SAM and Lookahead do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inner.step(closure)


def test_of_a_wrapped_optimizer_the_innermost_is_in_use() -> None:
    module = Shrinking(lambda params: Wrapping(torch.optim.SGD(params, lr=0.1)))
    found = in_a_step(module, lambda trainer: (bare_optimizers(trainer), optimizers_in_use(trainer)))
    assert [[type(one).__name__ for one in optimizers] for optimizers in found] == [["Wrapping"], ["SGD"]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_a_fused_step_unscales_itself(fused: bool, scaled: bool) -> None:
    module = Shrinking(lambda params: torch.optim.AdamW(params, fused=fused)).float()
    options = {"plugins": [fp16()]} if scaled else {}
    found = in_a_step(
        module, lambda trainer: (uses_scaler(trainer), unscales_in_step(trainer, trainer.optimizers[0])), **options
    )
    assert found == (scaled, scaled and fused)
