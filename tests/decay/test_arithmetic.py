"""Expected values: the formulas in float64, element by element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_l2.decay.arithmetic import (
    add_decay_gradient,
    decay_from,
    is_zero,
    read,
    real_parts,
    rows_of,
    shrink,
    start_of_rows,
    with_gradient,
    write,
)
from lightning_l2.decay.rounding import Stochastic

LAMBDA, SHARE = 0.3, 0.25
W, G, START = [3.0, -2.0, 0.5, 0.0], [0.5, 1.0, -1.0, 2.0], [1.0, 1.0, -1.0, 4.0]


def weight(values: Any = W, gradient: Any = G, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    w = nn.Parameter(torch.tensor(values, dtype=dtype))
    w.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
    return w


def table(rows: list[int]) -> nn.Parameter:
    """Four rows of which some have a gradient of ones, as often as they are named."""
    w = weight([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], None)
    values = torch.ones(len(rows), 2, dtype=w.dtype)
    w.grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, w.shape, check_invariants=True)
    return w


def close(found: Tensor, expected: Any, rtol: float = 1e-14) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=found.dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("pulled", [False, True])
def test_the_gradient_of_the_penalty_joins(as_tensor: bool, pulled: bool) -> None:
    w, free, frozen = weight(), weight(), weight(gradient=None)
    weight_decay: Any = torch.tensor(LAMBDA, dtype=torch.float64) if as_tensor else LAMBDA
    add_decay_gradient([w, frozen, free], weight_decay, {w: torch.tensor(START).double()} if pulled else None)
    close(w.grad, [g + LAMBDA * (v - (s if pulled else 0.0)) for g, v, s in zip(G, W, START, strict=True)])
    close(free.grad, [g + LAMBDA * v for g, v in zip(G, W, strict=True)])
    assert frozen.grad is None
    close(w, W)


def test_a_lambda_of_0_leaves_the_gradient_as_it_is() -> None:
    w = weight([math.inf, math.nan], [1.0, 2.0])  # 0 times these would be no number
    add_decay_gradient([w], 0.0)
    close(w.grad, [1.0, 2.0])


def test_a_sparse_gradient_gets_its_part_in_the_rows_it_has_once() -> None:
    w = table([3, 1, 3])
    add_decay_gradient([w], LAMBDA, {w: torch.ones(4, 2).double()})
    pull = [[LAMBDA * (v - 1) for v in row] for row in ([3.0, 4.0], [7.0, 8.0])]
    close(w.grad.to_dense(), [[0, 0], [1 + v for v in pull[0]], [0, 0], [2 + v for v in pull[1]]])


def test_a_gradient_that_is_sparse_in_more_than_rows_is_refused() -> None:
    w = weight([[1.0, 2.0]], None)
    w.grad = torch.ones_like(w).to_sparse()
    with pytest.raises(RuntimeError, match=r"acts on rows, got a gradient with 2 sparse dimensions .*shape \(1, 2\)"):
        add_decay_gradient([w], LAMBDA)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_each_list_shrinks_by_its_share_towards_its_start(as_tensor: bool) -> None:
    w, free, other, still, frozen = weight(), weight(), weight(), weight(), weight(gradient=None)
    share: Any = torch.tensor(SHARE, dtype=torch.float64) if as_tensor else SHARE
    shrink([([w, frozen, free], share), ([other], 0.5), ([still], 0.0)], starts={w: torch.tensor(START).double()})
    close(w, [v - SHARE * (v - s) for v, s in zip(W, START, strict=True)])
    close(free, [(1 - SHARE) * v for v in W])
    close(other, [0.5 * v for v in W])
    close(still, W)
    close(frozen, W)


def test_of_a_sparse_gradient_only_the_rows_shrink() -> None:
    w = table([3, 1, 3])
    shrink([([w], SHARE)], starts={w: torch.ones(4, 2).double()})
    rows = [[v - SHARE * (v - 1) for v in row] for row in ([3.0, 4.0], [7.0, 8.0])]
    close(w, [[1.0, 2.0], rows[0], [5.0, 6.0], rows[1]])


def test_a_factor_is_not_rounded_to_the_format_of_the_weights() -> None:
    """In bfloat16, 0.9973 is 0.9961, by which 129 would become 128."""
    w = weight([129.0], [0.0], torch.bfloat16)
    shrink([([w], 0.0027)])
    assert w.item() == 129.0  # 128.65 to the nearest


@pytest.mark.parametrize("pulled", [False, True])
def test_shares_are_taken_with_stochastic_rounding(pulled: bool) -> None:
    w = nn.Parameter(torch.full((20_000,), 2.0, dtype=torch.bfloat16))
    w.grad = torch.zeros_like(w)
    starts = {w: torch.full_like(w, 1.0)} if pulled else None
    shrink([([w], 0.001)], Stochastic(0), starts)
    expected = 2.0 - 0.001 * (1.0 if pulled else 2.0)
    deviation = 2**-7 / 2 / math.sqrt(20_000)  # neighbours below 2 are 2^-7 apart
    assert w.double().mean().item() == pytest.approx(expected, abs=5 * deviation)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_decay_goes_by_the_weights_before_the_update(masked: bool, pulled: bool, as_tensor: bool) -> None:
    before = [3.0, -2.0, 0.5, -4.0, 1.0, 0.0]
    after = [2.0, -3.0, 0.25, -3.5, 1.0, 1.0]  # towards 0, away, towards, towards, not at all, from 0
    start = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0] if pulled else [0.0] * 6
    expected = []
    for w, new, origin in zip(before, after, start, strict=True):
        pull = w - origin
        mask = 0.0 if masked and (w - new) * pull < 0 else 1.0
        expected.append(new - SHARE * mask * pull)
    weights = torch.tensor(after).double()
    share: Any = torch.tensor(SHARE).double() if as_tensor else SHARE
    starts = [torch.tensor(start).double()] if pulled else None
    decay_from([torch.tensor(before).double()], [weights], share, masked=masked, starts=starts)
    close(weights, expected)


def test_updates_too_small_to_multiply_still_have_a_sign() -> None:
    before = [torch.tensor([1e-30, 1e-30, -1e-30])]
    weights = [torch.tensor([2e-30, 0.5e-30, -2e-30])]  # away from 0, towards it, away from it
    decay_from(before, weights, 0.25, masked=True)
    close(weights[0], [2e-30, 0.25e-30, -2e-30], rtol=1e-6)


def test_rows_are_read_as_copies_and_written_back() -> None:
    dense, sparse = weight(), table([2, 0, 2])
    rows = [rows_of(dense), rows_of(sparse)]
    assert rows[0] is None
    assert rows[1].tolist() == [0, 2]
    weights = read([dense, sparse], rows)
    assert weights[0].data_ptr() == dense.data_ptr()
    weights[1].mul_(10)
    close(sparse[2], [5.0, 6.0])
    write([dense, sparse], rows, weights)
    close(sparse, [[10.0, 20.0], [3.0, 4.0], [50.0, 60.0], [7.0, 8.0]])
    close(start_of_rows(sparse, rows[1], sparse), [[10.0, 20.0], [50.0, 60.0]])
    assert start_of_rows(dense, None, dense) is not None


def test_what_takes_part() -> None:
    moving, frozen = weight(), weight(gradient=None)
    assert [id(one) for one in with_gradient([frozen, moving])] == [id(moving)]
    assert [is_zero(value) for value in (0, 0.0, 1e-300, torch.tensor(0.0))] == [True, True, False, False]
    parts = real_parts([torch.tensor([1 + 2j]), torch.tensor([3.0])])
    assert [one.tolist() for one in parts] == [[[1.0, 2.0]], [3.0]]
