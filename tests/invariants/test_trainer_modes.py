"""The callbacks sit quietly in every Trainer a person may build, of both packages."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_l2 import (
    L2NormMonitor,
    L2Penalty,
    NormConstraint,
    WeightDecay,
    WeightDecayScheduler,
    weight_decay_in_force,
)
from lightning_l2.schedules import LinearSchedule
from tests.helpers import (
    ACCELERATOR,
    Net,
    Shrinking,
    ValidatedNet,
    assert_same_weights,
    batches,
    data,
    make_trainer,
    weights,
)

# Penalty and decay at once shrink twice, which here is meant.
pytestmark = pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well")


def ours() -> list[Any]:
    return [
        WeightDecay(0.3),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0)),
        L2NormMonitor(every_n_steps=1, gradients=True, updates=True),
        L2Penalty(0.01),
        NormConstraint(100.0),
    ]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_without_fit(entry: str) -> None:
    model = ValidatedNet()
    before = weights(model)
    getattr(make_trainer(ours()), entry)(model, data())
    assert_same_weights(model, before)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_after_fit_and_fit_again(entry: str) -> None:
    model, trainer = Shrinking(), make_trainer(ours()[:2])
    trainer.fit(model, batches(5))
    setattr(model, f"{entry}_step".replace("validate", "validation"), lambda batch, batch_idx: torch.zeros(1))
    getattr(trainer, entry)(model, batches(2))
    trainer = make_trainer(trainer.callbacks)
    trainer.fit(model, batches(5), batches(1))
    np.testing.assert_allclose(model.watches[0].of("head.weight"), 0.3 * np.arange(5) / 4, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"logger": []},
        {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"log_every_n_steps": 0},
        {"max_epochs": 0},
        {"limit_train_batches": 0},
        {"enable_progress_bar": True},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"inference_mode": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer\\(detect_anomaly=True\\)`", "ignore:.*barebones.*")
def test_trainer_options(options: dict[str, Any], tmp_path: Any) -> None:
    options = {**options, "default_root_dir": tmp_path}
    if options.get("barebones"):
        options["enable_model_summary"] = None
    model = ValidatedNet()
    trainer = make_trainer(ours(), **options)
    trainer.fit(model, data(), data())


class WithoutOptimizer(Net):
    """As the last of several modules, or a baseline that only counts."""

    def __init__(self, configured: Any) -> None:
        super().__init__()
        self.configured = configured
        self.automatic_optimization = configured is None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.automatic_optimization else None

    def configure_optimizers(self) -> Any:
        return self.configured


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("configured", [None, [], ([], [])], ids=str)
@pytest.mark.parametrize("index", range(5), ids=["decay", "scheduler", "monitor", "penalty", "constraint"])
def test_a_module_without_an_optimizer(index: int, configured: Any) -> None:
    """What only looks goes on looking; what has to act on an optimizer may refuse, and says why."""
    model, callback = WithoutOptimizer(configured), ours()[index]
    before = weights(model)
    said = ""
    try:
        make_trainer([callback]).fit(model, data())
    except MisconfigurationException as error:
        said = str(error)
    assert not said or "configure_optimizers" in said, said
    assert not said or type(callback) is not L2NormMonitor
    assert_same_weights(model, before)


class TheirNet(pytorch_lightning.LightningModule):
    """The measuring module again, as a user of the other package writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Shrinking()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.inner.loss()

    def configure_optimizers(self) -> Any:
        return self.inner.configure_optimizers()


def test_the_other_packages_trainer() -> None:
    model = TheirNet()
    trainer = pytorch_lightning.Trainer(
        accelerator=ACCELERATOR,
        callbacks=ours()[:3],
        logger=False,
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(model, batches(5))
    watch = model.inner.watches[0]
    np.testing.assert_allclose(watch.of("head.weight"), 0.3 * np.arange(6) / 5, atol=1e-9)
    assert set(watch.of("head.bias")) == {0.0}
    assert "l2_norm/total" in trainer.callback_metrics


def test_the_other_packages_trainer_resumes(tmp_path: Any) -> None:
    def fit(epochs: int, ckpt_path: Any = None) -> Any:
        model = TheirNet()
        decay, ramp = WeightDecay(0.3, summary=False), LinearSchedule(start=0.0, end=1.0)
        trainer = pytorch_lightning.Trainer(
            accelerator=ACCELERATOR,
            callbacks=[decay, WeightDecayScheduler(ramp, total_steps=10), NormConstraint(100.0)],
            logger=False,
            max_epochs=epochs,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, batches(5), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return model.inner.watches[0]

    np.testing.assert_allclose(fit(1).of("head.weight"), 0.3 * np.arange(5) / 9, atol=1e-9)
    resumed = fit(2, tmp_path / "last.ckpt")
    np.testing.assert_allclose(resumed.of("head.weight"), 0.3 * np.arange(5, 10) / 9, atol=1e-9)
    assert set(resumed.of("head.bias")) == {0.0}


def test_the_same_callbacks_in_trainers_of_both_packages() -> None:
    callbacks = ours()[:3]
    for trainer_class, model in ((pl.Trainer, Shrinking()), (pytorch_lightning.Trainer, TheirNet())):
        trainer_class(
            accelerator=ACCELERATOR,
            callbacks=callbacks,
            logger=False,
            max_epochs=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ).fit(model, batches(5))
        watch = getattr(model, "inner", model).watches[0]
        np.testing.assert_allclose(watch.of("head.weight"), 0.3 * np.arange(5) / 4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_of_other_dtypes(dtype: torch.dtype) -> None:
    class Cast(ValidatedNet):
        def __init__(self) -> None:
            super().__init__()
            self.to(dtype)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step([t.to(dtype) for t in batch], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step([t.to(dtype) for t in batch], batch_idx)

    model = Cast()
    trainer = make_trainer(ours(), max_epochs=2)
    trainer.fit(model, data(), data())
    assert model.head.weight.dtype == dtype
    reference = torch.stack([p.detach().double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert torch.isfinite(reference)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_module() -> None:
    """Names carry ``_orig_mod.``, decisions don't."""
    model = Shrinking()
    model.body = torch.compile(model.body, backend="eager")
    make_trainer(ours()[:3]).fit(model, batches(5))
    watch = model.watches[0]
    weight = next(name for name in watch.named if name.endswith("0.weight"))
    bias = next(name for name in watch.named if name.endswith("0.bias"))
    np.testing.assert_allclose(watch.of(weight), 0.3 * np.arange(5) / 4, atol=1e-9)
    assert set(watch.of(bias)) == {0.0}


def test_lazy_modules_are_decided_once_they_have_shapes() -> None:
    class Lazy(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(3)

        def setup(self, stage: str) -> None:
            self.layer(torch.zeros(1, 4))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.layer(batch[0]) * 0.0).sum()

        def configure_optimizers(self) -> Any:
            self.before = self.layer.weight.detach().cpu().clone(), self.layer.bias.detach().cpu().clone()
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Lazy()
    make_trainer([WeightDecay(0.5)], max_steps=1).fit(model, data())
    torch.testing.assert_close(model.layer.weight.detach(), model.before[0] * 0.95, rtol=1e-6, atol=1e-8)
    assert torch.equal(model.layer.bias, model.before[1])


def test_sanity_check_steps_and_validation_leave_lambda_alone() -> None:
    seen: list[dict[str, float]] = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(weight_decay_in_force(trainer.optimizers[0]))

    model = ValidatedNet()
    make_trainer([*ours()[:2], Look()], max_epochs=2, num_sanity_val_steps=1).fit(model, batches(5), batches(2))
    assert len(seen) == 3
