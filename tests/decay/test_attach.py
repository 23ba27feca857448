"""Expected values: torch's own AdamW/Adam, loops over scalars in float64, and closed forms."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2.decay import attach_decay
from lightning_l2.optimizers.step_hook import gradients_are_complete
from lightning_l2.param_groups.decay_groups import decay_groups
from tests.helpers import ACCELERATOR

LAMBDA = 0.3
WAYS = ("coupled", "decoupled", "independent", "cautious")
Make = Callable[[Any], Optimizer]

OWN_WAY: dict[str, tuple[Make, str | None]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "coupled"),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.1), "coupled"),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.1), "decoupled"),
    "Adamax": (lambda p: torch.optim.Adamax(p, lr=0.1), "coupled"),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=0.1), "coupled"),
    "NAdam decoupled": (lambda p: torch.optim.NAdam(p, lr=0.1, decoupled_weight_decay=True), "decoupled"),
    "RAdam": (lambda p: torch.optim.RAdam(p, lr=0.1), "coupled"),
    "RAdam decoupled": (lambda p: torch.optim.RAdam(p, lr=0.1, decoupled_weight_decay=True), "decoupled"),
    "Adam decoupled": (lambda p: torch.optim.Adam(p, lr=0.1, decoupled_weight_decay=True), "decoupled"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), "coupled"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), "coupled"),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, lr=0.1), "coupled"),
    "ASGD": (lambda p: torch.optim.ASGD(p, lr=0.1), "coupled"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.1), "decoupled"),
    "Muon": (lambda p: torch.optim.Muon(p, lr=0.1), "decoupled"),
    "Rprop": (lambda p: torch.optim.Rprop(p, lr=0.1), None),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), None),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p, lr=0.1), None),
    "Lion": (lambda p: pytorch_optimizer.Lion(p, lr=0.1), None),
    "schedule-free": (lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=0.1), "decoupled"),
}
FIRST_ORDER = [name for name in OWN_WAY if name not in ("LBFGS", "SparseAdam", "schedule-free")]


class ForeignAdam(torch.optim.Adam):
    """An Adam whose step is its own, so that nothing is known of it; notes the lambda that its update saw."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[float] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen.append(self.param_groups[0]["weight_decay"])
        torch.optim.Adam.step.__wrapped__(self)  # without the hooks, which have run for this step
        return loss


