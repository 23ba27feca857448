"""Decay and penalty towards the start in real trainings, against the formulas of L2-SP written out."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2 import DecayRule, L2Penalty, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DECAYED, DEVICE, Net, assert_same_weights, data, make_trainer, weights
from tests.spies import Spies, assert_same

LR, LAMBDA = 0.02, 0.5
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    "SGD": partial(torch.optim.SGD, lr=LR, momentum=0.9),
}
OWN = {"AdamW": "decoupled", "SGD": "coupled"}
WAYS = ["optimizer", "coupled", "decoupled", "independent", "cautious"]


def made(optimizer: Any = OPTIMIZERS["AdamW"], kind: type[Net] = Net) -> Net:
    torch.manual_seed(2)
    return kind(optimizer)


def ours(weight_decay: float = LAMBDA, **options: Any) -> WeightDecay:
    return WeightDecay(weight_decay, **{"towards": "start", "summary": False, **options})


def fit(model: Net, callbacks: list[pl.Callback], epochs: int = 2, **options: Any) -> Net:
    make_trainer(callbacks, max_epochs=epochs, precision="64-true", **options).fit(model, data())
    return model


def by_hand(
    make: Callable[..., Optimizer],
    way: str,
    *,
    lambdas: Callable[[int], float] = lambda step: LAMBDA,
    pulled: set[str] = DECAYED,
    accumulate: int = 1,
    clip: float | None = None,
    joins_before_clipping: bool = False,
    parts: tuple[str, ...] = ("",),
    epochs: int = 2,
) -> Net:
    """Train in float64 with w0 kept aside; `pulled` are pulled to it, the other matrices to 0."""
    model = made(make).double()
    named = dict(model.named_parameters())
    origin = {name: named[name].detach().clone() * (name in pulled) for name in DECAYED}
    optimizers = [make(p for name, p in named.items() if name.startswith(part)) for part in parts]
    seen = [[entry.double().to(DEVICE) for entry in batch] for _ in range(epochs) for batch in data()]
    for step in range(len(seen) // accumulate):
        share = lambdas(step) * (1 if way == "independent" else LR)
        for optimizer in optimizers:
            model.zero_grad()
            for batch in seen[step * accumulate : (step + 1) * accumulate]:
                (model.training_step(batch, 0) / accumulate).backward()
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            decayed = {name: named[name] for name in DECAYED if id(named[name]) in mine}

            def join(decayed: dict[str, Tensor] = decayed, weight_decay: float = lambdas(step)) -> None:
                for name, p in decayed.items():
                    p.grad += weight_decay * (p.detach() - origin[name])

            if way == "coupled" and joins_before_clipping:
                join()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if way == "coupled" and not joins_before_clipping:
                join()
            before = {name: p.detach().clone() for name, p in decayed.items()}
            if way in ("decoupled", "independent"):
                for name, p in decayed.items():
                    p.data -= share * (before[name] - origin[name])
            optimizer.step()
            for name, p in decayed.items() if way == "cautious" else ():
                away = before[name] - origin[name]
                p.data -= share * away * ((before[name] - p.detach()) * away >= 0)
    return model


def assert_close(actual: Net, expected: Net, rtol: float = 1e-9) -> None:
    for (name, p), (_, q) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("apply", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_way(name: str, apply: str) -> None:
    weight_decay = LAMBDA / 20 if apply == "independent" else LAMBDA
    expected = by_hand(
        OPTIMIZERS[name], OWN[name] if apply == "optimizer" else apply, lambdas=lambda step: weight_decay
    )
    for device in ("same", "cpu"):
        actual = fit(made(OPTIMIZERS[name]), [ours(weight_decay, apply=apply, start_device=device)])
        assert_close(actual, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_penalty(name: str) -> None:
    """It is coupled decay whose gradient joins before clipping; its metric is the penalty of the weights."""
    for clip in (None, 0.1):
        expected = by_hand(OPTIMIZERS[name], "coupled", clip=clip, joins_before_clipping=True)
        penalty = L2Penalty(LAMBDA, towards="start")
        actual = fit(made(OPTIMIZERS[name]), [penalty], gradient_clip_val=clip)
        assert_close(actual, expected)


def test_logged_penalty_is_that_of_the_distance() -> None:
    class Note(pl.Callback):
        seen: list[tuple[float, float]] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Net, *_: Any) -> None:
            now = dict(pl_module.named_parameters())
            self.square = sum((now[name] - origin[name]).square().sum().item() for name in DECAYED)

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Net, *_: Any) -> None:
            self.seen.append((trainer.callback_metrics["l2_penalty/loss"].item(), LAMBDA / 2 * self.square))

    model = made()
    origin = {name: value.double() for name, value in weights(model).items()}
    penalty = L2Penalty(LAMBDA, towards="start", every_n_steps=1)
    # in front of Note, so that each batch's metric is there
    fit(model, [penalty, Note()], log_every_n_steps=1)
    found = torch.tensor(Note.seen, dtype=torch.float64)
    assert found[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found[:, 0], found[:, 1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("apply", WAYS)
def test_new_head_towards_zero_and_body_towards_its_start(apply: str) -> None:
    rules = [DecayRule("head", pattern=r"^head\.weight", towards="zero"), "exempt", DecayRule("body", towards="start")]
    weight_decay = LAMBDA / 20 if apply == "independent" else LAMBDA
    way = "decoupled" if apply == "optimizer" else apply
    expected = by_hand(OPTIMIZERS["AdamW"], way, lambdas=lambda step: weight_decay, pulled={"body.0.weight"})
    for towards in ("zero", "start"):
        callback = ours(weight_decay, apply=apply, rules=rules, towards=towards)
        assert_close(fit(made(), [callback]), expected)


@pytest.mark.parametrize("apply", ["coupled", "decoupled", "cautious"])
def test_schedule_of_lambda(apply: str) -> None:
    scheduler = WeightDecayScheduler(LinearSchedule(start=0.0, end=2.0))
    expected = by_hand(OPTIMIZERS["AdamW"], apply, lambdas=lambda step: LAMBDA * 2 * step / 15)
    assert_close(fit(made(), [ours(apply=apply), scheduler]), expected)


@pytest.mark.parametrize("apply", ["coupled", "decoupled", "cautious"])
def test_accumulation(apply: str) -> None:
    expected = by_hand(OPTIMIZERS["SGD"], apply, accumulate=4)
    assert_close(fit(made(OPTIMIZERS["SGD"]), [ours(apply=apply)], accumulate_grad_batches=4), expected)


@pytest.mark.parametrize("before_clipping", [True, False])
def test_clipping(before_clipping: bool) -> None:
    expected = by_hand(OPTIMIZERS["SGD"], "coupled", clip=0.1, joins_before_clipping=before_clipping)
    callback = ours(apply="coupled", before_clipping=before_clipping)
    assert_close(fit(made(OPTIMIZERS["SGD"]), [callback], gradient_clip_val=0.1), expected)


class ByHand(Net):
    """Two optimizers under manual optimization, one by Lightning's wrapper with a closure and one as it is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(self.body.parameters()), self.make_optimizer(self.head.parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self._is_training_by_trainer():
            return super().training_step(batch, batch_idx)
        body, head = self.optimizers()

        def closure() -> None:
            self.zero_grad()
            self.manual_backward(Net.training_step(self, batch, batch_idx))

        body.step(closure=closure)
        closure()
        head.optimizer.step()
        return torch.zeros(())

    def _is_training_by_trainer(self) -> bool:
        return self._trainer is not None


