"""A constraint on a torch optimizer, whoever calls its step."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_l2.constraints import (
    AttachedConstraint,
    AugmentedLagrangian,
    Bound,
    FixedBound,
    InflectionBound,
    InitialBound,
    RmsBound,
    Sphere,
    WarmupBound,
)
from lightning_l2.constraints.attach import AttachedConstraints
from lightning_l2.decay.attach import attach_decay
from tests.constraints.loops import attach, matrices, net, set_gradients


@pytest.mark.parametrize("foreach", [True, False])
def test_acts_in_the_step_on_named_parameters_only(foreach: bool) -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, foreach=foreach)
    attach(optimizer, module, 0.3)
    set_gradients(module)
    before = {name: p.detach().double() for name, p in module.named_parameters()}
    optimizer.step()
    for name, parameter in module.named_parameters():
        expected = before[name] - 0.5
        if parameter.ndim > 1:
            expected *= 0.3 / expected.norm()
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_each_optimizer_has_its_own_parameters() -> None:
    first, second = net(), net()
    both = nn.ModuleList([first, second])
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (first, second)]
    for optimizer in optimizers:
        attach(optimizer, both, 0.01)
    set_gradients(both)
    untouched = [p.detach().clone() for p in second.parameters()]
    optimizers[0].step()
    assert first[0].weight.norm() <= 0.01
    assert all(torch.equal(p, old) for p, old in zip(second.parameters(), untouched, strict=True))


def test_lbfgs_is_constrained_once_a_step() -> None:
    module = net()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=5)
    memory: dict[str, dict[str, float]] = {}
    attached = attach(optimizer, module, WarmupBound(3), memory=memory)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(4)).square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    attached.memorise()
    assert {values["steps"] for values in memory.values()} == {4}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bound", [FixedBound(0.9), WarmupBound(2), InflectionBound(1, 0.0)])
def test_nothing_advances_on_a_step_that_the_scaler_skips(fused: bool, bound: Bound) -> None:
    """A fused optimizer is called on a skipped step too, and must find out on the device."""

    def run(values: list[float]) -> tuple[list[Tensor], dict[str, dict[str, float]]]:
        torch.manual_seed(1)
        module = net()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05, fused=fused)
        memory: dict[str, dict[str, float]] = {}
        attached = attach(optimizer, module, bound, method=AugmentedLagrangian(1.0), memory=memory)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.999999, growth_interval=100)
        scaler.scale(torch.zeros(()))
        for value in values:
            set_gradients(module, value * scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        attached.memorise()
        return [p.detach().clone() for p in module.parameters()], memory

    weights, memory = run([1.0, float("inf"), 1.0, float("nan"), 0.5, 0.25, 1.0])
    expected_weights, expected_memory = run([1.0, 1.0, 0.5, 0.25, 1.0])
    assert expected_memory
    for actual, expected in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    for name, values in expected_memory.items():
        assert memory[name] == pytest.approx(values, rel=1e-5)


# kappa and Lambda of pytorch-cpr 0.3.1, AdamCPR(lr=0.02, foreach=True), after 80 steps of the problem in the test.
CPR = {
    "uniform": ([0.5] * 3, [0.05859247, 0.05324063, 0.04007779]),
    "warm_start": ([4.1668286, 3.7783597, 2.0730262], [0.012891378, 0.015107257, 0.016350914]),
    "dependent": ([0.451870501, 0.363744050, 0.200672686], [0.061947089, 0.063208871, 0.068233542]),
    "inflection_point": ([6.63933086, 6.33825016, 3.21409321], [0.010300462, 0.0044530416, 0.0089005800]),
}


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("uniform", FixedBound(0.5**0.5)),
        ("warm_start", WarmupBound(20)),
        ("dependent", InitialBound(1.1**0.5)),
        ("inflection_point", InflectionBound(8, 0.9)),
    ],
)
def test_lagrangian_is_that_of_the_authors_package(name: str, bound: Bound) -> None:
    """They bound ||w||^2 instead of half of it, so their kappa is b^2, and Lambda half of what it is here."""
    generator = torch.Generator().manual_seed(0)
    starts = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.15 for shape in ((4, 5), (6, 3), (3, 2, 2))
    ]
    weights = [nn.Parameter(start.clone()) for start in starts]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    memory: dict[str, dict[str, float]] = {}
    names: dict[Tensor, str | None] = {weight: str(index) for index, weight in enumerate(weights)}
    attached = AttachedConstraint(optimizer, lambda: names, bound, method=AugmentedLagrangian(1.0), memory=memory)
    attached.prepare()
    for _ in range(80):
        for weight, start in zip(weights, starts, strict=True):
            weight.grad = weight.detach() - 5 * start
        optimizer.step()
    attached.memorise()
    kappas, multipliers = CPR[name]
    readout = attached.readout()
    assert readout is not None
    assert [b**2 for b in readout[0].tolist()] == pytest.approx(kappas, rel=1e-6)
    assert [memory[str(i)]["multiplier"] / 2 for i in range(3)] == pytest.approx(multipliers, rel=1e-6)


def test_the_first_bound_is_that_of_the_weights_before_the_step() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    attached = attach(optimizer, module, InitialBound(1.0))
    before = module[0].weight.norm().item()
    attached.prepare()
    set_gradients(module)
    optimizer.step()
    assert module[0].weight.norm().item() == pytest.approx(before, rel=3e-6)


def test_undecided_parameters_are_left_alone() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    names: dict[Tensor, str | None] = {}
    attached = AttachedConstraint(optimizer, lambda: names, FixedBound(0.01))
    set_gradients(module)
    optimizer.step()
    assert attached.undecided
    assert attached.readout() is None
    assert module[0].weight.norm() > 1
    names.update(matrices(module))
    optimizer.step()
    assert not attached.undecided
    assert module[0].weight.norm() <= 0.01


def test_readout_is_what_was_found_before_acting() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    expected = [0.5 - module[i].weight.detach().double().norm().item() for i in (0, 2)]
    expected_rows = [(0.5 - module[i].weight.detach().double().norm(dim=1)).min().item() for i in (0, 2)]
    set_gradients(module)
    for per, slacks in (("row", expected_rows), ("parameter", None)):
        attached = attach(optimizer, module, 0.5, per=per)
        slacks = slacks or [0.5 - module[i].weight.detach().double().norm().item() for i in (0, 2)]
        optimizer.step()
        attached.remove()
        readout = attached.readout()
        assert readout is not None
        assert readout[0].tolist() == [0.5, 0.5]
        assert readout[1].tolist() == pytest.approx(slacks, abs=1e-6)
    assert expected != slacks


def test_remove() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    attach(optimizer, module, 0.5).remove()
    set_gradients(module)
    before = module[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(module[0].weight, before)
    assert not optimizer._optimizer_step_post_hooks


def hyperball(
    weight: Tensor, gradient: Any, steps: int, rate: Any, *, adam: bool, radius: Tensor, row: bool = False
) -> Tensor:
    """W <- R N(W - eta R N(u)), written down: u of Adam, or of SGD with momentum 0.9."""

    def norm(x: Tensor) -> Tensor:
        return x.norm(dim=1, keepdim=True) if row else x.norm()

    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, steps + 1):
        g = gradient(weight)
        m = 0.9 * m + (0.1 * g if adam else g)
        v = 0.999 * v + 0.001 * g**2
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) if adam else m
        moved = radius * weight / norm(weight) - rate(t) * radius * u / norm(u)
        weight = radius * moved / norm(moved)
    return weight


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("bound", [InitialBound(), FixedBound(0.7), RmsBound(0.3), InitialBound(2.0)], ids=repr)
@pytest.mark.parametrize("adam", [True, False])
def test_the_sphere_is_that_of_a_loop_by_hand(adam: bool, bound: Bound, row: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    norms = start.norm(dim=1, keepdim=True) if row else start.norm()
    elements = 5 if row else 30
    radius = {
        InitialBound(): norms,
        InitialBound(2.0): 2 * norms,
        FixedBound(0.7): torch.full_like(norms, 0.7),
        RmsBound(0.3): torch.full_like(norms, 0.3 * elements**0.5),
    }[bound]

    def rate(step: int) -> float:
        return 0.05 / step

    def gradient(weight: Tensor) -> Tensor:
        return 2 * (inputs @ weight.T - targets).T @ inputs / 20

    weight = nn.Parameter(start.clone())
    optimizer: Any = torch.optim.AdamW([weight], weight_decay=0.0) if adam else torch.optim.SGD([weight], momentum=0.9)
    per: Any = "row" if row else "parameter"
    attached = AttachedConstraint(optimizer, lambda: {weight: "w"}, bound, method=Sphere(), per=per)
    attached.prepare()
    for step in range(1, 41):
        optimizer.param_groups[0]["lr"] = rate(step)
        weight.grad = gradient(weight.detach())
        optimizer.step()
    expected = hyperball(start, gradient, 40, rate, adam=adam, radius=radius, row=row)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-8)
    held = weight.detach().norm(dim=1, keepdim=True) if row else weight.detach().norm()
    torch.testing.assert_close(held, radius, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_norms_on_the_sphere_do_not_drift(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(40, 50).to(dtype))
    norm = torch.linalg.vector_norm(weight.detach().to(torch.complex128)).item()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    AttachedConstraint(optimizer, lambda: {weight: "w"}, InitialBound(), method=Sphere()).prepare()
    for _ in range(300):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    after = torch.linalg.vector_norm(weight.detach().to(torch.complex128)).item()
    assert after == pytest.approx(norm, rel=1e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("tensors", [False, True])
def test_each_vector_turns_by_the_learning_rate_of_its_group(tensors: bool) -> None:
    module = net()
    rates = {"0.weight": 0.02, "2.weight": 0.3}
    groups = [
        {"params": module[i].parameters(), "lr": torch.tensor(rate) if tensors else rate}
        for i, rate in zip((0, 2), rates.values(), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, foreach=False)
    attach(optimizer, module, InitialBound(), method=Sphere())
    before = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        gradient = torch.randn_like(parameter, dtype=torch.float64)
        if name in rates:  # at a right angle to the weights
            weight = before[name]
            gradient -= weight * (gradient * weight).sum() / weight.square().sum()
        parameter.grad = gradient.float()
    optimizer.step()
    for name, rate in rates.items():
        after = dict(module.named_parameters())[name].detach().double()
        cosine = (after * before[name]).sum() / (after.norm() * before[name].norm())
        assert torch.tan(torch.acos(cosine)).item() == pytest.approx(rate, rel=1e-4)


def test_what_a_step_does_not_change_stays_as_it_is_on_the_sphere() -> None:
    """No gradient, a learning rate of 0, a skipped step, and an update of a fused optimizer that the scaler skips."""
    module = net()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05, fused=True)
    attach(optimizer, module, FixedBound(0.5), method=Sphere())
    before = [p.detach().clone() for p in module.parameters()]
    set_gradients(module, math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    set_gradients(module)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.05
    set_gradients(module)
    optimizer.step()
    assert module[0].weight.norm().item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("with_closure", [False, True])
def test_decay_of_the_weights_before_the_update_has_no_part_in_the_step_on_the_sphere(with_closure: bool) -> None:
    def run(decay: float) -> Tensor:
        torch.manual_seed(3)
        weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=decay)
        attach_decay(optimizer, "independent")
        AttachedConstraint(optimizer, lambda: {weight: "w"}, InitialBound(), method=Sphere()).prepare()

        def closure() -> float:
            weight.grad = weight.detach() ** 2
            return 0.0

        for _ in range(5):
            closure()
            optimizer.step(closure if with_closure else None)
        return weight.detach()

    with pytest.warns(UserWarning, match=r"^The weight decay of 0\.3 in group 'group0' has no effect to first order: "):
        decayed = run(0.3)
    torch.testing.assert_close(decayed, run(0.0), rtol=1e-9, atol=1e-12)


def test_all_that_lbfgs_moves_in_a_step_is_its_direction_on_the_sphere() -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    target = torch.randn(5, 4, dtype=torch.float64)

    def step(on_sphere: bool) -> Tensor:
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4)
        if on_sphere:
            AttachedConstraint(optimizer, lambda: {weight: "w"}, InitialBound(), method=Sphere())

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight - target).pow(4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight.detach()

    direction = step(False) - start
    moved = start + 0.1 * start.norm() * direction / direction.norm()
    torch.testing.assert_close(step(True), moved * start.norm() / moved.norm(), rtol=1e-9, atol=0)


class MovesFirst(torch.optim.Optimizer):
    """Moves weights before it asks for the gradient, there and back, as SAM does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(1.0)
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(1.0).sub_(parameter.grad, alpha=0.1)
        return loss


