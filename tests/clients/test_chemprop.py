"""chemprop's message-passing network: Adam without decay, its own learning-rate schedule, BatchNorm."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.clients.helpers import (
    assert_close,
    assert_decayed_but,
    assert_logged,
    assert_moved,
    assert_same,
    biases_and_norms,
    by_hand,
    decaying,
    lambda_probe,
    their_warnings,
    watching,
    weights,
)
from tests.helpers import make_trainer

chemprop = pytest.importorskip("chemprop")
pytestmark = their_warnings


def network() -> Any:
    torch.manual_seed(0)
    return chemprop.models.MPNN(
        chemprop.nn.BondMessagePassing(d_h=16),
        chemprop.nn.MeanAggregation(),
        chemprop.nn.RegressionFFN(input_dim=16, hidden_dim=8),
        batch_norm=True,
    )


def alcohols() -> Any:
    points = [
        chemprop.data.MoleculeDatapoint.from_smi("C" * length + "O", [float(length % 5)]) for length in range(1, 17)
    ]
    dataset = chemprop.data.MoleculeDataset(points)
    return chemprop.data.build_dataloader(dataset, batch_size=4, num_workers=0, shuffle=False)


def fit(callbacks: list[Any], epochs: int = 2, **options: Any) -> tuple[dict[str, Tensor], Any, pl.Trainer]:
    module, trainer = network(), make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(module, alcohols(), **options)
    return weights(module), module, trainer


def test_watching_changes_nothing() -> None:
    expected, _, _ = fit([])
    assert_moved(expected, weights(network()))
    assert_same(fit(watching())[0], expected)


def test_it_decays_by_the_rules() -> None:
    probe = lambda_probe()
    _, module, _ = fit([*decaying(), probe])
    exempt = biases_and_norms(module)
    assert {"bn.weight", "bn.bias", "message_passing.W_o.bias", "predictor.ffn.0.0.bias"} <= exempt
    assert not {"message_passing.W_i.weight", "predictor.ffn.0.0.weight"} & exempt
    assert_decayed_but(exempt, probe)
    assert probe.group_names == {"decay", "no_decay"}
    assert_logged(module, probe.metrics)


def test_it_trains_as_by_hand() -> None:
    assert_close(fit(decaying())[0], fit([by_hand(steps=8)])[0], fit([])[0])


def test_resume(tmp_path: Path) -> None:
    _, _, trainer = fit(decaying(total_steps=8), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, _ = fit(decaying(total_steps=8), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    expected, _, _ = fit(decaying(total_steps=8))
    assert_same(resumed, expected)