@pytest.mark.parametrize("apply", WAYS)
def test_manual_optimization_with_two_optimizers(apply: str) -> None:
    weight_decay = LAMBDA / 20 if apply == "independent" else LAMBDA
    way = "decoupled" if apply == "optimizer" else apply
    expected = by_hand(OPTIMIZERS["AdamW"], way, lambdas=lambda step: weight_decay, parts=("body", "head"))
    assert_close(fit(made(kind=ByHand), [ours(weight_decay, apply=apply)]), expected)


def test_lambda_of_zero_and_exempt_groups_are_bit_equal_to_none() -> None:
    bare = fit(made(), [])
    for apply in WAYS:
        for callback in (ours(0.0, apply=apply), ours(rules=[DecayRule("all", multiplier=0.0)], apply=apply)):
            assert_same_weights(fit(made(), [callback]), bare)
    assert_same_weights(fit(made(), [L2Penalty(0.0, towards="start")]), bare)
    start = {name: value.double() for name, value in weights(made()).items()}
    still = fit(made(partial(torch.optim.SGD, lr=0.0)), [ours(apply="independent")])
    assert_same_weights(still, start)


@pytest.mark.parametrize("apply", WAYS)
def test_nobody_can_tell(apply: str, tmp_path: Any) -> None:
    """Groups at every hook of everybody, and what checkpoints hold of the optimizer."""

    def run(callbacks: list[pl.Callback]) -> tuple[Any, Any]:
        spies = Spies()
        trainer = make_trainer([spies.first, *callbacks, spies.last], max_epochs=2)
        trainer.fit(made(), data())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        groups = [state["param_groups"] for state in saved["optimizer_states"]]
        states = [state["state"].items() for state in saved["optimizer_states"]]
        shapes = [[(key, name, value.shape) for key, one in state for name, value in one.items()] for state in states]
        return spies.seen, [groups, shapes, saved.keys() - {"callbacks"}, saved["state_dict"].keys()]

    bare, saved = run([])
    seen, also_saved = run([ours(apply=apply), L2Penalty(0.0, towards="start")])
    assert_same(seen, bare)
    assert also_saved == saved


