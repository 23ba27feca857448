"""pytorch-forecasting's temporal fusion transformer: an embedding, two LSTMs, gated residual networks, LayerNorms."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

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

forecasting = pytest.importorskip("pytorch_forecasting")
pytestmark = their_warnings


def series() -> Any:
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    random = numpy.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "time": list(range(24)) * 4,
            "series": numpy.repeat(list("abcd"), 24),
            "price": random.normal(size=96).astype("float32"),
            "sales": random.normal(size=96).astype("float32"),
        }
    )
    return forecasting.TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="sales",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=2,
        static_categoricals=["series"],
        time_varying_known_reals=["time", "price"],
        time_varying_unknown_reals=["sales"],
    )


def fit(callbacks: list[Any], epochs: int = 2, **options: Any) -> tuple[dict[str, Tensor], Any, pl.Trainer]:
    torch.manual_seed(0)
    data = series()
    module = forecasting.TemporalFusionTransformer.from_dataset(
        data,
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        dropout=0.0,
        learning_rate=0.01,
        loss=forecasting.QuantileLoss(),
        optimizer="adam",
        weight_decay=0.03,
        log_interval=-1,
    )
    start = weights(module)
    trainer = make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(module, data.to_dataloader(train=False, batch_size=16, num_workers=0), **options)
    assert_moved(weights(module), start)
    return weights(module), module, trainer


def test_watching_changes_nothing() -> None:
    """The module has a lambda of its own, 0.03, which stays."""
    assert_same(fit(watching())[0], fit([])[0])


def test_it_decays_by_the_rules() -> None:
    probe = lambda_probe()
    _, module, _ = fit([*decaying(), probe])
    exempt = biases_and_norms(module)
    assert {"lstm_encoder.bias_ih_l0", "post_lstm_add_norm_encoder.norm.weight", "output_layer.bias"} <= exempt
    assert not {"lstm_encoder.weight_hh_l0", "post_attn_gate_norm.glu.fc.weight", "output_layer.weight"} & exempt
    assert any(isinstance(layer, nn.Embedding) for layer in module.modules())
    assert_decayed_but(exempt, probe)
    assert probe.group_names == {"decay", "no_decay"}
    assert_logged(module, probe.metrics)


def test_it_trains_as_by_hand() -> None:
    steps = 2 * len(series().to_dataloader(train=False, batch_size=16))
    assert_close(fit(decaying())[0], fit([by_hand(steps)])[0], fit([])[0])


def test_resume(tmp_path: Path) -> None:
    steps = 2 * len(series().to_dataloader(train=False, batch_size=16))
    _, _, trainer = fit(decaying(steps), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, _ = fit(decaying(steps), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert_same(resumed, fit(decaying(steps))[0])
