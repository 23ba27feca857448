"""Decay towards the start, in a bare loop, against loops of a few lines."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2 import DecayRule
from lightning_l2.decay import RuleDecay
from lightning_l2.decay.start import Start, check_start, expect_start, squared_distances
from lightning_l2.param_groups.decay_groups import decay_groups
from tests.helpers import DEVICE

LR, LAMBDA, STEPS = 0.05, 0.4, 8
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    "SGD": partial(torch.optim.SGD, lr=LR, momentum=0.9),
}
OWN = {"AdamW": "decoupled", "SGD": "coupled"}
WAYS = ["optimizer", "coupled", "decoupled", "independent", "cautious"]
EVERYTHING = [DecayRule("all")]


class Model(nn.Module):
    """A matrix and a bias in float64, away from 0, and a loss that pulls them elsewhere."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64).to(DEVICE, dtype))
        self.head = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64).to(DEVICE, dtype))
        self.x = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def loss(self) -> Tensor:
        return (torch.tanh(self.x @ self.body) @ self.head - 1).square().mean()


def attached(model: nn.Module, optimizer: Optimizer, weight_decay: float = LAMBDA, **options: Any) -> RuleDecay:
    return RuleDecay(
        model, [optimizer], weight_decay, **{"rules": EVERYTHING, "apply": "decoupled", "towards": "start", **options}
    )