def alive() -> int:
    """Bytes of all tensors that Python knows of."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and one.layout == torch.strided]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


class Count(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Net, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.bytes = alive()


@pytest.mark.filterwarnings("ignore:L2Penalty penalises .* that their optimizer decays as well")
@pytest.mark.filterwarnings("ignore:Rule 'all' decays .* parameters that the default exempts")
@pytest.mark.parametrize("kind", ["decay", "penalty", "both", "frozen", "zero"])
def test_one_copy_of_the_decayed_weights_for_all_callbacks(kind: str) -> None:
    def run(callbacks: list[pl.Callback]) -> int:
        model = made(partial(torch.optim.SGD, lr=LR))
        model.hidden = nn.Linear(50, 50)
        model.frozen = nn.Linear(70, 70).requires_grad_(False)
        if kind == "frozen":
            make = model.make_optimizer
            model.make_optimizer = lambda params: make([p for p in params if p.requires_grad])
        count = Count()
        make_trainer([*callbacks, count], max_epochs=1).fit(model, data())
        return count.bytes

    decay, penalty = ours(apply="decoupled"), L2Penalty(0.1, towards="start")
    rules = [DecayRule("hidden", pattern=r"hidden\.weight", towards="start"), "default"]
    callbacks = {
        "decay": [decay],
        "penalty": [penalty],
        "both": [ours(rules=[DecayRule("all")]), penalty],
        "frozen": [decay],
        "zero": [ours(rules=rules, towards="zero")],
    }[kind]
    matrices = 4 * (4 * 8 + 8 * 2 + 50 * 50)
    expected = {
        "zero": 4 * 50 * 50,
        "frozen": matrices,
        "decay": matrices + 4 * 70 * 70,
        "penalty": matrices + 4 * 70 * 70,
        # with all vectors
        "both": matrices + 4 * 70 * 70 + 4 * (8 * 3 + 2 + 50 + 70),
    }[kind]
    found = run(callbacks) - run([])
    # what else they hold is small beside it: norms and shares of a few numbers
    assert expected <= found < expected + 400


class Thawing(BackboneFinetuning):
    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, backbone_initial_lr=LR)


class WithBackbone(Net):
    @property
    def backbone(self) -> nn.Module:
        return self.body

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize("position", ["before", "after"])
def test_thawed_layers_are_pulled_to_where_they_were_frozen(position: str, tmp_path: Any) -> None:
    """Also where training goes on from a checkpoint before or after they thawed."""

    def callbacks(callback: pl.Callback) -> list[pl.Callback]:
        return [callback, Thawing()] if position == "before" else [Thawing(), callback]

    for make in (lambda: ours(apply="decoupled"), lambda: L2Penalty(LAMBDA, towards="start")):
        model = made(kind=WithBackbone)
        origin = weights(model)["body.0.weight"]
        saving = pl.callbacks.ModelCheckpoint(tmp_path / position, "{epoch}", save_top_k=-1, every_n_epochs=1)
        trainer = make_trainer([*callbacks(make()), saving], max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, data())
        norms = torch.load(tmp_path / position / "epoch=3.ckpt", weights_only=True)["callbacks"][type(make()).__name__]
        assert norms["start"]["body.0.weight"] == pytest.approx(origin.norm().item(), rel=1e-6)
        assert "body.0.bias" not in norms["start"]
        for epoch in (0, 2):
            resumed = made(kind=WithBackbone)
            if epoch == 2:
                # where Lightning leaves the backbone frozen
                resumed.on_train_start = lambda resumed=resumed: resumed.body.requires_grad_(True)
            trainer = make_trainer(callbacks(make()), max_epochs=4)
            trainer.fit(resumed, data(), ckpt_path=tmp_path / position / f"epoch={epoch}.ckpt")
            assert_same_weights(resumed, model)
        for path in (tmp_path / position).iterdir():
            path.unlink()


class Replacing(Net):
    """Puts new parameters, and an optimizer of them, in the place of the old ones in mid-fit."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh())
            self.trainer.optimizers = [self.configure_optimizers()]
            self.replaced = weights(self)


