"""What reaches into a Trainer or a module where no hook does."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_l2.trainer.optimizers import on_optimizers_configured
from tests.helpers import Net


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
