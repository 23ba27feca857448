"""Feedback schedules against pytorch_optimizer's optimizers, and against float64 loops of the papers' formulas."""

import copy
import json
import math
import pickle
import re
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
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import DecayRule, WeightDecay
from lightning_l2.adaptive import (
    AdaptiveDecay,
    AlphaDecay,
    AutoL2Decay,
    CorrectedDecay,
    StableDecay,
    hill_exponent,
)
from lightning_l2.callbacks.weight_decay_scheduler import WeightDecayScheduler
from lightning_l2.schedules import FeedbackSchedule
from tests.helpers import fp16, make_trainer
from tests.processes import forked, sharded_adaptive

STEPS = 20
LR = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def groups_of(model: nn.Sequential, **body: Any) -> list[dict[str, Any]]:
    return [
        {"params": [model[0].weight, model[0].bias], "weight_decay": 0.3, "rule": "decay", **body},
        {"params": [model[2].weight], "weight_decay": 0.2, "rule": "head"},
        {"params": [model[2].bias], "weight_decay": 0.0, "rule": "no_decay"},
    ]


def train(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, schedule: FeedbackSchedule | None, scale: float = 1.0
) -> Tensor:
    """Train as the callback does: lr first, then gradients, then the multipliers, then the step."""
    random = torch.Generator().manual_seed(1)
    state: dict[str, Any] = {}
    for group in optimizer.param_groups:
        group.update(initial_weight_decay=group["weight_decay"], initial_lr=LR)
    if schedule is not None:
        schedule.check(optimizer)
    for step in range(STEPS):
        inputs = torch.randn(8, 6, generator=random, dtype=torch.float64)
        optimizer.zero_grad()
        (scale * (model(inputs) - inputs[:, :3]).square().mean()).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        if schedule is not None:
            # A checkpoint is written and read in every step
            state = json.loads(json.dumps(state))
            multipliers = schedule.multipliers(optimizer, {}, state)
            for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
                group["weight_decay"] = group["initial_weight_decay"] * multiplier
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def lr_at(step: int) -> float:
    return LR * (0.1 + 0.9 * math.cos(math.pi * step / 2 / STEPS))


def test_corrected_decay_makes_adamw_adamc() -> None:
    # pytorch_optimizer puts eps at another place than torch, and adds 1e-15 to the second moment: both vanish beside
    # large gradients, to whose size Adam is indifferent.
    options = {"lr": LR, "eps": 1e-30}
    reference, ours, plain = network(), network(), network()
    adamc = pytorch_optimizer.AdamC(groups_of(reference, normalized=True), **options)
    expected = train(reference, adamc, None, scale=1e6)
    actual = train(ours, torch.optim.AdamW(groups_of(ours), **options), CorrectedDecay(), scale=1e6)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    uncorrected = train(plain, torch.optim.AdamW(groups_of(plain), **options), None, scale=1e6)
    assert (uncorrected - expected).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}], ids=repr)
def test_stable_decay_makes_adamw_adams(options: dict[str, bool]) -> None:
    reference = network()
    adams = pytorch_optimizer.AdamS(
        groups_of(reference), lr=LR, eps=1e-30, betas=(0.9, 0.95), ams_bound=bool(options.get("amsgrad"))
    )
    expected = train(reference, adams, None)
    ours = network()
    adamw = torch.optim.AdamW(groups_of(ours), lr=LR, eps=1e-30, betas=(0.9, 0.95), **options)
    torch.testing.assert_close(train(ours, adamw, StableDecay()), expected, rtol=1e-11, atol=1e-12)


