r"""The penalty in a bare training loop; expected values: $\lambda / 2 (w - w_0)^2$ in float64, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_l2.decay import L2Objective, Penalised
from lightning_l2.optimizers.step_hook import gradients_are_complete
from lightning_l2.param_groups.decay_groups import decay_groups

LR, LAMBDA = 0.1, 0.3
A, B, START = [3.0, -4.0], [2.0], [1.0, 1.0]


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.tensor(A).double()), nn.Parameter(torch.tensor(B).double())


def sgd(params: Any, **options: Any) -> Optimizer:
    for param in params:
        param.grad = torch.zeros_like(param)
    return torch.optim.SGD(params, lr=LR, **options)


def penalised(a: Tensor, b: Tensor | None = None, start: bool = False) -> dict[int, Penalised]:
    """LAMBDA on one, twice that on the other, by rules of their own."""
    entries = {id(a): Penalised("a", "body", LAMBDA, torch.tensor(START).double() if start else None)}
    return entries if b is None else entries | {id(b): Penalised("b", "head", 2 * LAMBDA)}


def half_squares(values: list[float], start: list[float] | None = None) -> float:
    return sum((value - origin) ** 2 for value, origin in zip(values, start or [0.0] * len(values), strict=True)) / 2


@pytest.mark.parametrize("start", [False, True])
def test_a_step_descends_on_it(start: bool) -> None:
    a, b = parameters()
    c = nn.Parameter(torch.ones(1))
    optimizer = sgd([a, b, c])
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a, b, start))
    for _ in range(3):
        optimizer.step()
        for param in (a, b, c):
            param.grad.zero_()
    origins = START if start else [0.0, 0.0]
    left = (1 - LR * LAMBDA) ** 3
    expected = [origin + left * (value - origin) for value, origin in zip(A, origins, strict=True)]
    assert a.tolist() == pytest.approx(expected, rel=1e-12)
    assert b.tolist() == pytest.approx([2.0 * (1 - LR * 2 * LAMBDA) ** 3], rel=1e-12)
    assert c.tolist() == [1.0]
    objective.remove()
    optimizer.step()
    assert a.tolist() == pytest.approx(expected, rel=1e-12)


def test_it_joins_once_and_before_clipping_where_somebody_tells() -> None:
    a, _ = parameters()
    optimizer = sgd([a])
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a))
    gradients_are_complete(optimizer, "loop")
    assert a.grad.tolist() == pytest.approx([LAMBDA * value for value in A], rel=1e-12)
    a.grad /= 2  # clipped
    optimizer.step()
    assert a.tolist() == pytest.approx([value * (1 - LR * LAMBDA / 2) for value in A], rel=1e-12)
    a.grad.zero_()
    optimizer.step()  # of which nobody told
    assert a.tolist() == pytest.approx([value * (1 - LR * LAMBDA / 2) * (1 - LR * LAMBDA) for value in A], rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_gradients_that_are_scaled_are_joined_by_what_is_scaled(scale: float) -> None:
    a, _ = parameters()
    optimizer = sgd([a])
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a))
    objective.join_gradients(optimizer, scale)
    assert a.grad.tolist() == pytest.approx([scale * LAMBDA * value for value in A], rel=1e-12)


@pytest.mark.parametrize("start", [False, True])
def test_a_line_search_is_told_the_penalised_loss_and_sgd_its_own(start: bool) -> None:
    a, b = parameters()
    for optimizer, reads in ((torch.optim.LBFGS([a, b]), True), (sgd([a, b]), False)):
        objective = L2Objective([optimizer])
        objective.penalise(penalised(b, a) if not start else penalised(a, b, start))
        lambdas = (LAMBDA, 2 * LAMBDA) if start else (2 * LAMBDA, LAMBDA)
        penalty = lambdas[0] * half_squares(A, START if start else None) + lambdas[1] * half_squares(B)
        told = objective.objective(optimizer, torch.tensor(5.0).double())
        assert float(told) == pytest.approx(5.0 + penalty * reads, rel=1e-12)
        assert objective.objective(optimizer, None) is None
        objective.remove()


def test_where_the_optimizer_maximises_the_penalty_is_taken_off() -> None:
    a, _ = parameters()
    optimizer = sgd([a], maximize=True)
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a))
    optimizer.step()
    assert a.tolist() == pytest.approx([value * (1 - LR * LAMBDA) for value in A], rel=1e-12)


@pytest.mark.parametrize("follow", [False, True])
def test_it_follows_the_schedule_if_asked(follow: bool) -> None:
    a, _ = parameters()
    optimizer = sgd([a], weight_decay=0.0)
    objective = L2Objective([optimizer], follow_schedule=follow)
    objective.penalise(penalised(a))
    decay_groups(optimizer).multiply(0.5)
    optimizer.step()
    assert a.tolist() == pytest.approx([value * (1 - LR * LAMBDA * (0.5 if follow else 1.0)) for value in A], rel=1e-12)


def test_what_is_measured_is_that_of_the_weights_at_that_time() -> None:
    a, b = parameters()
    optimizer = sgd([a, b])
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a, b, start=True))
    assert not objective.is_measured
    objective.add_loss(torch.tensor(1.0))  # of a step that is not measured
    objective.measure()
    for loss in (0.5, 0.25):
        objective.add_loss(torch.tensor(loss))
    optimizer.step()
    assert objective.is_measured
    body, head = LAMBDA * half_squares(A, START), 2 * LAMBDA * half_squares(B)
    assert objective.metrics() == pytest.approx(
        {
            "l2_penalty/loss": body + head,
            "l2_penalty/loss/body": body,
            "l2_penalty/loss/head": head,
            "l2_penalty/objective": 0.75 + body + head,
        },
        rel=1e-12,
    )
    with pytest.raises(RuntimeError, match=r"L2Objective has nothing to report. Call `measure\(\)` first"):
        objective.metrics()


def test_one_rule_and_no_loss_is_one_number() -> None:
    a, _ = parameters()
    objective = L2Objective([sgd([a])])
    objective.penalise(penalised(a))
    objective.measure()
    assert objective.metrics() == pytest.approx({"l2_penalty/loss": LAMBDA * half_squares(A)}, rel=1e-12)
    objective.penalise({id(a): Penalised("a", "body", 0.0)})
    objective.measure()
    assert objective.metrics() == {"l2_penalty/loss": 0}


def test_what_decays_too_is_named() -> None:
    a, b = parameters()
    optimizer = torch.optim.SGD([{"params": [a], "weight_decay": 0.1}, {"params": [b]}], lr=LR)
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a, b))
    assert objective.decayed_twice() == ["a"]


def test_frozen_parameters_and_those_without_gradient_are_left_alone() -> None:
    a, b = parameters()
    optimizer = sgd([a, b])
    objective = L2Objective([optimizer])
    objective.penalise(penalised(a, b))
    a.requires_grad_(False)
    b.grad = None
    optimizer.step()
    assert (a.tolist(), b.tolist()) == (A, B)


def test_optimizers_that_take_the_place_of_others() -> None:
    a, b = parameters()
    first, second = sgd([a]), sgd([b])
    objective = L2Objective([first])
    objective.penalise(penalised(a, b))
    version = objective.version()
    assert not objective.follow([first])
    assert objective.follow([second])
    assert len(version) == len(objective.version()) == 1
    first.step()
    second.step()
    assert a.tolist() == A
    assert b.tolist() == pytest.approx([2.0 * (1 - LR * 2 * LAMBDA)], rel=1e-12)


class Allocations(TorchDispatchMode):
    """Adds up the elements of all tensors that operations make."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.elements += sum(tensor.numel() for tensor in made if tensor.data_ptr() not in known)
        return result


def test_the_gradient_takes_no_memory() -> None:
    module = nn.Linear(64, 64)
    optimizer = sgd(list(module.parameters()))
    objective = L2Objective([optimizer])
    objective.penalise({id(p): Penalised("", "", LAMBDA) for p in module.parameters()})
    with Allocations() as allocations:
        objective.join_gradients(optimizer)
    assert allocations.elements == 0
    with Allocations() as allocations:
        module.weight.add(module.bias)
    assert allocations.elements == 64 * 64  # the probe sees what there is
