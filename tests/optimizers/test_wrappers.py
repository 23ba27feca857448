"""Optimizers around optimizers: what acts on weights acts where the weights are updated, or says that it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import (
    DECAYED,
    Net,
    Shrinking,
    assert_same_weights,
    batches,
    data,
    make_trainer,
    record_rates,
)
from tests.others import LAMBDA, LR, STEPS, WAYS, assert_left, decay

Groups = list[dict[str, Any]]


class Sharpness(Optimizer):
    """Climbs along the gradient, and takes the base optimizer's step from below with the gradient found there (SAM)."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 1e-6, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        held = [(p, group["rho"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in held]).norm() + 1e-12
        for parameter, rho in held:
            self.state[parameter]["below"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=float(rho / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter].pop("below"))
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class LookingAhead(Optimizer):
    """Draws the weights back to slow ones every so many steps; without torch's own constructor, so without hooks."""

    def __init__(self, optimizer: Optimizer, every: int = 1000) -> None:
        self.optimizer, self.every, self.done = optimizer, every, 0
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.done += 1
        if self.done % self.every == 0:
            for parameter, slow in self.slow.items():
                slow.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(slow)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Several(Optimizer):
    """Steps every optimizer that it holds; its groups are a list of its own with the dicts of theirs."""

    def __init__(self, hold: Callable[[list[Optimizer]], Any], *inner: Optimizer) -> None:
        self.held = hold(list(inner))
        super().__init__([p for one in inner for group in one.param_groups for p in group["params"]], {})
        self.param_groups = [group for one in inner for group in one.param_groups]

    def inner(self) -> Iterable[Optimizer]:
        return self.held.values() if isinstance(self.held, dict) else self.held

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.inner():
            optimizer.step()
        return loss


class Property(Several):
    """Its groups are made anew whenever somebody asks."""

    @property
    def param_groups(self) -> Groups:
        return [group for one in self.inner() for group in one.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        pass

    def add_param_group(self, group: dict[str, Any]) -> None:
        pass


class InAttributes(Several):
    def __init__(self, *inner: Optimizer) -> None:
        self.first, self.second = inner
        super().__init__(lambda held: None, *inner)

    def inner(self) -> Iterable[Optimizer]:
        return self.first, self.second


class Synchronised(Optimizer):
    """Groups of its own, whose options go to its inner optimizer before a step and come back after it (ZeRO)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.optim = SGD([{**group, "params": list(group["params"])} for group in self.param_groups], **options)

    @staticmethod
    def copy(source: Groups, target: Groups) -> None:
        for one, other in zip(source, target, strict=True):
            other.update({key: value for key, value in one.items() if key != "params"})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.copy(self.param_groups, self.optim.param_groups)
        self.optim.step()
        self.copy(self.optim.param_groups, self.param_groups)
        return loss


def parts(module: nn.Module, expert: bool = False) -> list[Groups]:
    """The groups of body and head; an expert's are two each, of which one decays."""
    made = []
    for part in ("body", "head"):
        named = {name: p for name, p in module.named_parameters() if name.startswith(part)}
        if expert:
            exempt = [p for name, p in named.items() if name not in DECAYED]
            decayed = [p for name, p in named.items() if name in DECAYED]
            made.append([{"params": decayed, "weight_decay": LAMBDA}, {"params": exempt, "weight_decay": 0.0}])
        else:
            made.append([{"params": list(named.values())}])
    return made


def sgd(groups: Groups) -> SGD:
    return SGD(groups, lr=LR, weight_decay=0.0)


def pair(kind: Callable[..., Several], *hold: Any) -> Callable[[Groups, Groups], Optimizer]:
    return lambda body, head: kind(*hold, sgd(body), sgd(head))


WRAPPERS: dict[str, Callable[[Groups, Groups], Optimizer]] = {
    "sharpness": lambda body, head: Sharpness(body + head, SGD, lr=LR, weight_decay=0.0),
    "looking ahead": lambda body, head: LookingAhead(sgd(body + head)),
    "in a list": pair(Several, list),
    "in a tuple": pair(Several, tuple),
    "in a dict": pair(Several, lambda inner: dict(enumerate(inner))),
    "in attributes": pair(InAttributes),
    "groups as a property": pair(Property, list),
    "synchronised": lambda body, head: Synchronised(body + head, lr=LR, weight_decay=0.0),
    "around a wrapper": lambda body, head: LookingAhead(Several(tuple, LookingAhead(sgd(body)), sgd(head))),
}


class Wrapped(Shrinking):
    def __init__(self, make: Callable[[Groups, Groups], Optimizer], expert: bool = False) -> None:
        super().__init__()
        self.make, self.expert = make, expert

    def configure_optimizers(self) -> Any:
        return self.make(*parts(self, self.expert))


class InTwoSteps(Wrapped):
    """Drives `Sharpness` by hand, through Lightning's optimizer or the bare one."""

    def __init__(self, bare: bool, expert: bool = False) -> None:
        super().__init__(WRAPPERS["sharpness"], expert)
        self.automatic_optimization, self.bare = False, bare

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=not self.bare)
        for step in (optimizer.first_step, optimizer.second_step):
            self.manual_backward(self.loss())
            step()