def test_stable_decay_in_the_middle_of_a_training_reads_the_states_there_are() -> None:
    """Parameters that got their first gradient late have fewer steps behind them."""
    early, late = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.NAdam([early, late], betas=(0.9, 0.8))
    squares = torch.zeros(6, dtype=torch.float64)
    for step in range(1, 5):
        early.grad = torch.full_like(early, 0.1 * step)
        late.grad = torch.full_like(late, 2.0) if step > 2 else None
        gradients = torch.cat([early.grad, torch.zeros_like(late) if late.grad is None else late.grad])
        squares = 0.8 * squares + 0.2 * gradients.square()
        steps = torch.tensor([step] * 3 + [max(step - 2, 1)] * 3, dtype=torch.float64)
        corrected = squares / (1 - 0.8**steps)
        mean = corrected.mean() if step > 2 else corrected[:3].mean()
        StableDecay().check(optimizer)
        assert StableDecay().multipliers(optimizer, {}, {}) == [pytest.approx(mean.item() ** -0.5, rel=1e-12)]
        optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_stable_decay_of_complex_weights_is_that_of_their_parts(amsgrad: bool) -> None:
    as_complex = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    parts = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizers = [torch.optim.AdamW([weight], amsgrad=amsgrad) for weight in (as_complex, parts)]
    for step in range(3):
        parts.grad = torch.tensor([[1.0, 2.0], [0.0, -4.0], [0.5, 3.0]], dtype=torch.float64) / (1 + step)
        as_complex.grad = torch.view_as_complex(parts.grad)
        found, expected = (StableDecay().multipliers(optimizer, {}, {})[0] for optimizer in optimizers)
        assert found == pytest.approx(expected, rel=1e-12)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.Adafactor, pytorch_optimizer.Lion],
    ids=lambda make: make.__name__,
)
def test_stable_decay_refuses_optimizers_without_second_moments(make: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    message = rf"StableDecay reads the second moments .* of Adam, AdamW, NAdam or RAdam, but {make.__name__} doesn't"
    with pytest.raises(ValueError, match=message):
        StableDecay().check(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        StableDecay().check(optimizer)


def test_stable_decay_takes_another_optimizer_once_its_states_show() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = pytorch_optimizer.AdamP([weight])
    with pytest.raises(ValueError, match="AdamP doesn't keep them"):
        StableDecay().check(optimizer)
    optimizer.state[weight] = {"exp_avg_sq": torch.ones(2), "step": torch.tensor(3.0)}
    StableDecay().check(optimizer)


def test_adaptive_decay_is_the_paper_s_algorithm() -> None:
    model, reference = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.4)
    actual = train(model, optimizer, AdaptiveDecay())
    # Algorithm 1 of arXiv 2210.00094
    random, average = torch.Generator().manual_seed(1), 0.0
    for step in range(STEPS):
        inputs = torch.randn(8, 6, generator=random, dtype=torch.float64)
        loss = (reference(inputs) - inputs[:, :3]).square().mean()
        weights = list(reference.parameters())
        gradients = [gradient.numpy() for gradient in torch.autograd.grad(loss, weights)]
        arrays = [weight.detach().numpy() for weight in weights]
        norm_of_gradient = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))
        norm_of_weights = np.sqrt(sum(np.sum(array**2) for array in arrays))
        average = 0.1 * average + 0.9 * 0.4 * norm_of_gradient / norm_of_weights
        for array, gradient in zip(arrays, gradients, strict=True):
            array -= lr_at(step) * (gradient + average * array)
    expected = nn.utils.parameters_to_vector(reference.parameters()).detach()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def sgd(*groups: tuple[list[float], list[float], float]) -> torch.optim.SGD:
    """Make groups of one weight each from weight, gradient and weight decay."""
    parameters = []
    for weight, gradient, decay in groups:
        parameter = nn.Parameter(torch.tensor(weight))
        parameter.grad = torch.tensor(gradient)
        parameters.append({"params": [parameter], "weight_decay": decay})
    return torch.optim.SGD(parameters, lr=0.1)


def test_adaptive_decay_measures_the_decayed_groups_as_one_vector() -> None:
    optimizer = sgd(([3.0], [6.0], 0.1), ([4.0], [8.0], 0.2), ([100.0], [1.0], 0.0))
    assert AdaptiveDecay(smoothing=0.0).multipliers(optimizer, {}, {}) == [2.0, 2.0, 2.0]
    # what a schedule has made of weight decay doesn't decide who is decayed
    for group, base in zip(optimizer.param_groups, (0.1, 0.2, 0.0), strict=True):
        group.update(initial_weight_decay=base, weight_decay=0.0)
    assert AdaptiveDecay(smoothing=0.5).multipliers(optimizer, {}, {"multiplier": 8.0}) == [5.0, 5.0, 5.0]
    assert AdaptiveDecay().multipliers(sgd(([1.0], [1.0], 0.0)), {}, {}) == [0.0]


