"""Several setups at once, each beside an expert who groups by hand and writes lambda himself; whole and resumed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

from lightning_l2 import DecayRule, L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import ValidatedNet, assert_same_weights, batches, fp16, hand_grouped, make_trainer, stream

pytestmark = [
    # What Lightning says of any such resume: equal batches need no resumable loader, saving callbacks may go.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # What torch says where the first fp16 step is skipped, and Lightning of a rate that averaging takes over.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step.."),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
]
POSITIONS = pytest.mark.parametrize("position", ["before", "after"])


class Expert(pl.Callback):
    """Writes lambda of a linear ramp into groups made by hand; `clock` counts the steps that are done."""

    def __init__(self, steps: int, clock: Callable[[pl.Trainer], int] = lambda trainer: trainer.global_step) -> None:
        self.steps, self.clock = steps, clock

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        progress = min(1.0, self.clock(trainer) / (self.steps - 1))
        for group in [group for optimizer in trainer.optimizers for group in optimizer.param_groups]:
            group["weight_decay"] = 0.0 if group["name"].endswith("no_decay") else progress * 0.3


class SaveAfter(pl.Callback):
    """Saves once, when so many batches of all epochs are done."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch and not self.path.exists():
            trainer.save_checkpoint(self.path)


def ours() -> list[pl.Callback]:
    return [
        WeightDecay(0.3, summary=False),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0)),
        L2NormMonitor(every_n_steps=1, gradients=True, updates=True),
        L2NormMonitor(every_n_steps=2, per="total"),
        NormConstraint(100.0),
    ]


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def one_cycle(optimizer: Optimizer) -> Any:
    return lrs.OneCycleLR(optimizer, 0.1, total_steps=60)


def nested(optimizer: Optimizer) -> Any:
    each = lrs.LambdaLR(optimizer, [lambda step: 0.95**step] * len(optimizer.param_groups))
    warm = lrs.SequentialLR(optimizer, [lrs.LinearLR(optimizer), lrs.CosineAnnealingLR(optimizer, 9)], [4])
    return lrs.ChainedScheduler([warm, each])


# steps, other callbacks, learning rates, options of the Trainer made anew for each
SETUPS: dict[str, tuple[int, Callable[[], list[pl.Callback]], Any, Callable[[], dict[str, Any]]]] = {
    "accumulation-bf16-OneCycleLR": (
        6 + 3 + 2,
        lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})],
        one_cycle,
        lambda: {"precision": "bf16-mixed"},
    ),
    "skipped-fp16-clipping-OneCycleLR": (
        18,
        list,
        one_cycle,
        lambda: {
            "plugins": [fp16(init_scale=2.0**40, growth_interval=3)],
            "gradient_clip_val": 0.01,
            "gradient_clip_algorithm": "value",
        },
    ),
    "SWA-CosineAnnealingLR": (
        18,
        lambda: [StochasticWeightAveraging(0.005, swa_epoch_start=1, annealing_epochs=2)],
        lambda optimizer: lrs.CosineAnnealingLR(optimizer, 18),
        dict,
    ),
    "EMA-nested-schedulers": (18, lambda: [EMAWeightAveraging(decay=0.9)], nested, dict),
}


