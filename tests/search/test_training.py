"""The search on Trainers."""

import contextlib
import functools
import importlib
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import WeightDecay
from lightning_l2.search import Range, search_weight_decay
from lightning_l2.search.training import look
from tests.helpers import Net, ValidatedNet, batches, data, make_trainer, stream

# Lambda = 0 has tests of its own.
search = functools.partial(search_weight_decay, progress=False, zero=False, low=1e-5, high=1e-1)


class Logging(ValidatedNet):
    """Logs its losses, and the training loss of the epoch in the module's own hook, after all callbacks' hooks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_squared", float(self.current_epoch**2))


def make(weight_decay: float, **options: Any) -> tuple[Any, ...]:
    trainer = make_trainer([WeightDecay(weight_decay, summary=False)], **{"max_epochs": 2, **options})
    return trainer, Logging(), data(), data()


def test_a_trainer_a_module_and_data() -> None:
    result = search(make, trials=3, seeds=2)
    for trial in result.trials:
        assert [run.seed for run in trial.runs] == [0, 1]
        for run in trial.runs:
            assert set(run.metrics) == {"train_loss", "train_loss_epoch", "val_loss", "epoch_squared"}
            assert run.curves["epoch_squared"] == [0.0, 1.0], "each value belongs to its epoch"
            assert len(run.curves["val_loss"]) == 2
            assert run.value == run.curves["val_loss"][-1]
            assert run.seconds > 0
    assert result.train_metric == "train_loss_epoch"


def test_lambda_acts_and_the_norm_is_of_all_weights() -> None:
    """Under a learning rate of 0 nothing moves, so the norm is the initial one of the seed."""

    def still(weight_decay: float) -> tuple[Any, ...]:
        trainer = make_trainer([WeightDecay(weight_decay, summary=False)])
        return trainer, Logging(lambda p: torch.optim.SGD(p, lr=0.0)), data(), data()

    runs = [run for trial in search(still, trials=2, seeds=2).trials for run in trial.runs]
    for run in runs:
        pl.seed_everything(run.seed, verbose=False)
        module = Logging()
        norms = [float(weight.detach().double().norm()) for weight in module.parameters()]
        assert run.l2_norm == pytest.approx(math.hypot(*norms), rel=1e-6)
    assert runs[0].value == runs[2].value, "the same seed gives the same training"
    assert runs[0].value != runs[1].value
    result = search(make, trials=3, seeds=1, low=1e-5, high=10.0)
    norms = [trial.l2_norm for trial in sorted(result.trials, key=lambda trial: trial.weight_decay)]
    assert norms == sorted(norms, reverse=True)


def test_random_states_are_as_before() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    pl.seed_everything(3, verbose=False)
    expected = draw(), draw()
    pl.seed_everything(3, verbose=False)
    first = draw()
    search(make, trials=1, seeds=1)
    assert (first, draw()) == expected


def test_a_data_module_and_no_data_at_all() -> None:
    class Digits(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return data()

        val_dataloader = train_dataloader

    class WithData(Logging):
        def train_dataloader(self) -> Any:
            return data()

        val_dataloader = train_dataloader

    separate = search(lambda weight_decay: (make_trainer(), Logging(), Digits()), trials=1, seeds=1)
    inside = search(lambda weight_decay: (make_trainer(), WithData()), trials=1, seeds=1)
    handed = search(lambda weight_decay: (make_trainer(), Logging(), data(), data()), trials=1, seeds=1)
    assert separate.best.mean == inside.best.mean == handed.best.mean


def test_a_joint_search_hands_the_other_values_over() -> None:
    seen = []

    def with_lr(weight_decay: float, lr: float) -> tuple[Any, ...]:
        seen.append((weight_decay, lr))
        return make(weight_decay)

    result = search(with_lr, also={"lr": Range(1e-3, 1e-1)}, trials=3, seeds=1)
    looked, *trained = seen
    assert looked == (1e-3, pytest.approx(1e-2)), "the middle of the range, where the training is only looked at"
    assert trained == [(trial.weight_decay, trial.others["lr"]) for trial in result.trials]


def test_hopeless_trainings_stop_in_their_second_half() -> None:
    class Telling(ValidatedNet):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.value)

    def telling(weight_decay: float, value: float) -> tuple[Any, ...]:
        return make_trainer(max_epochs=6), Telling(value), batches(1), batches(1)

    result = search(telling, also={"value": Range(0.0, 1.0, log=False)}, trials=16, seeds=1)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned
    for trial in result.trials:
        assert len(trial.runs[0].curves["val_loss"]) == (3 if trial in pruned else 6)


def test_a_metric_that_never_appears() -> None:
    early = r"'val_acc' has not appeared in the first epoch with a validation\. Those that did: .*val_loss\. Unless"
    with pytest.raises(MisconfigurationException) as error, pytest.warns(UserWarning, match=early):
        search(make, monitor="val_acc", trials=1)
    assert str(error.value) == (
        "The metric monitor='val_acc' never appeared in a training. Those that did: epoch_squared, train_loss, "
        "train_loss_epoch, val_loss. Give one of them as monitor, or log it with `self.log`."
    )


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_metrics_that_the_module_logs_when_an_epoch_ends_belong_to_it(package: str) -> None:
    other: Any = importlib.import_module(package)

    class Late(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def on_train_epoch_end(self) -> None:
            self.log("late", float(self.current_epoch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)

    def make(weight_decay: float) -> Any:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = other.Trainer(max_epochs=3, accelerator="cpu", **quiet)
        return trainer, Late(), DataLoader(TensorDataset(torch.ones(4, 2)))

    result = search_weight_decay(make, monitor="late", trials=1, seeds=1, progress=False)
    assert result.best.runs[0].curves["late"] == [0.0, 1.0, 2.0]


def test_a_metric_that_comes_late_is_warned_of_in_vain() -> None:
    class Late(Logging):
        def on_validation_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.log("late", 0.5)

    with pytest.warns(UserWarning, match="Unless it comes later"):
        result = search(
            lambda weight_decay: (*make(weight_decay)[:1], Late(), data(), data()), monitor="late", trials=1
        )
    assert result.best.mean == 0.5


def test_no_validation_data() -> None:
    with pytest.raises(MisconfigurationException, match=r"No validation data was seen in this training\. Give one"):
        search(lambda weight_decay: make(weight_decay)[:3], trials=1)


def test_a_trainer_that_trained_before() -> None:
    trainer, module, *loaders = make(0.1)
    with pytest.raises(MisconfigurationException, match=r"was in use before \(global_step=0\)\. Build a new Trainer"):
        search(lambda weight_decay: (trainer, module, *loaders), trials=2, seeds=1)
    trained = make(0.1)
    trained[0].fit(*trained[1:])
    with pytest.raises(MisconfigurationException, match=r"was in use before \(global_step=16\)"):
        search(lambda weight_decay: trained, trials=2, seeds=1)


def test_make_returns_something_else() -> None:
    with pytest.raises(MisconfigurationException, match=r"make to return \(trainer, module\).*but got NoneType: None"):
        search(lambda weight_decay: None, trials=1)


def test_a_diverging_training_of_a_trainer() -> None:
    def diverging(weight_decay: float) -> tuple[Any, ...]:
        lr = 1e30 if weight_decay > 0.05 else 0.1
        return make_trainer(max_epochs=2), Logging(lambda p: torch.optim.SGD(p, lr=lr)), data(), data()

    result = search(diverging, trials=3, seeds=1)
    assert [trial.state for trial in result.trials] == ["complete", "complete", "failed"]
    assert result.trials[2].error == "val_loss is nan with seed 0"


class Linear(pl.LightningModule):
    """Linear regression, which gradient descent on the squared error with weight decay turns into ridge regression."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.line = torch.nn.Linear(20, 1, bias=False)
        self.lr = lr

    def training_step(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1]) / 2

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def test_the_regret_on_ridge_problems_in_real_trainings() -> None:
    """Ten problems of 20 weights and 30 samples, noise 1: what is known is the held-out loss of the closed form."""
    regrets = []
    for problem in range(10):
        generator = torch.Generator().manual_seed(problem)
        w = torch.randn(20, 1, generator=generator)
        x, held = (torch.randn(n, 20, generator=generator) for n in (30, 200))
        y, truth = (inputs @ w + torch.randn(len(inputs), 1, generator=generator) for inputs in (x, held))

        def ridge(weight_decay: float, x=x, y=y, held=held, truth=truth) -> float:
            a = x.double().T @ x.double() / 30 + weight_decay * torch.eye(20, dtype=torch.float64)
            solution = torch.linalg.solve(a, x.double().T @ y.double() / 30)
            return float((held.double() @ solution - truth.double()).square().mean()) / 2

        def linear(weight_decay: float, x=x, y=y, held=held, truth=truth) -> tuple[Any, ...]:
            trainer = make_trainer([WeightDecay(weight_decay, summary=False)])
            return trainer, Linear(0.1), *(DataLoader(pairs, None) for pairs in ([(x, y)] * 100, [(held, truth)]))

        result = search_weight_decay(linear, trials=7, seeds=2, progress=False)
        best = min(ridge(10.0**power) for power in torch.linspace(-4, 1, 200).tolist())
        regrets.append(ridge(result.weight_decay) / best - 1)
    assert sum(regrets) / 10 <= 0.05


