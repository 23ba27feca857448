"""What is logged for a step is what that step used: lambda, penalty and the norms of the forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_l2 import L2NormMonitor, L2Penalty, WeightDecay, WeightDecayScheduler
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DECAYED, EXEMPT, Net, Shrinking, data, make_trainer


class Rows(Logger):
    """Keeps what it is given: one dict a step label."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict[str, float]]] = []

    name, version = "rows", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.calls.append((step, dict(metrics)))

    def of(self, key: str) -> dict[int, float]:
        """step label -> value; one row a step, never two that differ."""
        found: dict[int, float] = {}
        for step, metrics in self.calls:
            if key in metrics:
                assert found.get(step, metrics[key]) == metrics[key], f"two values of {key} at step {step}"
                found[step] = metrics[key]
        return found

    def logged(self) -> set[str]:
        return {key for _, metrics in self.calls for key in metrics}


class Recording(Net):
    """Keeps the weights, in float64, that the first forward pass of each optimizer step used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.used: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.updates: list[dict[str, torch.Tensor]] = []
        self.lambdas: list[dict[str, float]] = []
        self.window = True

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().double().clone() for name, p in self.named_parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.window:
            self.used.append(self.snapshot())
            self.window = False
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        names = {id(p): name for name, p in self.named_parameters()}

        def after(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self.window = True
            self.updates.append({k: v - self.used[-1][k] for k, v in self.snapshot().items()})
            parts = decay_groups(opt).groups
            self.lambdas.append({names[id(p)]: part.weight_decay for part in parts for p in part.params})

        optimizer.register_step_post_hook(after)
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append({name: p.grad.detach().double().clone() for name, p in self.named_parameters()})


def norm(tensors: list[torch.Tensor]) -> float:
    return float(np.sqrt(sum(float(t.square().sum()) for t in tensors)))


def run(callbacks: list[pl.Callback], log_every: int = 1, **options: Any) -> tuple[Recording, Rows, pl.Trainer]:
    model, rows = Recording(), Rows()
    trainer = make_trainer(callbacks, logger=rows, log_every_n_steps=log_every, **options)
    trainer.fit(model, data(samples=40))
    return model, rows, trainer


def ours(monitor: L2NormMonitor | None = None) -> list[pl.Callback]:
    return [
        WeightDecay(0.2, summary=False),
        WeightDecayScheduler(LinearSchedule(start=0.5, end=2.0)),
        monitor or L2NormMonitor(),
    ]


def assert_rows(actual: dict[int, float], expected: dict[int, float]) -> None:
    assert actual.keys() == expected.keys()
    for step, value in expected.items():
        assert actual[step] == pytest.approx(value, rel=1e-6, abs=1e-12), step


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize(("accumulate", "epochs", "steps"), [(1, 1, 10), (3, 2, 8)])
def test_lambda_penalty_and_norms_of_each_step(
    order: tuple[int, ...], accumulate: int, epochs: int, steps: int
) -> None:
    callbacks = [ours()[i] for i in order]
    model, rows, _ = run(callbacks, accumulate_grad_batches=accumulate, max_epochs=epochs)
    every = range(steps)
    expected = {t: 0.2 * (0.5 + 1.5 * t / (steps - 1)) for t in every}
    assert_rows({t: model.lambdas[t]["head.weight"] for t in every}, expected)
    assert_rows(rows.of("weight_decay/decay"), expected)
    assert_rows(rows.of("weight_decay/no_decay"), dict.fromkeys(every, 0.0))
    squares = {t: sum(float(model.used[t][n].square().sum()) for n in DECAYED) for t in every}
    assert_rows(rows.of("l2_penalty/decay"), {t: expected[t] / 2 * squares[t] for t in every})
    assert_rows(rows.of("l2_penalty/total"), {t: expected[t] / 2 * squares[t] for t in every})
    assert_rows(rows.of("l2_norm/total"), {t: norm(list(model.used[t].values())) for t in every})
    assert_rows(
        rows.of("l2_norm/body.0"),
        {t: norm([model.used[t]["body.0.weight"], model.used[t]["body.0.bias"]]) for t in every},
    )


@pytest.mark.parametrize("every", [1, 3, 4])
@pytest.mark.parametrize("own", [False, True], ids=["cadence-of-the-trainer", "cadence-of-its-own"])
def test_cadence(every: int, own: bool) -> None:
    """Rows stand where the Trainer's own rows stand: steps n-1, 2n-1, ..."""
    monitor = L2NormMonitor(every_n_steps=every) if own else L2NormMonitor()
    model, rows, _ = run(ours(monitor), log_every=1 if own else every)
    logged = [t for t in range(10) if (t + 1) % every == 0]
    assert_rows(rows.of("l2_norm/total"), {t: norm(list(model.used[t].values())) for t in logged})
    assert_rows(rows.of("weight_decay/decay"), {t: model.lambdas[t]["head.weight"] for t in logged})


PER: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, float]]] = {
    "parameter": lambda w: {name: norm([w[name]]) for name in w},
    "module": lambda w: {part: norm([w[f"{part}.weight"], w[f"{part}.bias"]]) for part in ("body.0", "body.1", "head")},
    "group": lambda w: {"decay": norm([w[n] for n in DECAYED]), "no_decay": norm([w[n] for n in EXEMPT])},
    "total": lambda w: {},
}