@POSITIONS
@pytest.mark.parametrize("batch", [4, 8, 13])
@pytest.mark.parametrize("setup", SETUPS)
def test_beside_an_expert(setup: str, batch: int, position: str, tmp_path: Path) -> None:
    steps, others, scheduler, options = SETUPS[setup]

    def fit(callbacks: list[pl.Callback], grouped: Any, name: str, resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model, path = ValidatedNet(adamw, scheduler, grouped=grouped), tmp_path / name
        trainer = make_trainer([*callbacks, SaveAfter(batch, path)], max_epochs=3, **options())
        trainer.fit(model, batches(6), batches(2), ckpt_path=path if resume else None)
        return model

    for resume in (False, True):
        mine = [*others(), *ours()] if position == "before" else [*ours(), *others()]
        actual = fit(mine, None, "ours.ckpt", resume)
        assert_same_weights(actual, fit([*others(), Expert(steps)], hand_grouped(0.3), "expert.ckpt", resume))
    group = torch.load(tmp_path / "ours.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [entry["weight_decay"] for entry in group] == [0.1]


class Cast(ValidatedNet):
    """The same on batches of the weights' dtype."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([tensor.to(self.dtype) for tensor in batch], batch_idx)


PRECISIONS = {"bf16-mixed": 1e-6, "bf16-true": 1e-2, "64-true": 1e-12}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("make", "mine", "reference"),
    [
        (
            partial(torch.optim.Adam, lr=0.01),
            lambda: [WeightDecay(3.0, apply="decoupled", summary=False)],
            partial(torch.optim.AdamW, lr=0.01),
        ),
        (
            partial(torch.optim.AdamW, lr=0.01),
            lambda: [WeightDecay(3.0, apply="coupled", summary=False)],
            partial(torch.optim.Adam, lr=0.01),
        ),
        (partial(torch.optim.SGD, lr=0.05), lambda: [L2Penalty(3.0)], partial(torch.optim.SGD, lr=0.05)),
    ],
    ids=["decoupled", "coupled", "penalty"],
)
def test_ways_in_other_precisions(make: Any, mine: Any, reference: Any, precision: Any) -> None:
    """Each as the torch optimizer that does it by itself; the constraint holds meanwhile and doesn't bind here."""

    def fit(callbacks: list[pl.Callback], optimizer: Any, grouped: Any = None) -> nn.Module:
        torch.manual_seed(0)
        model = Cast(optimizer, grouped=grouped)
        make_trainer(callbacks, max_epochs=3, precision=precision).fit(model, batches(6))
        return model

    actual = fit([*mine(), NormConstraint(100.0)], make)
    expected = fit([], reference, hand_grouped(3.0))
    plain = fit([], reference, hand_grouped(0.0))
    tolerance = PRECISIONS[precision]
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], weight, rtol=tolerance, atol=tolerance, msg=name)
    assert (plain.head.weight - expected.head.weight).abs().max() > 5 * tolerance


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("per", ["parameter", "row"])
def test_bounds_in_other_precisions(per: Any, precision: Any) -> None:
    model = Cast(partial(torch.optim.SGD, lr=0.05))
    make_trainer([NormConstraint(0.5, per=per)], max_epochs=2, precision=precision).fit(model, batches(6))
    for weight in (model.body[0].weight, model.head.weight):
        norms = weight.detach().double().norm(dim=1 if per == "row" else None)
        assert norms.max() == pytest.approx(0.5, rel=max(PRECISIONS[precision], 2e-6))


class Adversaries(pl.LightningModule):
    """Manual optimization: one optimizer steps twice a batch, the other in each third; each has its own schedule."""

    def __init__(self, by_hand: bool, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)) for _ in "ab")
        self.by_hand, self.raw = by_hand, raw

    def groups(self, module: nn.Module) -> Any:
        if not self.by_hand:
            return module.parameters()
        decayed = [p for p in module.parameters() if p.ndim > 1]
        return [
            {"params": decayed, "name": "decay"},
            {"params": [p for p in module.parameters() if p.ndim < 2], "name": "no_decay"},
        ]

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.groups(self.generator), lr=0.01)
        second = torch.optim.SGD(self.groups(self.critic), lr=0.05, momentum=0.9)
        return [first, second], [one_cycle(first), lrs.CosineAnnealingLR(second, 10)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        wrapped = self.optimizers()
        first, second = (optimizer.optimizer if self.raw else optimizer for optimizer in wrapped)
        x, y = batch
        for _ in range(2):
            second.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.critic(x), y))
            second.step()
        if batch_idx % 3 == 0:
            first.zero_grad()
            self.manual_backward(self.critic(self.generator(x).repeat(1, 2)).square().mean())
            self.clip_gradients(wrapped[0], gradient_clip_val=0.1, gradient_clip_algorithm="value")
            first.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()


