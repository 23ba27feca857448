"""The monitor in real Trainers, against float64 arithmetic on weights that another callback saved."""

import copy
import gc
import math
import pickle
import re
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_l2 import L2NormMonitor, WeightDecay
from lightning_l2.monitor import NormAlarms, NormOptions
from tests.helpers import Net, ValidatedNet, batches, data, fp16, make_trainer

EVERYTHING: dict[str, Any] = {
    "per": "parameter",
    "rms": True,
    "prog_bar": True,
    "gradients": True,
    "updates": True,
    "rotation": True,
    "initial_ratio": True,
    "spectra": 1,
    "histograms": 1,
    "alarms": NormAlarms(max_norm=1e9, growth=1e9, vanishing=1e-9, penalty=1e9, stop=True),
}


class Rows(Logger):
    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}
        self.calls = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.calls += 1
        self.rows.setdefault(step, {}).update(metrics)


class Saved(pl.Callback):
    """Keeps float64 weights before and after each step, and each step's gradients before and after clipping."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, Tensor]] = {}
        self.after: dict[int, dict[str, Tensor]] = {}
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.clipped: dict[int, dict[str, Tensor]] = {}
        self.groups: dict[int, list[dict[str, Any]]] = {}
        self.step = 0

    @staticmethod
    def weights(module: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().double().clone() for name, p in module.named_parameters()}

    @staticmethod
    def grads(module: nn.Module) -> dict[str, Tensor]:
        return {n: p.grad.detach().double().clone() for n, p in module.named_parameters() if p.grad is not None}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        def stepped(optimizer: Any, *_: Any) -> None:
            self.clipped.setdefault(self.step, {}).update(self.grads(module))
            self.groups[self.step] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(stepped)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.before.setdefault(self.step, self.weights(module))

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self.gradients[self.step] = self.grads(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.after[self.step] = self.weights(module)


def fit(
    monitor: L2NormMonitor | list[L2NormMonitor], model: pl.LightningModule | None = None, **options: Any
) -> tuple[Rows, Saved, pl.Trainer]:
    rows, saved = Rows(), Saved()
    monitors = monitor if isinstance(monitor, list) else [monitor]
    trainer = make_trainer([saved, *monitors], **{"logger": rows, "log_every_n_steps": 1, **options})
    trainer.fit(model or Net(), data())
    return rows, saved, trainer


def vector(tensors: dict[str, Tensor], names: list[str] | None = None) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names or list(tensors)])


LAYERS = {
    "body.0": ["body.0.weight", "body.0.bias"],
    "body.1": ["body.1.weight", "body.1.bias"],
    "head": ["head.weight", "head.bias"],
    "total": ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"],
}


def momentum_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.5, weight_decay=0.2)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))


@pytest.mark.parametrize("make", [momentum_sgd, adamw])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_quantity(make: Any, accumulate: int) -> None:
    monitor = L2NormMonitor(rms=True, gradients=True, updates=True, rotation=True, initial_ratio=True)
    rows, saved, _ = fit(monitor, Net(make), accumulate_grad_batches=accumulate)
    assert len(rows.rows) == math.ceil(8 / accumulate)
    assert rows.calls == len(rows.rows)
    for step, row in rows.rows.items():
        for layer, names in LAYERS.items():
            before, after = vector(saved.before[step], names), vector(saved.after[step], names)
            expected = {
                "l2_norm": before.norm(),
                "l2_rms": before.square().mean().sqrt(),
                "update_rms": (after - before).square().mean().sqrt(),
                "grad_norm": vector(saved.gradients[step], names).norm(),
                "update_norm": (after - before).norm(),
                "update_ratio": (after - before).norm() / before.norm(),
                "angular_update": torch.arccos(torch.nn.functional.cosine_similarity(before, after, dim=0)),
                "norm_ratio": before.norm() / vector(saved.before[0], names).norm(),
            }
            for prefix, value in expected.items():
                # a turn that is a small part of the way loses digits
                rel = 1e-4 if prefix == "angular_update" else 2e-6
                assert row[f"{prefix}/{layer}"] == pytest.approx(value.item(), rel=rel), (prefix, layer, step)
        penalty = 0.2 / 2 * vector(saved.before[step]).square().sum()
        assert row["l2_penalty/total"] == pytest.approx(penalty.item(), rel=1e-6)
        assert row["l2_penalty/group0"] == row["l2_penalty/total"]
        assert row["weight_decay/group0"] == 0.2


def test_equilibrium_and_effective_lr_formulas() -> None:
    groups = lambda m: [  # noqa: E731 - a table
        {"params": [m.body[0].weight], "weight_decay": 0.3, "name": "body"},
        {"params": [m.body[0].bias, *m.body[1].parameters(), m.head.bias], "weight_decay": 0.0, "name": "no_decay"},
        {"params": [m.head.weight], "lr": 0.05, "name": "head"},
    ]
    adam_factor, sgd_factor = (1 - 0.8) / (1 + 0.8), 1 / (1 + 0.5)
    for make, factor, power in ((adamw, adam_factor, 1), (momentum_sgd, sgd_factor, 2)):
        rows, saved, _ = fit(L2NormMonitor(per="parameter", rotation=True), Net(make, grouped=groups))
        row, before = rows.rows[3], saved.before[3]
        assert row["angular_equilibrium/body.0.weight"] == pytest.approx(math.sqrt(2 * 0.1 * 0.3 * factor), rel=1e-6)
        assert row["angular_equilibrium/head.weight"] == pytest.approx(math.sqrt(2 * 0.05 * 0.2 * factor), rel=1e-6)
        assert "angular_equilibrium/head.bias" not in row
        norm = before["body.0.weight"].norm().item()
        assert row["effective_lr/body.0.weight"] == pytest.approx(0.1 / norm**power, rel=1e-6)
        assert [key for key in row if key.startswith("effective_lr/")] == ["effective_lr/body.0.weight"]


@pytest.mark.parametrize("gradients", [True, "before_clipping", "after_clipping"])
def test_gradients_around_clipping(gradients: Any) -> None:
    rows, saved, _ = fit(L2NormMonitor(gradients=gradients), gradient_clip_val=0.05)
    for step, row in rows.rows.items():
        expected = saved.clipped if gradients == "after_clipping" else saved.gradients
        assert row["grad_norm/total"] == pytest.approx(vector(expected[step]).norm().item(), rel=1e-6)
        assert (row["grad_norm/total"] <= 0.0501) == (gradients == "after_clipping")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gradients", ["before_clipping", "after_clipping"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*autocast.*")
def test_fp16_gradients_are_unscaled_and_skipped_steps_move_nothing(fused: bool, gradients: Any) -> None:
    class Overflowing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * 1e30 if batch_idx in (2, 3) else loss

    model = Overflowing(lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.2, fused=fused))
    monitor = L2NormMonitor(gradients=gradients, updates=True)
    rows, saved, _ = fit(monitor, model, plugins=[fp16(init_scale=2.0**17, growth_interval=1000)])
    skipped = {step for step in rows.rows if torch.equal(vector(saved.after[step]), vector(saved.before[step]))}
    assert {2, 3} <= skipped < set(rows.rows)
    for step, row in rows.rows.items():
        moved = vector(saved.after[step]) - vector(saved.before[step])
        assert row["update_norm/total"] == pytest.approx(moved.norm().item(), rel=1e-5)
        assert (row["update_norm/total"] == 0) == (step in skipped)
        if step not in skipped:
            # after a step the gradients are unscaled whoever did it
            expected = vector(saved.clipped[step]).norm().item()
            assert row["grad_norm/total"] == pytest.approx(expected, rel=1e-5), step
            assert 1e-3 < expected < 100


class Manual(Net):
    """Two optimizers: the second steps at every other batch, without Lightning's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        if batch_idx % 2:
            second.optimizer.step()

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD
        return [
            sgd(self.body.parameters(), lr=0.1, weight_decay=0.5),
            sgd(self.head.parameters(), lr=0.2, weight_decay=0.25),
        ]