class Digits(pl.LightningModule):
    """A network with far more weights than the 200 images it learns from."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_error", (self.layers(batch[0]).argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)


@pytest.mark.filterwarnings("ignore:Weight decay of group .* is (lost|distorted)")
@pytest.mark.parametrize("bounds", [{}, {"low": 1e-9, "high": 1e-4}])
def test_digits_where_lambda_hardly_acts(bounds: dict[str, float]) -> None:
    """AdamW(lr=1e-3) for 100 steps: lambda is found to matter or not to, and one that does nothing isn't suggested."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    train, val = (TensorDataset(images[part].float() / 16, labels[part]) for part in (slice(0, 500), slice(500, 900)))

    def digits(weight_decay: float) -> tuple[Any, ...]:
        trainer = make_trainer([WeightDecay(weight_decay, summary=False)], max_epochs=5)
        return trainer, Digits(lr=1e-3), DataLoader(train, 25, shuffle=True), DataLoader(val, 400)

    with pytest.warns(UserWarning, match=r"eta \* T = 0\.1") if bounds else contextlib.nullcontext():
        result = search_weight_decay(digits, trials=5, seeds=2, progress=False, **bounds)
    zero = [run.value for run in next(trial for trial in result.trials if trial.weight_decay == 0).runs]
    values = {trial.weight_decay: [run.value for run in trial.runs] for trial in result.trials}
    assert result.weight_decay == 0 or values[result.weight_decay] != zero
    if bounds:
        assert result.remark is not None
        assert "does not" in result.remark
    else:
        assert result.lr_steps == pytest.approx(0.1)
        gain = 1 - np.mean(values[result.weight_decay]) / np.mean(zero)
        assert gain >= 0.01 or "does not help" in result.remark