def train(model: Any, optimizer: Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


def expected(make: Callable[..., Optimizer], way: str, lambdas: list[float], pulled: set[str]) -> dict[str, Tensor]:
    """The formulas of L2-SP, step by step; parameters that are not `pulled` to their start are pulled to 0."""
    model = Model()
    optimizer = make(model.parameters())
    named = dict(model.named_parameters())
    origin = {name: p.detach().clone() * (name in pulled) for name, p in named.items()}
    for weight_decay in lambdas:
        optimizer.zero_grad()
        model.loss().backward()
        share = weight_decay * (1 if way == "independent" else LR)
        with torch.no_grad():
            for name, p in named.items():
                if way == "coupled":
                    p.grad += weight_decay * (p - origin[name])
                elif way != "cautious":
                    p -= share * (p - origin[name])
            before = {name: p.detach().clone() for name, p in named.items()}
        optimizer.step()
        for name, p in named.items() if way == "cautious" else ():
            away = before[name] - origin[name]
            p.data -= share * away * ((before[name] - p.detach()) * away >= 0)
    return {name: p.detach() for name, p in named.items()}


def assert_close(model: nn.Module, reference: dict[str, Tensor], rtol: float = 1e-12, atol: float = 1e-13) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), reference[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("apply", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_way_is_what_its_formula_says(name: str, apply: str) -> None:
    weight_decay = LAMBDA / 10 if apply == "independent" else LAMBDA
    way = OWN[name] if apply == "optimizer" else apply
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())
    decay = attached(model, optimizer, weight_decay, apply=apply)
    train(model, optimizer)
    reference = expected(OPTIMIZERS[name], way, [weight_decay] * STEPS, {"body", "head"})
    assert_close(model, reference)
    towards_zero = expected(OPTIMIZERS[name], way, [weight_decay] * STEPS, set())
    assert not torch.allclose(model.body, towards_zero["body"], rtol=1e-3)
    decay.remove()
    assert optimizer.param_groups[0].keys() == OPTIMIZERS[name](Model().parameters()).param_groups[0].keys()


@pytest.mark.parametrize("apply", WAYS)
def test_new_head_towards_zero_and_body_towards_its_start(apply: str) -> None:
    weight_decay = LAMBDA / 10 if apply == "independent" else LAMBDA
    rules = [DecayRule("head", pattern="head", towards="zero"), DecayRule("body", towards="start")]
    for towards in ("start", "zero"):
        model = Model()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        decay = attached(model, optimizer, weight_decay, rules=rules, apply=apply, towards=towards)
        train(model, optimizer)
        way = "decoupled" if apply == "optimizer" else apply
        assert_close(model, expected(OPTIMIZERS["AdamW"], way, [weight_decay] * STEPS, {"body"}))
        assert decay.state_dict()["start"] == {"body": pytest.approx(Model().body.norm().item(), rel=1e-12)}


@pytest.mark.parametrize("apply", ["coupled", "decoupled", "cautious"])
def test_copy_on_the_cpu_and_a_rate_that_is_a_tensor(apply: str) -> None:
    start = Start("cpu")
    model = Model()
    optimizer = OPTIMIZERS["AdamW"](model.parameters(), lr=torch.tensor(LR, dtype=torch.float64))
    attached(model, optimizer, apply=apply, start=start)
    train(model, optimizer)
    assert_close(model, expected(OPTIMIZERS["AdamW"], apply, [LAMBDA] * STEPS, {"body", "head"}))
    assert start.of(model.body).device.type == "cpu"


@pytest.mark.parametrize("way", ["decoupled", "cautious"])
def test_exempt_and_zero_lambda_are_bit_equal_to_none(way: str) -> None:
    """They are not copied either, and have no norm in the state."""
    bare = Model()
    train(bare, OPTIMIZERS["AdamW"](bare.parameters()))
    for weight_decay, multiplier in ((0.0, 1.0), (LAMBDA, 0.0)):
        model, start = Model(), Start()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        rules = [DecayRule("all", multiplier=multiplier)]
        decay = attached(model, optimizer, weight_decay, apply=way, rules=rules, start=start)
        train(model, optimizer)
        for name, p in model.named_parameters():
            assert torch.equal(p, dict(bare.named_parameters())[name])
        assert "start" not in decay.state_dict()
        assert start.norms(model) == {}


class Rosenbrock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-0.7, 0.6], dtype=torch.float64, device=DEVICE))

    def loss(self, weight_decay: float = 0.0, origin: Tensor | float = 0.0) -> Tensor:
        x, y = self.w
        return (1 - x) ** 2 + 5 * (y - x**2) ** 2 + weight_decay / 2 * (self.w - origin).square().sum()


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_minimises_the_distance_with_the_loss(search: str | None) -> None:
    reference, model = Rosenbrock(), Rosenbrock()
    origin = model.w.detach().clone()
    options = {"lr": 0.1 if search is None else 1.0, "line_search_fn": search, "max_iter": 6}
    theirs, ours = (torch.optim.LBFGS([one.w], **options) for one in (reference, model))
    attached(model, ours, apply="coupled")

    def closure(one: Rosenbrock, optimizer: Optimizer, *penalty: Any) -> Tensor:
        optimizer.zero_grad()
        loss = one.loss(*penalty)
        loss.backward()
        return loss

    for _ in range(3):
        found = ours.step(lambda: closure(model, ours))
        wanted = theirs.step(lambda: closure(reference, theirs, LAMBDA, origin))
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(model.w, reference.w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", ["coupled", "decoupled", "cautious"])
def test_sparse_gradients_pull_the_rows_that_they_have(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(5, 3, sparse=True, dtype=torch.float64, device=DEVICE)
    before = model.weight.detach().clone()
    start = Start()
    start.of(model.weight)
    with torch.no_grad():
        model.weight += 1
    dense = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    attached(model, optimizer, apply=way, start=start, before_clipping=way == "coupled")
    model(torch.tensor([1, 3, 3], device=DEVICE)).sum().backward()
    optimizer.step()
    gradient = torch.tensor([0.0, 1, 0, 2, 0], dtype=torch.float64, device=DEVICE)[:, None].expand(5, 3)
    touched = gradient > 0
    away = dense - before
    # of 1 everywhere, so a gradient above 0 leads back: cautious decay acts as well
    torch.testing.assert_close(model.weight.detach(), dense - LR * gradient - LR * LAMBDA * away * touched)


@pytest.mark.parametrize("way", ["coupled", "decoupled", "cautious"])
def test_complex_weights(way: str) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1 + 2j, -3 + 0.5j], dtype=torch.complex128, device=DEVICE))
    origin = model.w.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    decay = attached(model, optimizer, apply=way)
    assert decay.state_dict()["start"]["w"] == pytest.approx((1 + 4 + 9 + 0.25) ** 0.5)
    w = origin.clone()
    for _ in range(STEPS):
        model.w.grad = torch.full_like(w, 1 - 1j)
        optimizer.step()
        update, away = LR * torch.full_like(w, 1 - 1j), w - origin
        if way == "cautious":
            pairs = torch.view_as_real(update) * torch.view_as_real(away)
            away = torch.view_as_complex(torch.view_as_real(away) * (pairs >= 0))
        w = w - update - LR * LAMBDA * away
    torch.testing.assert_close(model.w.detach(), w, rtol=1e-12, atol=0)


def still(rounding: str, way: str = "decoupled", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, float]:
    """What is left of a distance of 2 after 400 steps without a gradient, and what should be."""
    model = nn.Module()
    model.w = nn.Parameter(torch.full((4000,), 1.0, dtype=dtype, device=DEVICE))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attached(model, optimizer, 0.1, rounding=rounding, apply=way)
    with torch.no_grad():
        model.w.add_(2)
    for _ in range(400):
        model.w.grad = torch.zeros_like(model.w)
        optimizer.step()
    return model.w.detach().double() - 1, 2 * (1 - 0.001) ** 400