@pytest.mark.parametrize("gradients", ["before_clipping", "after_clipping"])
def test_manual_optimization_with_two_optimizers_and_a_raw_step(gradients: Any) -> None:
    rows, saved, _ = fit(L2NormMonitor(gradients=gradients, updates=True), Manual())
    assert sorted(rows.rows) == list(range(8))
    for step, row in rows.rows.items():
        body, head = LAYERS["body.0"] + LAYERS["body.1"], LAYERS["head"]
        assert row["weight_decay/optimizer0/group0"] == 0.5
        assert row["weight_decay/optimizer1/group0"] == 0.25
        expected = 0.5 / 2 * vector(saved.before[step], body).square().sum()
        assert row["l2_penalty/optimizer0/group0"] == pytest.approx(expected.item(), rel=1e-6)
        stepped = body + head if step % 2 else body
        expected = vector(saved.clipped[step], stepped).norm()
        assert row["grad_norm/total"] == pytest.approx(expected.item(), rel=1e-6)
        assert ("grad_norm/head" in row) == bool(step % 2)
        moved = vector(saved.after[step], head) - vector(saved.before[step], head)
        assert row["update_norm/head"] == pytest.approx(moved.norm().item(), rel=1e-6, abs=1e-12)


def test_a_module_that_steps_once_its_batch_has_ended() -> None:
    """Its own hook runs after those of callbacks; the last step is logged at the epoch's end."""

    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.optimizers().step()

    model = Late()
    rows, saved, _ = fit(L2NormMonitor(updates=True), model, max_epochs=2)
    saved.before[16] = saved.weights(model)
    assert sorted(rows.rows) == list(range(16))
    assert rows.calls == 16
    for step, row in rows.rows.items():
        moved = vector(saved.before[step + 1]) - vector(saved.before[step])
        assert row["update_norm/total"] == pytest.approx(moved.norm().item(), rel=1e-5)
        assert row["l2_norm/total"] == pytest.approx(vector(saved.before[step]).norm().item(), rel=1e-6)


def test_lbfgs() -> None:
    make = lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4)  # noqa: E731
    rows, saved, _ = fit(L2NormMonitor(gradients=True, updates=True), Net(make))
    for step, row in rows.rows.items():
        moved = vector(saved.after[step]) - vector(saved.before[step])
        assert row["update_norm/total"] == pytest.approx(moved.norm().item(), rel=1e-5)
        assert row["grad_norm/total"] == pytest.approx(vector(saved.gradients[step]).norm().item(), rel=1e-5)
        assert row["weight_decay/group0"] == row["l2_penalty/total"] == 0.0


def test_spectra() -> None:
    class Shapes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last)
            self.wide = nn.Linear(200, 70)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            regularised = self.conv.weight.square().sum() + self.wide.weight.square().sum()
            return super().training_step(batch, batch_idx) + 0.1 * regularised

    rows, saved, _ = fit(L2NormMonitor(spectra=2), Shapes(), log_every_n_steps=2)
    matrices = ("body.0.weight", "conv.weight", "wide.weight", "head.weight")
    for step in (1, 5):
        row = rows.rows[step]
        assert {key.split("/")[1] for key in row if key.startswith("spectral_norm/")} == set(matrices)
        for name in matrices:
            values = torch.linalg.svdvals(saved.before[step][name].flatten(1))
            largest = values[0].item()
            assert row[f"spectral_norm/{name}"] == pytest.approx(largest, rel=1e-4)
            assert row[f"stable_rank/{name}"] == pytest.approx((values**2).sum().item() / largest**2, rel=2e-4)
            assert row[f"condition_number/{name}"] == pytest.approx(largest / values[-1].item(), rel=0.02)
    assert not any(key.startswith(("spectral", "stable", "condition")) for key in [*rows.rows[3], *rows.rows[7]])


