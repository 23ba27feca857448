"""`on_resume` with a checkpoint that was made without the callback: what its groups say is what it had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import Optimizer

from lightning_l2 import DecayRule, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DECAYED, Shrinking, batches, hand_grouped, make_trainer, weights

# That the checkpoint has another lambda, or other callbacks, may be said; what is done about it is the matter here.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*checkpoint:UserWarning")

LR, OLD, NEW = 0.1, 0.3, 0.05
Groups = Callable[[Any], Any]


class Grouped(Shrinking):
    """One optimizer over these groups, or two of them for body and head."""

    def __init__(self, groups: Groups, weight_decay: float = OLD, two: bool = False) -> None:
        super().__init__()
        self.groups, self.weight_decay, self.two = groups, weight_decay, two
        self.automatic_optimization = not two

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.two:
            return self.loss()
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()
        return None

    def configure_optimizers(self) -> list[Optimizer]:
        parts = [self.groups(self.body), self.groups(self.head)] if self.two else [self.groups(self)]
        return [torch.optim.SGD(part, lr=LR, weight_decay=self.weight_decay) for part in parts]

    def on_train_batch_start(self, *args: Any) -> None:
        self.before = weights(self)

    def on_train_batch_end(self, *args: Any) -> None:
        """What a batch did, whichever hook of the optimizer did it: lambda = (1 - w'/w) / lr."""
        self.lambdas = {
            name: ((1 - parameter.detach() / self.before[name]) / LR).flatten()[0].item()
            for name, parameter in self.named_parameters()
        }


def one_group(module: Any) -> Any:
    return list(module.parameters())


def only_matrices(module: Any) -> Any:
    """Vectors come later, by `add_param_group`."""
    return [parameter for parameter in module.parameters() if parameter.ndim > 1]


def resumed(
    path: Path, on_resume: str, make: Callable[[], Grouped], *others: pl.Callback, then: Any = None, **options: Any
) -> dict[str, float]:
    """The lambdas of the last step of a second epoch, whose first one ran without the callback."""
    trainer = make_trainer()
    trainer.fit(make(), batches(2))
    trainer.save_checkpoint(path)
    model = (then or make)()
    callback = WeightDecay(on_resume=on_resume, summary=False, **{"weight_decay": NEW, **options})
    make_trainer([callback, *others], max_epochs=2).fit(model, batches(2), ckpt_path=path, weights_only=False)
    return model.lambdas


def by_rules(value: float) -> dict[str, float]:
    return {name: value if name in DECAYED else 0.0 for name, _ in Shrinking().named_parameters()}


def everywhere(value: float) -> dict[str, float]:
    return dict.fromkeys(by_rules(value), value)


def close(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=1e-9)


KINDS: dict[str, Callable[[], Grouped]] = {
    "one group": lambda: Grouped(one_group),
    "two optimizers": lambda: Grouped(one_group, two=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("on_resume", "expected"), [("config", by_rules(NEW)), ("checkpoint", everywhere(OLD))])
def test_the_configured_lambda_or_that_of_the_groups(on_resume: str, expected: Any, kind: str, tmp_path: Path) -> None:
    assert resumed(tmp_path / "old.ckpt", on_resume, KINDS[kind]) == close(expected)


def test_the_groups_of_an_expert(tmp_path: Path) -> None:
    make = lambda: Grouped(hand_grouped(OLD, exempt=0.1))  # noqa: E731
    found = resumed(tmp_path / "old.ckpt", "checkpoint", make)
    assert found == close({name: OLD if name in DECAYED else 0.1 for name in found})


@pytest.mark.parametrize("apply", ["decoupled", "independent"])
def test_the_lambda_of_the_groups_acts_as_this_run_says(apply: str, tmp_path: Path) -> None:
    """What is found is divided by lr, which doesn't count for the independent way."""
    found = resumed(tmp_path / "old.ckpt", "checkpoint", KINDS["one group"], apply=apply)
    assert found == close(everywhere(OLD / (LR if apply == "independent" else 1.0)))


def test_a_schedule_multiplies_the_lambda_of_the_groups(tmp_path: Path) -> None:
    """At the third of its five steps it stands at a half, at the fourth and last at three quarters."""
    ramp = WeightDecayScheduler(LinearSchedule(0.0, 1.0), total_steps=5)
    assert resumed(tmp_path / "old.ckpt", "checkpoint", KINDS["one group"], ramp) == close(everywhere(0.75 * OLD))


def test_a_parameter_that_was_not_in_the_checkpoint_has_the_configured_lambda(tmp_path: Path) -> None:
    class Thawing(Grouped):
        def on_train_start(self) -> None:
            vectors = [parameter for parameter in self.parameters() if parameter.ndim == 1]
            self.optimizers().optimizer.add_param_group({"params": vectors, "weight_decay": 0.7})

    make, then = lambda: Grouped(only_matrices), lambda: Thawing(only_matrices)
    assert resumed(tmp_path / "old.ckpt", "checkpoint", make, then=then) == close(by_rules(OLD))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Grouped(hand_grouped(NEW)), {}),
        (lambda: Grouped(one_group, NEW), {"weight_decay": None, "rules": [DecayRule("all")]}),
        (lambda: Grouped(only_matrices, NEW), {}),
    ],
    ids=["an expert's groups", "one lambda for all", "nothing exempt there"],
)
@pytest.mark.filterwarnings("ignore:.*exempt")
def test_error_is_silent_where_both_agree(make: Callable[[], Grouped], options: Any, tmp_path: Path) -> None:
    found = resumed(tmp_path / "old.ckpt", "error", make, **options)
    assert {name: found[name] for name in DECAYED} == close(dict.fromkeys(DECAYED, NEW))


@pytest.mark.parametrize(
    ("make", "then", "options"),
    [
        (KINDS["one group"], None, {}),
        (KINDS["two optimizers"], None, {}),
        (lambda: Grouped(one_group, NEW), None, {}),
        (lambda: Grouped(only_matrices, OLD), lambda: Grouped(only_matrices, NEW), {"weight_decay": None}),
    ],
    ids=["another lambda", "two optimizers", "the exempt ones decayed", "the module's lambda was edited"],
)
def test_error_names_both_where_they_differ(make: Any, then: Any, options: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="on_resume") as error:
        resumed(tmp_path / "old.ckpt", "error", make, then=then, **options)
    assert type(error.value).__name__ in {"ValueError", "RuntimeError", "MisconfigurationException"}
    assert "0.05" in str(error.value)
