"""Lightning's own callbacks beside ours: each does what it does on an optimizer that an expert grouped by hand."""

from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.optim import Optimizer

from lightning_l2 import L2NormMonitor, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import (
    DECAYED,
    EXEMPT,
    Net,
    Shrinking,
    ValidatedNet,
    assert_same_weights,
    batches,
    data,
    hand_grouped,
    make_trainer,
    weights,
)

POSITIONS = pytest.mark.parametrize("position", ["before", "after"])


class Rows(DummyLogger):
    """What callbacks of ours and others logged, by step and key."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, str], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.seen.update({(step, key): float(value) for key, value in metrics.items() if key != "epoch"})


def ours(decay: float = 0.3) -> list[pl.Callback]:
    return [WeightDecay(decay, summary=False), L2NormMonitor(every_n_steps=1)]


def scheduled(decay: float = 0.3, **options: Any) -> list[pl.Callback]:
    return [*ours(decay), WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), **options)]


def beside(callback: pl.Callback, mine: list[pl.Callback], position: str) -> list[pl.Callback]:
    return [callback, *mine] if position == "before" else [*mine, callback]


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def train(model: pl.LightningModule, callbacks: list[pl.Callback], **options: Any) -> dict[str, torch.Tensor]:
    make_trainer(callbacks, **{"max_epochs": 4, **options}).fit(model, data(), data(samples=8))
    return weights(model)


def pair(callback: Any, position: str, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The final weights with our callbacks, and those of the hand-grouped optimizer without them."""
    torch.manual_seed(0)
    actual = train(ValidatedNet(adamw), beside(callback(), ours(), position), **options)
    torch.manual_seed(0)
    return actual, train(ValidatedNet(adamw, grouped=hand_grouped(0.3)), [callback()], **options)


@POSITIONS
def test_stochastic_weight_averaging(position: str) -> None:
    swa = partial(StochasticWeightAveraging, swa_lrs=0.005, swa_epoch_start=1, annealing_epochs=2)
    assert_same_weights(*pair(swa, position))


@POSITIONS
def test_stochastic_weight_averaging_with_a_rate_for_each_group(position: str, tmp_path: Path) -> None:
    """The user has two groups and two rates; resumed in each epoch, in the same order and in the other."""

    def halves(module: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": list(part.parameters()), "lr": lr} for part, lr in ((module.body, 0.01), (module.head, 0.03))
        ]

    def quarters(module: nn.Module) -> list[dict[str, Any]]:
        named = dict(module.named_parameters())
        return [
            {"params": [named["body.0.weight"]], "lr": 0.01, "weight_decay": 0.3},
            {"params": [p for n, p in named.items() if "body" in n and n in EXEMPT], "lr": 0.01, "weight_decay": 0.0},
            {"params": [named["head.weight"]], "lr": 0.03, "weight_decay": 0.3},
            {"params": [named["head.bias"]], "lr": 0.03, "weight_decay": 0.0},
        ]

    def run(mine: list[pl.Callback], rates: list[float], grouped: Any, ckpt: Path | None = None) -> Any:
        torch.manual_seed(0)
        swa = StochasticWeightAveraging(list(rates), swa_epoch_start=1, annealing_epochs=3)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1) if mine and ckpt is None else []
        callbacks = [*beside(swa, mine, position), *([saving] if saving else [])]
        trainer = make_trainer(callbacks, max_epochs=4, enable_checkpointing=bool(saving))
        trainer.fit(Net(adamw, grouped=grouped), batches(3), ckpt_path=ckpt)
        return weights(trainer.lightning_module)

    expected = run([], [0.005, 0.005, 0.002, 0.002], quarters)
    assert_same_weights(run(ours(), [0.005, 0.002], halves), expected)
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert_same_weights(run(ours(), [0.005, 0.002], halves, path), expected)
        assert_same_weights(run(ours()[::-1], [0.005, 0.002], halves, path), expected)


def test_the_epoch_that_averaging_adds_for_batch_norm_is_no_training() -> None:
    class WithBatchNorm(Shrinking):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()

    for interval, expected in (("step", np.arange(12) / 11), ("epoch", np.repeat([0.0, 0.5, 1.0], 4))):
        model = WithBatchNorm()
        averaging = StochasticWeightAveraging(0.1, swa_epoch_start=2)
        make_trainer([averaging, *scheduled(interval=interval)], max_epochs=3).fit(model, batches(4))
        np.testing.assert_allclose(model.watches[0].of("head.weight")[:12], 0.3 * expected, atol=1e-9)


