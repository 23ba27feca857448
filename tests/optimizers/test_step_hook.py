"""What acts within a step: at which moments, in which order, how often, and what is left of it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_l2.decay import attach_decay
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.optimizers.step_hook import Attachments, StepHook, Turn, gradients_are_complete, tell_once, updates_of
from tests.param_groups.others import Spy, in_force, ones


class Noting(StepHook):
    """Notes each moment, with the name of its turn."""

    def __init__(self, optimizer: Optimizer, turn: Turn, log: list[str]) -> None:
        self.turn = turn  # type: ignore[misc]
        self.log = log
        super().__init__(optimizer, "The test")

    def note(self, moment: str) -> None:
        self.log.append(f"{self.turn.name.lower()} {moment}")

    def begin(self, *, has_closure: bool) -> None:
        self.note(f"begin {has_closure}")

    def before_clipping(self) -> None:
        self.note("before clipping")

    def before_closure(self) -> None:
        self.note("before closure")

    def objective(self, loss: Any) -> Any:
        self.note("objective")
        return loss

    def before_update(self) -> None:
        self.note("before update")

    def after_update(self) -> None:
        self.note("after update")


class Logged(Spy):
    """Puts its update into the log."""

    log: ClassVar[list[str]] = []

    def step(self, closure: Any = None) -> Any:
        def logged() -> Any:
            self.log.append("closure")
            return closure()

        self.update(None if closure is None else logged)
        self.log.append("update")


ORDER = [Turn.SCHEDULE, Turn.PENALTY, Turn.DECAY, Turn.CONSTRAINT, Turn.MONITOR]


@pytest.mark.parametrize("attached", [ORDER, ORDER[::-1], ORDER[2:] + ORDER[:2]], ids=["in order", "back", "mixed"])
def test_the_order_of_turns_does_not_depend_on_who_came_first(attached: list[Turn]) -> None:
    optimizer, log = Logged(ones(1)), []
    optimizer.log = log  # type: ignore[misc]
    for turn in attached:
        Noting(optimizer, turn, log)
    gradients_are_complete(optimizer, "a callback")
    optimizer.step()
    names = [turn.name.lower() for turn in ORDER]
    assert log == [
        *(f"{name} before clipping" for name in names),
        *(f"{name} begin False" for name in names),
        *(f"{name} before update" for name in names),
        "update",
        *(f"{name} after update" for name in names),
    ]


def test_moments_of_a_step_with_a_closure_that_is_called_twice() -> None:
    class Twice(Logged):
        def step(self, closure: Any) -> None:
            closure()
            self.update(closure)
            self.log.append("update")

    optimizer, log = Twice(ones(1)), []
    optimizer.log = log  # type: ignore[misc]
    Noting(optimizer, Turn.DECAY, log)
    for arguments in ([lambda: None], []):
        log.clear()
        optimizer.step(*arguments) if arguments else optimizer.step(closure=lambda: None)
        once = ["decay before closure", "decay objective", "decay before update"]
        assert [entry for entry in log if entry != "closure"] == [
            "decay begin True",
            *once,
            *once,
            "update",
            "decay after update",
        ]


def test_a_hook_gives_the_optimizer_another_loss() -> None:
    class Doubling(StepHook):
        turn = Turn.PENALTY

        def objective(self, loss: Any) -> Any:
            return 2 * loss

    optimizer = Spy(ones(1))
    Doubling(optimizer, "The test")
    assert optimizer.step(lambda: 3.0) == 6.0


def test_gradients_are_told_of_once_however_many_tell() -> None:
    optimizer, log = Spy(ones(1)), []
    Noting(optimizer, Turn.DECAY, log)
    first, second = object(), object()

    def told() -> int:
        return log.count("decay before clipping")

    for teller in (first, second):
        gradients_are_complete(optimizer, teller)
    assert told() == 1
    gradients_are_complete(optimizer, first)  # the second time: they are new, as after a skipped step
    assert told() == 2
    gradients_are_complete(optimizer, second)
    assert told() == 2
    optimizer.step()
    gradients_are_complete(optimizer, second)
    assert told() == 3
    gradients_are_complete(Spy(ones(1)), first)  # to which nothing is attached


def test_what_is_attached_or_removed_within_a_step() -> None:
    optimizer, log = Spy(ones(1)), []
    leaving = Noting(optimizer, Turn.DECAY, log)

    def closure() -> None:
        leaving.remove()
        Noting(optimizer, Turn.MONITOR, log)

    optimizer.step(closure)
    assert [entry for entry in log if "monitor" in entry] == []
    assert "decay after update" not in log
    log.clear()
    optimizer.step()
    assert log == ["monitor begin False", "monitor before update", "monitor after update"]


def test_nothing_is_left_once_all_are_removed() -> None:
    optimizer = Spy(ones(1))
    before = set(vars(optimizer))
    hooks = [Noting(optimizer, turn, []) for turn in ORDER]
    for hook in hooks:
        assert set(vars(optimizer)) > before
        hook.remove()
    assert set(vars(optimizer)) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    hooks[0].remove()  # harmless


def test_a_learning_rate_scheduler_that_wrapped_the_step_keeps_its_wrapper() -> None:
    optimizer = torch.optim.SGD(ones(1), lr=0.1)
    hook = Noting(optimizer, Turn.DECAY, [])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    hook.remove()
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]
    later = Noting(optimizer, Turn.DECAY, [])
    optimizer.step()
    later.remove()
    optimizer.step()
    scheduler.step()  # would warn that no step came before it


def test_hooks_of_others_find_the_users_groups() -> None:
    """Those that were registered before, and post-hooks that come later."""
    parameters = ones(2)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    sizes: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda *_: sizes.append((name, len(optimizer.param_groups)))

    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    in_force(optimizer, dict(zip(parameters, (0.1, 0.0), strict=True)))
    optimizer.register_step_post_hook(note("after, late"))
    optimizer.step()
    assert sizes == [("before", 1), ("after", 1), ("after, late", 1)]


def test_an_exception_leaves_nothing_of_a_step_behind() -> None:
    optimizer, log = Spy(ones(1)), []
    Noting(optimizer, Turn.DECAY, log)

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    log.clear()
    optimizer.step()
    assert log == ["decay begin False", "decay before update", "decay after update"]


class Inheriting(torch.optim.AdamW):
    """Its step calls that of the class it is derived from, so torch runs the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("apply", ["optimizer", "coupled", "decoupled", "independent", "cautious"])
