"""A constraint on a torch optimizer, whoever calls its step."""

import re
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
    WarmupBound,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def matrices(module: nn.Module) -> dict[Tensor, str | None]:
    return {p: name if p.ndim > 1 else None for name, p in module.named_parameters()}


def attach(optimizer: Any, module: nn.Module, bound: float | Bound, **options: Any) -> AttachedConstraint:
    bound = bound if isinstance(bound, Bound) else FixedBound(bound)
    return AttachedConstraint(optimizer, lambda: matrices(module), bound, **options)


def set_gradients(module: nn.Module, value: float = 1.0) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)


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
    attached = attach(optimizer, module, WarmupBound(3))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(4)).square().sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    memory: dict[str, dict[str, float]] = {}
    attached._memory = memory
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


@pytest.mark.parametrize("per", ["parameter", "group"])
def test_memory_follows_parameters_through_changing_groups(per: Any) -> None:
    """Frozen parameters and late groups, as finetuning makes them; what is remembered belongs to the names."""
    first, second = net(), net()
    both = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    memory: dict[str, dict[str, float]] = {}
    attached = attach(optimizer, both, WarmupBound(2), per=per, memory=memory)
    set_gradients(both)
    for _ in range(3):
        optimizer.step()
    optimizer.add_param_group({"params": list(second.parameters())})
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    optimizer.step()
    attached.memorise()
    assert {name: values["steps"] for name, values in memory.items()} == {
        "0.0.weight": 3,
        "0.2.weight": 3,
        "1.0.weight": 1,
        "1.2.weight": 1,
    }
    for parameter in first.parameters():
        parameter.requires_grad_(True)
    optimizer.step()
    attached.memorise()
    assert [memory[f"{i}.0.weight"]["steps"] for i in (0, 1)] == [4, 2]


def test_memory_is_taken_up() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    memory = {"0.weight": {"reference": 0.25, "multiplier": 0.5}, "2.weight": {"reference": 100.0, "multiplier": 0.125}}
    attached = attach(optimizer, module, InitialBound(2.0), method=AugmentedLagrangian(1e-12), memory=memory)
    before = [p.detach().clone() for p in module.parameters()]
    set_gradients(module)
    optimizer.step()
    torch.testing.assert_close(module[0].weight.detach(), before[0] * 0.5)
    torch.testing.assert_close(module[2].weight.detach(), before[2] * 0.875)
    readout = attached.readout()
    assert readout is not None
    assert readout[0].tolist() == [0.5, 200.0]
    assert readout[2].tolist() == pytest.approx([0.5, 0.125])


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


def test_groups_are_labelled_by_name() -> None:
    module = net()
    groups = [{"params": module[0].parameters(), "name": "body"}, {"params": module[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    attached = attach(optimizer, module, 0.5, per="group")
    attached.prepare()
    assert attached.labels == ["body", "group1"]


def test_remove() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    attach(optimizer, module, 0.5).remove()
    set_gradients(module)
    before = module[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(module[0].weight, before)
    assert not optimizer._optimizer_step_post_hooks


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


def test_flattened_parameters_are_refused() -> None:
    """What FSDP1 makes: one parameter of several, or pieces without rows."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    shards: Any = {id(module[0].weight): object()}
    with pytest.raises(
        RuntimeError, match=r"flat pieces, which have no rows\. Use ModelParallelStrategy .* or per='pa"
    ):
        attach(optimizer, module, 1.0, per="row", shards=shards).prepare()
    flat: Any = module[0].weight
    flat._param_infos = []
    with pytest.raises(
        RuntimeError, match=r"^FSDP has flattened '0\.weight' and others .* use_orig_params=True, or Mod"
    ):
        attach(optimizer, module, 1.0).prepare()
