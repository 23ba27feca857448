"""What decay leaves of the weights, counted: closed forms under schedules, and steps skipped, lost or unknown."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.decay import RuleDecay, attach_decay
from lightning_l2.param_groups.shrinkage import count_shrinkage
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Shrinking, assert_same_weights, batches, make_trainer

STEPS, LR, LAMBDA = 12, 0.1, 0.4
EXACT: Any = {"rel": 1e-12}


class Counts(pl.Callback):
    """Counts beside the callback, and asks for what is left after each step."""

    def __init__(self, path: Path | None = None, after: int = 0) -> None:
        self.path, self.after = path, after

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count, self.left = count_shrinkage(trainer.optimizers[0]), []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left.append(self.count.left())
        if self.path is not None and trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, *_: Any) -> None:
        self.count.remove()


def one_cycle(optimizer: Optimizer) -> Any:
    return OneCycleLR(optimizer, 0.3, total_steps=STEPS, cycle_momentum=False)


def cosine(optimizer: Optimizer) -> Any:
    return CosineAnnealingLR(optimizer, STEPS)


def cosine_rates() -> list[float]:
    return [LR * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]


def one_cycle_rates() -> list[float]:
    """Up from a 25th of the peak over 30 % of the steps, then down to a 250,000th, both by half a cosine."""
    up, down = 0.3 * STEPS - 1, STEPS - 1

    def between(start: float, end: float, part: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    return [
        between(0.3 / 25, 0.3, step / up) if step <= up else between(0.3, 0.3 / 25e4, (step - up) / (down - up))
        for step in range(STEPS)
    ]


SCHEDULES = {"cosine": (cosine, cosine_rates()), "one cycle": (one_cycle, one_cycle_rates())}
RAMP = [LAMBDA * (0.25 + 0.75 * step / (STEPS - 1)) for step in range(STEPS)]
Make = Callable[..., Optimizer]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (AdamW, {}),
        (partial(Adam, decoupled_weight_decay=True), {}),
        (SGD, {}),
        (SGD, {"apply": "decoupled"}),
        (SGD, {"apply": "cautious"}),
        (Adam, {"apply": "decoupled"}),
        (SGD, {"apply": "independent"}),
        (SGD, {"apply": "independent", "peak_lr": 0.3}),
        (SGD, {"apply": "independent", "peak_lr": "initial"}),
        (AdamW, {"rounding": "accumulate"}),
        (AdamW, {"rounding": "stochastic"}),
    ],
    ids=str,
)
def test_under_schedules_of_learning_rate_and_lambda(make: Make, options: dict[str, Any], schedule: str) -> None:
    """The product of 1 - s_t, which is what the float64 weights have really kept."""
    scheduler, rates = SCHEDULES[schedule]
    peak = {"initial": LR if schedule == "cosine" else 0.3}.get(options.get("peak_lr"), options.get("peak_lr"))
    factors = rates if options.get("apply") != "independent" else [1.0 if peak is None else lr / peak for lr in rates]
    expected = np.cumprod([1 - factor * lam for factor, lam in zip(factors, RAMP, strict=True)])
    model, counts = Shrinking(lambda p: make(p, lr=LR), scheduler), Counts()
    decay = WeightDecay(LAMBDA, summary=False, **options)
    make_trainer([decay, WeightDecayScheduler(LinearSchedule(start=0.25, end=1.0)), counts]).fit(model, batches(STEPS))
    np.testing.assert_allclose([left["decay"] for left in counts.left], expected, rtol=1e-12)
    assert [left["no_decay"] for left in counts.left] == [1.0] * STEPS
    np.testing.assert_allclose(model.head.weight.detach(), expected[-1], rtol=1e-12)


def steps(optimizer: Optimizer, count: int) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def weight(dtype: torch.dtype = torch.float64, size: int = 1) -> nn.Parameter:
    return nn.Parameter(torch.ones(size, dtype=dtype))


@pytest.mark.parametrize("apply", ["optimizer", "coupled"])
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1.0),
        ({"momentum": 0.9}, 10.0),
        ({"momentum": 0.9, "dampening": 0.5}, 5.0),
        ({"momentum": 0.5, "nesterov": True}, 2.0),
        ({"dampening": 0.5}, 1.0),
    ],
    ids=str,
)
def test_sgd_with_momentum_by_a_long_simulation(options: dict[str, Any], factor: float, apply: Any) -> None:
    """What it counts is eta lambda (1 - d) / (1 - m), and what weights lose a step in the long run is that to 1 %."""
    parameter = weight()
    optimizer = SGD([parameter], lr=0.1, weight_decay=2e-4, **options)
    attach_decay(optimizer, apply)
    count = count_shrinkage(optimizer)
    steps(optimizer, 3000)
    share = 2e-5 * factor
    assert count.left() == {"group0": pytest.approx((1 - share) ** 3000, **EXACT)}
    assert math.log(parameter.item()) / 3000 == pytest.approx(math.log(1 - share), rel=0.01)


class Foreign(Optimizer):
    """An optimizer that nobody knows, with a decay of its own."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.3) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


