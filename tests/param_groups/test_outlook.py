"""What decay will do over the training, before the first step: closed forms, bounds, and what is told of them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, OneCycleLR, SequentialLR

from lightning_l2 import DecayRule, WeightDecay, WeightDecayScheduler
from lightning_l2.decay import RuleDecay
from lightning_l2.decay.early import EarlySplit
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.param_groups.outlook import Outlook, outlook_of, peak_lr_of
from lightning_l2.param_groups.resume import Resuming
from lightning_l2.param_groups.summary import table
from lightning_l2.schedules import CosineSchedule, LinearSchedule, OneCycleSchedule
from tests.helpers import Shrinking, batches, make_trainer

EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
STEPS = 20


def outlook(share: float | None, steps: int | None = 1000, dtype: str = "bfloat16", **options: Any) -> Outlook:
    return Outlook(
        **{"group": "decay", "first": 1.0, "last": 1.0, "largest": 1.0, "vanishing": EPS[dtype] / 4, **options},
        strength=share,
        share=share,
        steps=steps,
        dtype=dtype,
    )


def test_momentum_makes_a_share_but_no_strength_of_it() -> None:
    """A step of 0.45 of the weights is far from turning them around, however long momentum repeats it."""
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9, weight_decay=4.5)
    groups = decay_groups(optimizer)
    (group,) = groups.groups
    found = outlook_of(groups, group, None)
    assert (found.share, found.strength) == (pytest.approx(4.5), pytest.approx(0.45))
    assert list(found.warnings()) == []


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.5])
def test_the_timescale_and_what_is_left(share: float) -> None:
    found = outlook(share, 300, vanishing=0.0)
    assert found.timescale == pytest.approx(1 / share)
    assert found.left == pytest.approx((1 - share) ** 300)
    assert found.duration == f"{1 / share:,.0f} steps ({100 / share / 300:,.0f} %)"
    assert not found.is_lost


def test_of_what_is_not_known_nothing_is_said() -> None:
    unknown, endless, none = outlook(None), outlook(0.01, None), outlook(0.0)
    assert (unknown.timescale, unknown.left, unknown.duration, unknown.remainder) == (None, None, "", "")
    assert (endless.timescale, endless.left, endless.remainder) == (100.0, None, "")
    assert endless.duration == "100 steps"
    assert (none.timescale, none.left, none.duration, none.remainder) == (math.inf, 1.0, "", "")
    for one in (unknown, none):
        assert list(one.warnings()) == []
        assert one.remark() is None
    assert endless.remark() is None


def test_a_share_of_more_than_all_leaves_nothing() -> None:
    assert outlook(1.5, 3).left == 0.0


def test_lambda_over_the_training() -> None:
    assert outlook(0.1, first=0.04, last=0.4).course == "0.04 to 0.4"
    assert outlook(0.1, first=0.04, last=0.04).course == "0.04"


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("share_of_eps", "told"),
    [(0.001, "lost"), (0.249, "lost"), (0.251, "distorted"), (1.99, "distorted"), (2.01, None)],
)
def test_what_the_format_makes_of_it(share_of_eps: float, told: str | None, dtype: str) -> None:
    share = share_of_eps * EPS[dtype]
    found = outlook(share, dtype=dtype)
    texts = list(found.warnings())
    assert found.is_lost is (told == "lost")
    assert len(texts) == (told is not None)
    for text in texts:
        for part in ("'decay'", told, f"{share:g}", dtype, "rounding='accumulate'"):
            assert part in text
    assert (f"lost in {dtype}" in found.remainder) is (told == "lost")


def test_the_edge_is_where_the_format_loses_it() -> None:
    """1 - s in each format, for s around a quarter of its epsilon."""
    for name, eps in EPS.items():
        one = torch.ones((), dtype=torch.float64)
        for share in (0.249 * eps, 0.251 * eps):
            survives = bool((one - share).to(getattr(torch, name)) < 1)
            assert outlook(share, dtype=name).is_lost is not survives


@pytest.mark.parametrize("share", [1.0, 1.5])
def test_all_of_the_weights_in_one_step(share: float) -> None:
    """eta * lambda = share with lambda 3; at 3 / share it would be 1."""
    (text,) = outlook(share, first=3.0, last=3.0, largest=3.0).warnings()
    for part in ("'decay'", f"eta * lambda = {share:g}", f"{3 / share:g}"):
        assert part in text
    assert list(outlook(0.99).warnings()) == []


def test_the_remark_names_a_lambda_that_acts() -> None:
    """s T = 1e-6 * 3000 = 0.3 % with lambda 0.01, so s T = 1 needs 0.01 / 0.003."""
    found = outlook(1e-6, 3000, first=0.01, last=0.01, largest=0.01, vanishing=0.0)
    text = found.remark()
    assert text is not None
    for part in ("'decay'", "0.3 %", f"{0.01 / 0.003:.2g}"):
        assert part in text
    assert list(found.warnings()) == []
    assert outlook(0.99e-5, 1000, vanishing=0.0).remark() is not None
    assert outlook(1.01e-5, 1000, vanishing=0.0).remark() is None
    assert outlook(1e-6, 3000).remark() is None, "what is lost is warned of, and rounding comes first"


def test_the_remark_tells_of_weights_that_are_forgotten_within_a_few_steps() -> None:
    """s T = 0.25 * 400 = 100 with lambda 5, so s T = 1 needs 0.05."""
    text = outlook(0.25, 400, first=5.0, last=5.0, largest=5.0, vanishing=0.0).remark()
    assert text is not None
    for part in ("'decay'", "within 4 of 400 steps", "(eta * lambda = 0.25)", "a lambda of 0.05 would"):
        assert part in text
    assert outlook(0.1, 400, vanishing=0.0).remark() is not None
    assert outlook(0.099, 400, vanishing=0.0).remark() is None
    assert outlook(0.25, 4, vanishing=0.0).remark() is None, "the whole training counts"
    assert outlook(1.5, 400, vanishing=0.0).remark() is None, "that is warned of"


@pytest.mark.parametrize(
    ("group", "peak"),
    [
        ({"lr": 0.1}, 0.1),
        ({"lr": 0.0, "initial_lr": 0.1}, 0.1),
        ({"lr": 0.01, "initial_lr": 0.01, "max_lr": 0.3}, 0.3),
        ({"lr": 0.5, "initial_lr": 0.1}, 0.5),
        ({"lr": torch.tensor(0.25)}, 0.25),
        ({"lr": None}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_peak_of_the_learning_rate(group: dict[str, Any], peak: float | None) -> None:
    assert peak_lr_of(group) == peak


Make = Callable[..., Optimizer]


def fit(
    *callbacks: Any,
    make: Make = AdamW,
    lr: float = 0.1,
    schedule: Any = None,
    dtype: Any = torch.float64,
    **options: Any,
) -> tuple[dict[str, Outlook], Shrinking, list[str]]:
    """The outlook by group, the module after training, and the warnings; `callbacks` begin with the decay."""
    model = Shrinking(lambda params: make(params, lr=lr), schedule).to(dtype)
    if dtype == torch.bfloat16:
        options["precision"] = "bf16-true"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks, **options).fit(model, batches(STEPS))
    texts = [str(one.message) for one in caught if "eight decay" in str(one.message)]
    return {row.group: row.outlook for row in callbacks[0].summary() if row.outlook is not None}, model, texts


def warm_up(optimizer: Optimizer) -> Any:
    """From 0, as transformers' own."""
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    assert optimizer.param_groups[0]["lr"] == 0.0
    return ramp


