"""Decay in number formats that would swallow it: closed forms in float64, random numbers of its own, odd weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_l2.decay import RuleDecay, attach_decay
from lightning_l2.decay.rounding import Stochastic
from tests.processes import forked, rounded_decay

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDINGS = ["accumulate", "stochastic"]
# A share that rounds away, and the share that is worth a rounding
TINY = {BF16: (1e-3, 2.0**-6), FP16: (1e-4, 2.0**-9), FP32: (2e-8, 2.0**-16)}


def normal(size: int = 4096, dtype: torch.dtype = BF16, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype))


def decay(weight: nn.Parameter, make: Callable[..., Optimizer], steps: int, apply: Any, **options: Any) -> Optimizer:
    """Step without a gradient: what moves the weight is decay and nothing else."""
    optimizer = make([weight])
    handle = attach_decay(optimizer, apply, **options)
    weight.grad = torch.zeros_like(weight)
    for _ in range(steps):
        optimizer.step()
    handle.remove()
    return optimizer


def left_of(weight: Tensor, start: Tensor) -> float:
    return float(weight.detach().double().norm() / start.double().norm())


WAYS: dict[str, tuple[Callable[..., Optimizer], str, float]] = {
    "AdamW": (AdamW, "optimizer", 1e-2),
    "AdamW, foreach": (partial(AdamW, foreach=True), "optimizer", 1e-2),
    "AdamW, fused": (partial(AdamW, fused=True), "optimizer", 1e-2),
    "Adam, decoupled": (partial(Adam, decoupled_weight_decay=True), "optimizer", 1e-2),
    "decoupled": (SGD, "decoupled", 1e-2),
    "independent": (SGD, "independent", 1.0),
    "cautious": (SGD, "cautious", 1e-2),
}


@pytest.mark.parametrize(
    ("way", "rounding"),
    [(way, rounding) for way in WAYS for rounding in ROUNDINGS if (way, rounding) != ("cautious", "accumulate")],
)
def test_the_closed_form_in_bf16(way: str, rounding: str) -> None:
    make, apply, lr = WAYS[way]
    share, steps = TINY[BF16][0], 400
    weight = normal(2048)
    start = weight.detach().clone()
    decay(weight, partial(make, lr=1e-2, weight_decay=share / lr), steps, apply, rounding=rounding)
    assert left_of(weight, start) == pytest.approx((1 - share) ** steps, rel=0.05)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_closed_form_in_half_precision(dtype: torch.dtype, rounding: str) -> None:
    share, steps = TINY[dtype][0], 1000
    weight = normal(512, dtype)
    start = weight.detach().clone()
    # eps of 1e-8 is 0 in fp16
    make = partial(AdamW, lr=1e-3, eps=1e-4, weight_decay=share / 1e-3)
    decay(weight, make, steps, "optimizer", rounding=rounding)
    assert left_of(weight, start) == pytest.approx((1 - share) ** steps, rel=0.05)


@pytest.mark.parametrize(("rounding", "tolerance"), [("accumulate", 0.4), ("stochastic", 0.05)])
def test_the_closed_form_in_fp32(rounding: str, tolerance: float) -> None:
    """Of what 2,000 steps take, 4e-5, saving up still holds back less than 2^-16."""
    share, steps = TINY[FP32][0], 2000
    weight = normal(2048, FP32)
    start = weight.detach().clone()
    decay(weight, partial(SGD, lr=1e-3, weight_decay=share / 1e-3), steps, "decoupled", rounding=rounding)
    assert 1 - left_of(weight, start) == pytest.approx(1 - (1 - share) ** steps, rel=tolerance)


@pytest.mark.parametrize("dtype", TINY)
def test_to_the_nearest_nothing_is_left_of_small_decay(dtype: torch.dtype) -> None:
    """2,000 steps without decay, and with a share that is below a quarter of the format's epsilon."""
    weight = normal(256, dtype)
    start = weight.detach().clone()
    decay(weight, partial(SGD, lr=1e-3, weight_decay=TINY[dtype][0] / 1e-3), 2000, "decoupled")
    assert torch.equal(weight, start)