@pytest.mark.parametrize("rounding", ["accumulate", "stochastic"])
def test_in_bfloat16_the_distance_shrinks_as_it_should(rounding: str) -> None:
    distance, exact = still(rounding)
    assert distance.mean().item() == pytest.approx(exact, rel=0.05)
    with pytest.warns(UserWarning, match=r"^Weight decay of group 'all' is lost"):
        lost, _ = still("nearest")
    assert torch.equal(lost, torch.full_like(distance, 2.0))


def test_coupled_in_bfloat16_keeps_small_gradients() -> None:
    """Near the start, lambda (w - w0) is small, but lambda w0 is not: it must not wipe out the gradient's digits."""
    model = nn.Module()
    model.w = nn.Parameter(torch.full((100,), 3.0, dtype=torch.bfloat16, device=DEVICE))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attached(model, optimizer, 0.5, apply="coupled", before_clipping=True)
    gradient = torch.linspace(1e-3, 2e-3, 100, device=DEVICE).bfloat16()
    model.w.grad = gradient.clone()
    seen: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(model.w.grad.clone()))
    optimizer.step()
    assert torch.equal(seen[0], gradient)


def test_lambda_that_changes_from_step_to_step() -> None:
    """By the multiplier that schedules write."""
    model = Model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    attached(model, optimizer)
    multipliers = [step / STEPS for step in range(STEPS)]
    for multiplier in multipliers:
        decay_groups(optimizer).multiply([multiplier])
        train(model, optimizer, 1)
    assert_close(model, expected(OPTIMIZERS["SGD"], "decoupled", [m * LAMBDA for m in multipliers], {"body", "head"}))


def test_resumed_in_a_bare_loop() -> None:
    """Found in the module as it was made, by norms that the state has; with others, an error."""
    reference = Model()
    optimizer = OPTIMIZERS["AdamW"](reference.parameters())
    decay = attached(reference, optimizer)
    train(reference, optimizer, 4)
    saved = copy.deepcopy([reference.state_dict(), optimizer.state_dict(), decay.state_dict()])
    train(reference, optimizer, 4)
    assert not any(isinstance(value, Tensor) for value in saved[2]["start"].values())

    def resume(model: Model) -> None:
        start = Start()
        start.find(model)
        model.load_state_dict(saved[0])
        start.resume()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        optimizer.load_state_dict(saved[1])
        decay = attached(model, optimizer, start=start)
        decay.load_state_dict(saved[2])
        train(model, optimizer, 4)

    model = Model()
    resume(model)
    for name, p in reference.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], p)
    other = Model()
    with torch.no_grad():
        other.head[0, 0] += 0.1
    with pytest.raises(
        RuntimeError, match=r"^1 parameters don't start from the weights .* norm of 'head' is .* and was"
    ):
        resume(other)


def test_one_copy_of_what_is_pulled_and_nothing_else() -> None:
    """By the storages that are alive; while a checkpoint is waited for, one of every parameter."""

    model, start = nn.Sequential(nn.Linear(301, 203), nn.Linear(203, 107)), Start()
    matrices = sum(p.nbytes for p in model.parameters() if p.ndim > 1)
    everything = sum(p.nbytes for p in model.parameters())
    # sizes that nothing else has, of all that lives in a process with other tests
    sizes = {p.nbytes for p in model.parameters()}

    def alive() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
        storages = [one.untyped_storage() for one in tensors if one.layout == torch.strided]
        return sum({one.data_ptr(): one.nbytes() for one in storages if one.nbytes() in sizes}.values())

    before = alive()
    start.find(model)
    assert alive() - before == everything
    start.resume()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = attached(model, optimizer, rules="default", start=start)
    assert alive() - before == everything
    start.begin()
    assert alive() - before == matrices
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    assert alive() - before == matrices
    decay.remove()
    del decay, start, optimizer
    assert alive() == before


def test_start_without_a_checkpoint_is_what_the_weights_are() -> None:
    """Also if a module was seen before it loaded weights by itself."""
    model, start = nn.Linear(2, 1), Start()
    start.find(model)
    with torch.no_grad():
        model.weight += 1
    now = model.weight.detach().clone()
    assert torch.equal(start.of(model.weight), now)
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(start.of(model.weight), now)


def test_what_comes_after_the_first_checkpoint_is_no_start() -> None:
    """As where a learning-rate finder trains, and loads its own checkpoint after that of the user."""
    model, start = nn.Linear(2, 1), Start()
    origin = model.weight.detach().clone()
    start.find(model)
    with torch.no_grad():
        model.weight += 1
    start.resume()
    start.find(model)
    assert torch.equal(start.of(model.weight), origin)