@pytest.mark.parametrize(("weight", "gradient"), [(1.0, math.inf), (1.0, math.nan), (0.0, 1.0)])
def test_a_step_that_says_nothing_changes_nothing(weight: float, gradient: float) -> None:
    state = {"multiplier": 3.0}
    assert AdaptiveDecay().multipliers(sgd(([weight], [gradient], 0.1)), {}, state) == [3.0]
    adam = torch.optim.Adam([nn.Parameter(torch.tensor([1.0]))], weight_decay=0.1)
    adam.param_groups[0]["params"][0].grad = torch.tensor([0.0 if weight == 0.0 else gradient])
    assert StableDecay().multipliers(adam, {}, state) == [3.0]
    adam.param_groups[0]["params"][0].grad = None
    assert StableDecay().multipliers(adam, {}, state) == [3.0]
    assert state == {"multiplier": 3.0}


def hill_by_the_formula(matrices: list[np.ndarray]) -> float:
    """PL_Alpha_Hill of arXiv 2506.14562, section 3, with k = n / 2."""
    eigenvalues = sorted(value for matrix in matrices for value in eigenvalues_of(matrix))
    n = len(eigenvalues)
    k = n // 2
    return 1 + k / sum(math.log(eigenvalues[n - i] / eigenvalues[n - k - 1]) for i in range(1, k + 1))


def eigenvalues_of(matrix: np.ndarray) -> np.ndarray:
    adjoint = matrix.conj().T
    gram = adjoint @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ adjoint
    return np.linalg.eigvalsh(gram)


@pytest.mark.parametrize("shape", [(12, 12), (30, 11), (11, 30), (9, 7, 3), (6, 4, 3, 3)], ids=str)
def test_hill_exponent_is_the_formula(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_t(3, size=shape)
    positions = array.reshape(*shape[:2], -1)
    matrices = [positions[:, :, position] for position in range(positions.shape[2])]
    assert hill_exponent(torch.tensor(array)).item() == pytest.approx(hill_by_the_formula(matrices), rel=1e-9)
    half = torch.tensor(array, dtype=torch.bfloat16)
    matrices = [half.double().numpy().reshape(*shape[:2], -1)[:, :, position] for position in range(len(matrices))]
    assert hill_exponent(half).item() == pytest.approx(hill_by_the_formula(matrices), rel=1e-9)


def test_hill_exponent_of_complex_weights() -> None:
    weight = torch.randn(12, 9, dtype=torch.complex128)
    assert hill_exponent(weight).item() == pytest.approx(hill_by_the_formula([weight.numpy()]), rel=1e-9)


def test_hill_exponent_recovers_the_exponent_of_a_power_law() -> None:
    quantiles = (np.arange(4000) + 0.5) / 4000
    eigenvalues = (1 - quantiles) ** (-1 / 1.5)  # density ~ l ** -2.5
    diagonal = torch.diag(torch.tensor(np.sqrt(eigenvalues[::8])))
    assert hill_exponent(diagonal).item() == pytest.approx(2.5, rel=0.02)


def test_hill_exponent_counts_what_is_no_eigenvalue_as_the_precision_of_one() -> None:
    # l_2 is floored, l_3 and l_4 are 1
    exponent = hill_exponent(torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0])))
    assert exponent.item() == pytest.approx(1 - 1 / math.log(4 * np.finfo(np.float64).eps), rel=1e-12)
    for nothing in (torch.zeros(4, 4), torch.full((4, 4), math.nan), torch.diag(torch.full((4,), math.inf))):
        assert math.isnan(hill_exponent(nothing).item())


