"""Nobody can tell that the callbacks are there: groups, checkpoints and logs of others are those of a run without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_l2 import DecayRule, L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import ValidatedNet, assert_same_weights, data, fp16, make_trainer, weights
from tests.spies import Spies, assert_same, checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well"),
    # What Lightning says of any such resume, and of its monitor without a scheduler or beside a rate that is a tensor.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:You are using `LearningRateMonitor` with models that have no learning rate"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor"),
    pytest.mark.filterwarnings("ignore:You have set log_momentum=True, but some optimizers do not have momentum"),
]

# By the rules of `ours`; all other parameters are exempt.
LAMBDAS = {"head.weight": 0.6, "body.0.weight": 0.3}
MakeOptimizer = Callable[..., Optimizer]
MAKERS: dict[str, MakeOptimizer] = {"AdamW": torch.optim.AdamW, "SGD": partial(torch.optim.SGD, momentum=0.9)}


def ours(decay: float, penalty: float = 0.0, bound: float = 1e6, **options: Any) -> list[pl.Callback]:
    rules = [DecayRule("head", pattern=r"^head\.weight$", multiplier=2.0), "default"]
    return [
        WeightDecay(decay, rules=rules, summary=False, **options),
        WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0)),
        L2NormMonitor(every_n_steps=1, gradients=True, updates=True),
        L2Penalty(penalty),
        NormConstraint(bound),
    ]


def halves(module: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(module.body.parameters()), "lr": 0.01}, {"params": list(module.head.parameters())}]


def own_keys(module: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(module.head.parameters()), "name": "top", "lr": 0.03, "note": "mine", "weight_decay": 0.07},
        {"params": list(module.body.parameters()), "name": "bottom", "factors": [1.5, torch.ones(2)]},
    ]


def one_cycle(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)


def sequential(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step), lr_scheduler.CosineAnnealingLR(optimizer, 6)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


class ByHand(ValidatedNet):
    """Of manual optimization."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def look(self, where: str) -> None:
        """What spies put their own in place of."""


