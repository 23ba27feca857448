"""darts: pytorch_lightning, float64, a Trainer made from `pl_trainer_kwargs`, models copied and pickled whole."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clients.helpers import (
    assert_close,
    assert_decayed_but,
    assert_logged,
    assert_same,
    biases_and_norms,
    by_hand,
    decaying,
    lambda_probe,
    their_warnings,
    watching,
    weights,
)

models = pytest.importorskip("darts.models")
pytestmark = their_warnings
KINDS: dict[str, dict[str, Any]] = {
    "NBEATSModel": {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 8},
    "TFTModel": {"hidden_size": 8, "num_attention_heads": 2, "dropout": 0.0, "add_relative_index": True},
    "TiDEModel": {"hidden_size": 8, "dropout": 0.0, "use_layer_norm": True},
}


def series() -> Any:
    darts, numpy = pytest.importorskip("darts"), pytest.importorskip("numpy")
    return darts.TimeSeries.from_values(numpy.random.default_rng(0).normal(size=40))


def probe() -> Any:
    return lambda_probe(pytest.importorskip("pytorch_lightning").Callback)


def forecaster(kind: str, callbacks: list[Any], epochs: int = 2, **options: Any) -> Any:
    return getattr(models, kind)(
        input_chunk_length=6,
        output_chunk_length=2,
        n_epochs=epochs,
        batch_size=16,
        random_state=0,
        optimizer_kwargs={"lr": 0.01, "weight_decay": 0.03},
        pl_trainer_kwargs={
            "accelerator": "cpu",
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        **KINDS[kind],
        **options,
    )


def fit(kind: str, callbacks: list[Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    model = forecaster(kind, callbacks, **options)
    model.fit(series())
    return weights(model.model), model


@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_nothing(kind: str) -> None:
    """The optimizer has a lambda of its own, 0.03, which stays."""
    seen = probe()
    actual, _ = fit(kind, [*watching(), seen])
    assert seen.metrics.keys() >= {"l2_norm/total", "grad_norm/total"}
    assert {value for step in seen.steps for value in step.values()} == {0.03}
    assert {value.dtype for value in actual.values() if value.is_floating_point()} == {torch.float64}
    assert_same(actual, fit(kind, [])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_decays_by_the_rules(kind: str) -> None:
    seen = probe()
    _, model = fit(kind, [*decaying(), seen])
    exempt = biases_and_norms(model.model)
    assert_decayed_but(exempt & set(seen.steps[0]), seen)
    assert seen.group_names == {"decay", "no_decay"}
    assert_logged(model.model, seen.metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_by_hand(kind: str) -> None:
    expert = by_hand(6, pytest.importorskip("pytorch_lightning").Callback)
    assert_close(fit(kind, decaying())[0], fit(kind, [expert])[0], fit(kind, [])[0])


def test_known_parameters() -> None:
    seen = probe()
    fit("TFTModel", [*decaying(), seen])
    first = seen.steps[0]
    exempt, decayed = ({name for name, value in first.items() if bool(value) == decays} for decays in (False, True))
    assert exempt >= {"lstm_encoder.bias_ih_l0", "multihead_attn.q_layers.0.bias", "output_layer.bias"}
    assert decayed >= {"lstm_encoder.weight_ih_l0", "multihead_attn.q_layers.0.weight", "output_layer.weight"}


def test_untrained_and_deep_copies_train_as_the_original() -> None:
    """Both carry copies of callbacks that have seen a fit; backtesting makes such copies for each window."""
    expected, model = fit("NBEATSModel", decaying())
    for other in (model.untrained_model(), copy.deepcopy(model).untrained_model()):
        other.fit(series())
        assert_same(weights(other.model), expected)
    forecasts = model.historical_forecasts(series(), start=36, retrain=True, verbose=False)
    assert len(forecasts) > 0


def test_pickle_and_save(tmp_path: Path) -> None:
    """darts saves callbacks with the model, and loads classes of others than itself only if they are trusted."""
    expected, model = fit("NBEATSModel", decaying())
    again = pickle.loads(pickle.dumps(model)).untrained_model()
    again.fit(series())
    assert_same(weights(again.model), expected)
    model.save(str(tmp_path / "model.pt"))
    loaded = models.NBEATSModel.load(str(tmp_path / "model.pt"), trusted=True)
    assert_same(weights(loaded.model), expected)


def test_resume_from_its_own_checkpoint(tmp_path: Path) -> None:
    """Lambda goes on where the checkpoint was written; darts shuffles, so weights have nothing to equal."""
    steps = 2 * 3
    seen = probe()
    fit("NBEATSModel", [*decaying(steps), seen])
    options = {"save_checkpoints": True, "model_name": "half", "work_dir": str(tmp_path), "force_reset": True}
    fit("NBEATSModel", decaying(steps), epochs=1, **options)
    resumed = models.NBEATSModel.load_from_checkpoint("half", work_dir=str(tmp_path), best=False, trusted=True)
    again = probe()
    resumed.trainer_params["callbacks"] = [*decaying(steps), again]
    resumed.fit(series(), epochs=2)
    assert again.steps == seen.steps[len(seen.steps) // 2 :]