def test_histograms_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, saved = TensorBoardLogger(tmp_path), Saved()
    make_trainer([saved, L2NormMonitor(histograms=3)], logger=logger, log_every_n_steps=1).fit(Net(), data())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {f"weights/{name}" for name in saved.before[0]}
    found = events.Histograms("weights/body.0.weight")
    assert [event.step for event in found] == [0, 3, 6]
    for event in found:
        weight = saved.before[event.step]["body.0.weight"].flatten().cpu()
        value = event.histogram_value
        assert (value.num, value.min, value.max) == (
            32,
            pytest.approx(weight.min().item()),
            pytest.approx(weight.max().item()),
        )
        edges = torch.cat([weight.min().view(1), torch.tensor(value.bucket_limit, dtype=torch.float64)])
        expected = torch.histc(weight, 64, weight.min().item(), weight.max().item())
        assert len(value.bucket_limit) == 64
        torch.testing.assert_close(
            edges, torch.linspace(edges[0], edges[-1], 65, dtype=torch.float64), atol=1e-6, rtol=0
        )
        assert torch.tensor(value.bucket).tolist() == expected.tolist()


def test_histograms_reach_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    class WandbLogger(Rows):
        pass

    made = types.SimpleNamespace(Histogram=lambda np_histogram: np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", made)
    logger = WandbLogger()
    make_trainer([L2NormMonitor(histograms=1)], logger=logger, log_every_n_steps=4).fit(Net(), data())
    counts, edges = logger.rows[3]["weights/head.weight"]
    assert (sum(counts), len(counts), len(edges)) == (16, 64, 65)


class TakesHistograms(Rows):
    """Takes histograms as TensorBoard's logger does, and keeps how many weights each counts."""

    @property
    def experiment(self) -> Any:
        return types.SimpleNamespace(add_histogram_raw=self.add_histogram_raw)

    def add_histogram_raw(self, key: str, *, num: float, global_step: int, **_: Any) -> None:
        self.rows.setdefault(global_step, {})[key] = num


def test_complex_weights() -> None:
    class Complex(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.1 * self.mixing.abs().square().sum()

    model, logger = Complex(), TakesHistograms()
    norm = model.mixing.detach().abs().square().sum().sqrt().item()
    largest = torch.linalg.svdvals(model.mixing.detach())[0].item()
    make_trainer([L2NormMonitor(**EVERYTHING)], logger=logger, log_every_n_steps=1).fit(model, data())
    assert logger.rows[0]["l2_norm/mixing"] == pytest.approx(norm)
    assert logger.rows[0]["l2_rms/mixing"] == pytest.approx(norm / 4)
    assert logger.rows[0]["spectral_norm/mixing"] == pytest.approx(largest, rel=1e-5)
    assert logger.rows[0]["weights/mixing"] == 32


@pytest.mark.parametrize("logger", [True, False])
def test_totals_in_the_progress_bar(logger: bool) -> None:
    """As of the last logged step, in the bar's own text, whether anything else is logged or not."""

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            text = trainer.progress_bar_callback.train_progress_bar.postfix or ""
            found = dict(part.split("=") for part in text.split(", ")) if text else {}
            shown[trainer.global_step] = {key: float(value) for key, value in found.items() if key != "v_num"}

    shown: dict[int, dict[str, float]] = {}
    rows, saved = Rows() if logger else False, Saved()
    bar = TQDMProgressBar(refresh_rate=1)
    options = {"enable_progress_bar": True, "logger": rows, "max_epochs": 1}
    make_trainer([saved, Look(), bar, L2NormMonitor(every_n_steps=3, prog_bar=True)], **options).fit(Net(), data())
    # the bar is drawn before the last step is measured, where the user's own bar stands before the monitor
    logged_at = {step: max((n for n in (0, 2, 5) if n + 1 < step), default=None) for step in shown}
    for step, found in shown.items():
        expected = {}
        if (logged := logged_at[step]) is not None:
            before = vector(saved.before[logged])
            expected = {"l2_norm/total": before.norm().item(), "l2_penalty/total": 0.05 * before.square().sum().item()}
        assert found == pytest.approx(expected, rel=5e-3), step
    trainer = make_trainer([L2NormMonitor(every_n_steps=1)])
    trainer.fit(Net(), data())
    assert not any("l2_" in key for key in trainer.progress_bar_metrics)


def test_what_no_optimizer_has_counts_in_no_total() -> None:
    class Averaged(Net):
        """Its moving average has gradients turned on, as `copy.deepcopy` leaves it; the head comes in late."""

        def __init__(self) -> None:
            super().__init__(grouped=lambda module: module.body.parameters())
            self.average = copy.deepcopy(self.body)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters())})

    everything = L2NormMonitor(gradients=True, updates=True, rotation=True, rms=True)
    rows, saved, _ = fit(everything, Averaged())
    body = LAYERS["body.0"] + LAYERS["body.1"]
    for step, row in rows.rows.items():
        held = vector(saved.before[step], body if step < 4 else LAYERS["total"])
        assert row["l2_norm/total"] == pytest.approx(held.norm().item(), rel=1e-6), step
        assert row["l2_rms/total"] == pytest.approx(held.square().mean().sqrt().item(), rel=1e-6)
        average = vector(saved.before[step], ["average.0.weight", "average.0.bias"])
        assert row["l2_norm/average.0"] == pytest.approx(average.norm().item(), rel=1e-6)
        assert row["l2_norm/head"] == pytest.approx(vector(saved.before[step], LAYERS["head"]).norm().item())