class TwoByHand(ByHand):
    """Two optimizers, one stepped by Lightning's wrapper with a closure, the other as it is."""

    def configure_optimizers(self) -> Any:
        optimizers = [self.make_optimizer(part.parameters()) for part in (self.body, self.head)]
        return optimizers, [lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]

    def loss(self, batch: Any, optimizer: Any) -> Tensor:
        optimizer.zero_grad()
        loss = ValidatedNet.training_step(self, batch, 0)
        self.look("module, within a step")
        self.manual_backward(loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        body.step(closure=lambda: self.loss(batch, body))
        self.look("module, between two steps")
        self.loss(batch, head)
        head.optimizer.step()
        self.look("module, after a raw step")
        for scheduler in self.lr_schedulers():
            scheduler.step()


@dataclass(frozen=True)
class Situation:
    """A training as somebody has it; what keeps a state is made anew for each fit."""

    module: type[ValidatedNet] = ValidatedNet
    grouped: Callable[[nn.Module], Any] | None = None
    scheduler: Callable[[Optimizer], Any] | None = None
    lr: Callable[[], Any] = lambda: 0.02
    options: Callable[[], dict[str, Any]] = dict
    resume: str | None = None


def skipping() -> dict[str, Any]:
    return {"plugins": [fp16(init_scale=2.0**20, growth_interval=2)]}


SITUATIONS = {
    "one-group": Situation(),
    "named-parameters": Situation(grouped=lambda module: list(module.named_parameters())),
    "two-groups": Situation(grouped=halves),
    "own-keys": Situation(grouped=own_keys),
    "a-rate-that-is-a-tensor": Situation(lr=lambda: torch.tensor(0.02), scheduler=one_cycle),
    "OneCycleLR": Situation(grouped=halves, scheduler=one_cycle),
    "SequentialLR": Situation(grouped=own_keys, scheduler=sequential),
    "accumulation": Situation(options=lambda: {"accumulate_grad_batches": 3}),
    "clipping": Situation(options=lambda: {"gradient_clip_val": 0.05}),
    "two-manual-optimizers": Situation(TwoByHand),
    "resumed-after-an-epoch": Situation(grouped=halves, scheduler=one_cycle, resume="epoch=0"),
    "resumed-within-an-epoch": Situation(grouped=own_keys, scheduler=sequential, resume="step=6"),
    "fp16-with-skipped-steps": Situation(options=skipping),
    "bf16": Situation(options=lambda: {"precision": "bf16-mixed"}),
}


class Rows(DummyLogger):
    """What LearningRateMonitor logs, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if mine := {key: float(value) for key, value in metrics.items() if key.startswith("lr-")}:
            self.rows.append([step, mine])


class SaveInSteps(pl.Callback):
    """A checkpoint in the midst of the first update and of one in the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.updates = folder, itertools.count()

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if (update := next(self.updates)) in (0, 5):
            trainer.save_checkpoint(self.folder / f"midst-{update}.ckpt")


@dataclass
class Run:
    """A fit and what all others could see of it."""

    folder: Path
    spies: Spies = field(default_factory=Spies)
    rows: Rows = field(default_factory=Rows)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def fit(
        self, model: pl.LightningModule, callbacks: list[pl.Callback], watched: bool = True, **options: Any
    ) -> None:
        saving = [
            ModelCheckpoint(self.folder, "{step}", every_n_train_steps=3, save_top_k=-1),
            ModelCheckpoint(self.folder, "{epoch}", every_n_epochs=1, save_top_k=-1),
        ]
        monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
        others = [monitor, SaveInSteps(self.folder), *saving]
        everybody = [self.spies.first, *callbacks, *others, self.spies.last] if watched else [*callbacks, *saving]
        ckpt_path = options.pop("ckpt_path", None)
        options = {"max_epochs": 2, "logger": self.rows, "log_every_n_steps": 1, **options}
        trainer = make_trainer(everybody, enable_checkpointing=True, **options)
        try:
            trainer.fit(model, data(16), data(4), ckpt_path=ckpt_path)
        finally:
            self.spies.look("afterwards")
            self.weights = weights(model)

    def files(self, values: bool) -> list[Any]:
        return [[path.name, checkpoint(path, values)] for path in sorted(self.folder.iterdir())]

    def assert_like(self, other: Run, values: bool) -> None:
        """``values``: weights and all that follows from them, too."""
        assert_same(self.spies.seen, other.spies.seen)
        assert_same(self.files(values), other.files(values))
        assert self.rows.rows == other.rows.rows
        if values:
            assert_same_weights(self.weights, other.weights)


def run(
    situation: Situation,
    make: MakeOptimizer,
    callbacks: Callable[[], list[pl.Callback]],
    folder: Path,
    by_hand: bool = False,
    watched: bool = True,
) -> Run:
    """Fit, and go on once more from a checkpoint of that fit if the situation is a resumed one.

    Without ``watched`` nobody looks and only what is resumed from is saved.
    """

    def fit(folder: Path, **options: Any) -> Run:
        torch.manual_seed(0)
        model = situation.module(None, situation.scheduler, grouped=situation.grouped)
        optimizer = partial(make, lr=situation.lr())
        model.make_optimizer = (lambda params: optimizer(one_group_each(params))) if by_hand else optimizer
        result = Run(folder)
        result.fit(model, callbacks(), watched=watched, **situation.options(), **options)
        return result

    whole = fit(folder / "whole")
    if situation.resume is None:
        return whole
    return fit(folder / "resumed", ckpt_path=whole.folder / f"{situation.resume}.ckpt")


def one_group_each(params: Any) -> list[dict[str, Any]]:
    """As an expert groups who wants a lambda for each parameter; names would have to be different ones."""
    params = list(params)
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    options = [{key: value for key, value in group.items() if key != "name"} for group in groups]
    return [{**group, "params": [one]} for group in options for one in group["params"]]


class Expert(pl.Callback):
    """The reference: writes `LAMBDAS` by hand before each step, or what rises to them by equal amounts from 0."""

    def __init__(self, rising: bool = True) -> None:
        self.rising = rising

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        progress = trainer.global_step / (trainer.estimated_stepping_batches - 1) if self.rising else 1.0
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group["weight_decay"] = LAMBDAS.get(names[id(group["params"][0])], 0.0) * progress


def without_decay(params: Any, **options: Any) -> Optimizer:
    optimizer = torch.optim.AdamW(params, **options)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


DECAYING = partial(torch.optim.AdamW, weight_decay=0.1)
each_situation = pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS.keys())


@each_situation
def test_with_lambda_0_all_is_as_without(situation: Situation, tmp_path: Path) -> None:
    actual = run(situation, without_decay, lambda: ours(0.0), tmp_path / "with")
    actual.assert_like(run(situation, without_decay, list, tmp_path / "without"), values=True)


