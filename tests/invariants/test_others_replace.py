"""Optimizers, groups, parameters and states that others replace while training goes on as they would alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_l2
from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DECAYED, Net, Shrinking, assert_same_weights, batches, data, make_trainer, plain, weights
from tests.others import LAMBDA, STEPS, WAYS, Acting, Saves, TwoGroups, assert_left, assert_undisturbed, before, fit


class Renewing(Net):
    """Treats its optimizer in one of its hooks; an expert makes two groups of each: one decays, one doesn't."""

    def __init__(self, hook: str, act: Callable[[Renewing], None], expert: bool) -> None:
        super().__init__()
        self.expert = expert
        before(self, hook, act)

    def groups(self, **rates: float) -> list[dict[str, Any]]:
        """One group, or two, for the parameters of each part."""
        made = []
        for part, rate in rates.items():
            named = {name: p for name, p in self.named_parameters() if name.startswith(part)}
            decayed = [p for name, p in named.items() if name in DECAYED]
            exempt = [p for name, p in named.items() if name not in DECAYED]
            made.append({"params": decayed if self.expert else list(named.values()), "lr": rate})
            if self.expert:
                made[-1]["weight_decay"] = LAMBDA
                made.append({"params": exempt, "lr": rate, "weight_decay": 0.0})
        return made

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.groups(body=0.01, head=0.02), weight_decay=0.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def set_up_again(model: Renewing) -> None:
    if model.global_step == 4:
        model.trainer.strategy.setup_optimizers(model.trainer)


def assign(model: Renewing) -> None:
    if model.global_step == 4:
        model.trainer.optimizers = [model.configure_optimizers()]


def change_the_class(model: Renewing) -> None:
    if model.global_step == 4:
        model.trainer.optimizers = [torch.optim.SGD(model.groups(body=0.1, head=0.1), momentum=0.9)]


def change_the_groups(model: Renewing) -> None:
    if model.global_step == 4:
        parts = {"body.0": 0.02, "body.1": 0.03, "head": 0.01}
        model.trainer.optimizers = [torch.optim.AdamW(model.groups(**parts), weight_decay=0.0)]


def roll_back(model: Renewing) -> None:
    """To what was there after two steps."""
    optimizer = model.optimizers().optimizer
    if model.global_step == 2:
        model.kept = weights(model), copy.deepcopy(optimizer.state_dict())
    if model.global_step == 4:
        model.load_state_dict(model.kept[0])
        optimizer.load_state_dict(model.kept[1])


WHEN = {
    "on_train_epoch_start": [set_up_again, assign, change_the_class, change_the_groups],
    "on_train_batch_start": [assign],
    "on_train_batch_end": [set_up_again, roll_back],
    "on_validation_end": [change_the_class, roll_back],
}


@pytest.mark.parametrize(
    ("hook", "act"),
    [(hook, act) for hook, acts in WHEN.items() for act in acts],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_renewed_optimizer_trains_as_an_experts(hook: str, act: Callable[[Renewing], None]) -> None:
    def run(expert: bool, *callbacks: pl.Callback) -> Renewing:
        torch.manual_seed(0)
        model = Renewing(hook, act, expert)
        make_trainer(callbacks, max_epochs=4, num_sanity_val_steps=0).fit(model, data(samples=8), data(samples=4))
        return model

    assert_same_weights(run(False, WeightDecay(LAMBDA, summary=False)), run(True))


class Renewed(Shrinking):
    """Sets its optimizer up anew when its second epoch starts."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_acts_goes_on_with_a_renewed_optimizer(way: str) -> None:
    model = Renewed(lambda params: torch.optim.SGD(params, lr=0.1))
    make_trainer(WAYS[way].callbacks(), max_epochs=3).fit(model, batches(2))
    assert_left(model, way, 6)


def test_the_lambda_in_force_is_that_of_the_new_optimizer() -> None:
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(lightning_l2.weight_decay_in_force(trainer.optimizers[0]))

    model = Renewed(lambda params: torch.optim.SGD(params, lr=0.1))
    make_trainer([WeightDecay(LAMBDA, summary=False), Looks()], max_epochs=2).fit(model, batches(2))
    assert seen == [{"decay": LAMBDA, "no_decay": 0.0}] * 4


@pytest.mark.parametrize("callbacks", [[], [WeightDecay(summary=False)]], ids=["schedule alone", "with the base"])
def test_a_renewed_optimizer_saves_the_users_weight_decay(callbacks: list[pl.Callback], tmp_path: Path) -> None:
    """And not a product with the multiplier of the day."""
    saves = Saves(tmp_path / "last.ckpt")
    schedule = WeightDecayScheduler(LinearSchedule(1.0, 10.0))
    make_trainer([*callbacks, schedule, saves], max_epochs=2).fit(Renewed(), batches(2))
    assert [group["weight_decay"] for group in saves.states[0]["param_groups"]] == [0.1]


def in_the_middle(act: Callable[[Acting], None]) -> Callable[[Acting], None]:
    """Once, before the fourth of the steps."""

    def once(model: Acting) -> None:
        if len(model.rates) == STEPS // 2 and not hasattr(model, "acted"):
            model.acted = True
            act(model)

    return once


def add_a_group(model: Acting) -> None:
    """As a thawed layer comes: from a group that it leaves, into one of its own."""
    optimizer = model.optimizers().optimizer
    optimizer.param_groups[1]["params"] = [model.head.bias]
    optimizer.add_param_group({"params": [model.head.weight], "lr": 0.02, "name": "late"})


def pop_a_group(model: Acting, index: int = -1) -> None:
    optimizer = model.optimizers().optimizer
    for parameter in optimizer.param_groups.pop(index)["params"]:
        optimizer.state.pop(parameter, None)


def pop_the_first(model: Acting) -> None:
    pop_a_group(model, 0)


def renew_a_group(model: Acting) -> None:
    groups = model.optimizers().param_groups
    groups[1] = {**groups[1], "lr": 0.04}


def merge_groups(model: Acting) -> None:
    optimizer = model.optimizers().optimizer
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": list(model.parameters())}]


GROUPS = [add_a_group, pop_a_group, pop_the_first, renew_a_group, merge_groups]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("act", GROUPS)
def test_groups_that_come_and_go(act: Callable[[Acting], None], hook: str, tmp_path: Path) -> None:
    assert_undisturbed(lambda pull: Acting(hook, in_the_middle(act), pull), tmp_path / "last.ckpt")


def exchange(model: Acting, name: str, value: Tensor, keep_state: bool = True) -> None:
    """A new parameter of this value takes the place of the head's in module, group and state."""
    optimizer = model.optimizers().optimizer
    old, new = getattr(model.head, name), nn.Parameter(value.detach().clone())
    for group in optimizer.param_groups:
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, {})
    if keep_state and state.get("momentum_buffer") is not None and new.shape == old.shape:
        optimizer.state[new] = state
    setattr(model.head, name, new)