@pytest.mark.filterwarnings("ignore:At step .* the L2 norm of")
def test_a_float64_training_that_diverges_goes_on() -> None:
    class Diverging(Net):
        def __init__(self) -> None:
            super().__init__(lambda params: torch.optim.SGD(params, lr=1e60))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.head.weight.square().sum() + 1e-30 * self.body[0].weight.square().sum()

    options = {**EVERYTHING, "alarms": NormAlarms(growth=2.0)}
    rows, saved, _ = fit(L2NormMonitor(**options), Diverging(), precision="64-true")
    assert len(rows.rows) == 8
    norms = [row["l2_norm/head.weight"] for row in rows.rows.values()]
    assert norms[:3] == pytest.approx([saved.before[step]["head.weight"].norm().item() for step in range(3)], rel=1e-6)
    assert not math.isfinite(norms[-1])
    # each step is 1e60 times as long as the weights
    assert all(math.isnan(row["angular_update/head.weight"]) for row in rows.rows.values())


def test_loggers_without_histograms_get_none_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rows, _, _ = fit(L2NormMonitor(histograms=3))
    assert not any(key.startswith("weights/") for row in rows.rows.values() for key in row)
    assert "L2NormMonitor(histograms=3) shows none, since no logger takes histograms, of Rows. Give" in caplog.text


class WithHistograms(Rows):
    experiment = types.SimpleNamespace(add_histogram_raw=lambda *args, **kwargs: None)


@pytest.mark.parametrize(
    ("options", "trainer", "told"),
    [
        ({"histograms": 2}, {"logger": [Rows(), WithHistograms()]}, ""),
        ({"histograms": 2}, {"logger": False}, "L2NormMonitor(histograms=2) shows none, since no logger takes"),
        ({"spectra": 2}, {"logger": False}, "L2NormMonitor(spectra=2) shows none, since the Trainer has no logger."),
        ({"spectra": 2, "histograms": 2}, {"logger": False, "fast_dev_run": 2}, ""),
        ({"every_n_steps": 9}, {}, "L2NormMonitor(every_n_steps=9) logs nothing in a training of 8 steps."),
        ({"every_n_steps": 8}, {}, ""),
        ({"every_n_steps": 9}, {"logger": False}, ""),
    ],
)
def test_what_reaches_nobody_is_told(options: Any, trainer: Any, told: str, caplog: pytest.LogCaptureFixture) -> None:
    fit(L2NormMonitor(**options), **trainer)
    assert told in caplog.text
    assert ("L2NormMonitor(" in caplog.text) is bool(told)


def labels(row: dict[str, float], prefix: str = "l2_norm") -> set[str]:
    return {key.removeprefix(f"{prefix}/") for key in row if key.startswith(f"{prefix}/")} - {"total"}