@POSITIONS
@pytest.mark.parametrize(
    "make",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: WeightAveraging(torch.device("cpu"))],
    ids=["ema", "equal"],
)
def test_weight_averaging(make: Any, position: str) -> None:
    assert_same_weights(*pair(make, position))


@POSITIONS
def test_weight_averaging_resumes(position: str, tmp_path: Path) -> None:
    def run(callbacks: list[pl.Callback], epochs: int, ckpt: Path | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        model = Net(adamw, **options)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer([*callbacks, saving], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(model, batches(5), ckpt_path=ckpt)
        return weights(model)

    both = beside(EMAWeightAveraging(decay=0.9), ours(), position)
    expected = run([EMAWeightAveraging(decay=0.9)], 2, grouped=hand_grouped(0.3))
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    run(both, 1)
    both = beside(EMAWeightAveraging(decay=0.9), ours(), position)
    assert_same_weights(run(both, 2, tmp_path / "epoch=0.ckpt"), expected)


class Unfreeze(BaseFinetuning):
    """Trains the head alone, then adds the body to the optimizer."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.05, train_bn=True)


class FinetunedWatch(pl.Callback):
    """lambda by parameter in each step from what the step did; NaN where the optimizer hasn't the parameter yet."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer, named = trainer.optimizers[0], dict(pl_module.named_parameters())
        before: dict[str, torch.Tensor] = {}

        def pre(opt: Optimizer, args: Any, kwargs: Any) -> None:
            before.update({name: p.detach().clone() for name, p in named.items()})

        def post(opt: Optimizer, args: Any, kwargs: Any) -> None:
            lr = {id(p): g["lr"] for g in opt.param_groups for p in g["params"]}
            self.steps.append(
                {
                    name: float((1 - p.detach() / before[name]).flatten()[0]) / lr.get(id(p), float("nan"))
                    for name, p in named.items()
                }
            )

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)


class Frozen(Shrinking):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)


@POSITIONS
def test_finetuning_adds_groups_late_and_the_rules_hold_for_them(position: str) -> None:
    watch = FinetunedWatch()
    make_trainer([watch, *beside(Unfreeze(), scheduled(), position)], max_epochs=3).fit(Frozen(), batches(4))
    expected = 0.3 * np.arange(12) / 11
    for name in DECAYED | EXEMPT:
        actual = np.array([step[name] for step in watch.steps])
        started = 4 if name.startswith("body") else 0
        assert np.isnan(actual[:started]).all()
        reference = expected[started:] if name in DECAYED else np.zeros(12 - started)
        np.testing.assert_allclose(actual[started:], reference, rtol=1e-8, atol=1e-12, err_msg=name)