@pytest.mark.parametrize(
    ("make", "apply"),
    [
        (partial(Adam, weight_decay=0.1), "optimizer"),
        (partial(AdamW, weight_decay=0.1), "coupled"),
        (partial(torch.optim.RMSprop, weight_decay=0.1), "optimizer"),
        (partial(pytorch_optimizer.ScheduleFreeSGD, lr=0.1, weight_decay=0.1), "optimizer"),
        (Foreign, "optimizer"),
        (Foreign, "coupled"),
    ],
    ids=["Adam", "AdamW, coupled", "RMSprop", "schedule-free", "foreign", "foreign, coupled"],
)
def test_where_it_is_not_known_nothing_is_told(make: Make, apply: Any) -> None:
    optimizer = make([weight()])
    attach_decay(optimizer, apply)
    count = count_shrinkage(optimizer)
    steps(optimizer, 3)
    assert count.left() == {}


def test_lbfgs_knows_its_share_only_of_decoupled_decay() -> None:
    for apply, expected in (("coupled", {}), ("decoupled", {"group0": pytest.approx(0.97**3, **EXACT)})):
        parameter = weight()
        optimizer = LBFGS([parameter], lr=0.1)
        optimizer.param_groups[0]["weight_decay"] = 0.3
        attach_decay(optimizer, apply)
        count = count_shrinkage(optimizer)

        def closure(optimizer: Optimizer = optimizer, parameter: nn.Parameter = parameter) -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((parameter - 1.0) * 1e-3).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert count.left() == expected


def test_a_foreign_optimizer_is_known_when_the_decay_is_ours() -> None:
    parameter = weight()
    optimizer = Foreign([parameter], lr=0.1, weight_decay=0.3)
    attach_decay(optimizer, "decoupled")
    count = count_shrinkage(optimizer)
    steps(optimizer, 5)
    assert count.left() == {"group0": pytest.approx(0.97**5, **EXACT)}
    assert parameter.item() == pytest.approx(0.97**5, **EXACT)


def test_each_group_has_its_own() -> None:
    groups = [
        {"params": [weight()], "lr": 0.1, "name": "a"},
        {"params": [weight()], "lr": 0.2, "weight_decay": 0.0, "name": "b"},
        {"params": [weight()], "lr": 0.5, "weight_decay": 0.4, "name": "c"},
    ]
    optimizer = AdamW(groups, weight_decay=1.0)
    count = count_shrinkage(optimizer)
    steps(optimizer, 2)
    assert count.left() == {"a": pytest.approx(0.81), "b": 1.0, "c": pytest.approx(0.64)}


def test_learning_rate_and_lambda_may_be_tensors() -> None:
    optimizer = AdamW([weight()], lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=1.0)
    count = count_shrinkage(optimizer)
    steps(optimizer, 2)
    assert count.left() == {"group0": pytest.approx(0.81, **EXACT)}


def test_a_share_of_all_leaves_nothing_and_not_less() -> None:
    optimizer = SGD([weight()], lr=1.0, weight_decay=1.0)
    attach_decay(optimizer, "decoupled")
    count = count_shrinkage(optimizer)
    steps(optimizer, 2)
    assert count.left() == {"group0": 0.0}


# In bf16, 1 - s rounds to 1 below 2^-9; in fp16 below 2^-12, in fp32 below 2^-25.
EDGES = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}


