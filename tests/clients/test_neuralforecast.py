"""neuralforecast: pytorch_lightning, a Trainer that the module makes, and deep copies of module and callbacks."""

import copy
from pathlib import Path
from typing import Any

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

neuralforecast = pytest.importorskip("neuralforecast")
pytestmark = their_warnings
KINDS: dict[str, dict[str, Any]] = {
    "NHITS": {"mlp_units": [[8, 8]] * 3},
    "TFT": {"hidden_size": 8, "n_head": 2, "dropout": 0.0},
    "LSTM": {"encoder_hidden_size": 8, "decoder_hidden_size": 8, "encoder_n_layers": 1},
}
# Biases that are matrices of one row
BIASES_OF_A_ROW = {"embedding.tgt_embedding_bias", "embedding.futr_exog_embedding_bias"}


def series() -> Any:
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    return pandas.DataFrame(
        {
            "unique_id": numpy.repeat(["a", "b"], 30),
            "ds": list(pandas.date_range("2020", periods=30, freq="D")) * 2,
            "y": numpy.random.default_rng(0).normal(size=60),
        }
    )


def probe() -> Any:
    return lambda_probe(pytest.importorskip("pytorch_lightning").Callback)


def forecaster(kind: str, callbacks: list[Any], **options: Any) -> Any:
    model = getattr(neuralforecast.models, kind)(
        h=2,
        input_size=6,
        max_steps=6,
        learning_rate=0.01,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **KINDS[kind],
        **options,
    )
    return neuralforecast.NeuralForecast(models=[model], freq="D")


def fit(kind: str, callbacks: list[Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    forecasts = forecaster(kind, callbacks, **options)
    start = weights(forecasts.models[0])
    forecasts.fit(series())
    assert_moved(weights(forecasts.models[0]), start)
    return weights(forecasts.models[0]), forecasts


def last_callback(forecasts: Any) -> Any:
    """The library works with copies of the callbacks that it was given."""
    return forecasts.models[0].trainer_kwargs["callbacks"][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_nothing(kind: str) -> None:
    actual, forecasts = fit(kind, [*watching(), probe()])
    assert last_callback(forecasts).metrics.keys() >= {"l2_norm/total", "grad_norm/total"}
    assert_same(actual, fit(kind, [])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_decays_by_the_rules(kind: str) -> None:
    _, forecasts = fit(kind, [*decaying(), probe()])
    module, seen = forecasts.models[0], last_callback(forecasts)
    exempt = biases_and_norms(module) | (BIASES_OF_A_ROW if kind == "TFT" else set())
    assert_decayed_but(exempt & set(seen.steps[0]), seen)
    assert seen.group_names == {"decay", "no_decay"}
    assert len(seen.steps) == 6
    assert_logged(module, seen.metrics)


@pytest.mark.parametrize("kind", ["NHITS", "LSTM"])
def test_it_trains_as_by_hand(kind: str) -> None:
    expert = by_hand(6, pytest.importorskip("pytorch_lightning").Callback)
    assert_close(fit(kind, decaying())[0], fit(kind, [expert])[0], fit(kind, [])[0])


def test_known_parameters() -> None:
    first = last_callback(fit("NHITS", [*decaying(), probe()])[1]).steps[0]
    exempt, decayed = ({name for name, value in first.items() if bool(value) == decays} for decays in (False, True))
    assert exempt >= {"blocks.0.layers.0.bias", "blocks.2.layers.7.bias"}
    assert decayed >= {"blocks.0.layers.0.weight", "blocks.2.layers.7.weight"}


def test_a_second_fit_and_a_copy_train_as_the_first() -> None:
    """Each starts from new weights, and with copies of callbacks that have seen a fit."""
    expected, forecasts = fit("NHITS", decaying())
    copied = copy.deepcopy(forecasts)
    for again in (forecasts, copied):
        again.fit(series(), use_init_models=True)
        assert_same(weights(again.models[0]), expected)


def test_a_saved_forecaster_loads(tmp_path: Path) -> None:
    expected, forecasts = fit("NHITS", decaying())
    forecasts.save(str(tmp_path), save_dataset=True, overwrite=True)
    assert_same(weights(neuralforecast.NeuralForecast.load(str(tmp_path)).models[0]), expected)


def test_float64() -> None:
    result, _ = fit("NHITS", [*decaying(), probe()], precision="64-true")
    assert result["blocks.0.layers.0.weight"].dtype == torch.float64
    assert_same(fit("NHITS", watching(), precision="64-true")[0], fit("NHITS", [], precision="64-true")[0])