class Deep(Net):
    """A gamma that stands on the module, a deep stack, a layer called total, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(2))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in "ab")})
        self.total = nn.Linear(2, 2, bias=False)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.total.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.parameters())


DEPTHS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"gamma", "body.0", "body.1", "encoder.layers.0.fc", "encoder.layers.1.fc", "total_", "normed", "head"}),
    ({"depth": 1}, {"gamma", "body", "encoder", "total_", "normed", "head"}),
    ({"depth": 3}, {"gamma", "body.0", "body.1", "encoder.layers.0", "encoder.layers.1", "total_", "normed", "head"}),
    ({"include": r"^encoder|^head$"}, {"encoder.layers.0.fc", "encoder.layers.1.fc", "head"}),
    ({"per": "total"}, set()),
    ({"per": "group"}, {"group0"}),
    ({"per": "parameter", "include": "gamma|normed"}, {"gamma"} | {f"normed.{n}" for n in (
        "bias", "parametrizations.weight.original0", "parametrizations.weight.original1")}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), DEPTHS, ids=[str(options) for options, _ in DEPTHS])
def test_layers(options: dict[str, Any], expected: set[str]) -> None:
    rows, saved, _ = fit(L2NormMonitor(**options), Deep(), max_steps=2)
    assert labels(rows.rows[1]) == expected
    total = vector(saved.before[1]).norm().item()
    assert rows.rows[1]["l2_norm/total"] == pytest.approx(total, rel=1e-6)
    if "encoder" in expected:
        parts = [name for name in saved.before[1] if name.startswith("encoder.")]
        assert rows.rows[1]["l2_norm/encoder"] == pytest.approx(vector(saved.before[1], parts).norm().item(), rel=1e-6)


def test_frozen_parameters_are_left_out_until_they_are_unfrozen() -> None:
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.body)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer)

    rows, saved = Rows(), Saved()
    make = lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1, weight_decay=0.2)  # noqa: E731
    trainer = make_trainer([Thaw(), saved, L2NormMonitor(updates=True)], logger=rows, log_every_n_steps=1, max_epochs=2)
    trainer.fit(Net(make), data())
    assert labels(rows.rows[7]) == {"head"}
    assert labels(rows.rows[8]) == {"head", "body.0", "body.1"}
    for step, names in ((7, LAYERS["head"]), (8, LAYERS["total"])):
        assert rows.rows[step]["l2_norm/total"] == pytest.approx(vector(saved.before[step], names).norm().item())
    assert set(rows.rows[8]) >= {"weight_decay/group0", "weight_decay/group1", "l2_penalty/group1"}


def test_totals_can_be_monitored_before_any_step_is_logged(tmp_path: Path) -> None:
    """8 steps an epoch, logging at every 50th: EarlyStopping would raise if the metric were missing."""
    monitor = L2NormMonitor(gradients=True, updates=True)
    stopping = EarlyStopping("l2_norm/total", patience=100, check_on_train_epoch_end=True)
    checkpoint = ModelCheckpoint(tmp_path, monitor="l2_penalty/total")
    rows, saved = Rows(), Saved()
    trainer = make_trainer(
        [monitor, stopping, checkpoint, saved],
        logger=rows,
        log_every_n_steps=50,
        max_epochs=2,
        enable_checkpointing=True,
    )
    trainer.fit(Net(), data())
    assert rows.calls == 0
    assert trainer.callback_metrics["l2_norm/total"] == pytest.approx(vector(saved.before[0]).norm().item(), rel=1e-6)
    totals = {"l2_norm/total", "l2_penalty/total", "grad_norm/total", "update_norm/total", "update_ratio/total"}
    assert totals <= set(trainer.callback_metrics)


class Transfers(TorchDispatchMode):
    """Count what goes to the host, and every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.scalars = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.scalars += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Counted(L2NormMonitor):
    """Counts transfers to the host and operators in its own hooks, by step."""

    def count(self, trainer: pl.Trainer, hook: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        operators, transfers = self.counts.setdefault(step, (0, 0))
        lists = 0
        tolist = Tensor.tolist

        def counting(tensor: Tensor) -> Any:
            nonlocal lists
            lists += 1
            return tolist(tensor)

        with monkeypatch.context() as patch, Transfers() as found:
            patch.setattr(Tensor, "tolist", counting)
            hook()
        self.counts[step] = operators + found.operators, transfers + found.scalars + lists


@pytest.mark.parametrize("options", [{}, {k: v for k, v in EVERYTHING.items() if k != "spectra"}], ids=["plain", "all"])
def test_one_transfer_on_a_logged_step_and_nothing_on_others(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watching(Counted):
        counts: dict[int, tuple[int, int]] = {}  # noqa: RUF012 - one run

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            self.count(trainer, lambda: super(Watching, self).on_train_batch_start(trainer, *args), monkeypatch)

        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            self.count(trainer, lambda: super(Watching, self).on_before_optimizer_step(trainer, *args), monkeypatch)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.count(trainer, lambda: super(Watching, self).on_train_batch_end(trainer, *args), monkeypatch)

    # what a CPU looks at once more, a device keeps to itself
    monkeypatch.setattr("lightning_l2.norms.squared._seen_again", lambda squares, *_: squares)
    rows, _, _ = fit(Watching(every_n_steps=3, **options), max_epochs=2)
    assert sorted(rows.rows) == [2, 5, 8, 11, 14]
    for step, (operators, transfers) in Watching.counts.items():
        # the first step of a fit is read for callbacks that monitor totals
        measured = step == 0 or (step + 1) % 3 == 0
        assert transfers == measured, step
        assert (operators > 0) == measured, step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:.*autocast.*")
def test_monitoring_changes_no_bit(precision: Any) -> None:
    class Random(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([nn.functional.dropout(batch[0]), batch[1]], batch_idx)

    def run(callbacks: list[pl.Callback]) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        model = Random(adamw)
        options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "precision": precision, "max_epochs": 2}
        make_trainer(callbacks, **options).fit(model, data())
        return {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

    plain, state = run([])
    watched, state_watched = run([L2NormMonitor(every_n_steps=1, **EVERYTHING)])
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(state, state_watched)


HOOKS = ["setup", "on_train_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]


@pytest.mark.parametrize("hook", [*HOOKS, "on_train_end", "teardown"])
def test_copied_and_pickled_at_any_time_and_the_copy_works(hook: str) -> None:
    original = L2NormMonitor(**{**EVERYTHING, "every_n_steps": 2})
    copies: list[L2NormMonitor] = []

    def take(self: Any, *args: Any, **kwargs: Any) -> None:
        copies[:] = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]

    taker = type("Taker", (pl.Callback,), {hook: take})()
    make_trainer([original, taker]).fit(Net(), data())
    assert len(pickle.dumps(copies[1])) < 3000  # no weights in it
    expected, _, _ = fit(L2NormMonitor(**{**EVERYTHING, "every_n_steps": 2}))
    for monitor in (*copies, original):
        torch.manual_seed(0)
        assert fit(monitor, Net())[0].rows.keys() == expected.rows.keys()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_fit_is_kept(fails: bool) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if fails and batch_idx == 5:
                raise RuntimeError("here")
            return super().training_step(batch, batch_idx)

    monitor, model = L2NormMonitor(every_n_steps=1, **EVERYTHING), Fails()
    trainer = make_trainer([monitor])
    if fails:
        with pytest.raises(RuntimeError, match="here"):
            trainer.fit(model, data())
    else:
        trainer.fit(model, data())
    assert not any(trainer.optimizers[0]._optimizer_step_post_hooks)
    references = [weakref.ref(held) for held in (trainer, model, model.head.weight, trainer.optimizers[0])]
    del trainer, model
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_initial_norms_survive_a_resume(tmp_path: Path) -> None:
    def run(epochs: int, resume: str | None = None) -> Rows:
        torch.manual_seed(0)
        rows, saving = Rows(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        monitors = [
            L2NormMonitor(initial_ratio=True),
            L2NormMonitor(per="parameter", initial_ratio=True),
            L2NormMonitor(),
        ]
        trainer = make_trainer(
            [saving, *monitors], logger=rows, log_every_n_steps=1, max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(Net(), data(), ckpt_path=resume)
        return rows

    whole = run(2)
    resumed = run(2, str(tmp_path / "epoch=0.ckpt"))
    assert set(resumed.rows) == set(range(8, 16))
    for step, row in resumed.rows.items():
        assert row == pytest.approx(whole.rows[step])
    assert whole.rows[15]["norm_ratio/total"] != pytest.approx(1.0, abs=1e-3)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    states = {k: v for k, v in checkpoint["callbacks"].items() if "L2NormMonitor" in k}
    assert len(states) == 1
    assert all(isinstance(v, float) for state in states.values() for v in state["initial_squares"].values())


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_ratios_of_thawed_weights_are_to_the_norms_they_were_frozen_with(tmp_path: Path) -> None:
    """They move in the first step of the second epoch, 8, and are logged from the next but one on."""

    class Thaws(Net):
        def on_train_epoch_start(self) -> None:
            self.body.requires_grad_(self.current_epoch > 0)

        on_train_start = on_train_epoch_start

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "9.ckpt")

    def run(resume: Path | None = None) -> Rows:
        torch.manual_seed(0)
        rows = Rows()
        monitor = L2NormMonitor(per="parameter", initial_ratio=True, every_n_steps=5)
        trainer = make_trainer([monitor, Saves()], logger=rows, max_epochs=2)
        trainer.fit(Thaws(), batches(8), ckpt_path=resume)
        return rows

    torch.manual_seed(0)
    start = Net().body[0].weight.detach().norm().item()
    whole, resumed = run(), run(tmp_path / "9.ckpt")
    row = whole.rows[9]
    assert "norm_ratio/body.0.weight" not in whole.rows[4]
    assert row["norm_ratio/body.0.weight"] == pytest.approx(row["l2_norm/body.0.weight"] / start, rel=1e-6)
    assert row["norm_ratio/body.0.weight"] != pytest.approx(1.0, abs=1e-4)
    assert resumed.rows[9] == pytest.approx(row)


def test_checkpoints_know_of_a_plain_monitor_what_decay_has_left(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "last")
    make_trainer([saving, L2NormMonitor(), L2NormMonitor(per="total")], enable_checkpointing=True).fit(Net(), data())
    callbacks = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in callbacks.items() if "L2NormMonitor" in key)
    assert state == {"left": {"group0": pytest.approx((1 - 0.1 * 0.1) ** 8, rel=1e-12)}}


def test_several_monitors_beside_each_other() -> None:
    monitors = [L2NormMonitor(), L2NormMonitor(per="parameter", every_n_steps=3, updates=True)]
    rows, saved, _ = fit(monitors)
    assert "l2_norm/head.weight" not in rows.rows[0]
    assert {"l2_norm/head", "l2_norm/head.weight", "update_norm/head.weight"} <= set(rows.rows[2])
    assert rows.rows[2]["l2_norm/total"] == pytest.approx(vector(saved.before[2]).norm().item())


def test_fit_twice_with_the_same_monitor() -> None:
    monitor = L2NormMonitor(initial_ratio=True)
    for seed in (0, 1):
        torch.manual_seed(seed)
        rows, saved, _ = fit(monitor)
        assert rows.rows[0]["norm_ratio/total"] == 1.0
        assert rows.rows[3]["l2_norm/total"] == pytest.approx(vector(saved.before[3]).norm().item())


class Explodes(Net):
    """A weight grows by a factor at batch 3; the loss is 1."""

    def __init__(self, factor: float) -> None:
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.0, weight_decay=0.1))
        self.factor = factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1.0 + 0.0 * self.body[0].bias.sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            with torch.no_grad():
                self.head.weight.mul_(self.factor)


ALARMS: dict[str, tuple[NormAlarms, float, str]] = {
    "non_finite": (NormAlarms(), math.inf, r"At step 4 the L2 norm of head.weight is inf\."),
    "max_norm": (
        NormAlarms(max_norm=10),
        100.0,
        r"At step 4 the L2 norm of head.weight is \d+\.?\d*, above max_norm=10\.",
    ),
    "growth": (
        NormAlarms(growth=3),
        10.0,
        r"At step 4 the L2 norm of head.weight is \d+\.\d+, 10 times that of the previous logged step\.",
    ),
    "vanishing": (
        NormAlarms(vanishing=0.1),
        0.05,
        r"At step 4 the L2 norm of head.weight is 0\.\d+, 0\.05 of that of the first step\.",
    ),
    "penalty": (NormAlarms(penalty=1), 100.0, r"At step 4 the L2 penalty is \d+\.?\d* while the loss is 1\."),
}


def alarmed(monitor: L2NormMonitor, factor: float, **options: Any) -> tuple[Rows, list[str], pl.Trainer]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows, _, trainer = fit(monitor, Explodes(factor), **options)
    return rows, [str(w.message) for w in caught if str(w.message).startswith("At step")], trainer


@pytest.mark.parametrize("kind", ALARMS)
def test_alarms(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    alarms, factor, message = ALARMS[kind]
    layer = "total" if kind == "penalty" else "head.weight"
    rows, messages, trainer = alarmed(L2NormMonitor(per="parameter", alarms=alarms), factor)
    assert sum(re.fullmatch(message, text) is not None for text in messages) == 1, messages
    assert all(text.startswith("At step 4 ") for text in messages)  # not again at the steps after
    assert {step for step, row in rows.rows.items() if f"norm_alarm/{kind}/{layer}" in row} == {4}
    assert trainer.global_step == 8
    stopping = L2NormMonitor(per="parameter", alarms={**vars(alarms), "stop": True})
    with caplog.at_level("INFO"):
        assert alarmed(stopping, factor)[2].global_step == 5
    told = [text for text in caplog.messages if "L2NormMonitor signals the Trainer to stop: at step 4 the L2 " in text]
    assert len(told) == 1
    assert alarmed(L2NormMonitor(per="parameter", alarms=None), factor)[1] == []


def test_a_run_that_is_fine_hears_nothing() -> None:
    """Warnings are errors here."""
    alarms = NormAlarms(max_norm=100, growth=2, vanishing=0.01, penalty=10, stop=True)
    rows, _, trainer = fit(L2NormMonitor(alarms=alarms), max_epochs=2)
    assert trainer.global_step == 16
    assert not any(key.startswith("norm_alarm") for row in rows.rows.values() for key in row)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_compared_to_the_whole_loss(accumulate: int) -> None:
    """Under accumulation Lightning hands each batch's loss over divided by the number of batches."""

    class Constant(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 1.0 + 0.0 * self.head.weight.sum()

    for margin, expected in ((1.01, 0), (0.99, 1)):
        model = Constant(lambda params: torch.optim.SGD(params, lr=0.0, weight_decay=0.1))
        penalty = 0.1 / 2 * sum(p.square().sum().item() for p in model.parameters())
        monitor = L2NormMonitor(alarms=NormAlarms(penalty=penalty * margin))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(monitor, model, accumulate_grad_batches=accumulate)
        assert sum("L2 penalty" in str(w.message) for w in caught) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"fast_dev_run": 2, "logger": False},
        {"log_every_n_steps": 0},
        {"logger": [Rows(), Rows()]},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"limit_train_batches": 0},
    ],
    ids=lambda options: "-".join(f"{name}={str(value)[:12]}" for name, value in options.items()),
)
def test_trainer_options(options: dict[str, Any]) -> None:
    _, _, trainer = fit(L2NormMonitor(**EVERYTHING), **options)
    assert ("l2_norm/total" in trainer.callback_metrics) == ("limit_train_batches" not in options)
    for logger in trainer.loggers:
        assert isinstance(logger, Rows)
        assert len(logger.rows) == (8 if trainer.log_every_n_steps and trainer.limit_train_batches else 0)