def test_digits_with_few_samples() -> None:
    """The suggested lambda's test error is not above that of any value of the grid beyond noise."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    split = TensorDataset(torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order]))
    train, val, test = (
        DataLoader(torch.utils.data.Subset(split, range(*ends)), batch_size=batch, shuffle=batch == 50)
        for ends, batch in (((0, 200), 50), ((200, 500), 300), ((500, len(labels)), 2000))
    )
    errors: dict[float, list[float]] = {}

    def fit_and_test(weight_decay: float) -> tuple[Any, ...]:
        class Testing(pl.Callback):
            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                x, y = (tensor.to(pl_module.device) for tensor in next(iter(test)))
                with torch.no_grad():
                    wrong = (pl_module.layers(x).argmax(1) != y).double().mean()
                errors.setdefault(weight_decay, []).append(float(wrong))

        trainer = make_trainer([WeightDecay(weight_decay, summary=False), Testing()], max_epochs=12)
        return trainer, Digits(), train, val

    result = search(fit_and_test, low=1e-4, high=10.0, first=1e-2, trials=8, seeds=3, prune=False)
    means = {weight_decay: np.mean(values) for weight_decay, values in errors.items()}
    # a binomial standard error of the test set, and the spread between seeds, both small against the range
    noise = math.sqrt(means[result.weight_decay] / 1297) + np.std(errors[result.weight_decay]) / math.sqrt(3)
    assert means[result.weight_decay] <= min(means.values()) + 2 * noise
    assert max(means.values()) > means[result.weight_decay] + 4 * noise, "the choice matters"
    assert result.best.weight_decay <= result.weight_decay < 10.0


def noam(step: int) -> float:
    """The Transformer's: 10 steps of warm-up to 0.05, then the inverse square root, of a base of 1."""
    return 0.05 * min((step + 1) / 10, math.sqrt(10 / (step + 1)))