@POSITIONS
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_zero_grad", "on_after_backward"])
def test_a_group_that_the_module_adds_within_a_batch_obeys_the_rules_in_that_step(hook: str, position: str) -> None:
    class Growing(Shrinking):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.1, weight_decay=0.1)

    model, watch = Growing(), FinetunedWatch()

    def add(*args: Any) -> None:
        optimizer = model.trainer.optimizers[0]
        if model.global_step == 4 and len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": list(model.body.parameters())})

    setattr(model, hook, add)
    mine = scheduled() if position == "before" else scheduled()[::-1]
    make_trainer([watch, *mine], max_epochs=2).fit(model, batches(4))
    expected = 0.3 * np.arange(8) / 7
    for name in DECAYED | EXEMPT:
        actual = [step[name] for step in watch.steps][4:]
        np.testing.assert_allclose(actual, expected[4:] * (name in DECAYED), rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_groups_that_finetuning_adds_are_logged_in_any_order(order: tuple[int, ...]) -> None:
    """A monitor that comes first measures before the new group is split; closed form of the first step with it."""
    mine, rows = scheduled(), Rows()
    callbacks = [Unfreeze(), *(mine[index] for index in order)]
    make_trainer(callbacks, max_epochs=3, logger=rows).fit(Frozen(), batches(4))
    lambdas = 0.3 * np.arange(12) / 11
    head = 6 * np.prod(1 - 0.1 * lambdas[:4]) ** 2
    assert rows.seen[4, "l2_penalty/decay"] == pytest.approx(lambdas[4] / 2 * head)
    assert rows.seen[4, "l2_penalty/total"] == pytest.approx(lambdas[4] / 2 * (head + 9))
    for name in ("decay", "group1/decay"):
        assert rows.seen[4, f"weight_decay/{name}"] == pytest.approx(lambdas[4]), name


@pytest.mark.filterwarnings("ignore:The dirpath has changed from", "ignore:Be aware that when using `ckpt_path`")
@POSITIONS
@pytest.mark.parametrize("saved_after_epoch", [0, 1])
def test_finetuning_resumes(saved_after_epoch: int, position: str, tmp_path: Path) -> None:
    """Lightning freezes the body again on resume, with or without us; its groups and lambdas must be right still."""

    def run(mine: list[pl.Callback], folder: Path, ckpt: Path | None = None) -> Frozen:
        model = Frozen()
        saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        callbacks = [*beside(Unfreeze(), mine, position), saving]
        make_trainer(callbacks, max_epochs=3, enable_checkpointing=True).fit(model, batches(4), ckpt_path=ckpt)
        return model

    name = f"epoch={saved_after_epoch}.ckpt"
    whole = run(scheduled(), tmp_path)
    resumed = run(scheduled(), tmp_path / "second", tmp_path / name)
    assert_same_weights(
        {n: w for n, w in weights(resumed).items() if n.startswith("head")},
        {n: w for n, w in weights(whole).items() if n.startswith("head")},
    )
    if saved_after_epoch == 0:
        assert_same_weights(resumed, whole)
    run([], tmp_path / "third", tmp_path / name)
    plain = torch.load(tmp_path / "third" / "epoch=2.ckpt", weights_only=True)["optimizer_states"]
    mine = torch.load(tmp_path / "second" / "epoch=2.ckpt", weights_only=True)["optimizer_states"]
    assert mine[0]["param_groups"] == plain[0]["param_groups"]


@POSITIONS
def test_backbone_finetuning_writes_the_rate_of_the_whole_backbone(position: str) -> None:
    """It writes lr into the last group only, which is one of several once the backbone is split."""

    class Backbone(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
            self.head = nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.1, weight_decay=0.1)

    rates: list[dict[str, float]] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
            names = {id(p): name for name, p in pl_module.named_parameters()}
            rates.append({names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]})

    def run(mine: list[pl.Callback]) -> list[dict[str, float]]:
        rates.clear()
        finetuning = BackboneFinetuning(
            unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, backbone_initial_lr=0.01
        )
        trainer = make_trainer([*beside(finetuning, mine, position), Rates()], max_epochs=4)
        trainer.fit(Backbone(), batches(3))
        return list(rates)

    expected = run([])
    assert len({row.get("backbone.0.weight") for row in expected}) == 4
    assert run(scheduled()) == expected


