"""What modules and other callbacks write into an optimizer has the effect that it has without the callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lightning_l2 import DecayRule, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DECAYED, EXEMPT, Rows, Shrinking, batches, make_trainer
from tests.others import STEPS, Acting, TwoGroups, assert_undisturbed, fit

LAMBDA = 0.3


def warmed(model: Acting, factor: float = 1.0) -> float:
    return factor * 0.02 * (1 + len(model.rates))


def by_index(model: Acting) -> None:
    groups = model.optimizers().param_groups
    groups[0]["lr"], groups[1]["lr"] = warmed(model), warmed(model, 3.0)


def by_name(model: Acting) -> None:
    groups = {group["name"]: group for group in model.trainer.optimizers[0].param_groups}
    groups["body"]["lr"], groups["head"]["lr"] = warmed(model), warmed(model, 3.0)


def by_reference(model: Acting) -> None:
    for group, factor in zip(model.kept, (1.0, 3.0), strict=True):
        group["lr"] = warmed(model, factor)


def by_kept_list(model: Acting) -> None:
    model.groups[-1]["lr"] = warmed(model)


def by_factor(model: Acting) -> None:
    for group in model.optimizers().param_groups:
        group["lr"] *= 0.9


def other_options(model: Acting) -> None:
    groups = model.optimizers().param_groups
    groups[1]["maximize"] = len(model.rates) % 2 == 1
    groups[0]["momentum"] = model.pull * 0.1 * len(model.rates)


HOOKS = ["on_train_batch_start", "training_step", "on_before_zero_grad", "on_before_optimizer_step", "optimizer_step"]
WRITES = [by_name, by_reference, by_kept_list, by_factor, other_options]


@pytest.mark.parametrize(
    ("hook", "write"),
    [*((hook, by_index) for hook in HOOKS), *(("optimizer_step", write) for write in WRITES)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_options_written_by_a_modules_hook(hook: str, write: Callable[[Acting], None]) -> None:
    assert_undisturbed(lambda pull: Acting(hook, write, pull))


class WarmUp:
    """Dampens what other schedulers give, and so remembers one learning rate for each group of the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.done = optimizer, 0
        self.undampened = [group["lr"] for group in optimizer.param_groups]
        self.step()

    @contextmanager
    def around(self) -> Iterator[None]:
        for group, rate in zip(self.optimizer.param_groups, self.undampened, strict=True):
            group["lr"] = rate
        yield
        self.undampened = [group["lr"] for group in self.optimizer.param_groups]
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= min(1.0, self.done / 4)

    def step(self) -> None:
        with self.around():
            pass


class Keeping(TwoGroups):
    """A scheduler that the Trainer doesn't know, stepped by the module itself."""

    def __init__(self, make: Callable[[Optimizer], Any], late: bool, pull: float) -> None:
        super().__init__(pull)
        self.make, self.late = make, late

    def scheduled(self, optimizer: Optimizer) -> Any:
        if not self.late:
            self.kept_scheduler = self.make(optimizer)
        return optimizer

    def on_train_start(self) -> None:
        if self.late:
            self.kept_scheduler = self.make(self.optimizers().optimizer)

    def on_train_batch_end(self, *args: Any) -> None:
        plateau = isinstance(self.kept_scheduler, lr_scheduler.ReduceLROnPlateau)
        self.kept_scheduler.step(*[1.0] * plateau)


def halving(optimizer: Optimizer) -> lr_scheduler.LambdaLR:
    return lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.8**step])


def one_cycle(optimizer: Optimizer) -> lr_scheduler.OneCycleLR:
    return lr_scheduler.OneCycleLR(optimizer, [0.1, 0.3], STEPS + 2, cycle_momentum=optimizer.defaults["momentum"] > 0)


KEPT: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": halving,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "OneCycleLR": one_cycle,
    "warm-up": WarmUp,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize(("kept", "late"), [*((kept, False) for kept in KEPT), ("LambdaLR", True), ("warm-up", True)])
