"""What every adaptive schedule asks of groups, of its arguments, and of a training around it."""

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import DecayRule, WeightDecay
from lightning_l2.adaptive import (
    AdaptiveDecay,
    AlphaDecay,
    AutoL2Decay,
    CorrectedDecay,
    StableDecay,
)
from lightning_l2.callbacks.weight_decay_scheduler import WeightDecayScheduler
from lightning_l2.schedules import FeedbackSchedule
from tests.adaptive.trainings import LR, STEPS, groups_of, lr_at, network
from tests.helpers import fp16, make_trainer, through_yaml
from tests.processes import forked, sharded_adaptive


@pytest.mark.parametrize("schedule", [AdaptiveDecay(), StableDecay()], ids=repr)
def test_parameters_that_fsdp1_flattened_are_refused(schedule: FeedbackSchedule) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    schedule.check(optimizer)
    optimizer.param_groups[0]["params"][0]._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"sums over whole tensors, but FSDP1 has flattened .* AdamW. Use FSDP2"):
        schedule.check(optimizer)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: CorrectedDecay(exclude="("), r"Expected `exclude` to be a regular expression, got '\('"),
        (lambda: CorrectedDecay(max_lr=-1.0), "Expected `max_lr` to be finite and above 0, got -1.0"),
        (lambda: AdaptiveDecay(smoothing=1.0), "Expected `smoothing` to be at least 0 and below 1, got 1.0"),
        (lambda: AlphaDecay(exclude="["), r"Expected `exclude` to be a regular expression, got '\['"),
        (lambda: AlphaDecay(s_min=2.0, s_max=1.0), "Expected `s_min` to be at most `s_max`, 1.0, got 2.0"),
        (lambda: AlphaDecay(s_max=math.inf), "Expected `s_max` to be finite and at least 0, got inf"),
        (lambda: AlphaDecay(every_n_steps=0), "Expected `every_n_steps` to be at least 1, got 0"),
        (lambda: AlphaDecay(min_eigenvalues=1), "Expected `min_eigenvalues` to be at least 2, got 1"),
        (lambda: AutoL2Decay("loss", factor=2.0), "Expected `factor` to be at least 0 and below 1, got 2.0"),
        (lambda: AutoL2Decay("loss", patience=0), "Expected `patience` to be at least 1, got 0"),
        (lambda: AutoL2Decay("loss", refractory=-1.0), "Expected `refractory` to be finite and at least 0"),
        (lambda: AutoL2Decay("loss", min_multiplier=math.nan), "Expected `min_multiplier` to be finite and at least 0"),
    ],
    ids=range(12),
)
def test_misuse_is_a_clear_error(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()


ALL = [CorrectedDecay(), StableDecay(), AdaptiveDecay(0.2), AlphaDecay(s_max=5.0), AutoL2Decay("loss", error="error")]


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
def test_schedules_are_values_and_come_from_yaml(schedule: FeedbackSchedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert isinstance(hash(schedule), int)
    path = f"lightning_l2.adaptive.{type(schedule).__name__}"
    parsed, printed = through_yaml(FeedbackSchedule, {"class_path": path, "init_args": vars(schedule)})
    assert f"class_path: {path}\n" in printed
    assert parsed == schedule


class Module(pl.LightningModule):
    """Train the network as `train` does, with the groups above."""

    def __init__(self, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], **body: Any) -> None:
        super().__init__()
        self.network, self.make, self.body = network(), make, body

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 1e3 * (self.network(batch[0]) - batch[0][:, :3]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make(groups_of(self.network, **self.body))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_at(step) / LR)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: Module, *callbacks: pl.Callback, epochs: int = 5, save: Path | None = None, **options: Any) -> Tensor:
    """Train 5 epochs of 4 steps, or fewer."""
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = DataLoader(TensorDataset(inputs.repeat(STEPS // 5, 1)), batch_size=8)
    trainer = make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(module, data, **options)
    if save is not None:
        trainer.save_checkpoint(save)
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (CorrectedDecay(), Module(partial(pytorch_optimizer.AdamC, lr=LR, eps=1e-30), normalized=True)),
        (StableDecay(), Module(partial(pytorch_optimizer.AdamS, lr=LR, eps=1e-30))),
    ],
    ids=["AdamC", "AdamS"],
)
def test_a_trainer_with_the_callback_equals_one_with_the_optimizer(
    schedule: FeedbackSchedule, reference: Module
) -> None:
    module = Module(partial(torch.optim.AdamW, lr=LR, eps=1e-30))
    torch.testing.assert_close(fit(module, WeightDecayScheduler(schedule)), fit(reference), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", [CorrectedDecay(), StableDecay(), AdaptiveDecay(0.5)], ids=repr)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(schedule: FeedbackSchedule, tmp_path: Path) -> None:
    make, path = partial(torch.optim.AdamW, lr=LR), tmp_path / "first.ckpt"
    expected = fit(Module(make), WeightDecayScheduler(schedule))
    fit(Module(make), WeightDecayScheduler(schedule), epochs=2, save=path)
    actual = fit(Module(make), WeightDecayScheduler(schedule), ckpt_path=path, weights_only=True)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("apply", ["optimizer", "coupled", "cautious"])
@pytest.mark.parametrize("schedule", [StableDecay(), AdaptiveDecay(0.5)], ids=lambda schedule: type(schedule).__name__)
def test_gradients_are_read_unscaled(schedule: FeedbackSchedule, apply: str) -> None:
    """A fused optimizer would remove the scale of fp16 in its own step, too late to be read."""

    def run(scaled: bool, fused: bool) -> Tensor:
        module = Module(partial(torch.optim.AdamW, lr=LR, fused=fused)).float()
        module.training_step = lambda batch, batch_idx: (module.network(batch[0].float()) - 1.0).square().mean()
        options = {"plugins": [fp16(init_scale=256.0, growth_interval=2)]} if scaled else {}
        callbacks = [WeightDecay(None, rules=[DecayRule("all")], apply=apply, summary=False)]
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        trainer = make_trainer([*callbacks, WeightDecayScheduler(schedule)], **options)
        trainer.fit(module, DataLoader(TensorDataset(inputs.repeat(6, 1)), batch_size=8))
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    fused, plain, unscaled = run(True, True), run(True, False), run(False, False)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    assert (fused - unscaled).norm() < 0.05 * unscaled.norm()


def test_sharded_parameters_are_measured_whole(tmp_path: Path) -> None:
    """Two processes of FSDP2, each with a part of every tensor, against one process with all of them."""
    forked.ranks(sharded_adaptive.work, tmp_path)
    for name, options in sharded_adaptive.OPTIONS.items():
        whole = sharded_adaptive.multipliers_after_two_steps(sharded_adaptive.network(), options)
        for rank in range(2):
            shards = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            for actual, expected in zip(shards, whole, strict=True):
                assert actual == pytest.approx(expected, rel=1e-9)


def test_what_fsdp1_has_cut_is_refused_and_what_it_has_left_whole_is_measured(tmp_path: Path) -> None:
    """Two processes with the same data, against one."""
    forked.ranks(sharded_adaptive.work_under_fsdp1, tmp_path)
    for name, schedule in sharded_adaptive.SCHEDULES.items():
        expected = sharded_adaptive.weights_after_a_fit(schedule)
        for rank in range(2):
            found = json.loads((tmp_path / f"{rank}.json").read_text())
            assert "sums over whole tensors, but FSDP1 has flattened" in found[f"{name} FULL_SHARD"]
            assert found[f"{name} NO_SHARD"].keys() == expected.keys()
            for key, weight in expected.items():
                assert found[f"{name} NO_SHARD"][key] == pytest.approx(weight, rel=1e-5, abs=1e-7), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts transfers from a GPU")
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=repr)
@pytest.mark.parametrize("schedule", [AdaptiveDecay(), StableDecay()], ids=repr)
def test_one_transfer_a_step(schedule: FeedbackSchedule, options: dict[str, bool]) -> None:
    weights = [nn.Parameter(torch.randn(20, 20, device="cuda")) for _ in range(5)]
    optimizer, state = torch.optim.AdamW(weights, **options), {}
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            schedule.multipliers(optimizer, {}, state)
            torch.cuda.set_sync_debug_mode("default")
        assert sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught) == 1
        optimizer.step()