@pytest.mark.parametrize("per", PER)
def test_granularity(per: str) -> None:
    model, rows, trainer = run(ours(L2NormMonitor(per=per, gradients=True, updates=True)))
    for prefix, tensors in (("l2_norm", model.used), ("grad_norm", model.gradients), ("update_norm", model.updates)):
        for t in range(10):
            expected = {**PER[per](tensors[t]), "total": norm(list(tensors[t].values()))}
            for label, value in expected.items():
                assert rows.of(f"{prefix}/{label}")[t] == pytest.approx(value, rel=1e-5, abs=1e-9), (label, t)
        labels = {key.removeprefix(f"{prefix}/") for key in rows.logged() if key.startswith(f"{prefix}/")}
        assert labels == {*PER[per](tensors[0]), "total"}
    for label, value in PER[per](model.updates[4]).items():
        ratio = value / PER[per](model.used[4])[label]
        assert rows.of(f"update_ratio/{label}")[4] == pytest.approx(ratio, rel=1e-4, abs=1e-9)
    assert trainer.callback_metrics["l2_norm/total"] == pytest.approx(norm(list(model.used[9].values())), rel=1e-6)


def test_logged_penalty_is_what_the_loss_term_adds() -> None:
    """The penalty of the L2Penalty run, logged by the monitor, is the loss it was trained with minus the data loss."""

    class Both(Recording):
        def __init__(self) -> None:
            super().__init__(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))

    model, rows = Both(), Rows()
    callbacks = [WeightDecay(0.2, summary=False), L2NormMonitor()]
    make_trainer(callbacks, logger=rows, log_every_n_steps=1).fit(model, data(samples=40))
    for t, value in rows.of("l2_penalty/total").items():
        reference = 0.2 / 2 * sum(model.used[t][n].square().sum() for n in DECAYED)
        assert value == pytest.approx(float(reference), rel=1e-6)


def test_penalty_callback_adds_the_gradient_of_the_logged_penalty() -> None:
    """d/dw of lambda/2 ||w||^2 is lambda w, in the gradient the optimizer steps with."""
    grads: list[dict[str, torch.Tensor]] = []

    class Gradients(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(
                lambda *a: grads.append({n: p.grad.cpu().clone() for n, p in self.named_parameters()})
            )
            return optimizer

    def run_one(callbacks: list[pl.Callback]) -> Gradients:
        torch.manual_seed(0)
        model = Gradients(lambda params: torch.optim.SGD(params, lr=0.0))
        make_trainer(callbacks, max_steps=1).fit(model, data())
        return model

    model = run_one([])
    run_one([L2Penalty(0.2)])
    plain, penalised = grads
    for name, p in model.named_parameters():
        expected = plain[name] + (0.2 * p.detach() if name in DECAYED else 0.0)
        torch.testing.assert_close(penalised[name], expected, rtol=1e-6, atol=1e-7)


def test_rows_reach_a_csv_file(tmp_path: Path) -> None:
    model = Net()
    logger = CSVLogger(tmp_path)
    make_trainer(ours(), logger=logger, log_every_n_steps=2).fit(model, data())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    column = header.index("weight_decay/decay")
    steps = [(int(row.split(",")[header.index("step")]), row.split(",")[column]) for row in lines[1:]]
    logged = {step: float(value) for step, value in steps if value}
    assert_rows(logged, {t: 0.2 * (0.5 + 1.5 * t / 7) for t in (1, 3, 5, 7)})


def test_two_optimizers_have_rows_of_their_own() -> None:
    class Manual(Shrinking):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            make = torch.optim.SGD
            return [
                make(self.body.parameters(), lr=0.1, weight_decay=0.1),
                make(self.head.parameters(), lr=0.1, weight_decay=0.3),
            ]

    rows = Rows()
    callbacks = [WeightDecay(summary=False), L2NormMonitor(), LearningRateMonitor(log_weight_decay=True)]
    make_trainer(callbacks, logger=rows, log_every_n_steps=1).fit(Manual(), data())
    decays = {key: set(rows.of(key).values()) for key in rows.logged() if key.startswith("weight_decay/")}
    assert sorted(next(iter(values)) for values in decays.values()) == [0.0, 0.0, 0.1, 0.3], decays
    for key, (value,) in decays.items():
        assert key.endswith("no_decay") == (value == 0.0), key


def test_group_names_are_prefixed_only_where_they_would_clash() -> None:
    def groups(module: Any) -> list[dict[str, Any]]:
        return [
            {"params": module.body.parameters(), "name": "body"},
            {"params": module.head.parameters(), "name": "head", "weight_decay": 0.7},
        ]

    rows = Rows()
    make_trainer([WeightDecay(summary=False), L2NormMonitor()], logger=rows, log_every_n_steps=1).fit(
        Net(grouped=groups), data()
    )
    found = {
        key.removeprefix("weight_decay/"): rows.of(key)[0] for key in rows.logged() if key.startswith("weight_decay/")
    }
    assert sorted(found.values()) == [0.0, 0.0, 0.1, 0.7], found
    for name, value in found.items():
        parent = "body" if value == 0.1 else "head"
        assert value == 0.0 or (name.startswith(parent) and name.endswith("decay")), found
        assert name.endswith("no_decay") == (value == 0.0), found