def test_schedulers_that_a_module_keeps_to_itself(kept: str, late: bool) -> None:
    """``late``: made when the training starts, after the callbacks' own hooks."""
    assert_undisturbed(lambda pull: Keeping(KEPT[kept], late, pull))


class Dampened(TwoGroups):
    """A warm-up of the module's own around the scheduler that the Trainer has."""

    def scheduled(self, optimizer: Optimizer) -> Any:
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        self.warm_up = WarmUp(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        with self.warm_up.around():
            scheduler.step()


def test_a_warm_up_around_the_trainers_scheduler() -> None:
    assert_undisturbed(Dampened)


def clip_the_first_group(model: Acting) -> None:
    torch.nn.utils.clip_grad_norm_(model.optimizers().param_groups[0]["params"], 0.01)


def add_noise_group_by_group(model: Acting) -> None:
    generator = torch.Generator().manual_seed(len(model.rates))
    for group in model.optimizers().param_groups:
        for parameter in group["params"]:
            parameter.grad += model.pull * torch.randn(parameter.shape, generator=generator)


def average_by_position(model: Acting) -> None:
    """Pulls each weight of the second group towards its own running mean, kept in the group's order."""
    params = model.trainer.optimizers[0].param_groups[1]["params"]
    means = model.__dict__.setdefault("means", [parameter.detach().clone() for parameter in params])
    for mean, parameter in zip(means, params, strict=True):
        mean.lerp_(parameter.detach(), 0.3)
        parameter.grad += model.pull * (parameter.detach() - mean)


@pytest.mark.parametrize("act", [clip_the_first_group, add_noise_group_by_group, average_by_position])
def test_gradients_that_a_module_finds_through_its_groups(act: Callable[[Acting], None]) -> None:
    assert_undisturbed(lambda pull: Acting("on_before_optimizer_step", act, pull))


def renew_an_array(model: Acting) -> None:
    group = model.groups[0]
    group["history"] = np.append(group.get("history", np.zeros(3))[1:], group["lr"])


def fill_a_tensor(model: Acting) -> None:
    model.groups[1].setdefault("history", torch.zeros(STEPS))[len(model.rates)] = 1.0


def count_in_a_mapping(model: Acting) -> None:
    for group in model.optimizers().param_groups:
        counts = group.setdefault("history", {"steps": np.zeros(2), "norms": []})
        counts["steps"] += 1
        counts["norms"].append(np.float64(group["params"][0].detach().norm()))


@pytest.mark.parametrize("write", [renew_an_array, fill_a_tensor, count_in_a_mapping])
def test_values_in_a_group_that_have_no_plain_equality(write: Callable[[Acting], None]) -> None:
    assert_undisturbed(lambda pull: Acting("on_train_batch_start", write, pull))


def fill_the_tensor(model: Acting) -> None:
    model.options["lr"].mul_(0.9)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduler", "in-place"])
def test_tensors_as_learning_rates(shared: bool, scheduled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor given for both groups is theirs together, as torch has it; a tensor a group stays that group's."""
    made: list[TwoGroups] = []

    def make(pull: float) -> TwoGroups:
        rate = torch.tensor(0.1, dtype=torch.float64)
        monkeypatch.setattr(TwoGroups, "options", {"lr": rate})
        made.append(
            Keeping(halving, False, pull) if scheduled else Acting("on_train_batch_start", fill_the_tensor, pull)
        )
        if not shared:
            separate(made[-1])
        return made[-1]

    assert_undisturbed(make)
    for model in made:
        first, second = (group["lr"] for group in model.trainer.optimizers[0].param_groups)
        assert (first is second) == shared
        assert isinstance(second, Tensor)


def separate(model: TwoGroups) -> None:
    usual = model.scheduled

    def scheduled(optimizer: Optimizer) -> Any:
        optimizer.param_groups[1]["lr"] = torch.tensor(0.3, dtype=torch.float64)
        return usual(optimizer)

    model.scheduled = scheduled


def test_one_tensor_for_two_groups_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scheduled(TwoGroups):
        def scheduled(self, optimizer: Optimizer) -> Any:
            return [optimizer], [{"scheduler": halving(optimizer), "interval": "step"}]

    rates = []
    for callbacks in ([], [WeightDecay(0.0, summary=False)]):
        monkeypatch.setattr(TwoGroups, "options", {"lr": torch.tensor(0.1, dtype=torch.float64)})
        trainer = make_trainer(callbacks)
        trainer.fit(Scheduled(1.0), batches(STEPS))
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        monkeypatch.setattr(TwoGroups, "options", {"lr": torch.tensor(0.1, dtype=torch.float64)})
        resumed = Scheduled(1.0)
        make_trainer(callbacks, max_epochs=2).fit(resumed, batches(STEPS), ckpt_path=tmp_path / "half.ckpt")
        rates.append(resumed.rates)
    assert rates[1] == rates[0]
    assert len(rates[0]) == STEPS


class Decaying(Shrinking):
    """Writes its optimizer's weight decay in one of its hooks, from the step ``since`` on."""

    def __init__(self, hook: str, value: Callable[[int], float], since: int = 0, groups: slice = slice(None)) -> None:
        super().__init__(halves)
        usual = getattr(self, hook)

        @wraps(usual)
        def write(*args: Any, **kwargs: Any) -> Any:
            done = self.global_step
            for group in self.optimizers().param_groups[groups] if done >= since else []:
                group["weight_decay"] = value(done)
            return usual(*args, **kwargs)

        setattr(self, hook, write)


def halves(params: Any) -> Optimizer:
    params = list(params)
    return torch.optim.SGD([{"params": params[:4]}, {"params": params[4:]}], lr=0.1, weight_decay=0.1)


def lambdas(model: Shrinking, *callbacks: pl.Callback) -> dict[str, list[float]]:
    make_trainer(callbacks).fit(model, batches(STEPS))
    watch = model.watches[0]
    for name in EXEMPT:
        assert watch.of(name) == [0.0] * STEPS, name
    return {name: watch.of(name) for name in DECAYED}


def same(value: float) -> Callable[[int], float]:
    return lambda step: value


def growing(step: int) -> float:
    return 0.1 * (1 + step)


# Hook, value, the first step in which it writes, and the lambda of the six steps.
BASES: dict[str, tuple[str, Callable[[int], float], int, list[float]]] = {
    "before the training": ("on_fit_start", same(0.3), 0, [0.3] * 6),
    "when it starts": ("on_train_start", same(0.3), 0, [0.3] * 6),
    "before a batch": ("on_train_batch_start", same(0.3), 3, [0.1] * 3 + [0.3] * 3),
    "in a step": ("training_step", growing, 0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    "before the update": ("on_before_optimizer_step", same(0.3), 2, [0.1] * 2 + [0.3] * 4),
    "after a batch": ("on_train_batch_end", same(0.3), 2, [0.1] * 2 + [0.3] * 4),
}


@pytest.mark.parametrize("case", BASES)
def test_a_weight_decay_that_is_written_is_the_base(case: str) -> None:
    hook, value, since, expected = BASES[case]
    found = lambdas(Decaying(hook, value, since), WeightDecay(summary=False))
    for name in DECAYED:
        assert found[name] == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_weight_decay_that_a_callback_writes_is_the_base(hook: str, first: bool) -> None:
    class Sets(pl.Callback):
        pass

    def write(self: Sets, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["weight_decay"] = 0.3

    setattr(Sets, hook, write)
    found = lambdas(Shrinking(), *[Sets(), WeightDecay(summary=False)][:: 1 if first else -1])
    assert found["head.weight"] == pytest.approx([0.3] * STEPS, abs=1e-12)


def test_a_written_base_goes_on_through_rules_groups_and_schedules() -> None:
    """A multiplier acts on it, a rule's own lambda stays, a group that wasn't written keeps its base."""
    rules = [DecayRule("half", pattern=r"^head\.weight", multiplier=0.5), "default"]
    ramp = WeightDecayScheduler(LinearSchedule(0.0, 1.0))
    found = lambdas(Decaying("on_train_batch_start", same(0.4), 3), WeightDecay(rules=rules, summary=False), ramp)
    bases = np.array([0.1] * 3 + [0.4] * 3) * np.linspace(0.0, 1.0, STEPS)
    np.testing.assert_allclose(found["body.0.weight"], bases, atol=1e-12)
    np.testing.assert_allclose(found["head.weight"], 0.5 * bases, atol=1e-12)
    fixed = [DecayRule("fixed", pattern=r"^head\.weight", weight_decay=0.2), "default"]
    found = lambdas(Decaying("on_train_batch_start", same(0.4), 3), WeightDecay(rules=fixed, summary=False))
    assert found["head.weight"] == pytest.approx([0.2] * STEPS, abs=1e-12)
    assert found["body.0.weight"] == pytest.approx([0.1] * 3 + [0.4] * 3, abs=1e-12)
    only_first = Decaying("on_train_batch_start", same(0.4), 3, slice(0, 1))
    found = lambdas(only_first, WeightDecay(summary=False))
    assert found["head.weight"] == pytest.approx([0.1] * STEPS, abs=1e-12)
    assert found["body.0.weight"] == pytest.approx([0.1] * 3 + [0.4] * 3, abs=1e-12)


@pytest.mark.parametrize("value", [same(0.5), growing], ids=["once", "anew in each step"])
@pytest.mark.parametrize("groups", [slice(None), slice(1, 2)], ids=["all groups", "the second group"])
def test_a_write_beside_a_lambda_of_ours_is_told_once(value: Callable[[int], float], groups: slice) -> None:
    with pytest.warns(UserWarning, match="no effect") as told:
        found = lambdas(Decaying("on_train_batch_start", value, 2, groups), WeightDecay(0.2, summary=False))
    assert len([one for one in told if "no effect" in str(one.message)]) == 1
    for name in DECAYED:
        assert found[name] == pytest.approx([0.2] * STEPS, abs=1e-12), name


class OneGroup(TwoGroups):
    def configure_optimizers(self) -> Any:
        self.rates = []
        return self.scheduled(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01))


class Stepped(TwoGroups):
    def scheduled(self, optimizer: Optimizer) -> Any:
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step", "name": "rate"}]


class TwoOptimizers(TwoGroups):
    def __init__(self, pull: float) -> None:
        super().__init__(pull)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        self.rates = []
        return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (self.body, self.head)]


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize("kind", [OneGroup, TwoGroups, Stepped, TwoOptimizers])
def test_what_learning_rate_monitor_logs(kind: type[TwoGroups], first: bool) -> None:
    """The keys and values of learning rates, momenta and the user's weight decay, and no stale ones."""

    def logged(*callbacks: pl.Callback) -> tuple[Any, ...]:
        monitor, logger = LearningRateMonitor(log_momentum=True, log_weight_decay=True), Rows()
        both = [monitor, *callbacks] if first else [*callbacks, monitor]
        model = fit(kind(1.0), *both, logger=logger, log_every_n_steps=1, max_epochs=2)
        metrics = {key: float(value) for key, value in model.trainer.callback_metrics.items()}
        return monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values, logger.rows, metrics

    assert logged(WeightDecay(LAMBDA, summary=False)) == logged()


def test_a_learning_rate_can_be_monitored() -> None:
    for callbacks in ([], [WeightDecay(LAMBDA, summary=False)]):
        stopping = EarlyStopping("lr-SGD", mode="max", stopping_threshold=0.0)
        both = [*callbacks, LearningRateMonitor(), stopping]
        model = fit(OneGroup(1.0), *both, logger=Rows(), log_every_n_steps=1, max_epochs=3)
        assert stopping.stopped_epoch == model.trainer.current_epoch - 1 == 0