@pytest.mark.parametrize("dtype", EDGES)
def test_only_what_survives_the_format_counts(dtype: torch.dtype) -> None:
    """Beside the weight itself, 1, which stays below the edge and does not above it."""
    for times, survives in ((0.99, False), (1.01, True)):
        share, parameter = times * EDGES[dtype], weight(dtype)
        optimizer = SGD([parameter], lr=0.5, weight_decay=2 * share)
        attach_decay(optimizer, "decoupled")
        count = count_shrinkage(optimizer)
        steps(optimizer, 3)
        assert (parameter.item() < 1) is survives
        assert count.left() == {"group0": pytest.approx((1 - share) ** 3 if survives else 1.0, **EXACT)}


def test_a_group_counts_in_its_coarsest_format() -> None:
    optimizer = AdamW([weight(torch.float32), weight(torch.bfloat16)], lr=1e-3, weight_decay=1.0)
    count = count_shrinkage(optimizer)
    with pytest.warns(UserWarning, match="'group0' is lost: .* in bfloat16"):
        steps(optimizer, 11)
    assert count.left() == {"group0": 1.0}


def test_float64_and_coupled_decay_and_other_roundings_lose_nothing() -> None:
    def left(make: Make, dtype: torch.dtype, share: float, **options: Any) -> float:
        optimizer = make([weight(dtype)], lr=1.0, weight_decay=share)
        attach_decay(optimizer, **options)
        count = count_shrinkage(optimizer)
        steps(optimizer, 50)
        return count.left()["group0"]

    assert left(AdamW, torch.float64, 1e-12, apply="optimizer") == pytest.approx((1 - 1e-12) ** 50, rel=1e-15)
    assert left(SGD, torch.bfloat16, 1e-3, apply="optimizer") == pytest.approx(0.999**50, **EXACT)
    for rounding in ("accumulate", "stochastic"):
        found = left(AdamW, torch.bfloat16, 1e-3, apply="optimizer", rounding=rounding)
        assert found == pytest.approx(0.999**50, **EXACT)


def test_one_warning_a_group_once_one_percent_should_have_gone() -> None:
    """At 1e-3 a step that is the tenth; at 1e-4, the hundredth; where lambda is 0, never."""
    groups = [
        {"params": [weight(torch.bfloat16)], "name": "fast", "weight_decay": 1.0},
        {"params": [weight(torch.bfloat16)], "name": "slow", "weight_decay": 0.1},
        {"params": [weight(torch.bfloat16)], "name": "still", "weight_decay": 0.0},
        {"params": [weight(torch.bfloat16)], "name": "felt", "weight_decay": 20.0},
    ]
    optimizer = AdamW(groups, lr=1e-3)
    count = count_shrinkage(optimizer)
    told = []
    for step in range(1, 251):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(optimizer, 1)
        told += [(step, str(warning.message)) for warning in caught]
    assert [step for step, _ in told] == pytest.approx([10, 100], abs=1)
    for (_, text), group in zip(told, ("fast", "slow"), strict=True):
        assert f"'{group}'" in text
        assert "lost" in text or "round" in text
        assert "bfloat16" in text
        assert "rounding='accumulate'" in text
    assert count.told >= {"fast", "slow"}


def test_a_group_of_which_it_was_told_is_not_told_again() -> None:
    optimizer = AdamW([weight(torch.bfloat16)], lr=1e-3, weight_decay=1.0)
    count_shrinkage(optimizer).told.add("group0")
    steps(optimizer, 30)


def test_the_middle_of_a_training_that_is_lost_is_told() -> None:
    """At the peak of the learning rate decay is felt, so nothing is wrong at the start; later all of it is lost."""
    model = Shrinking(lambda p: AdamW(p, lr=1e-2), partial(CosineAnnealingLR, T_max=40)).bfloat16()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer([WeightDecay(1.0, summary=False)], precision="bf16-true", max_steps=40).fit(model, batches(40))
    (text,) = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert "'decay'" in text


def test_a_run_that_was_told_before_it_is_not_told_within_it() -> None:
    model = Shrinking(lambda p: AdamW(p, lr=1e-3)).bfloat16()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer([WeightDecay(1.0, summary=False)], precision="bf16-true").fit(model, batches(40))
    assert len([w for w in caught if "bfloat16" in str(w.message)]) == 1