def exchange_equal(model: Acting) -> None:
    exchange(model, "weight", model.head.weight)


def start_afresh(model: Acting) -> None:
    exchange(model, "weight", model.head.weight, keep_state=False)


def grow_the_head(model: Acting) -> None:
    for name in ("weight", "bias"):
        value = getattr(model.head, name)
        exchange(model, name, torch.cat([value, value[:1]]))


def prune_the_head(model: Acting) -> None:
    for name in ("weight", "bias"):
        exchange(model, name, getattr(model.head, name)[:1])


def grow_in_place(model: Acting) -> None:
    """The same Parameter with other data, in a new list."""
    weight, optimizer = model.head.weight, model.optimizers().optimizer
    weight.grad = None
    weight.data = torch.cat([weight.data, weight.data])
    optimizer.state.pop(weight, None)
    optimizer.param_groups[1]["params"] = list(optimizer.param_groups[1]["params"])


PARAMETERS = [exchange_equal, start_afresh, grow_the_head, prune_the_head, grow_in_place]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("act", PARAMETERS)
def test_parameters_that_are_replaced(act: Callable[[Acting], None], hook: str, tmp_path: Path) -> None:
    """Densified, grown or pruned: also in the checkpoint, and after the fit the optimizer has the module's own."""
    made = []

    def make(pull: float) -> Acting:
        made.append(Acting(hook, in_the_middle(act), pull))
        return made[-1]

    assert_undisturbed(make, tmp_path / "last.ckpt")
    for model in made:
        (optimizer,) = model.trainer.optimizers
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}


def own_state(pull: float) -> dict[str, Any]:
    """What the optimizer of another run has kept after a step, with another learning rate."""
    model = TwoGroups(pull)
    optimizer = model.configure_optimizers()
    model.loss().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    return optimizer.state_dict()


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_a_state_that_a_module_loads_itself(hook: str, tmp_path: Path) -> None:
    def load(model: Acting) -> None:
        if not model.rates:
            model.optimizers().optimizer.load_state_dict(own_state(model.pull))

    assert_undisturbed(lambda pull: Acting(hook, load, pull), tmp_path / "last.ckpt")


def state_dict(optimizer: Optimizer) -> Any:
    return optimizer.state_dict()


def saved(optimizer: Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def whole(optimizer: Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False).state_dict()


@pytest.mark.parametrize("keep", [state_dict, saved, whole])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_before_optimizer_step"])
def test_a_state_that_a_module_keeps(hook: str, keep: Callable[[Optimizer], Any]) -> None:
    def run(*callbacks: pl.Callback) -> Any:
        kept = []
        fit(Acting(hook, lambda model: kept.append(plain(keep(model.optimizers().optimizer))), 1.0), *callbacks)
        return kept

    kept, bare = run(WeightDecay(0.0, summary=False)), run()
    assert kept == bare
    assert len(kept[0]["param_groups"]) == 2


class Outside(Shrinking):
    """Trains what no module registers: a layer in a list or a dict, a tensor of its own."""

    def __init__(self, kind: str, together: bool, pull: float = 0.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.pull, self.together = pull, together
        layer = nn.Linear(1, 1).double()
        tensor = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            layer.weight.fill_(1.0), layer.bias.fill_(1.0)
        self.kept = {"list": [layer], "dict": {"critic": layer}, "tensor": tensor}[kind]
        self.others = [tensor] if kind == "tensor" else list(layer.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        every = [*self.parameters(), *self.others]
        self.manual_backward(sum((self.pull * (parameter - 0.5)).square().sum() for parameter in every))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = [[*self.parameters(), *self.others]] if self.together else [self.parameters(), self.others]
        return [torch.optim.AdamW(part, lr=0.1, weight_decay=0.0) for part in parts]


@pytest.mark.parametrize("together", [True, False], ids=["one optimizer", "two optimizers"])
@pytest.mark.parametrize("kind", ["list", "dict", "tensor"])
def test_parameters_that_no_module_registers_train(kind: str, together: bool) -> None:
    models = [Outside(kind, together, 1.0) for _ in range(2)]
    for model, callbacks in zip(models, ([], [WeightDecay(0.0, summary=False)]), strict=True):
        make_trainer(callbacks).fit(model, batches(STEPS))
    assert_same_weights(*models)
    assert plain(models[0].others) == plain(models[1].others) != plain(Outside(kind, together).others)
    decayed = Outside(kind, together)
    make_trainer([WeightDecay(LAMBDA, summary=False)]).fit(decayed, batches(STEPS))
    assert_left(decayed, "optimizer", STEPS)