# All but the one whose scaler skips steps: other weights overflow at other steps, so that scales and counts differ.
@pytest.mark.parametrize("name", [name for name in SITUATIONS if name != "fp16-with-skipped-steps"])
def test_while_all_act_only_weights_differ(name: str, tmp_path: Path) -> None:
    """In the opposite order, on which nothing depends."""
    situation = SITUATIONS[name]
    actual = run(situation, DECAYING, lambda: ours(0.3, penalty=0.01, bound=0.9)[::-1], tmp_path / "with")
    expected = run(situation, DECAYING, list, tmp_path / "without")
    actual.assert_like(expected, values=False)
    assert not torch.equal(actual.weights["head.weight"], expected.weights["head.weight"]), "something was to act"


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(SITUATIONS["SequentialLR"], DECAYING, list, tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize("apply", ["coupled", "decoupled", "independent", "cautious"])
def test_ways_to_decay(apply: str, without: Run, tmp_path: Path) -> None:
    actual = run(SITUATIONS["SequentialLR"], DECAYING, lambda: ours(0.3, apply=apply), tmp_path / "with")
    actual.assert_like(without, values=False)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "AdamW") for name in SITUATIONS), *((name, "SGD") for name in ("OneCycleLR", "two-manual-optimizers"))],
)
def test_it_trains_as_an_expert_does_by_hand(name: str, optimizer: str, tmp_path: Path) -> None:
    situation, make = SITUATIONS[name], MAKERS[optimizer]
    actual = run(situation, make, lambda: ours(0.3), tmp_path / "with", watched=False)
    expected = run(situation, make, lambda: [Expert()], tmp_path / "expert", by_hand=True, watched=False)
    assert_same_weights(actual.weights, expected.weights)


def test_no_key_of_ours_is_ever_in_a_group(tmp_path: Path) -> None:
    model, result = ValidatedNet(partial(torch.optim.AdamW, weight_decay=0.1)), Run(tmp_path)
    result.fit(model, ours(0.3))
    keys = list(torch.optim.AdamW(model.parameters()).param_groups[0])
    looks = [groups for _, optimizers in result.spies.seen for _, _, groups in optimizers]
    assert len(looks) > 100
    for groups in looks:
        assert [[key for key, _ in entries] for _, *entries in groups] == [keys]


def test_the_scaler_skips_some_steps_and_takes_others(tmp_path: Path) -> None:
    scales, watch = [], pl.Callback()
    watch.on_train_batch_end = lambda trainer, *_: scales.append(trainer.precision_plugin.scaler.get_scale())
    run(SITUATIONS["fp16-with-skipped-steps"], without_decay, lambda: [watch], tmp_path)
    assert 2 <= len(set(scales)) < len(scales) == 8


def test_step_hooks_that_come_late(tmp_path: Path) -> None:
    """Made by a callback while training goes on, they too see the user's groups."""

    def fit(callbacks: list[pl.Callback], folder: Path) -> Run:
        result, late = Run(folder), pl.Callback()
        late.on_train_start = lambda trainer, module: result.spies.watch_steps(trainer.optimizers[0], "a callback's")
        torch.manual_seed(0)
        result.fit(ValidatedNet(without_decay, grouped=halves), [*callbacks, late])
        return result

    fit(ours(0.0), tmp_path / "with").assert_like(fit([], tmp_path / "without"), values=True)


class Polite(torch.optim.AdamW):
    """Its step calls that of its parent, so that torch calls the step hooks twice, one within the other."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_whose_step_calls_its_parents(tmp_path: Path) -> None:
    # torch puts the hooks into a class when it first makes an optimizer of it
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    situation = SITUATIONS["SequentialLR"]
    actual = run(situation, Polite, lambda: ours(0.3), tmp_path / "with")
    expected = run(situation, Polite, lambda: [Expert()], tmp_path / "expert", by_hand=True)
    assert_same_weights(actual.weights, expected.weights)
    plain = run(situation, Polite, list, tmp_path / "without")
    seen, reference = ([look for look in r.spies.seen if "step hook" not in look[0]] for r in (actual, plain))
    assert_same(seen, reference)


class Breaking(Optimizer):
    """SGD that raises in its third update, once the closure has returned."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.updates = 0

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.updates += 1
        if self.updates == 3:
            raise RuntimeError("stopped")
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * parameter.grad)
        return loss


class Stopping(ValidatedNet):
    """Raises in its third training step, which the closure calls."""

    def __init__(self, *args: Any, error: type[BaseException] = RuntimeError, **options: Any) -> None:
        super().__init__(*args, **options)
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise self.error("stopped")
        return super().training_step(batch, batch_idx)


