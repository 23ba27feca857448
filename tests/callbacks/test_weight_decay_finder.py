"""The training after the finder is the one that would have been started with its lambda, bit for bit."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_l2 import L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.bounds import InitialBound
from lightning_l2.callbacks.weight_decay_finder import WeightDecayFinder
from lightning_l2.schedules import LinearSchedule
from lightning_l2.search.target import set_weight_decay
from tests.helpers import Net, ValidatedNet, assert_same_weights, data, make_trainer


class Restless(pl.LightningModule):
    """Everything that could remember a trial: dropout, batch statistics, momentum, counters, lists, a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.mean = MeanMetric()
        self.seen: list[float] = []
        self.generator = torch.Generator().manual_seed(5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.hidden += 1
        self.seen.append(float(x.sum()) + random.random() + float(np.random.rand()) + float(self.hidden))
        noise = torch.randn(x.shape, generator=self.generator).to(x) * 0.1
        loss = nn.functional.mse_loss(self.head(self.body(x + noise)), y)
        self.mean.update(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.seen.append(float(self.mean.compute()) if self.mean.update_called else 0.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def steps(self) -> int:
        return 24


class KnowsItsLength(Restless):
    """Sets the data up before the training begins, when it asks for the number of steps."""

    def steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)


class ByHand(Restless):
    """Two optimizers, one of which steps every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.body.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
            torch.optim.Adam(self.head.parameters(), lr=0.05, weight_decay=0.2),
        ]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set with random numbers of its own."""

    def __init__(self) -> None:
        self.x, self.y = data().dataset.tensors
        self.generator = np.random.default_rng(4)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return self.x[index] + float(self.generator.normal()) + self.reads, self.y[index]


class Continuing(IterableDataset[tuple[Tensor, Tensor]]):
    """A stream that goes on where it was."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data().dataset.tensors
        for _ in range(32):
            yield x[self.position % 32], y[self.position % 32]
            self.position += 5


def shuffled() -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True)


def own_generator() -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(8))


def weighted() -> DataLoader[Any]:
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(32), 32, generator=torch.Generator().manual_seed(8))
    return DataLoader(data().dataset, batch_size=4, sampler=sampler)


def with_workers() -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)


class Loaders(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.dataset = Augmented()

    def train_dataloader(self) -> Any:
        self.asked += 1
        torch.rand(self.asked)
        return {"a": DataLoader(self.dataset, batch_size=4, shuffle=True), "b": own_generator()}

    def val_dataloader(self) -> Any:
        return data()


class FirstOfTwo(Restless):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


class Counting(pl.Callback):
    """A callback that acts on the training and remembers what it did without telling the Trainer."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.events.append("fit")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        gradients = [name for name, parameter in pl_module.named_parameters() if parameter.grad is not None]
        self.events.append(f"metrics {sorted(trainer.callback_metrics)} gradients {gradients}")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.events[0] == "fit"
        self.events.append(f"batch {trainer.global_step}")
        if trainer.global_step == 3:
            pl_module.body[0].bias.requires_grad_(False)
        with torch.no_grad():
            pl_module.head.bias += 0.001 * len(self.events)


def finder(**options: Any) -> WeightDecayFinder:
    return WeightDecayFinder(**{"low": 1e-3, "high": 10.0, "first": 0.1, "trials": 3, "steps": 5, **options})


def everything(trainer: Any, module: Any) -> dict[str, Any]:
    """What a training leaves behind."""
    optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in trainer.optimizers]
    return {
        "random": (random.random(), float(np.random.rand()), float(torch.rand(()))),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "loops": trainer.fit_loop.state_dict(),
        "metrics": dict(trainer.callback_metrics),
        "buffers": dict(module.named_buffers()),
        "gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
        "seen": getattr(module, "seen", None),
        "events": [callback.events for callback in trainer.callbacks if isinstance(callback, Counting)],
    }


def train(module_class: Callable[[], Any], loaders: Callable[[], Any], callbacks: Any, **options: Any) -> Any:
    pl.seed_everything(11, verbose=False)
    module, loader = module_class(), loaders()
    trainer = make_trainer(callbacks(), max_epochs=3, **options)
    trainer.fit(module, *([loader] if isinstance(loader, pl.LightningDataModule) else [loader, data()]))
    return trainer, module, everything(trainer, module)


@pytest.mark.parametrize(
    ("module_class", "loaders", "options"),
    [
        (Restless, shuffled, {}),
        (Restless, own_generator, {}),
        (Restless, weighted, {}),
        (Restless, with_workers, {}),
        (Restless, lambda: DataLoader(Augmented(), batch_size=4), {}),
        (Restless, lambda: DataLoader(Continuing(), batch_size=4), {}),
        (Restless, shuffled, {"accumulate_grad_batches": 3}),
        (Restless, shuffled, {"max_steps": 20, "min_steps": 15, "min_epochs": 2}),
        (Restless, shuffled, {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}),
        (Restless, shuffled, {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}),
        (Restless, shuffled, {"reload_dataloaders_every_n_epochs": 1}),
        (KnowsItsLength, own_generator, {}),
        (KnowsItsLength, with_workers, {}),
        (ByHand, shuffled, {}),
        (FirstOfTwo, Loaders, {}),
    ],
)
def test_the_training_is_the_one_with_that_lambda(module_class: Any, loaders: Any, options: Any) -> None:
    search = finder()

    def callbacks(weight_decay: float | None, *searching: Any) -> list[Any]:
        schedule = WeightDecayScheduler(LinearSchedule(1.0, 2.0), total_steps=24)
        return [WeightDecay(weight_decay, summary=False), Counting(), *searching, schedule, Counting()]

    _, module, after = train(module_class, loaders, lambda: callbacks(None, search), **options)
    _, reference, expected = train(module_class, loaders, lambda: callbacks(search.result.weight_decay), **options)
    assert_same_weights(module, reference)
    assert str(after) == str(expected), "numbers, shapes and orders"
    torch.testing.assert_close(after["gradients"], expected["gradients"], rtol=0, atol=0)
    torch.testing.assert_close(after["buffers"], expected["buffers"], rtol=0, atol=0)
    torch.testing.assert_close(after["random"], expected["random"], rtol=0, atol=0)


@pytest.mark.parametrize("apply", ["coupled", "decoupled", "independent", "cautious"])
def test_trials_apply_lambda_in_the_way_of_the_training(apply: Any) -> None:
    search = finder(low=1e-3, high=0.5)

    def module_class() -> Net:
        return ValidatedNet(lambda params: torch.optim.Adam(params, lr=0.05, weight_decay=0.1, foreach=False))

    def callbacks(weight_decay: float | None, *searching: Any) -> list[Any]:
        decay = WeightDecay(weight_decay, apply=apply, summary=False)
        return [decay, *searching, NormConstraint(InitialBound(1.1), method="lagrangian")]

    _, module, after = train(module_class, shuffled, lambda: callbacks(None, search))
    assert len({trial.mean for trial in search.result.trials}) == 3
    _, reference, expected = train(module_class, shuffled, lambda: callbacks(search.result.weight_decay))
    assert_same_weights(module, reference)
    assert str(after) == str(expected)


def test_trials_differ_by_lambda_alone_and_their_beginning_is_that_of_the_training() -> None:
    """Two searches over different grids agree where they share a value, and one trial is the training itself."""
    search = finder(trials=4, steps=8)
    train(Restless, shuffled, lambda: [search, WeightDecay(summary=False)])
    other = finder(trials=2, steps=8)
    train(Restless, shuffled, lambda: [WeightDecay(summary=False), other])
    values = {trial.weight_decay: trial.mean for trial in search.result.trials}
    assert [values.get(trial.weight_decay) for trial in other.result.trials] == [
        trial.mean for trial in other.result.trials
    ]
    assert len(set(values.values())) == 4
    # one epoch has 8 steps
    pl.seed_everything(11, verbose=False)
    alone, module = make_trainer([WeightDecay(10.0, summary=False)], max_epochs=1), Restless()
    alone.fit(module, shuffled(), data())
    assert values[10.0] == float(alone.callback_metrics["val_loss"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trial_has_the_steps_it_is_given(accumulate: int) -> None:
    """Also where the Trainer has a least number of epochs and steps, and over the end of an epoch."""
    batches: list[int] = []

    class Listing(ValidatedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches.append(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    limits = {"min_epochs": 3, "min_steps": 9, "accumulate_grad_batches": accumulate}
    train(Listing, data, lambda: [WeightDecay(summary=False), finder(trials=2, steps=5)], **limits)
    # epochs of 8 batches: 8 steps, or 3 with a short last window
    trial = [*range(5)] if accumulate == 1 else [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    assert batches[: 2 * len(trial)] == trial * 2
    assert len(batches) == 2 * len(trial) + 24


def test_further_seeds_draw_other_random_numbers() -> None:
    search = finder(seeds=2, trials=1)
    train(Restless, shuffled, lambda: [WeightDecay(summary=False), search])
    one, two = search.result.trials[0].runs
    assert one.value != two.value


def test_it_sets_lambda_of_weight_decay_else_of_the_penalty() -> None:
    penalty, decay = L2Penalty(0.5), WeightDecay(0.5, summary=False)
    assert set_weight_decay([penalty, decay], [], 0.25) == "the callback WeightDecay"
    assert (penalty.weight_decay, decay.weight_decay) == (0.5, 0.25)
    search = finder()
    train(lambda: ValidatedNet(lambda p: torch.optim.SGD(p, lr=0.1)), data, lambda: [search, penalty])
    assert penalty.weight_decay == search.result.weight_decay


def test_without_a_callback_the_groups_keep_their_proportions() -> None:
    class Grouped(ValidatedNet):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.body.parameters(), "weight_decay": 0.01},
                {"params": [self.head.weight], "weight_decay": 0.02},
                {"params": [self.head.bias], "weight_decay": 0.0},
            ]
            return torch.optim.SGD(groups, lr=0.1)

    search = finder()
    trainer, _, _ = train(Grouped, data, lambda: [search])
    found = search.result.weight_decay
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [found / 2, found, 0.0]


def test_groups_without_any_lambda_all_get_it() -> None:
    search = finder()
    trainer, _, _ = train(lambda: ValidatedNet(lambda p: torch.optim.SGD(p, lr=0.1)), data, lambda: [search])
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [search.result.weight_decay]


def test_logs_checkpoints_and_early_stopping_see_nothing_of_the_search(tmp_path: Path) -> None:
    """Nothing improves by 100, so early stopping ends the training after its second epoch, but no trial."""
    search = finder(steps=30)
    left: list[dict[str, Any]] = []
    for name in ("searched", "given"):
        folder = tmp_path / name
        watching = [
            EarlyStopping("val_loss", patience=0, min_delta=100.0),
            ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1),
            LearningRateMonitor(),
        ]
        decay = [WeightDecay(0.1, summary=False), search] if name == "searched" else []
        decay = decay or [WeightDecay(search.result.weight_decay, summary=False)]
        options = {"logger": CSVLogger(folder), "enable_checkpointing": True, "log_every_n_steps": 1}
        trainer, _, after = train(Restless, shuffled, lambda: [*watching, *decay], **options)  # noqa: B023
        trainer.logger.save()
        left.append(
            {
                "log": (folder / "lightning_logs/version_0/metrics.csv").read_text(),
                "files": sorted(path.name for path in folder.glob("*.ckpt")),
                "states": [watcher.state_dict() for watcher in watching[:1]],
                "best": (Path(watching[1].best_model_path).name, watching[1].best_model_score),
                "after": str(after),
            }
        )
    assert left[0] == left[1]
    assert len(left[0]["files"]) == 2
    assert {len(trial.runs[0].curves["val_loss"]) for trial in search.result.trials} == {3}


def test_weight_averaging_starts_with_the_training() -> None:
    """Its average lives in a module of its own and counts updates."""
    found: list[WeightDecayFinder] = []

    def searching() -> list[Any]:
        found.append(finder())
        return [WeightAveraging(), found[0], WeightDecay(summary=False)]

    _, module, _ = train(Restless, shuffled, searching)
    weight_decay = found[0].result.weight_decay
    _, reference, _ = train(Restless, shuffled, lambda: [WeightAveraging(), WeightDecay(weight_decay, summary=False)])
    assert_same_weights(module, reference)


def test_a_resumed_training_keeps_what_was_found(tmp_path: Path) -> None:
    def fit(epochs: int, callbacks: list[Any], path: Any = None) -> tuple[Any, Any]:
        pl.seed_everything(11, verbose=False)
        trainer, module = make_trainer(callbacks, max_epochs=epochs), Restless()
        trainer.fit(module, data(), data(), ckpt_path=path)
        return trainer, module

    trainer, _ = fit(1, [WeightDecay(0.5, summary=False), first := finder()])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    found = first.result.weight_decay
    assert found != 0.5
    _, resumed = fit(3, [WeightDecay(0.5, summary=False), second := finder()], tmp_path / "one.ckpt")
    _, reference = fit(3, [WeightDecay(found, summary=False)], tmp_path / "one.ckpt")
    assert second.result is None, "no second search"
    assert_same_weights(resumed, reference)


def test_a_trial_that_diverges_counts_as_failed() -> None:
    search = finder(low=1e-3, high=1e30, first=0.1, trials=3, steps=8)
    _, module, _ = train(
        lambda: ValidatedNet(lambda p: torch.optim.SGD(p, lr=1.0)), data, lambda: [WeightDecay(summary=False), search]
    )
    assert [trial.state for trial in search.result.trials] == ["complete", "complete", "failed"]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_an_error_in_a_trial_puts_everything_back() -> None:
    class Failing(Restless):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.hidden == 3:
                raise OSError("the data is gone")
            return super().training_step(batch, batch_idx)

    pl.seed_everything(11, verbose=False)
    module = Failing()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer([WeightDecay(summary=False), finder()])
    with pytest.raises(OSError, match="the data is gone"):
        trainer.fit(module, shuffled(), data())
    assert_same_weights(module, before)
    assert module.seen == []
    assert module.hidden == 0


def test_it_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    search = finder()
    with caplog.at_level("INFO"):
        train(ValidatedNet, data, lambda: [WeightDecay(summary=False), search])
    assert "WeightDecayFinder tried 3 lambdas for 5 steps each:\ntrial" in caplog.text
    assert f"It set weight_decay={search.result.weight_decay:g} on the callback WeightDecay." in caplog.text


def test_fast_dev_run_searches_nothing() -> None:
    trainer = make_trainer([search := finder()], fast_dev_run=True)
    trainer.fit(ValidatedNet(), data(), data())
    assert search.result is None


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (lambda: ValidatedNet(), lambda: [finder(monitor="val_acc")], r"monitor='val_acc' never appeared.*: val_loss"),
        (lambda: Net(), lambda: [finder()], r"No validation data was seen"),
        (
            lambda: ValidatedNet(lambda p: torch.optim.Rprop(p)),
            lambda: [finder()],
            r"no lambda to search: the Trainer has no WeightDecay callback and its optimizer no",
        ),
    ],
)
def test_misuse(module: Any, callbacks: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        train(module, data, callbacks)


def test_lazy_parameters_are_refused() -> None:
    class Lazy(ValidatedNet):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(2)

    trainer = make_trainer([WeightDecay(summary=False), finder()])
    with pytest.raises(MisconfigurationException, match="can't keep lazy parameters"):
        trainer.fit(Lazy(), data(), data())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected `steps` to be at least 1, got 0"):
        WeightDecayFinder(steps=0)
    with pytest.raises(ValueError, match="is upside down"):
        WeightDecayFinder(1.0, 0.1)


def test_a_tensor_data_set_is_not_copied() -> None:
    """Large data would need its memory twice."""
    from lightning_l2.snapshot import data_holders, working_on_copies

    loader = DataLoader(TensorDataset(torch.ones(4, 2)), shuffle=True)
    (tensor,) = loader.dataset.tensors
    with working_on_copies([], data=data_holders([loader])):
        assert loader.dataset.tensors[0] is tensor


def test_a_training_that_began_without_the_finder_goes_on_without_a_search(tmp_path: Path) -> None:
    make_trainer([WeightDecay(0.1, summary=False)]).fit(model := Net(), data())
    make_trainer([WeightDecay(0.1, summary=False), keep := ModelCheckpoint(tmp_path)], enable_checkpointing=True).fit(
        model, data()
    )
    decay = WeightDecay(0.1, summary=False)
    finder = WeightDecayFinder(trials=2, steps=2)
    make_trainer([decay, finder], max_epochs=2).fit(Net(), data(), ckpt_path=keep.best_model_path)
    assert finder.result is None
    assert decay.weight_decay == 0.1