class ForeignSGD(Optimizer):
    """w <- w - lr g, and nothing torch knows of."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
        return loss


def weight(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (6, 4)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7)))


def loss_of(w: Tensor, step: int) -> Tensor:
    target = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(step))
    return ((w - target) ** 2).sum() + w.sin().sum()


def set_lambda(optimizer: Optimizer, value: float = LAMBDA) -> Optimizer:
    for group in optimizer.param_groups:
        group["weight_decay"] = value
    return optimizer


def train(
    make: Make,
    apply: str | None,
    *,
    steps: int = 10,
    dtype: torch.dtype = torch.float64,
    closure: bool = True,
    weight_decay: float = LAMBDA,
    **options: Any,
) -> Tensor:
    w = weight(dtype)
    optimizer = set_lambda(make([w]), weight_decay)
    if apply is not None:
        attach_decay(optimizer, apply, **options)

    for step in range(steps):

        def evaluate(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(w, step)
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    assert {group["weight_decay"] for group in optimizer.param_groups} == {weight_decay}
    return w.detach()


def train_by_hand(make: Make, apply: str, steps: int = 10, eta: float = 0.1) -> Tensor:
    """Run the optimizer without decay of its own and do by hand what the formulas say, `cautious` by scalars."""
    w = weight()
    optimizer = set_lambda(make([w]), 0.0)
    strength = {"decoupled": eta * LAMBDA, "independent": LAMBDA}.get(apply, 0.0)
    # Adafactor's u is in proportion to ||w||, which has not decayed yet: its own decay comes after that.
    reads_weights = isinstance(optimizer, torch.optim.Adafactor)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(w, step).backward()
        before = w.detach().clone()
        with torch.no_grad():
            if apply == "coupled":
                w.grad += LAMBDA * w
            if not reads_weights:
                w *= 1 - strength
        optimizer.step()
        with torch.no_grad():
            if reads_weights:
                w -= strength * before
            if apply == "cautious":
                for old, new in zip(before.flatten(), w.view(-1), strict=True):
                    u = (old - new) / eta
                    new -= eta * LAMBDA * old if u * old >= 0 else 0.0
    return w.detach()


@pytest.mark.parametrize("name", [name for name in FIRST_ORDER if OWN_WAY[name][1]])
def test_own_way_is_what_the_optimizer_does(name: str) -> None:
    make, way = OWN_WAY[name]
    torch.testing.assert_close(train(make, None), train_by_hand(make, str(way)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("closure", [True, False], ids=["closure", "no closure"])
@pytest.mark.parametrize("apply", WAYS)
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_any_way_on_any_optimizer(name: str, apply: str, closure: bool) -> None:
    make, _ = OWN_WAY[name]
    torch.testing.assert_close(train(make, apply, closure=closure), train_by_hand(make, apply), rtol=1e-12, atol=1e-12)


# Weights after 20 steps of heavyball 3.2.1 with cautious_weight_decay=True, from the problem in the test.
HEAVYBALL = {
    "AdamW": [-0.7429699, -0.3941092, -0.3778556, -0.4608981, -0.2093108, 0.0996560, 0.1014152, 0.1076338, 0.3902776,
              0.5950395, 0.5230216, 0.6107897],
    "SGD": [-0.0767785, 0.0707955, -0.0060458, -0.1348482, -0.0092559, 0.1088316, -0.0258162, -0.0835430, 0.0890284,
            0.1165052, -0.0440286, -0.0269862],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("AdamW", partial(torch.optim.AdamW, lr=0.05, betas=(0.9, 0.99))),
        ("SGD", partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    ],
)
def test_cautious_is_that_of_another_library(name: str, make: Make) -> None:
    index = torch.arange(12, dtype=torch.float64)
    w = nn.Parameter(1.3 * torch.linspace(-1, 1, 12, dtype=torch.float64) + 0.05)
    optimizer = set_lambda(make([w]), 0.4)
    attach_decay(optimizer, "cautious")
    for step in range(20):
        w.grad = torch.cos(1.7 * index + step) + 0.2 * w.detach()
        optimizer.step()
    expected = torch.tensor(HEAVYBALL[name], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=3e-7)  # its states are float32


def test_the_ways_differ() -> None:
    results = [train_by_hand(OWN_WAY["Adam"][0], apply) for apply in WAYS]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(results, 2))


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_decoupled_adam_is_adamw_and_coupled_adamw_is_adam_bit_for_bit(backend: dict[str, bool], dtype: Any) -> None:
    adam: Make = partial(torch.optim.Adam, lr=0.1, **backend)
    adamw: Make = partial(torch.optim.AdamW, lr=0.1, **backend)
    assert torch.equal(train(adam, "decoupled", steps=50, dtype=dtype), train(adamw, None, steps=50, dtype=dtype))
    assert torch.equal(train(adamw, "coupled", steps=50, dtype=dtype), train(adam, None, steps=50, dtype=dtype))
    assert not torch.equal(train(adam, None, steps=50, dtype=dtype), train(adamw, None, steps=50, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("apply", ["decoupled", "independent", "cautious"])
def test_short_floats_lose_no_more_than_their_rounding(apply: str, dtype: torch.dtype) -> None:
    """1 - eta lambda is not rounded to 1 before it meets the weight, as one foreach kernel of torch does."""
    w = nn.Parameter(torch.full((1000,), 1.0 + 1 / 128, dtype=dtype))
    strength = 0.003
    optimizer = set_lambda(ForeignAdam([w], lr=0.1, eps=1.0), strength / (1.0 if apply == "independent" else 0.1))
    attach_decay(optimizer, apply)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    expected = torch.full((1000,), (1.0 + 1 / 128) * (1 - strength), dtype=torch.float64).to(dtype)
    assert torch.equal(w.detach(), expected)


@pytest.mark.parametrize("name", ["NAdam", "RAdam"])
def test_the_flag_of_nadam_and_radam_is_used(name: str) -> None:
    coupled, decoupled = OWN_WAY[name][0], OWN_WAY[f"{name} decoupled"][0]
    assert torch.equal(train(coupled, "decoupled"), train(decoupled, None))
    assert torch.equal(train(decoupled, "coupled"), train(coupled, None))


@pytest.mark.parametrize(
    ("foreach", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)], ids=str
)
def test_where_torch_has_no_flag_the_result_is_the_same_bit_for_bit(foreach: bool, dtype: torch.dtype) -> None:
    foreign: Make = partial(ForeignAdam, lr=0.1, foreach=foreach)
    adamw: Make = partial(torch.optim.AdamW, lr=0.1, foreach=foreach)
    adam: Make = partial(torch.optim.Adam, lr=0.1, foreach=foreach)
    assert torch.equal(train(foreign, "decoupled", steps=50, dtype=dtype), train(adamw, None, steps=50, dtype=dtype))
    assert torch.equal(train(foreign, "coupled", steps=50, dtype=dtype), train(adam, None, steps=50, dtype=dtype))


def test_for_sgd_the_ways_are_one() -> None:
    make: Make = partial(torch.optim.SGD, lr=0.05)
    own = train(make, "optimizer", dtype=torch.float32)
    for apply in ("coupled", "decoupled"):
        torch.testing.assert_close(train(make, apply, dtype=torch.float32), own, rtol=1e-6, atol=1e-6)
    independent = train(make, "independent", dtype=torch.float32, weight_decay=0.05 * LAMBDA)
    torch.testing.assert_close(independent, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "apply"), [("SGD", "coupled"), ("AdamW", "decoupled"), ("Muon", "decoupled")])
def test_what_the_optimizer_does_by_itself_is_left_to_it(name: str, apply: str) -> None:
    make = OWN_WAY[name][0]
    for way in ("optimizer", apply):
        assert torch.equal(train(make, way), train(make, None))


# --- the learning rate ---


@pytest.mark.parametrize(
    ("peak_lr", "group", "factor"),
    [
        (None, {"lr": 0.1}, 1 - LAMBDA),
        (0.4, {"lr": 0.1}, 1 - LAMBDA / 4),
        ("initial", {"lr": 0.1, "initial_lr": 0.2}, 1 - LAMBDA / 2),
        ("initial", {"lr": 0.1, "initial_lr": 0.01, "max_lr": 0.5}, 1 - LAMBDA / 5),
        ("initial", {"lr": 0.1}, 1 - LAMBDA),
    ],
)
def test_independent_keeps_the_schedule_if_asked(peak_lr: Any, group: dict[str, float], factor: float) -> None:
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=LAMBDA)
    optimizer.param_groups[0].update(group)
    attach_decay(optimizer, "independent", peak_lr=peak_lr)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full_like(w, factor), rtol=1e-15, atol=0)


def test_the_learning_rate_of_the_step_counts() -> None:
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    optimizer = torch.optim.RMSprop([w], lr=0.1, weight_decay=LAMBDA)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    attach_decay(optimizer, "decoupled")
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert w.item() == pytest.approx(math.prod(1 - LAMBDA * 0.1 / 2**t for t in range(3)), rel=1e-15)


def test_lr_and_lambda_as_tensors() -> None:
    make: Make = partial(ForeignAdam, lr=torch.tensor(0.1), foreach=False)
    for apply in WAYS:
        w = train(make, apply, dtype=torch.float32)
        expected = train(lambda p: ForeignAdam(p, lr=0.1, foreach=False), apply, dtype=torch.float32)
        torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-6)


# --- what a parameter can be ---


@pytest.mark.parametrize("apply", WAYS)
def test_parameters_without_gradient_and_groups_without_lambda_stay(apply: str) -> None:
    frozen, exempt, decayed = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [frozen, decayed], "weight_decay": LAMBDA}, {"params": [exempt], "weight_decay": 0.0}]
    optimizer = ForeignAdam(groups, lr=0.1, eps=1.0)
    attach_decay(optimizer, apply)
    exempt.grad, decayed.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(2))
    assert torch.equal(exempt.detach(), torch.ones(2))
    assert (decayed < 1).all()


@pytest.mark.parametrize("apply", WAYS)
def test_maximize_decays_too(apply: str) -> None:
    """Maximising J - lambda/2 ||w||^2 is minimising -J + lambda/2 ||w||^2."""

    def run(maximize: bool) -> Tensor:
        w = weight()
        optimizer = set_lambda(torch.optim.Rprop([w], lr=0.1, maximize=maximize))
        attach_decay(optimizer, apply)
        for step in range(5):
            optimizer.zero_grad()
            (-loss_of(w, step) if maximize else loss_of(w, step)).backward()
            optimizer.step()
        return w.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apply", WAYS)
def test_complex_weights_decay_by_their_parts(apply: str) -> None:
    parts = weight(shape=(5, 2))

    def run(w: nn.Parameter) -> Tensor:
        optimizer = set_lambda(ForeignAdam([w], lr=0.1, foreach=False))
        attach_decay(optimizer, apply)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(torch.view_as_real(w) if w.is_complex() else w, step).backward()
            optimizer.step()
        return torch.view_as_real(w.detach()) if w.is_complex() else w.detach()

    as_complex = nn.Parameter(torch.view_as_complex(parts.detach().clone()))
    torch.testing.assert_close(run(as_complex), run(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "apply"),
    [(make, apply) for make in (torch.optim.SparseAdam, torch.optim.SGD) for apply in WAYS],
)
def test_sparse_gradients_decay_the_rows_they_touch_once(make: Callable[..., Optimizer], apply: str) -> None:
    eta, rows = 0.1, [1, 3, 3]
    table = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    start = table.weight.detach().clone()
    optimizer = set_lambda(make(table.parameters(), lr=eta))
    # SGD is coupled by itself, and torch has no weight decay there for sparse gradients.
    attach_decay(optimizer, apply, before_clipping=make is torch.optim.SGD and apply == "coupled")
    table(torch.tensor(rows)).sum().backward()
    optimizer.step()

    expected = start.clone()
    for row, column in itertools.product(set(rows), range(3)):
        w = start[row, column].item()
        g = rows.count(row) + (LAMBDA * w if apply == "coupled" else 0.0)
        u = math.copysign(1.0, g) if make is torch.optim.SparseAdam else g  # Adam's first step has length 1
        masked = eta * LAMBDA if u * w >= 0 else 0.0
        strength = {"coupled": 0.0, "decoupled": eta * LAMBDA, "independent": LAMBDA, "cautious": masked}[apply]
        expected[row, column] = w - eta * u - strength * w
    torch.testing.assert_close(table.weight.detach(), expected, rtol=1e-6, atol=1e-9)
    untouched = [0, 2, 4]
    assert torch.equal(table.weight.detach()[untouched], start[untouched])


def test_sparse_rows_that_are_known_only_after_the_closure() -> None:
    """The copy for `cautious` is taken before it where an optimizer may move weights first."""
    table = nn.Embedding(3, 2, sparse=True, dtype=torch.float64)
    table.weight.data = torch.tensor([[1.0, 1.0], [2.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    optimizer = set_lambda(ForeignSGD(table.parameters(), lr=0.1))
    attach_decay(optimizer, "cautious")

    def evaluate() -> Tensor:
        loss = table(torch.tensor([1, 1])).sum()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    expected = [[1.0, 1.0], [2.0 - 0.2 - 0.1 * LAMBDA * 2.0, -2.2], [1.0, 1.0]]
    torch.testing.assert_close(table.weight.detach(), torch.tensor(expected, dtype=torch.float64))


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("apply", WAYS)
def test_sharded_weights(mesh: Any, apply: str) -> None:
    def run(w: nn.Parameter) -> Tensor:
        optimizer = set_lambda(ForeignAdam([w], lr=0.1))
        attach_decay(optimizer, apply)
        for step in range(3):
            optimizer.zero_grad()
            full = w.full_tensor() if hasattr(w, "full_tensor") else w
            loss_of(full, step).backward()
            optimizer.step()
        return w.full_tensor().detach() if hasattr(w, "full_tensor") else w.detach()

    sharded = nn.Parameter(distribute_tensor(weight().detach(), mesh))
    torch.testing.assert_close(run(sharded), run(weight()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apply", WAYS)
def test_partial_sums_of_a_gradient_are_added_up_first(mesh: Any, apply: str) -> None:
    """As tensor parallelism leaves them: lambda w joins their sum once, not each of them."""
    w, reference = nn.Parameter(distribute_tensor(weight().detach(), mesh)), weight()
    w.grad = DTensor.from_local(weight().detach().cos(), mesh, [Partial()])
    reference.grad = weight().detach().cos()
    for p in (w, reference):
        optimizer = set_lambda(ForeignAdam([p], lr=0.1))
        attach_decay(optimizer, apply)
        optimizer.step()
    torch.testing.assert_close(w.full_tensor().detach(), reference.detach(), rtol=1e-12, atol=1e-12)
    if apply == "coupled":
        assert w.grad.placements == w.placements


# --- GradScaler ---


def scaled_step(optimizer: Optimizer, scaler: torch.amp.GradScaler, w: nn.Parameter, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(w, 0) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("apply", WAYS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_skipped_step_decays_nothing(make: Any, fused: bool, apply: str) -> None:
    w = weight(torch.float32)
    optimizer = set_lambda(make([w], lr=0.1, fused=fused))
    attach_decay(optimizer, apply, **({"before_clipping": True} if apply == "coupled" else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = w.detach().clone()
    scaled_step(optimizer, scaler, w, factor=math.inf)
    assert torch.equal(w.detach(), start)
    assert scaler.get_scale() == 512.0
    assert optimizer.param_groups[0]["weight_decay"] == LAMBDA


@pytest.mark.parametrize("apply", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_fused_under_a_scaler_is_plain_without(make: Any, dtype: torch.dtype, apply: str) -> None:
    options = {"before_clipping": True} if apply == "coupled" else {}  # the gradient route, also where torch has a flag
    w, reference = weight(dtype), weight(dtype)
    fused, plain = set_lambda(make([w], lr=0.1, fused=True)), set_lambda(make([reference], lr=0.1))
    attach_decay(fused, apply, **options)
    attach_decay(plain, apply, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(5):
        scaled_step(fused, scaler, w)
        plain.zero_grad()
        loss_of(reference, 0).backward()
        plain.step()
    torch.testing.assert_close(w.detach(), reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apply", WAYS)
def test_nothing_synchronises(apply: str) -> None:
    """Fake tensors refuse to be read on the host, and these say that they live on a GPU."""
    with FakeTensorMode():
        w = nn.Parameter(torch.ones(3, device="cuda"))
        w.grad = torch.ones(3, device="cuda")
        optimizer = ForeignAdam([w], weight_decay=LAMBDA)
        optimizer.param_groups[0]["lr"] = torch.full((), 0.1, device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.grad_scale = torch.ones((), device="cuda")
        attach_decay(optimizer, apply, **({"peak_lr": "initial"} if apply == "independent" else {}))
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (optimizer,), {})
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (optimizer,), {})


# --- once, and visible ---


@pytest.mark.parametrize("apply", WAYS)
def test_the_update_sees_no_lambda_and_everybody_else_does(apply: str) -> None:
    w = weight()
    optimizer = ForeignAdam([w], lr=0.1, weight_decay=LAMBDA)
    attach_decay(optimizer, apply)
    within: list[float] = []

    def evaluate() -> Tensor:
        within.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.param_groups[0]["weight_decay"] = 0.5  # as a scheduler might, in `on_before_optimizer_step`
        loss = loss_of(w, 0)
        loss.backward()
        return loss

    optimizer.step(closure=evaluate)
    assert (within, optimizer.seen) == ([LAMBDA], [0.0])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_lambda_set_within_the_closure_acts_in_the_same_step() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = set_lambda(torch.optim.Rprop([w], lr=0.1))
    attach_decay(optimizer, "decoupled")

    def evaluate() -> None:
        w.grad = torch.zeros(2)
        set_lambda(optimizer, 5.0)

    optimizer.step(evaluate)
    assert w.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("name", "apply"), [("Rprop", way) for way in WAYS] + [("AdamW", "coupled")])
def test_a_step_that_raises_leaves_the_groups_whole(name: str, apply: str) -> None:
    w = weight()
    optimizer = set_lambda(getattr(torch.optim, name)([w], lr=0.1))
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    handle = attach_decay(optimizer, apply)
    w.grad = torch.zeros_like(w)
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # later than ours: as if the update itself raised

    def groups() -> dict[str, Any]:
        return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert groups() == before
        saved = optimizer.state_dict()["param_groups"][0]
        assert {key: saved[key] for key in before} == before
    handle.remove()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert groups() == before


@pytest.mark.parametrize("apply", WAYS)
def test_an_error_in_the_closure_leaves_the_groups_whole_and_the_next_step_right(apply: str) -> None:
    w, reference = weight(), weight()
    optimizer, clean = (set_lambda(torch.optim.Rprop([p], lr=0.1)) for p in (w, reference))
    attach_decay(optimizer, apply)
    attach_decay(clean, apply)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups[0]["weight_decay"] == LAMBDA
    for opt, p in ((optimizer, w), (clean, reference)):
        loss_of(p, 0).backward()
        opt.step()
    assert torch.equal(w, reference)


@pytest.mark.parametrize("closure", [True, False])
def test_an_optimizer_that_reads_lambda_first_decays_once(closure: bool) -> None:
    """As ZeroRedundancyOptimizer, which copies the groups to an inner optimizer before it asks for the gradient."""

    class Eager(Optimizer):
        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor] | None = None) -> None:
            own = self.param_groups[0]["weight_decay"]
            if closure is not None:
                closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad + own * p, alpha=0.1)

    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    optimizer = Eager([w], {"lr": 0.1, "weight_decay": LAMBDA})
    attach_decay(optimizer, "decoupled")
    optimizer.step(*([lambda: None] if closure else []))
    assert w.tolist() == [1 - 0.1 * LAMBDA] * 2


def test_a_step_before_which_nobody_couples_is_coupled_all_the_same() -> None:
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=LAMBDA)
    handle = attach_decay(optimizer, "coupled", before_clipping=True)
    for couple in (True, False, True, False):
        w.grad = torch.zeros_like(w)
        if couple:
            handle.before_clipping()
        optimizer.step()
    assert w.item() == pytest.approx((1 - 0.1 * LAMBDA) ** 4, rel=1e-15)


@pytest.mark.parametrize("apply", WAYS)
def test_what_is_attached_within_a_step_acts_from_the_next_one_on(apply: str) -> None:
    w, reference = weight(), weight()
    optimizer, clean = (set_lambda(torch.optim.Rprop([p], lr=0.1)) for p in (w, reference))

    def evaluate(optimizer: Optimizer, p: nn.Parameter, attach: bool) -> None:
        optimizer.zero_grad()
        loss_of(p, 0).backward()
        if attach:
            attach_decay(optimizer, apply)

    clean.step(lambda: evaluate(clean, reference, False))
    attach_decay(clean, apply)
    optimizer.step(lambda: evaluate(optimizer, w, True))
    for _ in range(2):
        assert torch.equal(w, reference)
        optimizer.step(lambda: evaluate(optimizer, w, False))
        clean.step(lambda: evaluate(clean, reference, False))


@pytest.mark.parametrize("apply", WAYS)
def test_removed_is_as_never_attached(apply: str) -> None:
    w, reference = weight(), weight()
    optimizer, clean = (set_lambda(torch.optim.RMSprop([p], lr=0.1)) for p in (w, reference))
    attach_decay(optimizer, apply, **({"before_clipping": True} if apply == "coupled" else {})).remove()
    for opt, p in ((optimizer, w), (clean, reference)):
        loss_of(p, 0).backward()
        opt.step()
    assert torch.equal(w, reference)
    attach_decay(optimizer, apply)


def test_copies_and_pickles_of_an_optimizer_have_nothing_attached() -> None:
    optimizer = set_lambda(torch.optim.Rprop([weight()], lr=0.1))
    attach_decay(optimizer, "decoupled")
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not twin._optimizer_step_pre_hooks
        assert twin.param_groups[0]["weight_decay"] == LAMBDA


def test_loading_a_state_dict_keeps_it_working() -> None:
    w = weight()
    optimizer = set_lambda(torch.optim.RMSprop([w], lr=0.1))
    attach_decay(optimizer, "independent")
    optimizer.load_state_dict(optimizer.state_dict())
    set_lambda(optimizer, 0.5)
    start = w.detach().clone()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(w.detach(), start / 2)


def test_no_copy_is_held_between_steps() -> None:
    """One of a parameter that turns out to have no gradient neither, which an unknown optimizer might have moved."""

    def alive() -> int:
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        return sum(tensor.shape == (5, 13) for tensor in tensors)

    used, unused, frozen = weight(), weight(shape=(5, 13)), weight(shape=(5, 13)).requires_grad_(False)
    optimizer = set_lambda(ForeignAdam([used, unused, frozen], lr=0.1))
    attach_decay(optimizer, "cautious")
    within: list[int] = []

    def evaluate() -> None:
        within.append(alive())
        loss_of(used, 0).backward()

    before = alive()
    optimizer.step(evaluate)
    assert (within, alive()) == ([before + 1], before)


# --- optimizers that do more than one thing in a step ---


def ridge_problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = torch.randn(40, dtype=torch.float64, generator=generator)
    # 1/(2N) ||xw - y||^2 + lambda/2 ||w||^2 has its minimum where (x'x/N + lambda) w = x'y/N.
    return x, y, torch.linalg.solve(x.T @ x / 40 + LAMBDA * torch.eye(5, dtype=torch.float64), x.T @ y / 40)


@pytest.mark.parametrize("before_clipping", [False, True])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_coupled_lbfgs_minimises_the_whole_objective(search: str | None, before_clipping: bool) -> None:
    x, y, solution = ridge_problem()

    def run(explicit: bool) -> tuple[Tensor, Tensor]:
        w = nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = torch.optim.LBFGS([w], lr=0.3, max_iter=4, line_search_fn=search)
        set_lambda(optimizer, 0.0 if explicit else LAMBDA)
        handle = attach_decay(optimizer, "coupled", before_clipping=before_clipping)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = (x @ w - y).square().mean() / 2
            if explicit:
                loss = loss + LAMBDA / 2 * w.square().sum()
            loss.backward()
            handle.before_clipping()
            return loss

        losses = [optimizer.step(evaluate).item() for _ in range(12)]
        return w.detach(), torch.tensor(losses)

    (w, losses), (expected, written) = run(False), run(True)
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, written, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(w, solution, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("apply", ["decoupled", "independent", "cautious"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_decays_weights_once_a_step(search: str | None, apply: str) -> None:
    eta = 0.3

    def run(decay: bool) -> Tensor:
        w = weight()
        optimizer = torch.optim.LBFGS([w], lr=eta, max_iter=4, line_search_fn=search)
        set_lambda(optimizer)
        if decay:
            attach_decay(optimizer, apply)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(w, 0)
            loss.backward()
            return loss

        optimizer.step(evaluate)
        return w.detach()

    before, undecayed = weight().detach(), run(False)
    opposes = ((before - undecayed) * before < 0) & (apply == "cautious")
    expected = undecayed - torch.where(opposes, 0.0, LAMBDA * (1.0 if apply == "independent" else eta) * before)
    torch.testing.assert_close(run(True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apply", WAYS)
def test_lookahead_decays_as_its_inner_optimizer_would(apply: str) -> None:
    def lookahead(p: Any) -> Optimizer:
        return pytorch_optimizer.Lookahead(torch.optim.RMSprop(p, lr=0.1), k=3)

    if apply != "cautious":  # whose direction u is the whole of Lookahead's step
        w = weight()
        inner = set_lambda(torch.optim.RMSprop([w], lr=0.1))
        attach_decay(inner, apply)
        outer = pytorch_optimizer.Lookahead(inner, k=3)
        for step in range(10):
            outer.zero_grad()
            loss_of(w, step).backward()
            outer.step()
        torch.testing.assert_close(train(lookahead, apply), w.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(train(lookahead, apply), train_by_hand(lookahead, apply), rtol=1e-12, atol=1e-12)


def test_schedule_free_decays_y() -> None:
    make: Make = partial(pytorch_optimizer.ScheduleFreeSGD, lr=0.1)
    own = train(make, "optimizer")
    torch.testing.assert_close(train(make, "decoupled"), own, rtol=0, atol=0)
    torch.testing.assert_close(train(make, "coupled"), own, rtol=1e-12, atol=1e-12)
    assert (own - train(make, "optimizer", weight_decay=0.0)).abs().max() > 1e-2


@pytest.mark.parametrize("apply", WAYS)
def test_lazy_layers_under_an_optimizer_torch_does_not_know(apply: str) -> None:
    def run(layer: nn.Module) -> Tensor:
        beside = weight()
        optimizer = set_lambda(ForeignAdam([layer.weight, beside], lr=0.1))
        attach_decay(optimizer, apply)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            output = layer(torch.ones(1, 3, dtype=torch.float64))
            with torch.no_grad():
                layer.weight.copy_(start) if not optimizer.state else None
            loss = output.sum() * 0.0 + loss_of(layer.weight, 0) + loss_of(beside, 1)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(evaluate)
        return torch.cat([layer.weight.detach().flatten(), beside.detach().flatten()])

    start = weight(shape=(2, 3)).detach()
    lazy, eager = (
        kind(bias=False, dtype=torch.float64) for kind in (partial(nn.LazyLinear, 2), partial(nn.Linear, 3, 2))
    )
    eager.weight.data.copy_(start)
    torch.testing.assert_close(run(lazy), run(eager), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("apply", ["decoupled", "independent", "cautious"])
def test_sam_decays_the_weights_it_comes_back_to(apply: str) -> None:
    """SAM asks for the gradient at w + e and goes back to w, so what happens to the weights meanwhile is lost."""

    def step(decay: bool) -> Tensor:
        w = weight()
        sam = set_lambda(pytorch_optimizer.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1), LAMBDA * decay)
        attach_decay(sam, apply)

        def evaluate() -> Tensor:
            sam.zero_grad()
            loss = loss_of(w, 0)
            loss.backward()
            return loss

        evaluate()
        sam.step(evaluate)
        return w.detach()

    before, undecayed = weight().detach(), step(False)
    strength = LAMBDA * (1.0 if apply == "independent" else 0.1)
    if apply == "cautious":
        expected = undecayed - strength * torch.where((before - undecayed) * before >= 0, before, 0.0)
    else:
        expected = (1 - strength) * undecayed
    torch.testing.assert_close(step(True), expected, rtol=1e-12, atol=1e-12)


# --- within a Trainer ---


class Attach(pl.Callback):
    """What `WeightDecay` does with `attach_decay`, and no more."""

    def __init__(self, apply: str, **options: Any) -> None:
        self.apply, self.options = apply, options

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        attach_decay(trainer.optimizers[0], self.apply, **self.options)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients_are_complete(optimizer, self)


class Line(pl.LightningModule):
    """w . x with fixed data: the gradient of the loss is the mean of the x, whatever w is."""

    def __init__(self, make: Make, manual: bool = False) -> None:
        super().__init__()
        self.w, self.make = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64)), make
        self.automatic_optimization = not manual

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = (batch[0] @ self.w).mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make([self.w])


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> Tensor:
    data = DataLoader(TensorDataset(torch.full((4, 2), 2.0, dtype=torch.float64)), batch_size=1)
    trainer = pl.Trainer(
        accelerator=ACCELERATOR,
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, data)
    return next(module.parameters()).detach()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("before_clipping", [True, False])
@pytest.mark.parametrize("make", [torch.optim.SGD, ForeignSGD])
def test_clipping_takes_hold_of_what_is_added_before_it(make: Any, before_clipping: bool, accumulate: int) -> None:
    module = Line(lambda p: set_lambda(make(p, lr=0.1)))
    options = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm", "accumulate_grad_batches": accumulate}
    w = fit(module, Attach("coupled", before_clipping=before_clipping), **options)
    start, g = torch.tensor([3.0, -4.0]).double(), torch.tensor([2.0, 2.0]).double()
    if before_clipping:
        total = g + LAMBDA * start
        total /= total.norm()
    else:
        total = g / g.norm() + LAMBDA * start
    torch.testing.assert_close(w, start - 0.1 * total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("apply", ["decoupled", "independent", "cautious"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_decay_of_weights_is_not_clipped(manual: bool, apply: str) -> None:
    module = Line(lambda p: set_lambda(ForeignSGD(p, lr=0.1)), manual=manual)
    w = fit(module, Attach(apply), **({} if manual else {"gradient_clip_val": 1.0}))
    start, g = torch.tensor([3.0, -4.0]).double(), torch.tensor([2.0, 2.0]).double()
    strength = LAMBDA * (1.0 if apply == "independent" else 0.1)
    mask = torch.tensor([1.0, 0.0]) if apply == "cautious" else 1.0  # the update of -4 goes away from 0
    torch.testing.assert_close(w, start - 0.1 * g / g.norm() - strength * mask * start, rtol=1e-6, atol=1e-6)


# --- misuse ---


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (torch.optim.SGD, {"apply": "L2"}, ValueError, "Unknown apply='L2'. Choose one of 'optimizer', 'coupled', "),
        (torch.optim.LBFGS, {"apply": "optimizer"}, ValueError, "LBFGS has no weight decay of its own, so apply='opti"),
        (torch.optim.Rprop, {"apply": "optimizer"}, ValueError, "Choose apply='coupled', 'decoupled', 'independent'"),
        (ForeignSGD, {"apply": "optimizer"}, ValueError, "ForeignSGD has no weight decay of its own"),
        (torch.optim.SGD, {"apply": "decoupled", "before_clipping": True}, ValueError, "goes with apply='coupled' onl"),
        (torch.optim.SGD, {"apply": "decoupled", "peak_lr": 0.1}, ValueError, "goes with apply='independent' only, go"),
        (torch.optim.SGD, {"apply": "independent", "peak_lr": 0.0}, ValueError, "to be a positive number, 'initial' o"),
        (torch.optim.SGD, {"apply": "independent", "peak_lr": math.inf}, ValueError, "None, got inf"),
        (torch.optim.SGD, {"apply": "independent", "peak_lr": "first"}, ValueError, "None, got 'first'"),
        (pytorch_optimizer.ScheduleFreeAdamW, {"apply": "cautious"}, ValueError, "Choose apply='optimizer' or 'coupl"),
        (pytorch_optimizer.ScheduleFreeAdamW, {"apply": "independent"}, ValueError, "keeps weights besides the ones"),
    ],
)
def test_misuse(make: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        attach_decay(make([weight()], lr=0.1), **arguments)


def test_a_differentiable_optimizer_is_refused() -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match=r"SGD\(differentiable=True\) records its step, and apply='decoupled' changes"):
        attach_decay(optimizer, "decoupled")
    attach_decay(optimizer, "coupled")  # its own way, which can be recorded


def test_an_optimizer_without_lr_is_refused_where_lr_counts() -> None:
    optimizer = ForeignSGD([weight()], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"needs an `lr` in every group of ForeignSGD\. Choose apply='independent'"):
        attach_decay(optimizer, "decoupled")
    attach_decay(optimizer, "independent").remove()
    with pytest.raises(ValueError, match=r"needs an `lr` in every group of ForeignSGD"):
        attach_decay(optimizer, "independent", peak_lr=0.1)


def test_a_peak_of_zero_is_refused() -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.0)
    with pytest.raises(
        ValueError, match=r"finds no learning rate above 0 in a group of SGD\. Give the peak as a number"
    ):
        attach_decay(optimizer, "independent", peak_lr="initial")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adafactor])
def test_independent_decay_of_more_than_everything_is_refused_before_it_moves(make: Any) -> None:
    w = weight()
    start = w.detach().clone()
    w.grad = torch.ones_like(w)
    optimizer = make([w], lr=0.1, weight_decay=1.5)
    attach_decay(optimizer, "independent")
    with pytest.raises(ValueError, match=r"got weight_decay=1.5. Give a value of at most 1"):
        optimizer.step()
    assert torch.equal(w, start)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.5]


def test_independent_decay_that_a_schedule_drives_above_everything_is_told_once_and_takes_no_more() -> None:
    w = weight()
    start = w.detach().clone()
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=0.5)
    way = attach_decay(optimizer, "independent")
    (group,) = decay_groups(optimizer).groups

    def step(multiplier: float) -> None:
        decay_groups(optimizer).multiply(multiplier)
        w.grad = torch.zeros_like(w)
        optimizer.step()

    step(1.0)
    torch.testing.assert_close(w.detach(), start / 2)
    with pytest.warns(UserWarning, match=r"has driven lambda to 3, and apply='independent' scales weights by 1 - lam"):
        step(6.0)
    assert way.share(group) == 1.0
    assert not w.any()
    step(8.0)


def test_an_optimizer_without_hooks_is_refused() -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.param_groups = [{"params": [], "lr": 0.1, "weight_decay": 0.1}]

        def step(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"^apply='decoupled' needs step hooks .* which Wrapper does not call"):
        attach_decay(Wrapper(), "decoupled")


def test_nothing_decays_twice() -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.1)
    handle = attach_decay(optimizer, "decoupled")
    with pytest.raises(RuntimeError, match=r"SGD has a decay attached already and would decay twice\. Remove"):
        attach_decay(optimizer, "cautious")
    handle.remove()
    attach_decay(optimizer, "cautious")
