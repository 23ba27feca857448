"""AdaptiveDecay against a float64 loop of the paper's algorithm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_l2.adaptive import (
    AdaptiveDecay,
    StableDecay,
)
from tests.adaptive.trainings import LR, STEPS, lr_at, network, sgd, train


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


def test_adaptive_decay_measures_the_decayed_groups_as_one_vector() -> None:
    optimizer = sgd(([3.0], [6.0], 0.1), ([4.0], [8.0], 0.2), ([100.0], [1.0], 0.0))
    assert AdaptiveDecay(smoothing=0.0).multipliers(optimizer, {}, {}) == [2.0, 2.0, 2.0]
    # what a schedule has made of weight decay doesn't decide who is decayed
    for group, base in zip(optimizer.param_groups, (0.1, 0.2, 0.0), strict=True):
        group.update(initial_weight_decay=base, weight_decay=0.0)
    assert AdaptiveDecay(smoothing=0.5).multipliers(optimizer, {}, {"multiplier": 8.0}) == [5.0, 5.0, 5.0]
    # a penalty may follow it where nothing decays by itself
    assert AdaptiveDecay(smoothing=0.0).multipliers(sgd(([1.0], [3.0], 0.0)), {}, {}) == [3.0]


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