def warm_up_and_cosine(optimizer: Optimizer) -> Any:
    parts = [LinearLR(optimizer, 1e-8, 1.0, 5), CosineAnnealingLR(optimizer, STEPS - 5)]
    return SequentialLR(optimizer, parts, [5])


LR_SCHEDULES = {
    "none": (None, 0.1),
    "warm-up": (warm_up, 0.1),
    "cosine": (partial(CosineAnnealingLR, T_max=STEPS), 0.1),
    "warm-up and cosine": (warm_up_and_cosine, 0.1),
    "exponential": (partial(ExponentialLR, gamma=0.8), 0.1),
    "one cycle": (partial(OneCycleLR, max_lr=0.4, total_steps=STEPS, cycle_momentum=False), 0.4),
}
LAMBDA_SCHEDULES = {
    "none": (None, 0.3, 0.3, 0.3),
    "up": (LinearSchedule(0.25, 1.0), 0.075, 0.3, 0.3),
    "down": (CosineSchedule(1.0, 0.0), 0.3, 0.0, 0.3),
    "up and down": (OneCycleSchedule(0.1, 1.0, 0.0), 0.03, 0.0, 0.3),
}


@pytest.mark.parametrize("lam", LAMBDA_SCHEDULES)
@pytest.mark.parametrize("rate", LR_SCHEDULES)
def test_it_takes_the_peaks_and_bounds_what_is_really_left(rate: str, lam: str) -> None:
    (schedule, peak), (decays, first, last, highest) = LR_SCHEDULES[rate], LAMBDA_SCHEDULES[lam]
    scheduler = [] if decays is None else [WeightDecayScheduler(decays)]
    found, model, texts = fit(WeightDecay(0.3, summary=False), *scheduler, schedule=schedule)
    decay = found["decay"]
    assert decay.steps == STEPS
    assert (decay.first, decay.last) == pytest.approx((first, last))
    assert decay.share == pytest.approx(peak * highest, rel=1e-3)
    left = model.head.weight.detach().double().mean().item()
    assert decay.left is not None
    assert decay.left <= left * (1 + 1e-12)
    if rate == lam == "none":
        assert decay.left == pytest.approx(left)
    assert texts == []
    assert (found["no_decay"].share, found["no_decay"].left) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "options", "share"),
    [
        (AdamW, {}, 0.03),
        (SGD, {}, 0.03),
        (partial(SGD, momentum=0.9), {}, 0.3),
        (partial(SGD, momentum=0.5, dampening=0.5), {}, 0.03),
        (partial(SGD, momentum=0.9), {"apply": "decoupled"}, 0.03),
        (Adam, {"apply": "cautious"}, 0.03),
        (SGD, {"apply": "independent"}, 0.3),
        (SGD, {"apply": "independent", "peak_lr": 0.2}, 0.15),
        (SGD, {"apply": "independent", "peak_lr": "initial"}, 0.3),
        (Adam, {}, None),
        (Adam, {"apply": "coupled"}, None),
        (LBFGS, {"apply": "coupled"}, None),
    ],
    ids=str,
)
def test_the_share_of_each_way(make: Make, options: dict[str, Any], share: float | None) -> None:
    found, *_ = fit(WeightDecay(0.3, summary=False, **options), make=make)
    assert found["decay"].share == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("options", "make", "dtype", "lr", "told"),
    [
        ({}, AdamW, torch.bfloat16, 1e-4, "lost"),
        ({"apply": "decoupled"}, SGD, torch.bfloat16, 1e-4, "lost"),
        ({"apply": "cautious"}, SGD, torch.bfloat16, 1e-4, "lost"),
        ({}, AdamW, torch.float32, 1e-9, "lost"),
        ({}, AdamW, torch.bfloat16, 1e-2, "distorted"),
        ({}, AdamW, torch.bfloat16, 0.1, None),
        ({}, AdamW, torch.float32, 1e-4, None),
        ({}, AdamW, torch.float64, 1e-9, None),
        ({}, SGD, torch.bfloat16, 1e-4, None),
        ({}, Adam, torch.bfloat16, 1e-4, None),
        ({"apply": "coupled"}, AdamW, torch.bfloat16, 1e-4, None),
        ({"rounding": "accumulate"}, AdamW, torch.bfloat16, 1e-4, None),
        ({"rounding": "stochastic"}, AdamW, torch.bfloat16, 1e-2, None),
        ({"rounding": "stochastic", "apply": "cautious"}, SGD, torch.bfloat16, 1e-4, None),
    ],
    ids=str,
)
def test_one_warning_of_what_is_lost_and_none_else(
    options: dict[str, Any], make: Make, dtype: torch.dtype, lr: float, told: str | None
) -> None:
    _, _, texts = fit(WeightDecay(0.3, summary=False, **options), make=make, lr=lr, dtype=dtype)
    assert len(texts) == (told is not None)
    if told is not None:
        assert told in texts[0]
        assert f"1 - {lr * 0.3:g}" in texts[0]
        assert "'decay'" in texts[0]