@pytest.mark.parametrize(
    ("trainer", "module", "loader", "expected"),
    [
        ({"max_epochs": 5}, {}, batches(6), 0.1 * 30),
        ({"max_steps": 7, "max_epochs": -1}, {}, batches(6), 0.1 * 7),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, {}, batches(6), 0.1 * 4),
        ({"max_epochs": 2, "limit_train_batches": 3}, {}, batches(6), 0.1 * 6),
        ({"max_steps": 7, "max_epochs": -1}, {}, stream(6), 0.1 * 7),
        # unknown lengths
        ({"max_epochs": 2}, {}, stream(6), None),
        ({"max_epochs": -1}, {}, batches(6), None),
        # schedules: the peak counts
        ({}, {"scheduler": lambda o: schedulers.OneCycleLR(o, 0.4, total_steps=30)}, batches(30), 0.4 * 30),
        ({}, {"scheduler": lambda o: schedulers.LambdaLR(o, noam), "base": 1.0}, batches(30), 0.05 * 30),
        ({}, {"scheduler": lambda o: schedulers.CosineAnnealingLR(o, 30)}, batches(30), 0.1 * 30),
        (
            {"max_epochs": 3},
            {"scheduler": lambda o: schedulers.StepLR(o, 1, 2.0), "interval": "epoch"},
            batches(4),
            0.4 * 12,
        ),
    ],
)
def test_the_peak_times_the_steps(trainer: dict, module: dict, loader: Any, expected: float | None) -> None:
    options = {"max_epochs": 1, **trainer}
    base = module.pop("base", 0.1)
    found = look(make_trainer(**options), Net(lambda p: torch.optim.SGD(p, lr=base), **module), loader)
    assert found == ({} if expected is None else {"lr_steps": pytest.approx(expected, rel=1e-6)})


def test_decay_that_is_independent_of_the_learning_rate() -> None:
    trainer = make_trainer([WeightDecay(0.1, apply="independent", summary=False)], max_epochs=5)
    assert look(trainer, Net(), batches(6)) == {"lr_steps": 30.0}


def test_nothing_trains_and_nobody_is_told() -> None:
    seen: list[str] = []

    class Spy(pl.Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            seen.append("sanity check")

        def on_train_start(self, *_: Any) -> None:
            seen.append("training")

    class Watched(ValidatedNet):
        def on_fit_start(self) -> None:
            self.logger.log_metrics({"anything": 1.0})

    logger = pl.loggers.logger.DummyLogger()
    logger.log_metrics = lambda *_: seen.append("logger")  # type: ignore[assignment]
    look(make_trainer([Spy()], logger=logger), Watched(), data(), data())
    assert seen == []


def sgd(weight_decay: float, lr: float = 0.1, epochs: int = 1, values: list[float] | None = None) -> tuple[Any, ...]:
    if values is not None:
        values.append(weight_decay)
    trainer = make_trainer([WeightDecay(weight_decay, summary=False)], max_epochs=epochs)
    return trainer, ValidatedNet(lambda p: torch.optim.SGD(p, lr=lr)), data(), data()


def test_the_range_of_a_search_follows() -> None:
    """SGD(lr=0.1) for 3 epochs of 8 batches: eta T = 2.4."""
    result = search_weight_decay(functools.partial(sgd, epochs=3), trials=3, seeds=1, progress=False)
    assert result.lr_steps == pytest.approx(2.4)
    tried = sorted(trial.weight_decay for trial in result.trials)
    assert tried == pytest.approx([0.0, 0.01 / 2.4, math.sqrt(0.1) / 2.4, 10 / 2.4], rel=1e-2)
    row = next(row for row in result.rows() if row["weight_decay"] == tried[3])
    assert row["eta_lambda_T"] == pytest.approx(10.0, rel=1e-2)
    assert "eta*lambda*T" in result.table()


def test_a_range_that_does_nothing_is_told_before_it_trains() -> None:
    values: list[float] = []
    told = r"eta \* lambda \* T = 0\.008 for the largest lambda, 0\.1, with eta \* T = 0\.08: .* up to high=1\.2e\+02"
    with pytest.warns(UserWarning, match=told):
        search_weight_decay(
            functools.partial(sgd, lr=0.01, values=values), low=1e-5, high=0.1, trials=1, seeds=1, progress=False
        )
    assert len(values) == 3, "looked at, and two trials"
    assert search_weight_decay(sgd, low=1e-3, high=0.1, trials=1, seeds=1, progress=False).lr_steps == pytest.approx(
        0.8
    )


def test_where_it_cant_be_known_the_range_is_the_usual_one_and_it_is_told() -> None:
    def endless(weight_decay: float) -> tuple[Any, ...]:
        trainer = make_trainer([WeightDecay(weight_decay, summary=False)], max_epochs=2)
        return trainer, ValidatedNet(), stream(4), data()

    with pytest.warns(UserWarning, match=r"lambda is searched from 1e-05 to 0\.1\. Give `low` and `high`"):
        result = search_weight_decay(endless, trials=3, seeds=1, progress=False)
    assert sorted(trial.weight_decay for trial in result.trials) == [0.0, 1e-5, 1e-3, 1e-1]
    search_weight_decay(endless, low=1e-3, high=1.0, trials=1, seeds=1, progress=False)