def test_follows_the_dtype_of_the_weights() -> None:
    """A Trainer converts a module after it has loaded the checkpoint."""
    model, start = nn.Linear(2, 1), Start()
    start.find(model)
    start.resume()
    origin = model.weight.detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(start.of(model.weight), origin.bfloat16())


def test_lazy_parameters_have_no_start_in_a_resumed_training() -> None:
    model, start = nn.LazyLinear(1), Start()
    start.find(model)
    model(torch.ones(1, 2))
    start.resume()
    with pytest.raises(
        RuntimeError, match=r"^Nobody knows the weights .* shape \(1, 2\) .* Give lazy layers their shapes"
    ):
        start.of(model.weight)


def test_norms_that_are_only_summed_in_another_order_are_the_same() -> None:
    model, start = nn.ParameterDict({"w": torch.ones(1), "new": torch.zeros(1)}), Start()
    start.take(model)
    start.expect({"w": 1.0 + 9e-6, "gone": 2.0})
    assert start.norms(model) == {"w": 1.0, "new": 0.0}
    start.resume({"new": 0.0})
    start.norms(model)
    for known in (1.0 + 1.1e-5, 1.0 - 1.1e-5, 0.0, float("inf")):
        start.expect({"w": known})
        with pytest.raises(RuntimeError, match=r"the norm of 'w' is 1, and was .*Make the module as it was before"):
            start.norms(model)


def test_norms_are_compared_once() -> None:
    """A parameter that takes the place of another one in mid-training starts from weights of its own."""
    model, start = nn.ParameterDict({"w": torch.ones(1)}), Start()
    start.take(model)
    start.resume({"w": 1.0})
    start.norms(model)
    model["w"] = torch.zeros(1)
    start.begin()
    start.take(model)
    assert start.norms(model) == {"w": 0.0}


def test_all_that_ask_share_one_start() -> None:
    watched: list[str] = []

    def watch(act: Callable[[], None]) -> Callable[[], None]:
        watched.append("begins")
        return lambda: watched.append("ends")

    model = nn.Linear(2, 1)
    first, second = expect_start(model, watch), expect_start(model, watch, "cpu")
    assert first is second
    assert first.device == "cpu"
    with pytest.raises(ValueError, match=r"^Expected `start_device` to be 'cpu', .* got 'same'.*Give both the same\."):
        expect_start(model, watch, "same")
    first.of(model.weight)
    first.begin()
    assert watched == ["begins", "ends"]
    first.end()
    assert expect_start(model, watch) is first
    first.end()
    second.end()
    assert watched == ["begins", "ends"]
    assert expect_start(model, watch) is not first
    gone = weakref.ref(model)
    del model, first, second
    gc.collect()
    assert gone() is None


def test_squared_distances() -> None:
    w, origin = torch.randn(3, 2, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex64)
    far = torch.full((2,), 1e25)
    found = squared_distances([w, far], [origin, torch.zeros(2)])
    assert found[0].item() == pytest.approx((w - origin).abs().double().square().sum().item(), rel=1e-6)
    assert found[1].item() == pytest.approx(2e50, rel=1e-6)
    assert squared_distances([], []).sum() == 0


@pytest.mark.parametrize("apply", ["coupled", "independent"])
def test_misuse_of_a_way(apply: str) -> None:
    """The optimizer's own decay can't be turned around where nobody knows how it acts."""

    class Mine(torch.optim.SGD):
        pass

    Mine.step = lambda self, closure=None: None
    Mine.__module__ = "mine"
    model = Model()
    with pytest.raises(
        ValueError, match=r"Decay towards the start needs to know how Mine decays\. Choose apply='decoup"
    ):
        attached(model, Mine(model.parameters(), lr=0.1, weight_decay=0.1), apply="optimizer")
    attached(model, Mine(model.parameters(), lr=0.1), 0.1, apply=apply).remove()
    with pytest.raises(ValueError, match=r"Expected `towards` to be None, 'zero' or 'start', got 'begin'"):
        DecayRule("r", towards="begin")  # type: ignore[arg-type]


def test_a_device_for_a_copy_that_nobody_needs_is_refused() -> None:
    to_start = [DecayRule("all", towards="start")]
    assert not check_start("zero", EVERYTHING, "same")
    assert check_start("zero", to_start, "cpu")
    assert check_start("start", EVERYTHING, "cpu")
    with pytest.raises(
        ValueError, match=r"^`start_device` goes with towards='start', got start_device='cpu' and towards="
    ):
        check_start("zero", EVERYTHING, "cpu")