def test_half_precision_weights() -> None:
    rows, saved, _ = fit(L2NormMonitor(updates=True, rotation=True, per="parameter"), precision="bf16-true")
    for step, row in rows.rows.items():
        for name, before in saved.before[step].items():
            assert row[f"l2_norm/{name}"] == pytest.approx(before.norm().item(), rel=1e-6)
            moved = saved.after[step][name] - before
            assert row[f"update_norm/{name}"] == pytest.approx(moved.norm().item(), rel=1e-6, abs=1e-12)


def test_compiled_names_are_clean() -> None:
    model = Net()
    model.body = torch.compile(model.body, backend="eager")
    rows, _, _ = fit(L2NormMonitor(), model, max_steps=1)
    assert labels(rows.rows[0]) == {"body.0", "body.1", "head"}


def test_groups_made_by_weight_decay() -> None:
    rows, saved = Rows(), Saved()
    make_trainer(
        [WeightDecay(0.3, summary=False), L2NormMonitor(per="group"), saved], logger=rows, log_every_n_steps=1
    ).fit(Net(), data())
    row, before = rows.rows[5], saved.before[5]
    assert labels(row) == {"decay", "no_decay"}
    weights = vector(before, ["body.0.weight", "head.weight"])
    assert row["l2_norm/decay"] == pytest.approx(weights.norm().item())
    assert row["l2_penalty/decay"] == pytest.approx(0.3 / 2 * weights.square().sum().item(), rel=1e-6)
    assert row["l2_penalty/no_decay"] == row["weight_decay/no_decay"] == 0.0