# What Lightning says of any OnExceptionCheckpoint.
@pytest.mark.filterwarnings("ignore:..fit.ckpt_path=None.. was called without a model")
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")
@pytest.mark.parametrize(
    ("module", "make"),
    [
        pytest.param(ValidatedNet, Breaking, id="update"),
        pytest.param(Stopping, torch.optim.AdamW, id="closure"),
        pytest.param(partial(Stopping, error=KeyboardInterrupt), torch.optim.AdamW, id="interrupted"),
    ],
)
def test_an_exception_leaves_the_groups_to_whoever_looks_next(module: Any, make: Any, tmp_path: Path) -> None:
    """That is `on_exception` of a callback before ours, what is saved there, and the caller of fit."""

    def fit(callbacks: list[pl.Callback], folder: Path) -> Run:
        torch.manual_seed(0)
        result, model = Run(folder), module(partial(make, weight_decay=0.1), sequential, grouped=own_keys)
        with pytest.raises((RuntimeError, SystemExit)):
            result.fit(model, [*callbacks, OnExceptionCheckpoint(folder, "cut")])
        return result

    actual, expected = fit(ours(0.3), tmp_path / "with"), fit([], tmp_path / "without")
    actual.assert_like(expected, values=False)
    looks = [where for where, _ in actual.spies.seen]
    before = looks[looks.index("first callback, on_exception") - 1]
    assert before.startswith("module, "), f"{before} was to see nothing of the exception"
    assert (tmp_path / "with" / "cut.ckpt").exists()


class Stubborn(ByHand):
    """Goes on with its training after a step that failed, in the update or at the end of the closure."""

    def __init__(self, *args: Any, place: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.place = place

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = ValidatedNet.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            if self.place == "closure" and batch_idx == 2:
                raise RuntimeError("stopped")
            return loss

        try:
            optimizer.step(closure=closure)
        except RuntimeError:
            self.look("module, after the exception")


@pytest.mark.parametrize("place", ["update", "closure"])
def test_training_goes_on_after_an_exception(place: str, tmp_path: Path) -> None:
    """Each further step decays as an expert's, and nobody can tell."""

    def fit(callbacks: list[pl.Callback], folder: Path, grouped: Any = own_keys) -> Run:
        torch.manual_seed(0)
        result, make = Run(folder), Breaking if place == "update" else MAKERS["SGD"]
        model = Stubborn(partial(make, lr=0.1, weight_decay=0.1), grouped=grouped, place=place)
        result.fit(model, callbacks)
        return result

    unscheduled = [callback for callback in ours(0.3) if not isinstance(callback, WeightDecayScheduler)]
    actual = fit(unscheduled, tmp_path / "with")
    actual.assert_like(fit([], tmp_path / "without"), values=False)
    assert "module, after the exception" in [where for where, _ in actual.spies.seen]
    expected = fit([Expert(rising=False)], tmp_path / "expert", lambda module: one_group_each(own_keys(module)))
    assert_same_weights(actual.weights, expected.weights)


MISDEEDS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "a-key": lambda groups: groups[0].update(rule="decay"),
    "a-value": lambda groups: groups[0].update(weight_decay=0.3),
    "the-order-of-keys": lambda groups: groups[0].update(lr=groups[0].pop("lr")),
    "another-group": lambda groups: groups.insert(0, {**groups.pop(0)}),
    "one-group-more": lambda groups: groups.append({**groups[0], "params": []}),
    "another-tensor": lambda groups: groups[1].update(lr=groups[1]["lr"].clone()),
    "another-list-of-parameters": lambda groups: groups[0].update(params=[*groups[0]["params"]]),
    "the-order-of-parameters": lambda groups: groups[0]["params"].reverse(),
}


class Mischief(pl.Callback):
    """Does something to the groups in the third batch."""

    def __init__(self, deed: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.deed = deed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            self.deed(trainer.optimizers[0].param_groups)


MISCHIEVOUS = Situation(grouped=halves, lr=lambda: torch.tensor(0.02))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(MISCHIEVOUS, torch.optim.AdamW, list, tmp_path_factory.mktemp("without")).spies.seen


@pytest.mark.parametrize("deed", MISDEEDS.values(), ids=MISDEEDS.keys())
def test_spies_notice_what_is_done_to_the_groups(deed: Any, untouched: list[Any], tmp_path: Path) -> None:
    seen = run(MISCHIEVOUS, torch.optim.AdamW, lambda: [Mischief(deed)], tmp_path / "with").spies.seen
    first = next(mine for mine, theirs in zip(seen, untouched, strict=True) if mine != theirs)
    assert first[0] == "last callback, on_train_batch_start"


def test_two_runs_without_the_callbacks_are_the_same(tmp_path: Path) -> None:
    """Else a difference would prove nothing."""
    first, second = (run(SITUATIONS["one-group"], without_decay, list, tmp_path / name) for name in "ab")
    first.assert_like(second, values=True)
    assert len(first.spies.seen) > 500
    assert len(first.files(values=True)) == 2 + 2 + 2