@POSITIONS
def test_learning_rate_finder(position: str, tmp_path: Path) -> None:
    """Its trial steps leave no trace: the clock starts at 0, both groups get the rate it found."""

    class WithRate(Shrinking):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            self.make_optimizer = lambda params: torch.optim.SGD(params, lr=self.lr, weight_decay=0.1)
            return super().configure_optimizers()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.loss() + 1.0

    finder = LearningRateFinder(min_lr=0.01, max_lr=0.5, num_training_steps=8, update_attr=False)
    model = WithRate()
    trainer = make_trainer(beside(finder, scheduled(), position), max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(model, batches(5))
    np.testing.assert_allclose(model.watches[0].of("head.weight")[-10:], 0.3 * np.arange(10) / 9, atol=1e-10)
    assert set(model.watches[0].of("head.bias")[-10:]) == {0.0}


class FineTuneRate(LearningRateFinder):
    """As Lightning's documentation shows it: the rate is sought again in the middle of a fit."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in (0, 2):
            self.lr_find(trainer, pl_module)


class FineTuneSize(BatchSizeFinder):
    """The same of the batch size."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in (0, 2):
            self.scale_batch_size(trainer, pl_module)


@pytest.mark.parametrize("apply", ["optimizer", "decoupled"])
@pytest.mark.parametrize("kind", ["rate", "size"])
def test_finders_in_the_middle_of_a_fit(kind: str, apply: str, tmp_path: Path) -> None:
    """They save, train a little without other callbacks, and restore."""

    class Tuned(ValidatedNet):
        lr, batch_size = 0.02, 4

        def configure_optimizers(self) -> Any:
            groups = self.grouped(self) if self.grouped else self.parameters()
            optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]

        def train_dataloader(self) -> Any:
            return data(batch_size=self.batch_size)

        val_dataloader = train_dataloader

    def run(mine: list[pl.Callback], grouped: Any = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        finders: dict[str, Any] = {
            "rate": lambda: FineTuneRate(min_lr=1e-4, max_lr=0.5, num_training_steps=8),
            "size": lambda: FineTuneSize(steps_per_trial=2, max_trials=2, init_val=4),
        }
        model = Tuned(grouped=grouped)
        trainer = make_trainer([*mine, finders[kind]()], max_epochs=4, default_root_dir=tmp_path)
        trainer.fit(model)
        return weights(model)

    mine = [WeightDecay(0.3, apply=apply, summary=False), L2NormMonitor(every_n_steps=1), NormConstraint(50.0)]
    assert_same_weights(run(mine), run([], hand_grouped(0.3)))


@POSITIONS
def test_batch_size_finder(position: str, tmp_path: Path) -> None:
    class Sized(Shrinking):
        batch_size = 1

        def train_dataloader(self) -> Any:
            return data(samples=32, batch_size=self.batch_size)

    finder = BatchSizeFinder(mode="power", steps_per_trial=2, max_trials=2)
    model = Sized()
    trainer = make_trainer(beside(finder, scheduled(), position), max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(model)
    steps = 2 * 32 // model.batch_size
    actual = model.watches[0].of("head.weight")[-steps:]
    np.testing.assert_allclose(actual, 0.3 * np.arange(steps) / (steps - 1), atol=1e-10)


@POSITIONS
def test_early_stopping_on_our_key(position: str) -> None:
    """The weights shrink, so a total that has to grow stops training after the patience."""
    stopping = EarlyStopping("l2_norm/total", mode="max", patience=1, check_on_train_epoch_end=True)
    trainer = make_trainer(beside(stopping, ours(), position), max_epochs=10, log_every_n_steps=1)
    trainer.fit(Shrinking(), batches(3))
    assert trainer.current_epoch == 2


@POSITIONS
@pytest.mark.parametrize("key", ["l2_norm/total", "l2_penalty/total"])
def test_model_checkpoint_on_our_key(key: str, position: str, tmp_path: Path) -> None:
    name = "{epoch}"
    saving = ModelCheckpoint(tmp_path, name, monitor=key, mode="min", save_top_k=1, save_on_train_epoch_end=True)
    trainer = make_trainer(
        beside(saving, ours(), position), max_epochs=3, enable_checkpointing=True, log_every_n_steps=1
    )
    model = Shrinking()
    trainer.fit(model, batches(3))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=2.ckpt"]
    before_last_step = 1 / (1 - 0.1 * 0.3)
    named = dict(model.named_parameters())
    squares = {n: float(p.detach().square().sum()) for n, p in named.items()}
    squares |= {n: before_last_step**2 * squares[n] for n in DECAYED}
    expected = {
        "l2_norm/total": np.sqrt(sum(squares.values())),
        "l2_penalty/total": 0.3 / 2 * sum(squares[n] for n in DECAYED),
    }
    assert float(saving.best_model_score) == pytest.approx(expected[key], rel=1e-6)


def test_timer_and_several_of_ours() -> None:
    timer = Timer(duration="00:00:10:00")
    callbacks = [L2NormMonitor(per="total"), timer, *scheduled(), L2NormMonitor(every_n_steps=2, per="parameter")]
    model = Shrinking()
    trainer = make_trainer(callbacks, max_epochs=2)
    trainer.fit(model, batches(5))
    np.testing.assert_allclose(model.watches[0].of("head.weight"), 0.3 * np.arange(10) / 9, atol=1e-10)


def test_a_module_may_bring_the_callbacks() -> None:
    class Brings(Shrinking):
        def configure_callbacks(self) -> list[pl.Callback]:
            return scheduled()

    model = Brings()
    make_trainer().fit(model, batches(10))
    np.testing.assert_allclose(model.watches[0].of("head.weight"), 0.3 * np.arange(10) / 9, atol=1e-10)


def test_the_order_of_the_callbacks_changes_nothing() -> None:
    def everybody() -> list[pl.Callback]:
        return [
            *scheduled(),
            NormConstraint(0.9),
            LearningRateMonitor(log_weight_decay=True),
            EMAWeightAveraging(decay=0.9),
            GradientAccumulationScheduler({0: 1, 1: 2}),
        ]

    def run(order: list[int]) -> tuple[dict[str, torch.Tensor], dict[tuple[int, str], float]]:
        torch.manual_seed(0)
        rows = Rows()
        callbacks = everybody()
        trainer = make_trainer([callbacks[i] for i in order], max_epochs=3, logger=rows, log_every_n_steps=2)
        trainer.fit(ValidatedNet(adamw), data(), data(samples=4))
        return weights(trainer.lightning_module), rows.seen

    count = len(everybody())
    expected, logged = run(list(range(count)))
    assert {key for _, key in logged} >= {"l2_norm/total", "weight_decay/decay", "norm_constraint/slack"}
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(count).tolist()
        actual, seen = run(order)
        assert_same_weights(actual, expected)
        assert seen == logged, order
