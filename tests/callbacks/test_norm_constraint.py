"""Norm constraints in real Trainers."""

import copy
import itertools
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2.callbacks.norm_constraint import NormConstraint
from lightning_l2.callbacks.weight_decay import WeightDecay
from lightning_l2.constraints import Bound, FixedBound, InflectionBound, InitialBound, RmsBound, WarmupBound
from lightning_l2.optimizers.step_hook import StepHook
from lightning_l2.optimizers.turns import Turn
from lightning_l2.rules import DecayRule
from tests.helpers import DECAYED, DEVICE, EXEMPT, Net, assert_same_weights, batches, data, make_trainer, weights
from tests.processes import forked
from tests.processes import sharded_norm_constraint as sharded

BOUNDS = [FixedBound(0.8), InitialBound(0.95), WarmupBound(3), InflectionBound(2, 0.5)]


def growing(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


class Blobs(pl.LightningModule):
    """Four classes of points; records accuracy and the largest row norm after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        self.accuracy: list[float] = []
        self.rows: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.layers(batch[0])
        self.accuracy.append((logits.argmax(1) == batch[1]).double().mean().item())
        return nn.functional.cross_entropy(logits, batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        norms = [self.layers[i].weight.detach().double().norm(dim=1).max().item() for i in (0, 2)]
        self.rows.append(max(norms))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def blobs() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (256,), generator=generator)
    centres = torch.randn(4, 8, generator=generator)
    points = centres[labels] + 0.8 * torch.randn(256, 8, generator=generator)
    return DataLoader(TensorDataset(points, labels), batch_size=32)


def test_max_norm_holds_in_every_step_while_training_succeeds() -> None:
    free, bound = Blobs(), Blobs()
    bound.load_state_dict(free.state_dict())
    make_trainer(max_epochs=8).fit(free, blobs())
    make_trainer([NormConstraint(0.6, per="row")], max_epochs=8).fit(bound, blobs())
    assert max(free.rows) > 1.5
    assert len(bound.rows) == 64
    assert max(bound.rows) <= 0.6 * (1 + 1e-6)
    assert bound.accuracy[0] < 0.5
    assert sum(bound.accuracy[-8:]) / 8 > 0.85


@pytest.mark.parametrize("per", ["parameter", "row", "group"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_projection_is_that_of_a_loop_by_hand(accumulate: int, per: Any) -> None:
    """Float64, with accumulation and a short last window; exempt parameters are as without a constraint."""
    model, reference = Net(growing).double(), Net(growing).double()
    reference.load_state_dict(model.state_dict())
    loader = DataLoader(TensorDataset(*(tensor.double() for tensor in data().dataset.tensors)), batch_size=4)
    make_trainer([NormConstraint(0.7, per=per)], accumulate_grad_batches=accumulate).fit(model, loader)

    optimizer, microbatches = reference.configure_optimizers(), list(loader)
    for start in range(0, len(microbatches), accumulate):
        optimizer.zero_grad()
        for batch in microbatches[start : start + accumulate]:
            (reference.training_step(batch, 0) / accumulate).backward()
        optimizer.step()
        with torch.no_grad():
            matrices = [reference.get_parameter(name) for name in DECAYED]
            together = torch.cat([weight.flatten() for weight in matrices]).norm()
            for weight in matrices:
                norm = {"parameter": weight.norm(), "row": weight.norm(dim=1, keepdim=True), "group": together}[per]
                weight *= (0.7 / norm).clamp(max=1.0)
    for name, weight in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], weight, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Rprop, torch.optim.LBFGS, torch.optim.Adagrad])
def test_any_optimizer(optimizer: Any) -> None:
    model = Net(lambda params: optimizer(params, lr=0.1))
    make_trainer([NormConstraint(0.5)]).fit(model, data())
    for name, weight in weights(model).items():
        assert name in EXEMPT or weight.norm() <= 0.5


class Rates(pl.Callback):
    """The weights of `Net` before and after each step, and the learning rate of it."""

    def __init__(self) -> None:
        self.angles: list[float] = []
        self.heads: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        old, new = (each["body.0.weight"].double() for each in (self.before, weights(pl_module)))
        self.angles.append(torch.acos((old * new).sum() / (old.norm() * new.norm())).item())
        self.heads.append(torch.equal(self.before["head.weight"], weights(pl_module)["head.weight"]))


def test_on_the_sphere_norms_stay_and_steps_turn_by_the_learning_rate() -> None:
    """Of hidden layers alone; the angle of a direction that is orthogonal to the weights is atan eta."""
    model, rates = Net(lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.0)), Rates()
    start = weights(model)
    trainer = make_trainer([NormConstraint(None, method="sphere"), rates], log_every_n_steps=1)
    trainer.fit(model, data())
    after = weights(model)
    assert after["body.0.weight"].norm().item() == pytest.approx(start["body.0.weight"].norm().item(), rel=1e-6)
    assert rates.angles == pytest.approx([0.02] * 8, rel=0.1)
    assert after["head.weight"].norm().item() != pytest.approx(start["head.weight"].norm().item(), rel=1e-3)
    assert not any(rates.heads)
    bound = trainer.callback_metrics["norm_constraint/bound"].item()
    assert bound == pytest.approx(start["body.0.weight"].norm().item(), rel=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_decay_on_the_sphere_is_told_once_and_exempt_weights_are_not(order: int) -> None:
    def fit(rules: Any) -> None:
        callbacks = [NormConstraint(None, method="sphere"), WeightDecay(0.25, rules=rules, summary=False)][::order]
        make_trainer(callbacks).fit(Net(growing), data())

    with pytest.warns(UserWarning, match=r"^The weight decay of 0\.25 in group 'decay' has no effect to") as told:
        fit("default")
    assert len([one for one in told if "sphere" in str(one.message)]) == 1
    fit([DecayRule("body", pattern=r"^body\.0\.weight", weight_decay=0.0), "default"])


def test_own_rules_decide() -> None:
    rules: Any = [DecayRule("head", pattern=r"^head\.weight", weight_decay=0.0), "default"]
    model = Net(growing)
    make_trainer([NormConstraint(0.1, rules=rules)]).fit(model, data())
    assert model.body[0].weight.norm() <= 0.1
    assert model.head.weight.norm() > 0.5


class Manual(Net):
    """Two optimizers of different cadence; one is stepped past Lightning's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[tuple[bool, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2 == 1:
            second.step()
        if batch_idx >= 2:
            first.optimizer.step()
        self.seen.append((bool(self.body[0].weight.norm() <= 0.2), bool(self.head.weight.norm() <= 0.2)))

    def configure_optimizers(self) -> Any:
        return growing(self.body.parameters()), growing(self.head.parameters())


def test_manual_optimization() -> None:
    """Each optimizer's parameters are projected from its own first step on."""
    model = Manual()
    make_trainer([NormConstraint(0.2)]).fit(model, batches(4))
    assert model.seen == [(False, False), (False, True), (True, True), (True, True)]


@pytest.mark.parametrize("order", [1, -1])
def test_groups_are_those_that_weight_decay_makes(order: int) -> None:
    """Whichever callback comes first; the bound is that of the weights before the first step."""
    rules: Any = [DecayRule("head", pattern=r"^head\.weight", multiplier=0.5), "default"]
    model = Net(growing)
    start = {name: weights(model)[name].norm().item() for name in DECAYED}
    constraint = NormConstraint(InitialBound(0.5), per="group", rules=rules, log_each=True)
    decay = WeightDecay(0.1, rules=rules, summary=False)
    make_trainer([constraint, decay][::order], log_every_n_steps=1).fit(model, data())
    state = constraint.state_dict()["parameters"]
    assert {name: values["reference"] for name, values in state.items()} == pytest.approx(start, rel=1e-6)
    for name in DECAYED:
        assert weights(model)[name].norm().item() <= 0.5 * start[name] * (1 + 1e-6)


def test_late_groups() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.body)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.3)

    model = Net(lambda params: growing([p for p in model.parameters() if p.requires_grad]))
    start = {name: weights(model)[name].norm().item() for name in DECAYED}
    constraint = NormConstraint(InitialBound(0.5))
    make_trainer([Unfreeze(), constraint], max_epochs=2).fit(model, data())
    state = constraint.state_dict()["parameters"]
    assert {name: values["reference"] for name, values in state.items()} == pytest.approx(start, rel=1e-6)
    for name in DECAYED:
        assert weights(model)[name].norm().item() <= 0.5 * start[name] * (1 + 1e-6)