class Late(pl.Callback):
    """Writes lambda once gradients are there, as schedules that read gradients do."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.01 * (trainer.global_step + 1)


@pytest.mark.parametrize("position", ["before", "after"])
def test_lambda_that_is_written_within_the_step(position: str) -> None:
    rows, saved, monitor = Rows(), Saved(), L2NormMonitor()
    callbacks = [Late(), monitor] if position == "before" else [monitor, Late()]
    make_trainer([saved, *callbacks], logger=rows, log_every_n_steps=1).fit(Net(), data())
    for step, row in rows.rows.items():
        assert row["weight_decay/group0"] == pytest.approx(0.01 * (step + 1))
        expected = 0.01 * (step + 1) / 2 * vector(saved.before[step]).square().sum().item()
        assert row["l2_penalty/total"] == pytest.approx(expected, rel=1e-6)


MISUSES: dict[str, tuple[dict[str, Any], str]] = {
    "per": ({"per": "layer"}, "Expected `per` to be one of 'parameter', 'module', 'group', 'total', got 'layer'"),
    "every_n_steps": ({"every_n_steps": 0}, "Expected `every_n_steps` to be an integer of at least 1 or None, got 0"),
    "bool": (
        {"every_n_steps": True},
        "L2NormMonitor needs `every_n_steps` to be int | None, but got True of type bool.",
    ),
    "spectra": ({"spectra": 0.5}, "L2NormMonitor needs `spectra` to be int | None, but got 0.5 of type float."),
    "gradients": (
        {"gradients": "clipped"},
        "Expected `gradients` to be one of True, False, 'before_clipping', 'after_",
    ),
    "depth": ({"depth": 2, "per": "parameter"}, "`depth` rolls modules up and goes with per='module', got per='param"),
    "include": ({"include": "("}, "Expected `include` to be a regular expression, got '(': missing ),"),
    "include without layers": (
        {"include": "a", "per": "total"},
        "`include` chooses layers, got 'a', and per='total'",
    ),
    "unknown alarm": (
        {"alarms": {"grow": 2.0}},
        "`alarms` has no 'grow'. Did you mean 'growth'? It takes max_norm",
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse(case: str) -> None:
    options, message = MISUSES[case]
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        L2NormMonitor(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": "^haed"},
            r"include='\^haed'\) finds none of the 3 layers \(per='module'\)\. Closest names: 'h",
        ),
        ({"include": "bo?y.*"}, r"As a glob it would match 'body\.0', but .*: write '\^bo\.y"),
        ({"include": "head", "per": "group"}, r"the 1 layers \(per='group'\)\. Closest names: 'group0'"),
        ({"include": "weight", "depth": 1}, r"the 2 layers .*: '(body|head)', '(body|head)'\."),
    ],
)
def test_include_that_finds_no_layer(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(MisconfigurationException, match=message):
        fit(L2NormMonitor(**options), model)
    assert model.trainer.global_step == 0


def test_include_finds_what_is_frozen_at_first() -> None:
    model = Net()
    model.body.requires_grad_(False)
    rows, _, _ = fit(L2NormMonitor(include="^body"), model)
    assert {key for key in rows.rows[0] if key.startswith("l2_norm/")} == {"l2_norm/total"}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_include_waits_for_lazy_layers() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(2)

    rows = Rows()
    make_trainer([L2NormMonitor(include="^head", every_n_steps=1)], logger=rows).fit(Lazy(), data())
    assert "l2_norm/head" in rows.rows[1]
    with pytest.raises(MisconfigurationException, match=r"'\^haed'\) finds none"):
        make_trainer([L2NormMonitor(include="^haed", every_n_steps=1)]).fit(Lazy(), data())


def test_alarms_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"`alarms` to be NormAlarms \| None, but got 3 of type int"):
        L2NormMonitor(alarms=3)


YAML = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_l2.L2NormMonitor
      init_args:
        every_n_steps: 3
        per: module
        depth: 1
        include: ^body
        gradients: after_clipping
        updates: true
        spectra: 2
        alarms: {max_norm: 10, stop: true}
    - class_path: lightning_l2.L2NormMonitor
      init_args: {gradients: true, alarms: null}
    - lightning_l2.L2NormMonitor
"""


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    def run(*arguments: str) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        return LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=0)

    return run


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own use
def test_from_yaml(tmp_path: Path, command_line: Callable[..., LightningCLI]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    callbacks: list[Any] = command_line("--config", str(config), "--trainer.callbacks.rms=true").trainer.callbacks
    first, second, third = [callback for callback in callbacks if isinstance(callback, L2NormMonitor)]
    assert vars(first.options) == vars(
        NormOptions(
            every_n_steps=3,
            depth=1,
            include="^body",
            gradients="after_clipping",
            updates=True,
            spectra=2,
            alarms=NormAlarms(max_norm=10, stop=True),
        )
    )
    assert vars(second.options) == vars(NormOptions(gradients=True, alarms=None))
    assert vars(third.options) == vars(L2NormMonitor(rms=True).options)
    assert third.options.alarms == NormAlarms()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own use
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.callbacks.pre=parameter", "pre"),
        ("--trainer.callbacks.per=layer", "per"),
        ("--trainer.callbacks.alarms.max_norm=-1", "max_norm"),
    ],
)
def test_mistakes_on_the_command_line(
    argument: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command_line: Callable[..., LightningCLI],
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    with pytest.raises((SystemExit, ValueError)) as error:
        command_line("--config", str(config), argument)
    assert message in str(error.value) + capsys.readouterr().err


def test_print_config_round_trip_and_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command_line: Callable[..., LightningCLI]
) -> None:
    config, printed = tmp_path / "config.yaml", tmp_path / "printed.yaml"
    config.write_text(YAML)
    for target in (config, printed):
        with pytest.raises(SystemExit):
            command_line("--config", str(target), "--print_config")
        printed.write_text(capsys.readouterr().out)
    assert "max_norm: 10" in printed.read_text()
    with pytest.raises(SystemExit):
        command_line("--trainer.callbacks.help=lightning_l2.L2NormMonitor")
    text = capsys.readouterr().out
    assert "how far the weights turned" in text
    assert "--trainer.callbacks.alarms" in text or "alarms" in text


