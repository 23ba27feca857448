"""An optimizer's steps: which are its own, what others find around them, and what is left of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2.decay import attach_decay
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.optimizers.step_hook import StepHook, updates_of
from lightning_l2.optimizers.turns import Turn
from tests.optimizers.others import Noting
from tests.param_groups.others import Spy, in_force, ones


def test_nothing_is_left_once_all_are_removed() -> None:
    optimizer = Spy(ones(1))
    before = set(vars(optimizer))
    hooks = [Noting(optimizer, turn, []) for turn in Turn]
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
    wrapper = vars(optimizer)["step"]
    later = Noting(optimizer, Turn.DECAY, [])
    optimizer.step()
    later.remove()
    assert vars(optimizer)["step"] is wrapper
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


def test_a_step_that_somebody_kept_from_before_may_raise_too() -> None:
    """Nothing of ours is around it; the next one puts the user's groups back before it looks at them."""
    parameters = ones(2)
    optimizer = Spy(parameters)
    kept = optimizer.step
    in_force(optimizer, dict(zip(parameters, (0.1, 0.2), strict=True)))

    def fail(index: int, group: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    optimizer.write = fail
    with pytest.raises(KeyboardInterrupt):
        kept()
    optimizer.write = lambda index, group: None
    for _ in range(2):
        kept()
        assert optimizer.lambdas() == [0.1, 0.2]
        assert len(optimizer.param_groups) == 1


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


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("stated", [False, True])
def test_a_step_of_a_warm_up_from_0_is_an_update(kind: Any, stated: bool) -> None:
    """With a gradient, or, once there is a state, even without one."""
    (parameter,) = ones(1)
    optimizer, log = kind([parameter], lr=0.0), []
    Noting(optimizer, Turn.DECAY, log)
    if stated:
        optimizer.state[parameter]["step"] = torch.tensor(0.0)
        optimizer.state[parameter] |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    else:
        parameter.grad.fill_(1.0)
    optimizer.step()
    assert log == ["decay begin False", "decay before update", "decay after update"]
    assert updates_of(optimizer) == 1


def test_an_optimizer_without_hooks_is_refused_in_the_name_of_who_asks() -> None:
    with pytest.raises(TypeError, match=r"^Somebody needs step hooks .* which Bare does not call\. Derive it from"):
        StepHook(Bare(), "Somebody")  # type: ignore[arg-type]


class Bare:
    """No optimizer of torch's."""