class LazyNet(Net):
    def __init__(self, manual: bool = False) -> None:
        super().__init__(growing)
        self.body = nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8), nn.Tanh())
        self.materialised: float | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.materialised is None:
            self.materialised = self.body[0].weight.detach().norm().item()
        return loss


def test_lazy_parameters() -> None:
    model = LazyNet()
    constraint = NormConstraint(InitialBound(0.5))
    make_trainer([constraint]).fit(model, data())
    reference = constraint.state_dict()["parameters"]["body.0.weight"]["reference"]
    assert reference == pytest.approx(model.materialised, rel=1e-6)
    assert model.body[0].weight.norm().item() <= 0.5 * reference


def test_lazy_parameters_that_nothing_constrains_are_refused_before_the_first_step() -> None:
    model = LazyNet()
    start = model.head.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match="nothing to constrain"):
        make_trainer([NormConstraint(0.5, rules=everything_exempt())]).fit(model, data())
    assert torch.equal(model.head.weight, start)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("method", ["projection", "sphere"])
def test_lazy_parameters_resume(method: Any, tmp_path: Path) -> None:
    """The module is materialised before its checkpoint can be loaded."""
    path = tmp_path / "middle.ckpt"
    whole, resumed = LazyNet(), LazyNet()
    constraint = NormConstraint(InitialBound(0.5), method=method)
    make_trainer([constraint, SaveAt(2, path)]).fit(whole, batches(4))
    resumed(torch.zeros(1, 4))
    make_trainer([NormConstraint(InitialBound(0.5), method=method)]).fit(resumed, batches(4), ckpt_path=path)
    assert_same_weights(resumed, whole)


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("bound", "per", "method"),
    [
        *itertools.product(BOUNDS, ["parameter", "group"], ["projection", "lagrangian"]),
        *itertools.product([None, RmsBound(0.3)], ["parameter", "row", "group"], ["sphere"]),
        (InitialBound(0.95), "row", "projection"),
    ],
    ids=str,
)
def test_resume_is_the_uninterrupted_run(bound: Bound | None, per: Any, method: Any, tmp_path: Path) -> None:
    """Bit for bit, in the middle of an epoch, from a checkpoint that holds nothing but plain values."""

    def constraint() -> NormConstraint:
        rules: Any = [DecayRule("head", pattern=r"head\.weight"), "default"]
        return NormConstraint(bound, method=method, per=per, rules=rules)

    path = tmp_path / "middle.ckpt"
    whole, first = Net(growing), constraint()
    make_trainer([first, SaveAt(6, path)], max_epochs=4).fit(whole, batches(4))
    content = torch.load(path, weights_only=True)
    state = content["callbacks"][first.state_key]["parameters"]
    if not isinstance(bound, FixedBound | RmsBound) or method == "lagrangian":
        assert set(state) == DECAYED
    resumed, second = Net(growing), constraint()
    make_trainer([second], max_epochs=4).fit(resumed, batches(4), ckpt_path=path, weights_only=True)
    assert_same_weights(resumed, whole)
    assert second.state_dict() == first.state_dict()
    if isinstance(bound, InflectionBound):
        values = second.state_dict()["parameters"].values()
        assert all(quantities["steps"] == 16 for quantities in values)


