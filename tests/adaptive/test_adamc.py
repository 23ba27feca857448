"""CorrectedDecay against AdamC of pytorch_optimizer, and what it takes for an output layer."""

import re

import pytest
import pytorch_optimizer
import torch

from lightning_l2.adaptive import (
    CorrectedDecay,
)
from tests.adaptive.trainings import LR, groups_of, network, sgd, train


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