def matrices(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    random = np.random.default_rng(seed)
    return [nn.Parameter(torch.tensor(random.standard_t(2 + index, size=shape))) for index, shape in enumerate(shapes)]


def test_alpha_decay_is_the_paper_s_linear_map_on_a_period() -> None:
    weights = matrices((60, 80), (50, 50), (70, 55), (60, 60))
    schedule = AlphaDecay(s_min=0.5, s_max=4.0, every_n_steps=3)
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in weights], lr=0.1)
    schedule.check(optimizer)
    state: dict[str, Any] = {}
    for step in range(7):
        if step % 3 == 0:
            alphas = np.array([hill_by_the_formula([weight.detach().numpy()]) for weight in weights])
            expected = 0.5 + (alphas - alphas.min()) / (alphas.max() - alphas.min()) * 3.5
        state = json.loads(json.dumps(state))
        np.testing.assert_allclose(schedule.multipliers(optimizer, {}, state), expected, rtol=1e-8)
        for weight, other in zip(weights, matrices(*(weight.shape for weight in weights), seed=step + 1), strict=True):
            weight.data.copy_(other)


def alpha_of_the_authors(eigenvalues: list[float]) -> float:
    """As `WeightDecayUnbalance.py` of the authors has it, where the tail's first eigenvalue is one of the tail."""
    tail = sorted(eigenvalues)[len(eigenvalues) // 2 :]
    return 1 + len(tail) / (sum(map(math.log, tail)) - len(tail) * math.log(tail[0]))


@pytest.mark.parametrize(("size", "tolerance"), [(51, 1e-12), (50, 0.3), (200, 0.3)])
def test_alpha_decay_is_nearly_what_the_authors_code_gives(size: int, tolerance: float) -> None:
    weights = matrices(*[(size, size + 20)] * 6)
    alphas = [alpha_of_the_authors(list(eigenvalues_of(weight.detach().numpy()))) for weight in weights]
    expected = np.interp(alphas, [min(alphas), max(alphas)], [2 / 3, 3.0])
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in weights])
    multipliers = AlphaDecay().multipliers(optimizer, {}, {})
    np.testing.assert_allclose(multipliers, expected, atol=tolerance)


def test_alpha_decay_averages_over_a_group_and_leaves_out_what_it_should() -> None:
    first, second, third, small, excluded, exempt = matrices((50, 50), (50, 60), (60, 50), (49, 90), (70, 70), (70, 70))
    bias, nothing = nn.Parameter(torch.ones(50)), nn.Parameter(torch.zeros(50, 50))
    optimizer = torch.optim.AdamW(
        [
            {"params": [first, bias, third, small, nothing], "name": "decay"},
            {"params": [second], "name": "other"},
            {"params": [excluded], "rule": "lm_head", "name": "x"},
            {"params": [exempt], "weight_decay": 0.0},
            {"params": [nn.Parameter(torch.ones(3))]},
        ],
        weight_decay=0.1,
    )
    alphas = [hill_by_the_formula([weight.detach().numpy()]) for weight in (first, second, third)]
    low, high = min(alphas), max(alphas)
    multipliers = [2 / 3 + 7 / 3 * (alpha - low) / (high - low) for alpha in alphas]
    expected = [(multipliers[0] + multipliers[2]) / 2, multipliers[1], 1.0, 1.0, 1.0]
    assert AlphaDecay().multipliers(optimizer, {}, {}) == pytest.approx(expected, rel=1e-8)
    assert AlphaDecay(exclude=None).multipliers(optimizer, {}, {})[2] != 1.0


def test_alpha_decay_of_a_single_matrix_changes_nothing() -> None:
    optimizer = torch.optim.AdamW(matrices((50, 50)))
    assert AlphaDecay().multipliers(optimizer, {}, {}) == [1.0]
    # groups that came late are measured at once
    state = {"step": 7, "multipliers": [2.0]}
    optimizer.add_param_group({"params": matrices((60, 60))})
    assert sorted(AlphaDecay().multipliers(optimizer, {}, state)) == pytest.approx([2 / 3, 3.0])