@pytest.mark.parametrize(
    "make", [lambda: ours(apply="decoupled"), lambda: L2Penalty(LAMBDA, towards="start")], ids=["decay", "penalty"]
)
def test_replaced_parameters_start_where_they_are_put(make: Any, tmp_path: Any) -> None:
    model = made(kind=Replacing)
    origin = weights(model)
    trainer = make_trainer([make()], max_epochs=2)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    norms = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][type(make()).__name__]["start"]
    assert norms == {
        "body.0.weight": pytest.approx(model.replaced["body.0.weight"].norm().item(), rel=1e-6),
        "head.weight": pytest.approx(origin["head.weight"].norm().item(), rel=1e-6),
    }


@pytest.mark.parametrize("rounding", ["accumulate", "stochastic"])
def test_rounding_in_bf16(rounding: str, tmp_path: Any) -> None:
    """A gradient of 0 leaves the pull alone: by (1 - eta lambda)^T; resumed runs end bit-equal."""

    class Still(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 0 and not self.is_moved:
                self.is_moved = True
                with torch.no_grad():
                    for name in DECAYED:
                        self.get_parameter(name).add_(1.0)
            return sum((p * 0).sum() for p in self.parameters())

        is_moved = False

    def run(epochs: int, **options: Any) -> Net:
        torch.manual_seed(2)
        model = Still(partial(torch.optim.SGD, lr=0.01))
        with torch.no_grad():
            for name in DECAYED:
                model.get_parameter(name).fill_(0.5)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
        callback = ours(0.2, apply="decoupled", rounding=rounding)
        trainer = make_trainer([callback, saving], max_epochs=epochs, precision="bf16-true", enable_checkpointing=True)
        trainer.fit(model, data(samples=200), **options)
        return model

    pl.seed_everything(5)
    whole = run(4)
    mean = torch.cat([whole.get_parameter(name).detach().double().flatten() for name in DECAYED]).mean().item()
    assert mean - 0.5 == pytest.approx((1 - 0.002) ** 200, rel=0.05)
    again = tmp_path / "epoch=1.ckpt"
    resumed = run(4, ckpt_path=again)
    assert_same_weights(resumed, whole)


def test_a_copy_of_the_callback_made_in_mid_fit() -> None:
    for make in (ours, partial(L2Penalty, LAMBDA, towards="start")):
        copies: list[pl.Callback] = []

        class Copy(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, copies: list[Any] = copies) -> None:
                copies.append(copy.deepcopy(trainer.callbacks[0]))

        expected = fit(made(), [make(), Copy()])
        assert copies[-1]._start is None
        assert_same_weights(fit(made(), [copies[-1]]), expected)


def test_misuse() -> None:
    for kind in (WeightDecay, L2Penalty):
        with pytest.raises(ValueError, match=r"^Expected `towards` to be .*'zero'.*'start', got 'begin'"):
            kind(0.1, towards="begin")
        with pytest.raises(ValueError, match=r"^Expected `start_device` to be .*'same'.*'cpu', got 'gpu'"):
            kind(0.1, start_device="gpu")