def test_holders_share_one_count_until_the_last_lets_go() -> None:
    optimizer = AdamW([weight()], lr=0.1, weight_decay=1.0)
    first = count_shrinkage(optimizer)
    steps(optimizer, 1)
    second = count_shrinkage(optimizer)
    assert second is first
    steps(optimizer, 1)
    first.remove()
    steps(optimizer, 1)
    assert second.left() == {"group0": pytest.approx(0.9**3)}
    second.remove()
    steps(optimizer, 1)
    third = count_shrinkage(optimizer)
    steps(optimizer, 1)
    assert third.left() == {"group0": pytest.approx(0.9)}


def test_what_is_not_known_stays_unknown_when_it_goes_on() -> None:
    """Adam's own coupled decay, which takes another share of each weight; before the first step it has taken none."""
    optimizer = torch.optim.Adam([weight()], lr=0.1, weight_decay=1.0)
    count = count_shrinkage(optimizer)
    assert count.left() == {"group0": 1.0}
    steps(optimizer, 1)
    other = count_shrinkage(torch.optim.Adam([weight()], lr=0.1, weight_decay=1.0))
    other.go_on(count.state_dict())
    assert count.left() == other.left() == {}


def test_it_lets_optimizers_go() -> None:
    import weakref

    optimizer = AdamW([weight()], lr=0.1, weight_decay=1.0)
    count_shrinkage(optimizer).remove()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("apply", ["optimizer", "decoupled"])
def test_a_step_that_a_scaler_skips_does_not_count(apply: Any) -> None:
    layer = nn.Linear(2, 2, bias=False)
    optimizer = AdamW(layer.parameters(), lr=0.1, weight_decay=1.0)
    attach_decay(optimizer, apply)
    count = count_shrinkage(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale((layer.weight * (math.inf if step % 3 == 1 else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert count.left() == {"group0": pytest.approx(0.9**4)}


def test_what_is_left_under_several_optimizers_and_rules() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizers = [SGD(model["a"].parameters(), lr=0.1), SGD(model["b"].parameters(), lr=0.2)]
    decay = RuleDecay(model, optimizers, 0.5, apply="decoupled")
    for optimizer in optimizers:
        steps(optimizer, 3)
    assert sorted(decay.left().values()) == pytest.approx([0.9**3, 0.95**3, 1.0, 1.0])


@pytest.mark.parametrize(
    ("make", "options"),
    [(AdamW, {}), (partial(SGD, momentum=0.9), {}), (SGD, {"apply": "independent"})],
    ids=str,
)
def test_it_goes_on_after_a_resume(make: Make, options: dict[str, Any], tmp_path: Path) -> None:
    """2n steps, and n steps, a checkpoint, and n steps."""
    path, half = tmp_path / "half.ckpt", STEPS // 2

    def run(counts: Counts, ckpt_path: Path | None = None) -> Shrinking:
        model = Shrinking(lambda p: make(p, lr=LR), cosine)
        decay = WeightDecay(LAMBDA, summary=False, **options)
        schedule = WeightDecayScheduler(LinearSchedule(start=0.25, end=1.0))
        trainer = make_trainer([decay, schedule, counts], max_epochs=2)
        trainer.fit(model, batches(half), ckpt_path=ckpt_path)
        return model

    whole, resumed = Counts(path, half), Counts()
    model = run(whole)
    assert_same_weights(run(resumed, path), model)
    assert len(resumed.left) == half
    assert resumed.left == whole.left[half:]
    factors = [1.0] * STEPS if options else [lr * (10 if "momentum" in str(make) else 1) for lr in cosine_rates()]
    expected = np.prod([1 - factor * lam for factor, lam in zip(factors, RAMP, strict=True)])
    assert resumed.left[-1]["decay"] == pytest.approx(expected, **EXACT)


def test_a_way_that_is_taken_off_leaves_no_share_behind() -> None:
    """Nobody counted its steps, and a group has come since: s = 0.1 * 0.25 of the first, 0.1 * 0.5 of the second."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD(weights[:1], lr=0.1, weight_decay=0.5)
    handle = attach_decay(optimizer, "decoupled")
    optimizer.step()
    handle.remove()
    optimizer.param_groups[0]["weight_decay"] = 0.25
    optimizer.add_param_group({"params": weights[1:]})
    count = count_shrinkage(optimizer)
    optimizer.step()
    assert count.left() == pytest.approx({"group0": 0.975, "group1": 0.95}, rel=1e-12)
    count.remove()