def test_a_step_within_a_step_decays_once(apply: Any, closure: bool) -> None:
    torch.optim.AdamW(ones(1))  # torch hooks a class when it is first used

    def train(kind: Any, value: float) -> tuple[list[float], Any]:
        parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = kind([parameter], lr=0.1, weight_decay=0.0)
        in_force(optimizer, {parameter: value})
        attach_decay(optimizer, apply)

        def evaluate() -> None:
            parameter.grad = parameter.detach().cos()

        for _ in range(3):
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        return parameter.tolist(), optimizer

    (actual, optimizer), (expected, _) = train(Inheriting, 0.3), train(torch.optim.AdamW, 0.3)
    assert actual == pytest.approx(expected, rel=1e-12)
    assert actual != train(Inheriting, 0.0)[0]
    assert len(optimizer.param_groups) == 1


def test_a_step_within_a_step_is_one_update_for_all_that_acts() -> None:
    torch.optim.AdamW(ones(1))
    optimizer, log = Inheriting(ones(1)), []
    Noting(optimizer, Turn.CONSTRAINT, log)
    optimizer.step()
    assert log.count("constraint after update") == 1
    assert updates_of(optimizer) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_takes_the_state_is_left_alone(kind: Any) -> None:
    """As `torch.distributed.checkpoint` makes it: gradients and learning rates of 0, before there is a state."""
    parameters = ones(2)
    optimizer, log = kind(parameters, lr=0.0, weight_decay=0.5), []
    Noting(optimizer, Turn.DECAY, log)
    in_force(optimizer, dict(zip(parameters, (0.1, 0.0), strict=True)))
    optimizer.step()
    assert log == []
    assert updates_of(optimizer) == 0
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert log == ["decay begin False", "decay before update", "decay after update"]


def test_an_optimizer_without_hooks_is_refused_in_the_name_of_who_asks() -> None:
    with pytest.raises(TypeError, match=r"^Somebody needs step hooks .* which Bare does not call\. Derive it from"):
        Noting.__base__(Bare(), "Somebody")  # type: ignore[misc, call-arg]


class Bare:
    """No optimizer of torch's."""


def test_a_warning_is_given_once() -> None:
    optimizer = Spy(ones(1))
    assert not tell_once(optimizer), "nobody acts on it"
    Noting(optimizer, Turn.DECAY, [])
    assert [tell_once(optimizer), tell_once(optimizer)] == [True, False]


class Handle:
    def __init__(self, number: int, optimizer: Any, log: list[Any]) -> None:
        self.optimizer, self.log = optimizer, log
        log.append(("on", number, optimizer))

    def remove(self) -> None:
        self.log.append(("off", self.optimizer))


def test_attachments_follow_optimizers_by_identity() -> None:
    first, second, third = (Spy(ones(1)) for _ in range(3))
    log: list[Any] = []
    attachments = Attachments(lambda number, optimizer: Handle(number, optimizer, log))
    assert attachments.follow([first, second])
    assert log == [("on", 0, first), ("on", 1, second)]
    assert not attachments.follow([first, second])
    kept = list(attachments)[1]
    log.clear()
    assert attachments.follow([second, third])
    assert log == [("off", first), ("on", 1, third)]
    assert next(iter(attachments)) is kept
    assert [handle.optimizer for handle in attachments] == [second, third]
    log.clear()
    attachments.remove()
    assert log == [("off", second), ("off", third)]
    assert list(attachments) == []


def test_attachments_look_before_the_first_step_of_an_optimizer_that_they_do_not_know() -> None:
    known, fresh = Spy(ones(1)), Spy(ones(1))
    current, looks, log = [known], [], []

    def look() -> None:
        looks.append(len(current))
        attachments.follow(current)

    attachments = Attachments(lambda number, optimizer: Noting(optimizer, Turn.DECAY, log), look)
    attachments.follow(current)
    known.step()
    assert looks == []
    current[0] = fresh
    fresh.step()  # of which nothing is missed
    assert looks == [1]
    assert log[-3:] == ["decay begin False", "decay before update", "decay after update"]
    attachments.remove()
    log.clear()
    known.step()
    fresh.step()
    assert (log, looks) == ([], [1])


def test_pre_hooks_that_come_late_find_the_users_groups_in_steps_without_a_closure() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    model = torch.nn.ParameterDict({"weight": weight, "bias": bias})
    decay = RuleDecay(model, [optimizer], 0.1, look=lambda: None)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: seen.append(len(one.param_groups)))
    for _ in range(2):
        optimizer.step()
    decay.remove()
    assert seen == [1, 1]
