"""Singular values against LAPACK in float64."""

import math

import pytest
import torch

from lightning_l2.monitor.spectra import as_matrix, bidiagonal, extreme_singular_values, reduced

SHAPES = [(2, 2), (5, 20), (20, 5), (32, 32), (31, 200), (70, 200), (200, 70), (256, 1024)]


def extremes(matrix: torch.Tensor) -> tuple[float, float]:
    return extreme_singular_values(bidiagonal(matrix).flatten().tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_random_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape).to(dtype)
    values = torch.linalg.svdvals(matrix.double())
    largest, smallest = extremes(matrix)
    assert largest == pytest.approx(values[0].item(), rel=1e-5)
    if min(shape) <= 32:  # as many iterations as there are singular values
        assert smallest == pytest.approx(values[-1].item(), rel=1e-3)
    else:
        assert values[-1].item() * 0.9999 <= smallest <= values[-1].item() * 1.05


@pytest.mark.parametrize("shape", [(5, 20), (32, 32), (200, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype)
    values = torch.linalg.svdvals(matrix.to(torch.complex128))
    assert abs(torch.linalg.svdvals(matrix.real.double())[0].item() / values[0].item() - 1) > 0.1
    for layout in (matrix, matrix.conj(), matrix.t()):
        largest, smallest = extremes(layout)
        assert largest == pytest.approx(values[0].item(), rel=1e-5)
        if min(shape) <= 32:
            assert smallest == pytest.approx(values[-1].item(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_complex_halves() -> None:
    matrix = torch.randn(6, 4, dtype=torch.complex64).to(torch.complex32)
    values = torch.linalg.svdvals(matrix.to(torch.complex128))
    assert extremes(matrix) == pytest.approx((values[0].item(), values[-1].item()), rel=1e-5)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_decaying_spectra(decay: float) -> None:
    left, right = (torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64))[0] for _ in "ab")
    values = torch.arange(1, 129, dtype=torch.float64) ** -decay
    largest, smallest = extremes((left * values @ right).float())
    assert largest == pytest.approx(1.0, rel=1e-6)
    assert smallest >= values[-1].item() * 0.99


def test_equal_singular_values_and_low_rank() -> None:
    orthogonal = torch.linalg.qr(torch.randn(100, 40))[0]
    assert extremes(3 * orthogonal) == pytest.approx((3.0, 3.0), rel=1e-5)
    rank_one = torch.outer(torch.randn(50), torch.randn(60))
    largest, smallest = extremes(rank_one)
    assert largest == pytest.approx(torch.linalg.svdvals(rank_one.double())[0].item(), rel=1e-5)
    assert smallest < 1e-5 * largest
    assert extremes(torch.zeros(4, 4)) == (0.0, 0.0)
    assert all(map(math.isnan, extremes(torch.full((4, 4), math.nan))))


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (8, 3, 5), (8, 75)], ids=str)
def test_kernels_as_matrices(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    expected = torch.linalg.svdvals(weight.double().flatten(1))
    layouts = [weight, weight.transpose(0, 1).contiguous().transpose(0, 1)]
    if weight.ndim == 4:
        layouts.append(weight.to(memory_format=torch.channels_last))
        assert as_matrix(layouts[-1]).data_ptr() == layouts[-1].data_ptr()
    for layout in layouts:
        assert extremes(as_matrix(layout))[0] == pytest.approx(expected[0].item(), rel=1e-5)


def test_what_is_no_matrix() -> None:
    for shape in ((), (4,), (4, 1), (1, 4), (0, 4)):
        assert as_matrix(torch.zeros(shape)) is reduced(torch.zeros(shape)) is None


def test_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, second = bidiagonal(torch.eye(50)), bidiagonal(torch.eye(50))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