@pytest.mark.parametrize("change", [{"per": "group"}, {"bound": WarmupBound(5)}])
def test_another_kind_of_constraint_starts_anew(change: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer([NormConstraint(InitialBound())])
    trainer.fit(Net(growing), batches(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    constraint = NormConstraint(**{"bound": InitialBound(), **change})
    with pytest.warns(UserWarning, match=r"constraint had a InitialBound per parameter, this one has .*start anew"):
        make_trainer([constraint], max_epochs=2).fit(Net(growing), batches(4), ckpt_path=tmp_path / "a.ckpt")
    assert set(constraint.state_dict()["parameters"]) == DECAYED


def test_an_edited_factor_acts_on_the_remembered_norm(tmp_path: Path) -> None:
    model = Net(growing)
    start = weights(model)["head.weight"].norm().item()
    trainer = make_trainer([NormConstraint(InitialBound(1.0))])
    trainer.fit(model, batches(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    make_trainer([NormConstraint(InitialBound(0.5))], max_epochs=2).fit(
        model, batches(4), ckpt_path=tmp_path / "a.ckpt"
    )
    assert model.head.weight.norm().item() == pytest.approx(0.5 * start, rel=3e-6)


def read_csv(logger: CSVLogger) -> list[dict[str, float]]:
    import csv

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


class NormsAfterTheOptimizer(pl.Callback):
    """Takes the norms between the optimizer's update and the constraint, in the turn before that."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.norms = norms = []

        class Take(StepHook):
            turn = Turn.DECAY

            def after_update(self) -> None:
                norms.append({name: weights(pl_module)[name].double().norm().item() for name in DECAYED})

        Take(trainer.optimizers[0], "the test")


def test_logged_values(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    witness, model = NormsAfterTheOptimizer(), Net(growing)
    start = {name: weights(model)[name].double().norm().item() for name in DECAYED}
    constraint = NormConstraint(InitialBound(1.1), method="lagrangian", log_each=True)
    trainer = make_trainer([witness, constraint], logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    trainer.fit(model, data(samples=48))
    rows = read_csv(logger)
    assert [row["step"] for row in rows] == [1, 3, 5]
    multipliers = dict.fromkeys(DECAYED, 0.0)
    for step, norms in enumerate(witness.norms):
        bounds = {name: 1.1 * start[name] for name in DECAYED}
        for name in DECAYED:
            violation = (norms[name] ** 2 - bounds[name] ** 2) / 2
            rate = 4 / model.get_parameter(name).numel()
            multipliers[name] = max(0.0, multipliers[name] + rate * violation)
        if step % 2 == 1:
            slacks = {name: bounds[name] - norms[name] for name in DECAYED}
            expected = {
                "norm_constraint/bound": min(bounds.values()),
                "norm_constraint/slack": min(slacks.values()),
                "norm_constraint/multiplier": max(multipliers.values()),
            }
            for name in DECAYED:
                expected[f"norm_constraint/bound/{name}"] = bounds[name]
                expected[f"norm_constraint/slack/{name}"] = slacks[name]
                expected[f"norm_constraint/multiplier/{name}"] = multipliers[name]
            logged = {key: value for key, value in rows[step // 2].items() if key.startswith("norm_constraint")}
            assert logged == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert max(multipliers.values()) > 0
    monitored = {key for key in trainer.callback_metrics if key.startswith("norm_constraint")}
    assert monitored == {"norm_constraint/bound", "norm_constraint/slack", "norm_constraint/multiplier"}


def test_totals_only_by_default_and_no_infinite_bound(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = [NormConstraint(WarmupBound(3)), NormConstraint(0.5, per="row", name="max_norm", every_n_steps=2)]
    make_trainer(callbacks, logger=logger, log_every_n_steps=1).fit(Net(growing), batches(5))
    keys: dict[int, set[str]] = {}
    for row in read_csv(logger):
        keys.setdefault(int(row["step"]), set()).update(key for key in row if "/" in key)
    own, rows = ({f"{name}/bound", f"{name}/slack"} for name in ("norm_constraint", "max_norm"))
    assert keys == {1: rows, 3: own | rows, 4: own}


def test_at_most_one_transfer_in_a_logging_step_and_none_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tolist` and `item` are what moves values to the host; GPU runs would wait for each."""
    count = {"reads": 0}
    per_batch: list[int] = []

    def counting(method: Any) -> Any:
        def wrapper(tensor: Tensor, *args: Any) -> Any:
            count["reads"] += 1
            return method(tensor, *args)

        return wrapper

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            count["reads"] = 0

        def on_train_batch_end(self, *_: Any) -> None:
            per_batch.append(count["reads"])

    class Last(Watch):
        on_train_batch_start = pl.Callback.on_train_batch_start

    constraint = NormConstraint(WarmupBound(2), method="lagrangian", log_each=True)
    watch = Watch()
    watch.on_train_batch_end = lambda *_: None
    for name in ("tolist", "item", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, counting(getattr(Tensor, name)))
    # what a CPU looks at once more, a device keeps to itself
    monkeypatch.setattr("lightning_l2.norms.squared._seen_again", lambda squares, *_: squares)
    trainer = make_trainer([watch, constraint, Last()], log_every_n_steps=3)
    trainer.fit(Net(growing), batches(7))
    # The branch that reads the factors where that costs nothing, on a CPU, is in each step.
    on_cpu = int(DEVICE == "cpu")
    assert per_batch[1:] == [on_cpu, on_cpu + 1, on_cpu, on_cpu, on_cpu + 1, on_cpu]


def test_copies_pickles_and_a_second_fit() -> None:
    constraint = NormConstraint(InitialBound(1.2), method="lagrangian")
    first, second, third = Net(growing), Net(growing), Net(growing)
    for other in (second, third):
        other.load_state_dict(first.state_dict())
    trainer = make_trainer([constraint])
    trainer.fit(first, data())
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    make_trainer([constraint]).fit(second, data())
    assert_same_weights(second, first)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(constraint)))
    assert copied.state_dict() == constraint.state_dict()
    make_trainer([copied]).fit(third, data())
    assert_same_weights(third, first)


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_kept_after_fit(fail: bool) -> None:
    constraint = NormConstraint(InitialBound(), method="lagrangian")

    def fit() -> list[weakref.ref[Any]]:
        model = Net(growing)
        trainer = make_trainer([constraint])
        if fail:
            model.on_train_batch_end = lambda *_: 1 / 0
            with pytest.raises(ZeroDivisionError):
                trainer.fit(model, data())
        else:
            trainer.fit(model, data())
        optimizer = trainer.optimizers[0]
        assert not optimizer._optimizer_step_post_hooks
        return [weakref.ref(model), weakref.ref(trainer), weakref.ref(optimizer)]

    import gc

    references = fit()
    # Lightning's own: it gives every callback the module's log methods, and never takes them back.
    vars(constraint).pop("log", None)
    vars(constraint).pop("log_dict", None)
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    assert set(constraint.state_dict()["parameters"]) == DECAYED


def test_checkpoint_callback_can_monitor(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="norm_constraint/slack", mode="max", every_n_train_steps=2)
    callbacks = [NormConstraint(0.5), checkpoint]
    make_trainer(callbacks, enable_checkpointing=True, log_every_n_steps=1).fit(Net(growing), batches(4))
    assert checkpoint.best_model_score is not None


def test_early_stopping_can_monitor_before_the_first_logged_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    stopping = EarlyStopping("norm_constraint/slack", mode="max", check_on_train_epoch_end=True)
    trainer = make_trainer([NormConstraint(0.5), stopping], logger=logger, log_every_n_steps=50)
    trainer.fit(Net(growing), batches(4))
    assert stopping.best_score.item() == trainer.callback_metrics["norm_constraint/slack"].item() != 0
    assert not (Path(logger.log_dir) / "metrics.csv").exists()


def test_early_stopping_can_monitor_lazy_parameters_within_the_first_window() -> None:
    """A validation after the first batch, whose forward pass has given them their shapes."""

    class Validated(LazyNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    stop = EarlyStopping("norm_constraint/slack", check_on_train_epoch_end=False, patience=99)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 0}
    trainer = make_trainer([NormConstraint(9.0), stop], max_steps=1, **options)
    model = Validated()
    trainer.fit(model, batches(4), batches(1))
    largest = max(model.body[0].weight.detach().norm().item(), model.head.weight.detach().norm().item())
    assert trainer.callback_metrics["norm_constraint/slack"].item() == pytest.approx(9.0 - largest, rel=1e-6)


def test_nothing_is_logged_or_monitored_at_every_0_steps() -> None:
    trainer = make_trainer([NormConstraint(0.5, every_n_steps=0)], log_every_n_steps=1)
    trainer.fit(Net(growing), batches(4))
    assert not any("norm_constraint" in key for key in trainer.callback_metrics)


def test_beside_the_learning_rate_finder(tmp_path: Path) -> None:
    """It trains, restores, and trains again: the bounds are those of the restored weights."""
    model = Net(growing)
    model.lr = 0.1
    start = {name: weights(model)[name].norm().item() for name in DECAYED}
    constraint = NormConstraint(InitialBound())
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    make_trainer([finder, constraint], default_root_dir=tmp_path).fit(model, data())
    state = constraint.state_dict()["parameters"]
    assert {name: values["reference"] for name, values in state.items()} == pytest.approx(start, rel=1e-6)


YAML = """
callback:
  class_path: lightning_l2.callbacks.norm_constraint.NormConstraint
  init_args:
    bound: {class_path: lightning_l2.constraints.WarmupBound, init_args: {steps: 100, factor: 1.5}}
    method: lagrangian
    per: group
    rules:
      - {name: head, pattern: "^head", weight_decay: 0.0}
      - default
    update_rate: 0.5
"""


def instantiated(parser: ArgumentParser, config: Any) -> NormConstraint:
    return parser.instantiate(config).callback


def test_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    for text in (YAML, parser.dump(parser.parse_string(YAML))):
        constraint = instantiated(parser, parser.parse_string(text))
        assert (constraint.bound, constraint.method, constraint.per) == (WarmupBound(100, 1.5), "lagrangian", "group")
        assert [rule.name for rule in constraint.rules] == ["head", "no_decay", "decay"]
        assert constraint.update_rate == 0.5

    for bound, expected in (
        ("null", InitialBound()),
        ("{class_path: lightning_l2.constraints.RmsBound, init_args: {rms: 0.02}}", RmsBound(0.02)),
    ):
        text = f"callback: {{class_path: lightning_l2.NormConstraint, init_args: {{bound: {bound}, method: sphere}}}}"
        constraint = instantiated(parser, parser.parse_string(text))
        assert (constraint.bound, constraint.method) == (expected, "sphere")

    line = ["--callback=lightning_l2.NormConstraint", "--callback.bound=3", "--callback.per=row"]
    constraint = instantiated(parser, parser.parse_args(line))
    assert (constraint.bound, constraint.per) == (FixedBound(3.0), "row")


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(NormConstraint, "constraint")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    entries = capsys.readouterr().out.split("  --constraint.")
    for name in ("bound", "method", "per", "rules", "update_rate", "every_n_steps", "log_each", "name"):
        described = [entry for entry in entries if re.match(rf"{name}\b[^.]", entry)]
        assert re.search(r"\s[A-Z`$].{15,}\(", described[0], re.DOTALL), described


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": -1.0}, "Expected `bound` to be finite and above 0, got -1.0."),
        ({"bound": float("nan")}, "Expected `bound` to be finite and above 0, got nan."),
        (
            {"bound": None},
            "Expected `bound` to be a number or a Bound, got None. Only method='sphere' needs none.",
        ),
        ({"bound": True}, "NormConstraint needs `bound` to be float | Bound | None, but got True of type bool."),
        ({"method": "clip"}, "Expected `method` to be 'projection', 'lagrangian' or 'sphere', got 'clip'."),
        ({"every_n_steps": -1}, "Expected `every_n_steps` to be at least 0, got -1."),
        ({"name": ""}, "Expected `name` to be the prefix of the logged keys, got ''. Leave it out, or give one."),
        ({"per": "layer"}, "Expected `per` to be 'parameter', 'row' or 'group', got 'layer'."),
        (
            {"per": "row", "method": "lagrangian"},
            "per='row' takes 'projection' or 'sphere' as method and a bound that is known at the start, got "
            "AugmentedLagrangian(update_rate=1.0) and FixedBound(norm=1.0). Use per='parameter' or 'group' for bounds "
            "and multipliers that change.",
        ),
        (
            {"per": "row", "bound": WarmupBound(2)},
            "per='row' takes 'projection' or 'sphere' as method and a bound that is known at the start, got "
            "Projection() and WarmupBound(steps=2, factor=1.0). Use per='parameter' or 'group' for bounds and "
            "multipliers that change.",
        ),
        (
            {"method": "sphere", "bound": WarmupBound(2)},
            "A sphere has its radius from the start on, got WarmupBound(steps=2, factor=1.0). Use None, a number, "
            "InitialBound or RmsBound.",
        ),
        (
            {"update_rate": 2.0},
            "`update_rate` goes with method='lagrangian' only, got method='projection'. Leave it out.",
        ),
        (
            {"update_rate": 0.0, "method": "lagrangian"},
            "Expected `update_rate` to be finite and above 0, got 0.0.",
        ),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        NormConstraint(**{"bound": 1.0, **options})


class NoOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return None


class Foreign(Net):
    def configure_optimizers(self) -> Any:
        return growing([nn.Parameter(p.detach().clone()) for p in self.parameters()])


class ZeroHead(Net):
    def __init__(self) -> None:
        super().__init__(growing)
        nn.init.zeros_(self.head.weight)


def everything_exempt() -> Any:
    return [DecayRule("none", weight_decay=0.0)]


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (
            NoOptimizer,
            {},
            MisconfigurationException,
            "`configure_optimizers` returned None. Return one, or remove Norm",
        ),
        (Foreign, {}, MisconfigurationException, "None of the optimizers' parameters are the module's"),
        (Net, {"rules": everything_exempt()}, MisconfigurationException, "its rules exempt all 6 parameters of the"),
        (Net, {"rules": [DecayRule("x", pattern="tail"), "default"]}, ValueError, "matched no parameter"),
        (ZeroHead, {"bound": InitialBound()}, RuntimeError, "makes the bound of 'head.weight' 0"),
        (Net, {"bound": 0.01, "method": "lagrangian", "update_rate": 50.0}, RuntimeError, "turns them around"),
        (
            ZeroHead,
            {"method": "sphere", "rules": [DecayRule("head", pattern=r"^head\.weight"), "default"]},
            RuntimeError,
            "The weights of 'head.weight' have a norm of 0",
        ),
    ],
)
def test_misuse_is_an_error_before_the_first_step(model: Any, options: dict[str, Any], kind: Any, message: str) -> None:
    module = model()
    before = weights(module)
    with pytest.raises(kind, match=re.escape(message)):
        make_trainer([NormConstraint(**{"bound": 1.0, **options})]).fit(module, data())
    assert_same_weights(module, before)


def test_deepspeed_is_refused() -> None:
    class DeepSpeedStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    trainer = make_trainer([NormConstraint(1.0)], accelerator="cpu", strategy=DeepSpeedStrategy())
    with pytest.raises(
        MisconfigurationException, match=r"^DeepSpeed overwrites the parameters .* Use DDP, FSDP or Mod"
    ):
        trainer.fit(Net(), data())


def test_sharded_weights_are_constrained_as_whole_ones(tmp_path: Path) -> None:
    """FSDP2, cut by rows and across them, FSDP1 and DDP, in two processes; resumed from a sharded checkpoint too."""
    forked.ranks(sharded.work, tmp_path)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 20
    for name, result in results[0].items():
        kind = name.split("-")[-1]
        alone = sharded.Net()
        _, constraint = sharded.train(alone, kind, 4)
        state = constraint.state_dict()["parameters"]
        for parameter, expected in sharded.whole(alone).items():
            torch.testing.assert_close(result["weights"][parameter], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(result["weights"][parameter], results[1][name]["weights"][parameter])
        assert len(result["logged"]) == 4
        for logged, expected_log in zip(result["logged"], alone.logged, strict=True):
            assert logged == pytest.approx(expected_log, abs=1e-5)
        assert result["logged"] == results[1][name]["logged"]
        assert result["state"] == results[1][name]["state"]
        assert result["state"].keys() == state.keys()
        for parameter, values in state.items():
            for key, value in values.items():
                assert result["state"][parameter][key] == pytest.approx(value, rel=1e-5)
        if "resumed" in result:
            assert result["resumed"]["state"] == result["state"]
            assert_same_weights(result["resumed"]["weights"], result["weights"])