def test_totals_are_there_at_a_validation_within_the_first_window() -> None:
    class Look(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                exact = vector(Saved.weights(module)).norm()
                seen.append(trainer.callback_metrics["l2_norm/total"].item() / exact.item())

    seen: list[float] = []
    trainer = make_trainer(
        [L2NormMonitor(), Look()], accumulate_grad_batches=4, val_check_interval=2, log_every_n_steps=1
    )
    trainer.fit(ValidatedNet(), data(), data())
    assert seen[0] == pytest.approx(1.0, rel=1e-6)
    assert len(seen) == 4


def test_a_model_without_parameters_has_nothing_to_log() -> None:
    class Empty(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.zeros((), requires_grad=True)

        def configure_optimizers(self) -> None:
            return None

    rows = Rows()
    with pytest.warns(UserWarning, match="configure_optimizers"):
        make_trainer([L2NormMonitor()], logger=rows, log_every_n_steps=1).fit(Empty(), data())
    assert not any(key.startswith("l2_norm") for row in rows.rows.values() for key in row)


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.Rprop])
def test_no_equilibrium_is_logged_where_none_is_known(make: Any) -> None:
    rows, _, _ = fit(L2NormMonitor(rotation=True), Net(lambda params: make(params, lr=0.1)))
    keys = set().union(*rows.rows.values())
    assert "angular_update/total" in keys
    assert not {key for key in keys if key.startswith("angular_equilibrium")}


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("per", ["module", "group"])
def test_groups_that_lazy_layers_get_within_a_step(per: str, position: str) -> None:
    """They are split after the weights were measured, and hold the lambda of that step."""

    class PartlyLazy(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 3), nn.LazyLinear(2)
            nn.init.constant_(self.body.weight, 1.0)
            nn.init.constant_(self.body.bias, 2.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.head(self.body(batch[0])).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    mine = [WeightDecay(0.3, summary=False), L2NormMonitor(every_n_steps=1, per=per, updates=True, rotation=True)]
    logger = Rows()
    trainer = make_trainer(mine if position == "after" else mine[::-1], max_steps=2, logger=logger)
    trainer.fit(PartlyLazy(), data())
    first = logger.rows[0]
    expected = {"body": math.sqrt(24)} if per == "module" else {"decay": math.sqrt(12), "no_decay": math.sqrt(12)}
    for layer, norm in expected.items():
        assert first[f"l2_norm/{layer}"] == pytest.approx(norm)
    assert first["weight_decay/decay"] == 0.3
    assert first["weight_decay/no_decay"] == 0.0
    assert first["l2_penalty/total"] == pytest.approx(0.15 * 12)
