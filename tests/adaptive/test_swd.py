"""StableDecay against AdamS of pytorch_optimizer, and which optimizers' second moments it reads."""

from collections.abc import Callable

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_l2.adaptive import (
    StableDecay,
)
from tests.adaptive.trainings import LR, groups_of, network, train


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