def test_alpha_decay_refuses_an_optimizer_without_large_matrices() -> None:
    optimizer = torch.optim.SGD([*matrices((49, 60)), nn.Parameter(torch.ones(10_000))], weight_decay=0.1)
    with pytest.raises(ValueError, match=r"AlphaDecay reads .* but SGD holds none with 50 eigenvalues .* Lower `min"):
        AlphaDecay().check(optimizer)
    AlphaDecay(min_eigenvalues=49).check(optimizer)


@pytest.mark.parametrize(
    ("losses", "errors", "expected"),
    [
        # one rise is not enough, two in a row are; the smallest loss so far counts, not the last one
        ([3, 2, 2.5, 1, 1.5, 1.4, 0.5], None, [1, 1, 1, 1, 1, 0.1, 0.1]),
        # an equal loss is no rise
        ([1, 1, 1, 1], None, [1, 1, 1, 1]),
        # either metric reduces
        ([4, 3, 2, 1], [0.5, 0.6, 0.7, 0.5], [1, 1, 0.1, 0.1]),
        # a NaN is a rise
        ([1, math.nan, math.nan, 1], None, [1, 1, 0.1, 0.1]),
        # after the first reduction 1 / 0.1 = 10 observations are left alone, after the second 100
        ([1] + [2] * 40, None, [1] * 2 + [0.1] * 11 + [0.01] * 28),
    ],
    ids=["rise", "equal", "error", "nan", "refractory"],
)
def test_auto_l2_reduces_when_a_metric_goes_up(
    losses: list[float], errors: list[float] | None, expected: list[float]
) -> None:
    schedule = AutoL2Decay("loss", error=None if errors is None else "error")
    schedule.check(sgd(([1.0], [1.0], 0.1)))
    state: dict[str, Any] = {}
    seen = []
    for loss, error in zip(losses, errors or losses, strict=True):
        state = json.loads(json.dumps(state))
        seen += schedule.multipliers(sgd(([1.0], [1.0], 0.1)), {"loss": loss, "error": error}, state)
    assert seen == pytest.approx(expected)


def test_auto_l2_counts_rises_anew_after_a_reduction() -> None:
    schedule, optimizer = AutoL2Decay("loss", factor=0.5, refractory=0.0), sgd(([1.0], [1.0], 0.1))
    state: dict[str, Any] = {}
    seen = [schedule.multipliers(optimizer, {"loss": loss}, state)[0] for loss in (1, 2, 2, 2, 2)]
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_auto_l2_goes_on_after_a_first_value_that_is_not_a_number() -> None:
    schedule, optimizer, state = AutoL2Decay("loss", refractory=0.0), sgd(([1.0], [1.0], 0.1)), {}  # type: ignore[var-annotated]
    losses = (math.nan, 3.0, 2.0, 1.0, 1.5, 1.4)
    assert [schedule.multipliers(optimizer, {"loss": loss}, state)[0] for loss in losses] == [1.0] * 5 + [0.1]


def test_auto_l2_stops_at_its_minimum() -> None:
    schedule = AutoL2Decay("loss", factor=0.5, patience=1, refractory=0.0, min_multiplier=0.3)
    state: dict[str, Any] = {}
    optimizer = sgd(([1.0], [1.0], 0.1))
    seen = [schedule.multipliers(optimizer, {"loss": loss}, state)[0] for loss in (1, 2, 3, 4)]
    assert seen == [1.0, 0.5, 0.3, 0.3]
    with pytest.raises(ValueError, match=r"AutoL2Decay monitors 'loss', which was not logged. Logged: \['other'\]"):
        schedule.multipliers(sgd(([1.0], [1.0], 0.1)), {"other": 1.0}, {})