@pytest.mark.parametrize("raw", [False, True], ids=["lightning-optimizer", "raw-optimizer"])
@pytest.mark.parametrize("batch", [4, 6, 11])
def test_two_manual_optimizers_resumed_in_the_middle_of_an_epoch(batch: int, raw: bool, tmp_path: Path) -> None:
    def fit(callbacks: list[pl.Callback], by_hand: bool, name: str, resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model, path = Adversaries(by_hand, raw), tmp_path / name
        trainer = make_trainer([*callbacks, SaveAfter(batch, path)], max_epochs=3)
        trainer.fit(model, batches(6), ckpt_path=path if resume else None)
        return model

    # as many batches as were begun before the one that begins
    expert = Expert(18, lambda trainer: trainer.fit_loop.epoch_loop.total_batch_idx)
    expected = fit([expert], True, "expert.ckpt")
    assert_same_weights(fit(ours(), False, "ours.ckpt"), expected)
    assert_same_weights(fit(ours(), False, "ours.ckpt", resume=True), expected)


@pytest.mark.parametrize("way", ["penalty", "decoupled"])
def test_lbfgs_resumed_in_the_middle_of_an_epoch(way: str, tmp_path: Path) -> None:
    """The uninterrupted run is the reference; that of one is in `test_penalty` and `test_clock`."""

    def lbfgs(params: Any) -> Optimizer:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=4, history_size=5)

    def decay() -> list[pl.Callback]:
        if way == "penalty":
            return [L2Penalty(0.05)]
        ramp = WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))
        return [WeightDecay(0.05, apply="decoupled", rules=[DecayRule("all")], summary=False), ramp]

    def fit(resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model, path = ValidatedNet(lbfgs), tmp_path / "saved.ckpt"
        watching = [L2NormMonitor(every_n_steps=1), NormConstraint(0.5, method="lagrangian")]
        trainer = make_trainer([*decay(), *watching, SaveAfter(6, path)], max_epochs=3)
        trainer.fit(model, batches(4), ckpt_path=path if resume else None)
        return model

    whole = fit()
    assert_same_weights(fit(resume=True), whole)


def test_data_without_a_length_and_changing_accumulation() -> None:
    def fit(callbacks: list[pl.Callback], grouped: Any) -> nn.Module:
        torch.manual_seed(0)
        model = ValidatedNet(adamw, grouped=grouped)
        changing = GradientAccumulationScheduler({0: 2, 1: 3})
        make_trainer([*callbacks, changing], max_steps=9, max_epochs=-1).fit(model, stream(7))
        return model

    assert_same_weights(fit(ours(), None), fit([Expert(9)], hand_grouped(0.3)))


def test_a_rate_that_falls_when_our_key_says_so(tmp_path: Path) -> None:
    class Watched(ValidatedNet):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = lrs.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "l2_norm/total"}}

    def fit(callbacks: list[pl.Callback], grouped: Any) -> tuple[nn.Module, float]:
        torch.manual_seed(0)
        model = Watched(adamw, grouped=grouped)
        watching = [L2NormMonitor(every_n_steps=1), LearningRateMonitor(log_weight_decay=True)]
        trainer = make_trainer([*callbacks, *watching], max_epochs=5, logger=CSVLogger(tmp_path))
        trainer.fit(model, batches(4))
        return model, trainer.optimizers[0].param_groups[0]["lr"]

    actual, lr = fit(ours(), None)
    expected, expected_lr = fit([Expert(20)], hand_grouped(0.3))
    assert_same_weights(actual, expected)
    assert lr == expected_lr < 0.01


@POSITIONS
def test_a_rate_sought_again_in_the_middle_of_a_fit(position: str, tmp_path: Path) -> None:
    """The finder saves, trains a little and restores; the schedule goes on where it was."""

    class SeekAgain(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch in (0, 2):
                self.lr_find(trainer, pl_module)

    class Sought(ValidatedNet):
        lr = 0.02

        def configure_optimizers(self) -> Any:
            groups = self.grouped(self) if self.grouped else self.parameters()
            return torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.1)

    def fit(callbacks: list[pl.Callback], grouped: Any) -> Sought:
        torch.manual_seed(0)
        model = Sought(grouped=grouped)
        make_trainer(callbacks, max_epochs=4, default_root_dir=tmp_path).fit(model, batches(8))
        return model

    def finder() -> pl.Callback:
        return SeekAgain(min_lr=1e-4, max_lr=0.5, num_training_steps=30)

    mine = [finder(), *ours()] if position == "before" else [*ours(), finder()]
    actual, expected = fit(mine, None), fit([Expert(32), finder()], hand_grouped(0.3))
    assert actual.lr == expected.lr != 0.02
    assert_same_weights(actual, expected)
