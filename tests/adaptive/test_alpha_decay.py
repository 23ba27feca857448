"""AlphaDecay and its exponent against the paper's formula, a power law and the authors' code."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_l2.adaptive import (
    AlphaDecay,
    hill_exponent,
)


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
