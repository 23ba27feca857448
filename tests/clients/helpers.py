"""What the tests with other projects' modules share: callbacks to attach, and what an outsider sees of the groups."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler, weight_decay_in_force
from lightning_l2.schedules import LinearSchedule

LAMBDA = 0.05

# The other projects' own warnings are none of ours.
their_warnings = pytest.mark.filterwarnings("ignore")


def watching() -> list[Any]:
    """Callbacks that measure everything, and split groups without giving any of them another lambda."""
    return [
        L2NormMonitor(per="total"),
        WeightDecay(rules=[DecayRule("small", max_ndim=1, optional=True), DecayRule("large")], summary=False),
        L2NormMonitor(
            every_n_steps=1,
            per="parameter",
            gradients=True,
            updates=True,
            rotation=True,
            initial_ratio=True,
            spectra=1,
        ),
    ]


def decaying(total_steps: int | None = None) -> list[Any]:
    """Default rules, and lambda that doubles from the first step to the last."""
    return [
        WeightDecay(LAMBDA, summary=False),
        WeightDecayScheduler(LinearSchedule(start=1.0, end=2.0), total_steps=total_steps),
        L2NormMonitor(every_n_steps=1),
    ]


def lambda_probe(base: type = pl.Callback) -> Any:
    """A callback of either Lightning package that keeps, by name, lambda of each parameter in each batch's updates.

    It is what torch's optimizers, which all of these projects use, read from their groups in the midst of an update. At
    any other time the groups are to look as before training, of which it keeps notes too.
    """

    class Probe(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.group_names: set[str] = set()
            self.metrics: dict[str, float] = {}
            self.layouts: list[Any] = []

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.look(trainer)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.look(trainer)
            names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
            self.steps.append(read := {})
            for optimizer in trainer.optimizers:
                optimizer._init_group = partial(self.update, type(optimizer)._init_group, optimizer, names, read)
            self.group_names = {name for optimizer in trainer.optimizers for name in weight_decay_in_force(optimizer)}

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.look(trainer)
            for optimizer in trainer.optimizers:
                del optimizer._init_group
            self.metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.look(trainer)

        def update(
            self, init: Any, optimizer: Any, names: dict[int, str], read: dict[str, float], group: Any, *args: Any
        ) -> Any:
            read.update({names[id(parameter)]: group["weight_decay"] for parameter in group["params"]})
            return init(optimizer, group, *args)

        def look(self, trainer: Any) -> None:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self.layouts.append([(list(group), group["weight_decay"], len(group["params"])) for group in groups])

    return Probe()


def by_hand(steps: int, base: type = pl.Callback) -> Any:
    """What `decaying` does, by hand, for Adam and modules without exemptions but `biases_and_norms`.

    Adam adds lambda w to the gradient, so this callback of either Lightning package does, and lets Adam add nothing.
    """

    class ByHand(base):  # type: ignore[misc]
        done = 0

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            for optimizer in trainer.optimizers:
                assert type(optimizer) is torch.optim.Adam
                for group in optimizer.param_groups:
                    group["weight_decay"] = 0.0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            exempt = biases_and_norms(pl_module)
            for name, parameter in pl_module.named_parameters():
                if name not in exempt and parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=LAMBDA * (1 + self.done / (steps - 1)))

        def on_train_batch_end(self, *args: Any) -> None:
            self.done += 1

    return ByHand()


def biases_and_norms(module: nn.Module, norms: tuple[type[nn.Module], ...] = ()) -> set[str]:
    """Names of what is 0-D or 1-D, or belongs to a module of the given types."""
    return {
        f"{path}.{leaf}".lstrip(".")
        for path, owner in module.named_modules()
        for leaf, parameter in owner.named_parameters(recurse=False)
        if parameter.ndim < 2 or isinstance(owner, norms)
    }


def assert_decayed_but(exempt: Collection[str], probe: Any) -> None:
    """lambda doubles from the first step to the last, and is 0 throughout for the exempt parameters."""
    assert exempt <= set(probe.steps[0])
    assert all(layout == probe.layouts[0] for layout in probe.layouts), "nobody else was to see it"
    for step, strength in ((0, LAMBDA), (-1, 2 * LAMBDA)):
        expected = {name: 0.0 if name in exempt else strength for name in probe.steps[step]}
        assert probe.steps[step] == pytest.approx(expected)


def assert_logged(module: nn.Module, metrics: dict[str, float]) -> None:
    """Totals are there; the penalty is at most lambda/2 of all squares, and more than that of none."""
    norm, penalty = metrics["l2_norm/total"], metrics["l2_penalty/total"]
    assert 0.0 < penalty < LAMBDA * norm**2
    now = float(torch.stack([p.detach().double().square().sum() for p in module.parameters()]).sum().sqrt())
    assert norm == pytest.approx(now, rel=0.2), "measured one step before"


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """But for rounding; and `other`, which was trained without decay, is to be told apart from both."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert any(not torch.allclose(other[name].double(), value.double(), 1e-3) for name, value in expected.items())


def assert_moved(actual: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    assert any(not torch.equal(actual[name], value) for name, value in start.items()), "nothing was trained"
