"""scvi-tools: its own Trainer, two optimizers by hand, matrices of priors that are no weights, names with spaces."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_l2 import WeightDecay
from lightning_l2.rules import DecayRule
from tests.clients.helpers import (
    LAMBDA,
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

scvi = pytest.importorskip("scvi")
pytestmark = their_warnings
MODELS = ["scvi", "scanvi", "totalvi"]
PRIORS = {"module.background_pro_alpha", "module.background_pro_log_beta", "module.log_per_batch_efficiency"}


class Reseed(pl.Callback):
    """Latent variables are sampled in each batch as in that of another run."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)


@pytest.fixture
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells come in order, since a resumed training shuffles them at another moment than an uninterrupted one."""
    monkeypatch.setattr(torch.utils.data.RandomSampler, "__iter__", lambda self: iter(range(len(self.data_source))))


def model_of(kind: str) -> Any:
    # seeds all generators, and decides which cells are for validation
    scvi.settings.seed = 0
    cells = scvi.data.synthetic_iid(batch_size=32, n_genes=20, n_proteins=6)
    if kind == "scvi":
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        return scvi.model.SCVI(cells, n_latent=4, n_hidden=8, dispersion="gene-batch")
    if kind == "scanvi":
        scvi.model.SCANVI.setup_anndata(cells, batch_key="batch", labels_key="labels", unlabeled_category="label_0")
        return scvi.model.SCANVI(cells, n_latent=4, n_hidden=8)
    scvi.model.TOTALVI.setup_anndata(cells, batch_key="batch", protein_expression_obsm_key="protein_expression")
    return scvi.model.TOTALVI(cells, n_latent=4, n_hidden=8)


def train(kind: str, callbacks: list[Any], epochs: int = 2, **options: Any) -> tuple[dict[str, Tensor], Any]:
    model = model_of(kind)
    start = weights(model.module)
    if kind == "totalvi":
        options["adversarial_classifier"] = True
    model.train(
        max_epochs=epochs,
        batch_size=16,
        accelerator="cpu",
        early_stopping=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        **options,
    )
    assert_moved(weights(model.module), start)
    return weights(model.trainer.lightning_module), model


@pytest.mark.parametrize("kind", MODELS)
def test_watching_changes_nothing(kind: str) -> None:
    """Each has a lambda of its own, 1e-6 or 0.01, which stays."""
    probe, watched = lambda_probe(), lambda_probe()
    expected, _ = train(kind, [probe])
    assert min(probe.steps[0].values()) > 0
    assert_same(train(kind, [*watching(), watched])[0], expected)
    assert watched.steps == probe.steps


@pytest.mark.parametrize("kind", MODELS)
def test_it_decays_by_the_rules(kind: str) -> None:
    probe = lambda_probe()
    _, model = train(kind, [*decaying(), probe])
    plan = model.trainer.lightning_module
    exempt = biases_and_norms(plan)
    assert_decayed_but(exempt & set(probe.steps[0]), probe)
    assert_logged(plan, probe.metrics)
    assert {"l2_norm/total", "l2_penalty/total"} <= set(model.history), "in their own logger too"


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_as_by_hand(kind: str) -> None:
    probe = lambda_probe()
    without, _ = train(kind, [probe])
    assert_close(train(kind, decaying())[0], train(kind, [by_hand(len(probe.steps))])[0], without)


def test_both_optimizers_of_the_adversarial_plan_follow_one_clock() -> None:
    probe = lambda_probe()
    _, model = train("totalvi", [*decaying(), probe])
    assert not model.trainer.lightning_module.automatic_optimization
    assert len(model.trainer.optimizers) == 2
    assert probe.group_names == {f"optimizer{number}/{name}" for number in (0, 1) for name in ("decay", "no_decay")}
    encoder, judge = "module.encoder.z_mean_encoder.weight", "adversarial_classifier.classifier.1.weight"
    steps = len(probe.steps)
    for step, values in enumerate(probe.steps):
        expected = LAMBDA * (1 + step / (steps - 1))
        assert {name: value for name, value in values.items() if name in (encoder, judge)} == pytest.approx(
            {encoder: expected, judge: expected}
        )


def test_a_rule_by_module_type_exempts_priors() -> None:
    """Matrices that stand on the model itself look like weights, and by default decay as such."""
    probe = lambda_probe()
    _, model = train("totalvi", [*decaying(), probe], epochs=1)
    assert all(probe.steps[0][name] == LAMBDA for name in PRIORS)
    probe = lambda_probe()
    rules = [DecayRule("priors", modules=["TOTALVAE"], weight_decay=0.0), "default"]
    train("totalvi", [WeightDecay(LAMBDA, rules=rules, summary=False), probe], epochs=1)
    plan = model.trainer.lightning_module
    direct = {f"module.{name}" for name, _ in plan.module.named_parameters(recurse=False)}
    assert direct >= PRIORS
    expected = {name: 0.0 if name in biases_and_norms(plan) | direct else LAMBDA for name in probe.steps[0]}
    assert probe.steps[0] == expected


@pytest.mark.usefixtures("_in_order")
@pytest.mark.parametrize("kind", MODELS)
def test_resume(kind: str, tmp_path: Path) -> None:
    expected_probe, resumed_probe = lambda_probe(), lambda_probe()
    expected, _ = train(kind, [Reseed(), *decaying(20), expected_probe])
    _, model = train(kind, [Reseed(), *decaying(20)], epochs=1)
    model.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = train(kind, [Reseed(), *decaying(20), resumed_probe], ckpt_path=tmp_path / "half.ckpt")
    assert resumed_probe.steps == expected_probe.steps[len(expected_probe.steps) // 2 :]
    assert_same(resumed, expected)


def test_names_with_spaces_are_logged() -> None:
    probe = lambda_probe()
    _, model = train("scvi", [*decaying(), probe], epochs=1)
    layers = dict(model.trainer.lightning_module.named_modules())
    with_space = next(name for name, layer in layers.items() if " " in name and isinstance(layer, nn.Linear))
    assert f"l2_norm/{with_space}" in model.history