class WithAClosure(InTwoSteps):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> Any:
            loss = self.loss()
            self.manual_backward(loss)
            return loss

        self.optimizers(use_pl_optimizer=not self.bare).step(closure=closure)


MODULES: dict[str, Callable[..., Wrapped]] = {
    **{name: lambda expert=False, make=make: Wrapped(make, expert) for name, make in WRAPPERS.items()},
    "two steps": lambda expert=False: InTwoSteps(False, expert),
    "two bare steps": lambda expert=False: InTwoSteps(True, expert),
    "closure by hand": lambda expert=False: WithAClosure(False, expert),
    "bare closure by hand": lambda expert=False: WithAClosure(True, expert),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("module", MODULES)
def test_what_acts_on_weights_acts_once_in_every_update(module: str, way: str) -> None:
    """`Sharpness` has so small a radius that it makes no difference whether it climbs along a penalty too."""
    model = MODULES[module]()
    make_trainer(WAYS[way].callbacks()).fit(model, batches(STEPS))
    assert_left(model, way, STEPS, rtol=1e-5)


@pytest.mark.parametrize("module", MODULES)
def test_a_scheduler_alone_multiplies_what_the_groups_have(module: str) -> None:
    model = MODULES[module](expert=True)
    make_trainer([WeightDecayScheduler(LinearSchedule(0.0, 1.0))]).fit(model, batches(STEPS))
    assert_left(model, "schedule", STEPS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_optimizer_trains_as_an_experts(wrapper: str) -> None:
    """With the learning rates of a scheduler that knows the wrapper alone."""

    def run(expert: bool, *callbacks: Any) -> tuple[Net, list[Any]]:
        torch.manual_seed(0)
        model, rates = Net(), []

        def configure_optimizers() -> Any:
            optimizer = WRAPPERS[wrapper](*parts(model, expert))
            if isinstance(optimizer, LookingAhead):
                optimizer.every = 2
            rates.extend(record_rates(model, one) for one in innermost(optimizer))
            return [optimizer], [{"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

        model.configure_optimizers = configure_optimizers
        make_trainer(callbacks).fit(model, data())
        return model, rates

    beside, rates = run(False, WeightDecay(LAMBDA, summary=False))
    expert, expected_rates = run(True)
    assert rates == expected_rates
    if wrapper == "sharpness":  # a norm over all gradients depends on their order, which is the user's and the expert's
        for actual, expected in zip(beside.parameters(), expert.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    else:
        assert_same_weights(beside, expert)


def innermost(optimizer: Optimizer) -> list[Optimizer]:
    if isinstance(optimizer, Several):
        return [one for inner in optimizer.inner() for one in innermost(inner)]
    for name in ("base_optimizer", "optimizer", "optim"):
        if name in vars(optimizer):
            return innermost(vars(optimizer)[name])
    return [optimizer]


def descend(optimizer: Any, closure: Any = None) -> Any:
    """Gradient descent with a weight decay, on the groups that the optimizer says it has."""
    loss = None if closure is None else closure()
    optimizer.updates += 1
    with torch.no_grad():
        for group in optimizer.groups():
            for parameter in group["params"]:
                gradient = parameter.grad + group["weight_decay"] * parameter
                parameter.sub_(gradient, alpha=group["lr"])
    return loss


class Plain(Optimizer):
    def __init__(self, params: Groups) -> None:
        super().__init__(params, {"lr": LR, "weight_decay": 0.0})
        self.updates = 0

    def groups(self) -> Groups:
        return self.param_groups

    def step(self, closure: Any = None) -> Any:
        return descend(self, closure)


class Zipped(Plain):
    """Pairs its groups with the learning rates that it started from (AdaBound)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.first_rates = [group["lr"] for group in self.param_groups]

    def groups(self) -> Groups:
        return [group for group, _ in zip(self.param_groups, self.first_rates, strict=False)]


class Counted(Plain):
    """Takes as many of its groups as there were."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.count = len(self.param_groups)

    def groups(self) -> Groups:
        return [self.param_groups[index] for index in range(self.count)]


class Remembered(Plain):
    """Takes its groups from a list made when it was made."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.remembered = list(self.param_groups)

    def groups(self) -> Groups:
        return self.remembered


@pytest.mark.parametrize("kind", [Zipped, Counted, Remembered])
def test_an_optimizer_that_does_not_read_all_its_groups(kind: type[Plain]) -> None:
    """It ends with its first update, and with the way out in the error; that way decays."""
    made: list[Plain] = []

    def make(body: Groups, head: Groups) -> Plain:
        made.append(kind(body + head))
        return made[-1]

    with pytest.raises(Exception, match=f"{kind.__name__}.*apply=.decoupled") as error:
        make_trainer(decay("optimizer")()).fit(Wrapped(make), batches(STEPS))
    assert type(error.value).__name__ in {"ValueError", "RuntimeError", "MisconfigurationException"}
    assert made[0].updates <= 1
    model = Wrapped(make)
    make_trainer(decay("decoupled")()).fit(model, batches(STEPS))
    assert_left(model, "decoupled", STEPS)


@pytest.mark.parametrize("kind", [Plain, Zipped, Counted])
def test_groups_that_an_expert_made_need_no_others(kind: type[Plain]) -> None:
    model = Wrapped(lambda body, head: kind(body + head), expert=True)
    make_trainer(decay("optimizer")()).fit(model, batches(STEPS))
    assert_left(model, "optimizer", STEPS)


class Hookless(Optimizer):
    """Never calls torch's constructor, so its step never goes through torch's hooks."""

    def __init__(self, params: Groups) -> None:
        self.defaults, self.state, self.updates = {"lr": LR, "weight_decay": 0.0}, {}, 0
        self.param_groups = [{**self.defaults, **group} for group in params]

    def groups(self) -> Groups:
        return self.param_groups

    def step(self, closure: Any = None) -> Any:
        return descend(self, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class Duck:
    """No optimizer of torch at all, only with the methods of one."""

    __init__, groups, step, zero_grad = Hookless.__init__, Hookless.groups, Hookless.step, Hookless.zero_grad

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("way", [way for way in WAYS if way != "schedule"])
@pytest.mark.parametrize("kind", [Hookless, Duck])
def test_an_optimizer_without_hooks_is_refused_before_its_first_step(kind: Any, way: str) -> None:
    made: list[Any] = []

    def make(body: Groups, head: Groups) -> Any:
        made.append(kind(body + head))
        return made[-1]

    make_trainer().fit(Wrapped(make), batches(STEPS))
    assert made[0].updates == STEPS
    with pytest.raises(Exception, match=kind.__name__) as error:
        make_trainer(WAYS[way].callbacks()).fit(Wrapped(make), batches(STEPS))
    assert type(error.value).__name__ in {"TypeError", "ValueError", "RuntimeError", "MisconfigurationException"}
    assert made[1].updates == 0


class Idle(Plain):
    """Holds an optimizer and updates the weights without it."""

    def __init__(self, params: Groups) -> None:
        super().__init__(params)
        self.inner = SGD(self.param_groups, lr=LR)


class Overridden(Plain):
    """Somebody gave it another step, which torch's hooks know nothing of."""

    def __init__(self, params: Groups) -> None:
        super().__init__(params)
        self.step = lambda closure=None: descend(self, closure)


@pytest.mark.parametrize("way", ["optimizer", "decoupled", "penalty", "constraint"])
@pytest.mark.parametrize("kind", [Idle, Overridden])
def test_a_hooked_optimizer_that_never_updates_is_told_once(kind: type[Plain], way: str) -> None:
    with pytest.warns(UserWarning, match=f"{kind.__name__}|SGD") as told:
        make_trainer(WAYS[way].callbacks(), max_epochs=2).fit(
            Wrapped(lambda body, head: kind(body + head)), batches(60)
        )
    assert len([one for one in told if kind.__name__ in str(one.message) or "SGD" in str(one.message)]) == 1


@pytest.mark.parametrize("wrapper", ["looking ahead", "in a list"])
def test_updates_that_are_rare_are_no_reason_for_a_warning(wrapper: str) -> None:
    model = Wrapped(WRAPPERS[wrapper])
    make_trainer(decay("optimizer")(), accumulate_grad_batches=60, max_epochs=2).fit(model, batches(60))
    assert_left(model, "optimizer", 2)