def test_each_group_that_is_lost_is_told_of_once() -> None:
    rules = [DecayRule("head", pattern=r"^head\.weight", weight_decay=1.0), "default"]
    _, _, texts = fit(WeightDecay(0.1, rules=rules, summary=False), lr=1e-3, dtype=torch.bfloat16, max_epochs=3)
    assert sorted(re.findall(r"'(\w+)'", " ".join(texts))) == ["accumulate", "accumulate", "decay", "head"]


@pytest.mark.parametrize("rate", ["warm-up", "warm-up and cosine"])
def test_a_warm_up_from_0_raises_no_alarm(rate: str) -> None:
    """At its peak decay is felt, in fp32 and in bf16, though the first steps round away."""
    for dtype, lam in ((torch.float32, 0.3), (torch.bfloat16, 0.3)):
        _, _, texts = fit(WeightDecay(lam, summary=False), schedule=LR_SCHEDULES[rate][0], dtype=dtype)
        assert texts == []


def test_a_cosine_to_0_raises_no_alarm_in_fp32() -> None:
    _, _, texts = fit(WeightDecay(0.1, summary=False), lr=1e-3, schedule=LR_SCHEDULES["cosine"][0], dtype=torch.float32)
    assert texts == []


def test_a_lambda_that_takes_everything_is_told_before_the_first_step() -> None:
    model = Shrinking(lambda params: AdamW(params, lr=0.1))
    with pytest.raises(UserWarning, match=r"'decay' takes all .* eta \* lambda = 2 .* less than 10\."):
        make_trainer([WeightDecay(20.0, summary=False)]).fit(model, batches(2))
    assert model.watches[0].steps == []


