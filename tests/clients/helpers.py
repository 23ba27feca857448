"""What the tests with other projects' modules share: callbacks to attach, and what an outsider sees of the groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler
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
    """A callback of either Lightning package that keeps lambda of each parameter, by name, at each batch's start."""

    class Probe(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.group_names: set[str] = set()
            self.metrics: dict[str, float] = {}

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self.group_names = {group.get("name") for group in groups}
            self.steps.append({names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]})

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}

    return Probe()


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


def assert_moved(actual: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    assert any(not torch.equal(actual[name], value) for name, value in start.items()), "nothing was trained"