@pytest.mark.parametrize(
    ("name", "corrected"),
    [("decay", True), ("multihead_attention", True), ("overhead", True), ("input", True), ("head", False)]
    + [(name, False) for name in ("lm_head", "model.head.decay", "output", "classifier", "head/decay")],
)
def test_corrected_decay_knows_output_layers_by_name(name: str, corrected: bool) -> None:
    optimizer = sgd(([1.0], [1.0], 0.1))
    optimizer.param_groups[0].update(name=name, initial_lr=0.2)
    assert CorrectedDecay().multipliers(optimizer, {}, {}) == [0.5 if corrected else 1.0]
    assert CorrectedDecay(exclude=None).multipliers(optimizer, {}, {}) == [0.5]
    assert CorrectedDecay(exclude=f"^{re.escape(name)}$").multipliers(optimizer, {}, {}) == [1.0]
    assert CorrectedDecay(exclude=None, max_lr=0.4).multipliers(optimizer, {}, {}) == [0.25]


def test_corrected_decay_refuses_groups_without_lr() -> None:
    optimizer = sgd(([1.0], [1.0], 0.1))
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"CorrectedDecay reads .* group 0 of SGD has no `lr`"):
        CorrectedDecay().check(optimizer)


@pytest.mark.parametrize("schedule", [AdaptiveDecay(), StableDecay()], ids=repr)
def test_parameters_that_fsdp1_flattened_are_refused(schedule: FeedbackSchedule) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    schedule.check(optimizer)
    optimizer.param_groups[0]["params"][0]._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"sums over whole tensors, but FSDP1 has flattened .* AdamW. Use FSDP2"):
        schedule.check(optimizer)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: CorrectedDecay(exclude="("), r"CorrectedDecay needs a regular expression as `exclude`, but got '\('"),
        (lambda: CorrectedDecay(max_lr=-1.0), "needs a finite `max_lr` above 0"),
        (lambda: AdaptiveDecay(smoothing=1.0), r"`smoothing` within \[0, 1\), but got 1.0"),
        (lambda: AlphaDecay(exclude="["), "AlphaDecay needs a regular expression"),
        (lambda: AlphaDecay(s_min=2.0, s_max=1.0), "0 <= `s_min` <= `s_max`, both finite, but got 2.0 and 1.0"),
        (lambda: AlphaDecay(s_max=math.inf), "both finite"),
        (lambda: AlphaDecay(every_n_steps=0), "`every_n_steps` of at least 1 .* got 0 and 50"),
        (lambda: AlphaDecay(min_eigenvalues=1), "`min_eigenvalues` of at least 2, but got 500 and 1"),
        (lambda: AutoL2Decay("loss", factor=2.0), "`factor` above 0 and below 1, but got 2.0.*PlateauSchedule can"),
        (lambda: AutoL2Decay("loss", patience=0), "`patience` of at least 1, but got 0"),
        (lambda: AutoL2Decay("loss", refractory=-1.0), "finite `refractory` of at least 0"),
        (lambda: AutoL2Decay("loss", min_multiplier=math.nan), "finite `min_multiplier` of at least 0"),
    ],
    ids=range(12),
)
def test_misuse_is_a_clear_error(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()


class Owner:
    """Take a schedule as a callback does."""

    def __init__(self, schedule: FeedbackSchedule) -> None:
        """Keep it.

        Args:
            schedule: what to follow
        """
        self.schedule = schedule


ALL = [CorrectedDecay(), StableDecay(), AdaptiveDecay(0.2), AlphaDecay(s_max=5.0), AutoL2Decay("loss", error="error")]


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
def test_schedules_are_values_and_come_from_yaml(schedule: FeedbackSchedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert isinstance(hash(schedule), int)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Owner, "owner")
    path = f"lightning_l2.adaptive.{type(schedule).__name__}"
    config = {"owner": {"schedule": {"class_path": path, "init_args": vars(schedule)}}}
    printed = parser.dump(parser.parse_object(config))
    assert f"class_path: {path}\n" in printed
    assert parser.instantiate(parser.parse_string(printed)).owner.schedule == schedule


class Module(pl.LightningModule):
    """Train the network as `train` does, with the groups above."""

    def __init__(self, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], **body: Any) -> None:
        super().__init__()
        self.network, self.make, self.body = network(), make, body

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 1e3 * (self.network(batch[0]) - batch[0][:, :3]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(groups_of(self.network, **self.body))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_at(step) / LR)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: Module, *callbacks: pl.Callback, epochs: int = 5, save: Path | None = None, **options: Any) -> Tensor:
    """Train 5 epochs of 4 steps, or fewer."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = DataLoader(TensorDataset(inputs.repeat(STEPS // 5, 1)), batch_size=8)
    trainer = make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(module, data, **options)
    if save is not None:
        trainer.save_checkpoint(save)
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (CorrectedDecay(), Module(partial(pytorch_optimizer.AdamC, lr=LR, eps=1e-30), normalized=True)),
        (StableDecay(), Module(partial(pytorch_optimizer.AdamS, lr=LR, eps=1e-30))),
    ],
    ids=["AdamC", "AdamS"],
)
def test_a_trainer_with_the_callback_equals_one_with_the_optimizer(
    schedule: FeedbackSchedule, reference: Module
) -> None:
    module = Module(partial(torch.optim.AdamW, lr=LR, eps=1e-30))
    torch.testing.assert_close(fit(module, WeightDecayScheduler(schedule)), fit(reference), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", [CorrectedDecay(), StableDecay(), AdaptiveDecay(0.5)], ids=repr)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(schedule: FeedbackSchedule, tmp_path: Path) -> None:
    make, path = partial(torch.optim.AdamW, lr=LR), tmp_path / "first.ckpt"
    expected = fit(Module(make), WeightDecayScheduler(schedule))
    fit(Module(make), WeightDecayScheduler(schedule), epochs=2, save=path)
    actual = fit(Module(make), WeightDecayScheduler(schedule), ckpt_path=path, weights_only=True)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("apply", ["optimizer", "coupled", "cautious"])
@pytest.mark.parametrize("schedule", [StableDecay(), AdaptiveDecay(0.5)], ids=lambda schedule: type(schedule).__name__)
def test_gradients_are_read_unscaled(schedule: FeedbackSchedule, apply: str) -> None:
    """A fused optimizer would remove the scale of fp16 in its own step, too late to be read."""

    def run(scaled: bool, fused: bool) -> Tensor:
        module = Module(partial(torch.optim.AdamW, lr=LR, fused=fused)).float()
        module.training_step = lambda batch, batch_idx: (module.network(batch[0].float()) - 1.0).square().mean()
        options = {"plugins": [fp16(init_scale=256.0, growth_interval=2)]} if scaled else {}
        callbacks = [WeightDecay(None, rules=[DecayRule("all")], apply=apply, summary=False)]
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        trainer = make_trainer([*callbacks, WeightDecayScheduler(schedule)], **options)
        trainer.fit(module, DataLoader(TensorDataset(inputs.repeat(6, 1)), batch_size=8))
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    fused, plain, unscaled = run(True, True), run(True, False), run(False, False)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    assert (fused - unscaled).norm() < 0.05 * unscaled.norm()


def test_sharded_parameters_are_measured_whole(tmp_path: Path) -> None:
    """Two processes of FSDP2, each with a part of every tensor, against one process with all of them."""
    forked.ranks(sharded_adaptive.work, tmp_path)
    for name, options in sharded_adaptive.OPTIONS.items():
        whole = sharded_adaptive.multipliers_after_two_steps(sharded_adaptive.network(), options)
        for rank in range(2):
            shards = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            for actual, expected in zip(shards, whole, strict=True):
                assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts transfers from a GPU")
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=repr)
@pytest.mark.parametrize("schedule", [AdaptiveDecay(), StableDecay()], ids=repr)
def test_one_transfer_a_step(schedule: FeedbackSchedule, options: dict[str, bool]) -> None:
    weights = [nn.Parameter(torch.randn(20, 20, device="cuda")) for _ in range(5)]
    optimizer, state = torch.optim.AdamW(weights, **options), {}
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            schedule.multipliers(optimizer, {}, state)
            torch.cuda.set_sync_debug_mode("default")
        assert sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught) == 1
        optimizer.step()