def test_a_group_split_before_the_strategy_raises_no_alarm() -> None:
    """DeepSpeed updates in fp32, whatever the module's format is."""
    model = nn.Linear(2, 2).bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    early = EarlySplit(model, [optimizer], lambda group: 0.1, "default", Resuming("config"))
    early.begin([optimizer])
    summary = early.summary(100)
    assert early.warnings(summary) == []
    found = summary[0].outlook
    assert found is not None
    assert (found.share, found.steps) == (pytest.approx(1e-4), 100)
    assert not found.is_lost


def test_rules_tell_it_without_a_trainer() -> None:
    model = nn.Linear(2, 2).bfloat16()
    decay = RuleDecay(model, [AdamW(model.parameters(), lr=1e-3)], 0.1)
    summary = decay.summary(100)
    (text,) = decay.warnings(summary)
    assert "lost" in text
    found = summary[0].outlook
    assert found is not None
    assert found.left == pytest.approx((1 - 1e-4) ** 100)
    decay.remove()


def test_columns_of_the_table_are_there_where_something_is_known() -> None:
    def header(make: Make) -> list[str]:
        model = nn.Linear(2, 2)
        return table(RuleDecay(model, [make(model.parameters(), lr=0.1)], 0.1).summary(50))[0]

    assert header(AdamW)[1:4] == ["weight decay", "timescale (of training)", "left"]
    assert header(Adam)[1:3] == ["weight decay", "tensors"]


def test_rows_of_the_table() -> None:
    """s = 0.01 leaves 0.99^50 = 0.605 in 50 steps."""
    model = nn.Linear(2, 2)
    summary = RuleDecay(model, [AdamW(model.parameters(), lr=0.1)], 0.1).summary(50)
    assert [row[:4] for row in table(summary)[1]] == [
        ["decay", "0.1", "100 steps (200 %)", ">= 0.605"],
        ["no_decay", "0", "", ""],
    ]