def train(weight: nn.Parameter, optimizer: Optimizer, steps: int, before: Callable[[], None] = lambda: None) -> Tensor:
    """Steps with gradients that don't depend on the weights."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        before()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("weight_decay", [0.1, 10.0])
@pytest.mark.parametrize("apply", ["optimizer", "decoupled"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_to_the_nearest_is_torchs_own_decay(dtype: torch.dtype, apply: Any, weight_decay: float) -> None:
    def run(attach: bool) -> Tensor:
        weight = normal(512, dtype)
        optimizer = AdamW([weight], lr=1e-3, weight_decay=weight_decay)
        if attach:
            attach_decay(optimizer, apply, rounding="nearest")
        return train(weight, optimizer, 50)

    assert torch.equal(run(True), run(False))


def test_in_bf16_lambda_changes_nothing_where_decay_is_rounded_to_the_nearest() -> None:
    def run(weight_decay: float) -> Tensor:
        weight = normal(512)
        return train(weight, AdamW([weight], lr=1e-3, weight_decay=weight_decay), 200)

    assert torch.equal(run(0.0), run(0.1))
    assert torch.equal(run(0.0), run(1.0)), "1e-3 is below 2^-9"
    assert not torch.equal(run(0.0), run(4.0))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_saving_up_is_a_loop_of_five_lines(dtype: torch.dtype) -> None:
    """Beside AdamW without decay and a hand that takes the share once it is worth a rounding."""
    share, due = 0.3 * TINY[dtype][1], TINY[dtype][1]
    weight, by_hand = normal(512, dtype), normal(512, dtype)
    optimizer = AdamW([weight], lr=1e-2, weight_decay=share / 1e-2)
    attach_decay(optimizer, "optimizer", rounding="accumulate")
    saved, taken = 0.0, 0

    def save_up() -> None:
        nonlocal saved, taken
        saved = 1 - (1 - saved) * (1 - share)
        if saved >= due:
            with torch.no_grad():
                by_hand.mul_(1 - saved)
            saved, taken = 0.0, taken + 1

    expected = train(by_hand, AdamW([by_hand], lr=1e-2, weight_decay=0.0), 42, save_up)
    assert torch.equal(train(weight, optimizer, 42), expected)
    assert taken == 10


def test_saving_up_takes_a_large_share_at_once() -> None:
    """One that is worth a rounding by itself is taken in its own step, as torch does."""
    weight, own = normal(512), normal(512)
    optimizer = AdamW([weight], lr=1e-2, weight_decay=5.0)
    attach_decay(optimizer, "optimizer", rounding="accumulate")
    assert torch.equal(train(weight, optimizer, 20), train(own, AdamW([own], lr=1e-2, weight_decay=5.0), 20))


def test_groups_save_up_each_for_itself() -> None:
    weights = [normal(4096, BF16), normal(4096, BF16, seed=1), normal(4096, FP32, seed=2)]
    starts = [weight.detach().clone() for weight in weights]
    groups = [{"params": [weights[0]], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.05}]
    optimizer = SGD(groups, lr=1e-2)
    attach_decay(optimizer, "decoupled", rounding="accumulate")
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for _ in range(500):
        optimizer.step()
    for weight, start, share, tolerance in zip(weights, starts, (1e-3, 5e-4, 5e-4), (0.05, 0.05, 5e-5), strict=True):
        assert left_of(weight, start) == pytest.approx((1 - share) ** 500, rel=tolerance)


def test_saving_up_follows_both_schedules() -> None:
    """The share of each step is that of its learning rate and its lambda."""
    weight = normal()
    start = weight.detach().clone()
    optimizer = SGD([weight], lr=0.0, weight_decay=0.0)
    attach_decay(optimizer, "decoupled", rounding="accumulate")
    weight.grad = torch.zeros_like(weight)
    expected = 1.0
    for step in range(1000):
        optimizer.param_groups[0].update(lr=1e-2 * step / 1000, weight_decay=0.3 * (1 - step / 1000))
        expected *= 1 - 3e-3 * step / 1000 * (1 - step / 1000)
        optimizer.step()
    assert expected == pytest.approx(math.exp(-0.5), rel=1e-3)
    assert left_of(weight, start) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0078125, -2.9375, 1.2e-3])
def test_stochastic_rounding_is_right_on_average(value: float, dtype: torch.dtype) -> None:
    """Each weight goes to one of the two neighbours of (1 - s) w, and the mean is within 5 sigma of it."""
    weight = nn.Parameter(torch.full((50_000,), value, dtype=dtype))
    start, share = weight[0].item(), TINY[dtype][0]
    decay(weight, partial(SGD, lr=1.0, weight_decay=share), 1, "decoupled", rounding="stochastic")
    exact = (1 - share) * start
    inward = torch.nextafter(torch.tensor(start, dtype=dtype), torch.zeros((), dtype=dtype)).item()
    assert set(weight.tolist()) == {start, inward}
    chance = (start - exact) / (start - inward)
    sigma = abs(start - inward) * math.sqrt(chance * (1 - chance) / weight.numel())
    assert abs(weight.detach().double().mean().item() - exact) < 5 * sigma


@pytest.mark.parametrize("dtype", TINY)
def test_stochastic_rounding_is_right_on_average_where_many_neighbours_lie_between(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((50_000,), 1.0, dtype=dtype))
    share = 0.123456789
    decay(weight, partial(SGD, lr=1.0, weight_decay=share), 1, "decoupled", rounding="stochastic")
    step = torch.finfo(dtype).eps / 2
    values = sorted(set(weight.tolist()))
    assert values == [math.floor((1 - share) / step) * step, math.ceil((1 - share) / step) * step]
    assert abs(weight.detach().double().mean().item() - (1 - share)) < 5 * step / 2 / math.sqrt(weight.numel())


def test_cautious_decay_rounds_stochastically_where_it_acts() -> None:
    """w <- w - eta u - s w where u w >= 0; without decay the weights go to 1 + 2^-4 and 1 - 2^-4."""
    weight = nn.Parameter(torch.ones(40_000, dtype=BF16))
    weight.grad = torch.ones_like(weight)
    weight.grad[::2] = -1.0
    optimizer = SGD([weight], lr=2.0**-4, weight_decay=1e-3 * 2**4)
    attach_decay(optimizer, "cautious", rounding="stochastic")
    optimizer.step()
    against, along = weight.detach()[::2], weight.detach()[1::2]
    assert torch.equal(against, torch.full_like(against, 1 + 2.0**-4))
    chance = 1e-3 / 2.0**-8
    sigma = 2.0**-8 * math.sqrt(chance * (1 - chance) / along.numel())
    assert abs(along.double().mean() - (1 - 2.0**-4 - 1e-3)) < 5 * sigma


def stochastic(seed: int, steps: int = 20) -> list[Tensor]:
    weights = [normal(300), normal(300)]
    optimizer = SGD(weights, lr=1e-2, weight_decay=0.1)
    handle = attach_decay(optimizer, "decoupled", rounding="stochastic", seed=seed)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for _ in range(steps):
        optimizer.step()
    handle.remove()
    return [weight.detach() for weight in weights]


def test_random_numbers_follow_from_the_seed() -> None:
    first = stochastic(3)
    torch.manual_seed(99)
    again, other = stochastic(3), stochastic(4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1]), "equal weights of one optimizer have numbers of their own"


def test_each_step_has_random_numbers_of_its_own() -> None:
    """The weights that go in a step are no fixed choice: after 10 steps, 1 - (1 - p)^10 of them have gone."""
    weight = nn.Parameter(torch.ones(50_000, dtype=BF16))
    decay(weight, partial(SGD, lr=1.0, weight_decay=2.0**-12), 10, "decoupled", rounding="stochastic")
    chance = 1 - (1 - 2.0**-4) ** 10
    gone = (weight != 1).double().mean().item()
    assert abs(gone - chance) < 5 * math.sqrt(chance * (1 - chance) / weight.numel())


def test_the_global_random_state_stays_as_it_is() -> None:
    before = torch.get_rng_state()
    stochastic(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_odd_numbers(dtype: torch.dtype) -> None:
    """Zeros, infinities and NaN stay, subnormals and the largest number are right on average."""
    info, share, count = torch.finfo(dtype), 0.25, 20_000
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    smallest = torch.full((count,), info.smallest_normal * info.eps, dtype=dtype)
    assert (smallest > 0).all()
    ends = [smallest.clone(), -smallest, torch.full((count,), info.max, dtype=dtype)]
    rounder = Stochastic(seed=1)
    rounder.subtract([odd, *ends], [odd.clone(), *(end.clone() for end in ends)], [share] * 4)
    assert odd[:4].tolist() == [0.0, 0.0, math.inf, -math.inf]
    assert odd[4].isnan()
    for end, sign in zip(ends[:2], (1, -1), strict=True):
        assert set(end.tolist()) == {0.0, sign * smallest[0].item()}
        kept = (end != 0).double().mean().item()
        assert abs(kept - (1 - share)) < 5 * math.sqrt(share * (1 - share) / count)
    # 3/4 of the largest, (2 - eps) 2^k, lies halfway between two neighbours, or on a number
    mean = ends[2].double().mean().item()
    assert abs(mean / info.max - (1 - share)) < 5 * info.eps / math.sqrt(count)


def test_float64_has_no_wider_format_and_rounds_to_the_nearest() -> None:
    weight = normal(64, torch.float64)
    expected = weight.detach() * (1 - 1e-3)
    decay(weight, partial(SGD, lr=1.0, weight_decay=1e-3), 1, "decoupled", rounding="stochastic")
    torch.testing.assert_close(weight.detach(), expected, rtol=4e-16, atol=0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_that_are_not_contiguous(rounding: str) -> None:
    storage = normal(4096).detach().view(64, 64)
    weight = nn.Parameter(storage.t()[:, ::2])
    start, between = weight.detach().clone(), storage.t()[:, 1::2].clone()
    assert not weight.is_contiguous()
    decay(weight, partial(SGD, lr=1e-2, weight_decay=0.1), 1000, "decoupled", rounding=rounding)
    assert left_of(weight, start) == pytest.approx(0.999**1000, rel=0.05)
    assert torch.equal(storage.t()[:, 1::2], between)


def test_infinite_weights_stay_whatever_rounds() -> None:
    """As masks are, of which torch's own decay leaves as much."""
    for rounding in ("nearest", *ROUNDINGS):
        weight = nn.Parameter(torch.tensor([math.inf, -math.inf, 1.0], dtype=BF16))
        decay(weight, partial(AdamW, lr=1e-2, weight_decay=5.0), 3, "optimizer", rounding=rounding)
        assert weight.tolist()[:2] == [math.inf, -math.inf]
        assert 0.8 < weight[2] < 0.9