def test_an_optimizer_that_moves_weights_before_the_closure_goes_its_own_direction_on_the_sphere() -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    gradient = torch.randn(5, 4, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = MovesFirst([weight])
    AttachedConstraint(optimizer, lambda: {weight: "w"}, InitialBound(), method=Sphere())

    def closure() -> float:
        weight.grad = gradient.clone()
        return 0.0

    optimizer.step(closure)
    moved = start - 0.1 * start.norm() * gradient / gradient.norm()
    torch.testing.assert_close(weight.detach(), moved * start.norm() / moved.norm(), rtol=1e-9, atol=0)


class NotTorch:
    """An optimizer without hooks."""


def test_messages() -> None:
    message = (
        "NormConstraint needs step hooks (`register_step_pre_hook`), which NotTorch does not call. Derive it from "
        "torch.optim.Optimizer and call `super().__init__`, or keep the optimizer that it wraps in one of its "
        "attributes."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        attach(NotTorch(), net(), 1.0)

    module = net()
    nn.init.zeros_(module[2].weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    message = (
        "InitialBound(factor=1.0) makes the bound of '2.weight' 0, the norm at the start, so that it would stay 0. "
        "Exempt it by a rule with weight_decay=0, or use a number or WarmupBound as the bound."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        attach(optimizer, module, InitialBound()).prepare()

    for i in (0, 2):
        nn.init.constant_(module[i].weight, 3.0)
    # The first multiplier is 4 / n (9 n - 1) / 2 for n elements, 17.9 at most.
    message = (
        "The weights of '0.weight' and 1 more are so far outside of FixedBound(norm=1.0) that the first multiplier "
        "would be 17.9, and 1 or more turns them around. Use a larger bound, an update_rate 18 times smaller, or "
        "method='projection'."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        attach(optimizer, module, 1.0, method=AugmentedLagrangian(1.0)).prepare()
    attach(optimizer, module, 1.0, method=AugmentedLagrangian(0.055)).prepare()
    # what is remembered goes on from where it was
    memory = {name: {"multiplier": 0.5} for name in ("0.weight", "2.weight")}
    attach(optimizer, module, 1.0, method=AugmentedLagrangian(1.0), memory=memory).prepare()

    nn.init.zeros_(module[2].weight)
    for per, bound in (("parameter", 1.0), ("parameter", InitialBound()), ("row", RmsBound(1.0))):
        with pytest.raises(RuntimeError, match=r"^The weights of '2\.weight' have a norm of 0, .* Initialise them, "):
            attach(optimizer, module, bound, method=Sphere(), per=per).prepare()
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(RuntimeError, match=r"^On a sphere weights turn by the learning rate, and a group of SGD"):
        attach(optimizer, module, 1.0, method=Sphere()).prepare()
    optimizer.param_groups[0]["lr"] = 0.0


def test_a_multiplier_that_comes_to_turn_weights_around_is_told_once() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    memory = {name: {"multiplier": 1.25} for name in ("0.weight", "2.weight")}
    method = AugmentedLagrangian(1e-12)
    constraints = AttachedConstraints(lambda one: attach(one, module, 0.5, method=method, memory=memory))
    constraints.follow([optimizer])
    set_gradients(module)
    optimizer.step()
    message = (
        "NormConstraint of '0.weight': the multiplier has reached 1.25, and 1 or more turns weights around. Use a "
        "larger bound, a smaller `update_rate` than 1e-12, or method='projection'."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        constraints.metrics("a")
    constraints.metrics("a")


def test_decay_on_the_sphere_is_told_once() -> None:
    """Also if groups change."""
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights[:1], lr=0.1, weight_decay=0.3)
    names = {weight: f"w{number}" for number, weight in enumerate(weights)}
    constraint = AttachedConstraint(optimizer, lambda: names, InitialBound(), method=Sphere())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        constraint.prepare()
        optimizer.add_param_group({"params": weights[1:]})
        constraint.prepare()
    assert len([one for one in told if "to first order" in str(one.message)]) == 1