def test_large_weights_are_rounded_in_pieces_with_numbers_of_their_own() -> None:
    weight = nn.Parameter(torch.ones(600_000, dtype=BF16))
    decay(weight, partial(SGD, lr=1.0, weight_decay=2.0**-9), 1, "decoupled", rounding="stochastic")
    gone = weight.detach() != 1
    assert abs(gone.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(weight.numel())
    assert not torch.equal(gone[: 1 << 18], gone[1 << 18 : 2 << 18])


def test_complex_weights() -> None:
    """Both parts are rounded in the format of each."""
    share, steps = TINY[FP32][0], 500
    for rounding, tolerance in (("accumulate", 2.0**-16), ("stochastic", 0.05 * share * steps)):
        weight = nn.Parameter(torch.complex(normal(4096, FP32), normal(4096, FP32, seed=1)).detach())
        parts = torch.view_as_real(weight.detach())
        start = parts.clone()
        decay(weight, partial(SGD, lr=1e-3, weight_decay=share / 1e-3), steps, "decoupled", rounding=rounding)
        for part in (0, 1):
            left = left_of(parts[:, part], start[:, part])
            assert left == pytest.approx((1 - share) ** steps, rel=0, abs=tolerance)


def test_complex_weights_decay_in_both_parts() -> None:
    weight = nn.Parameter(torch.ones(20_000, dtype=torch.complex64))
    with torch.no_grad():
        weight.mul_(1 - 1j)
    decay(weight, partial(SGD, lr=1.0, weight_decay=0.3), 1, "decoupled", rounding="stochastic")
    mean = weight.detach().to(torch.complex128).mean().item()
    assert abs(mean - 0.7 * (1 - 1j)) < 1e-9
    decay(weight, partial(SGD, lr=1.0, weight_decay=0.3), 1, "decoupled", rounding="accumulate")
    mean = weight.detach().to(torch.complex128).mean().item()
    assert abs(mean - 0.49 * (1 - 1j)) < 1e-7


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_of_sparse_gradients_only_the_rows_decay(rounding: str) -> None:
    table = nn.Embedding(6, 2048, sparse=True, dtype=BF16)
    start = table.weight.detach().clone()
    optimizer = SGD(table.parameters(), lr=1e-2, weight_decay=0.1)
    attach_decay(optimizer, "decoupled", rounding=rounding)
    for _ in range(300):
        optimizer.zero_grad()
        (table(torch.tensor([1, 4, 4])) * 0.0).sum().backward()
        optimizer.step()
    still = [0, 2, 3, 5]
    assert torch.equal(table.weight.detach()[still], start[still])
    for row in (1, 4):
        assert left_of(table.weight[row], start[row]) == pytest.approx(0.999**300, rel=0.05)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("apply", ["decoupled", "independent"])
@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_optimizers_that_decay_after_their_update(make: Callable[..., Optimizer], apply: Any, rounding: Any) -> None:
    weight = normal(2048)
    start = weight.detach().clone()
    optimizer = make([weight], lr=1e-2)
    optimizer.param_groups[0]["weight_decay"] = 1e-1 if apply == "decoupled" else 1e-3
    attach_decay(optimizer, apply, rounding=rounding)

    def closure() -> Tensor:
        weight.grad = torch.zeros_like(weight)
        return torch.zeros(())

    for _ in range(150):
        optimizer.step(closure)
    assert left_of(weight, start) == pytest.approx(0.999**150, rel=0.05)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_without_a_gradient_stay(rounding: str) -> None:
    used, unused = normal(), normal()
    start = unused.detach().clone()
    optimizer = SGD([used, unused], lr=1e-2, weight_decay=0.1)
    attach_decay(optimizer, "decoupled", rounding=rounding)
    used.grad = torch.zeros_like(used)
    for _ in range(300):
        optimizer.step()
    assert torch.equal(unused, start)
    assert left_of(used, start) == pytest.approx(0.999**300, rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_skipped_step_takes_and_saves_up_nothing(rounding: Any, fused: bool) -> None:
    """Of 60 steps a GradScaler skips every second one."""
    layer = nn.Linear(64, 64, bias=False)
    start = layer.weight.detach().clone()
    optimizer = AdamW(layer.parameters(), lr=1e-7, fused=fused)
    decay = RuleDecay(layer, [optimizer], 1.0, rounding=rounding)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(60):
        optimizer.zero_grad()
        scaler.scale((layer.weight * (math.inf if step % 2 else 0.0)).nansum()).backward()
        scaler.step(optimizer)
        scaler.update()
    if rounding == "accumulate":
        # 3e-6 are not yet worth a rounding
        assert torch.equal(layer.weight, start)
        (saved,) = decay.state_dict()["rounding"]["accumulate"]
        assert saved == pytest.approx({"decay/torch.float32": 1 - (1 - 1e-7) ** 30}, rel=1e-6)
    else:
        assert 1 - left_of(layer.weight, start) == pytest.approx(30e-7, rel=0.05)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_another_loop_goes_on_where_one_stopped(rounding: Any) -> None:
    """40 steps at once, against 25 and 15 with what `state_dict` returned between them."""

    def run(weight: Tensor, steps: int, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        layer = nn.Linear(16, 16, bias=False, dtype=BF16)
        layer.weight.data = weight.clone()
        optimizer = SGD(layer.parameters(), lr=1e-2)
        decay = RuleDecay(layer, [optimizer], 0.1, apply="decoupled", rounding=rounding, seed=5)
        if state is not None:
            decay.load_state_dict(state)
        layer.weight.grad = torch.zeros_like(layer.weight)
        for _ in range(steps):
            optimizer.step()
        state = decay.state_dict()
        decay.remove()
        return layer.weight.detach(), json.loads(json.dumps(state))

    start = normal(256).detach().view(16, 16)
    whole, expected = run(start, 40)
    half, state = run(start, 25)
    resumed, found = run(half, 15, state)
    assert torch.equal(resumed, whole)
    assert found == expected
    assert not torch.equal(run(half, 15)[0], whole), "what is saved up, or the place in the random numbers, matters"


def linear(make: Callable[..., Optimizer], **options: Any) -> Optimizer:
    return make(nn.Linear(2, 2).parameters(), lr=0.1, **options)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: linear(SGD, weight_decay=0.1),
        lambda: linear(Adam, weight_decay=0.1),
        lambda: linear(pytorch_optimizer.ScheduleFreeAdamW),
        lambda: linear(AdamW, differentiable=True),
    ],
    ids=["SGD", "Adam", "schedule-free", "differentiable"],
)
def test_an_optimizer_whose_own_decay_can_t_be_rounded_is_refused(make: Callable[[], Optimizer], rounding: Any) -> None:
    with pytest.raises(ValueError, match=r"rounding.*" + rounding):
        attach_decay(make(), "optimizer", rounding=rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_decay_that_only_the_optimizer_can_do_can_t_be_rounded(rounding: Any) -> None:
    optimizer = linear(pytorch_optimizer.ScheduleFreeAdamW)
    with pytest.raises(ValueError, match=f"rounding='{rounding}' does nothing for ScheduleFreeAdamW"):
        attach_decay(optimizer, "decoupled", rounding=rounding)


@pytest.mark.parametrize(
    ("apply", "rounding"),
    [("coupled", "accumulate"), ("coupled", "stochastic"), ("cautious", "accumulate"), ("decoupled", "up")],
)
def test_options_that_don_t_go_together(apply: Any, rounding: Any) -> None:
    with pytest.raises(ValueError, match=r"rounding.*" + rounding):
        attach_decay(linear(SGD, weight_decay=0.1), apply, rounding=rounding)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rounded")
    forked.ranks(rounded_decay.work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_replicas_stay_equal(rounding: str, two_processes: list[dict[str, Any]]) -> None:
    replicas = [found["replicated"][rounding] for found in two_processes]
    assert replicas[0].keys() == replicas[1].keys()
    for name, weight in replicas[0].items():
        assert torch.equal(weight, replicas[1][name])
    assert not torch.equal(two_processes[0]["random"], two_processes[1]["random"]), "the processes' own numbers differ"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_sharded_weights(rounding: str, two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        for weight, start in found["sharded"][rounding]:
            assert left_of(weight, start) == pytest.approx((1 - 1.9e-3) ** 150, rel=0.05)


def step_without_gradient(optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()


def test_a_group_that_comes_later_saves_up_too() -> None:
    """s = 0.1 * 0.05 a step, below half of bf16's 2^-7, so 40 steps leave (1 - s)^40."""
    first, late = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = SGD([first], lr=0.1, weight_decay=0.05)
    attach_decay(optimizer, "decoupled", rounding="accumulate")
    step_without_gradient(optimizer, 3)
    optimizer.add_param_group({"params": [late]})
    step_without_gradient(optimizer, 40)
    assert late.float().mean().item() == pytest.approx(0.995**40, rel=0.02)
    assert first.float().mean().item() == pytest.approx(0.995**43, rel=0.02)


def test_weights_that_get_another_format_save_up_for_it() -> None:
    """s = 0.1 * 0.01 a step, enough for fp32 in each, and nothing at all in bf16."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], lr=0.1, weight_decay=0.01)
    attach_decay(optimizer, "decoupled", rounding="accumulate")
    step_without_gradient(optimizer, 2)
    weight.data = weight.data.bfloat16()
    step_without_gradient(optimizer, 200)
    assert weight.float().mean().item() == pytest.approx(0.999**202, rel=0.02)
