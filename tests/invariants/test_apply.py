"""Each way to apply lambda, against torch's own optimizers where one does it and the formula by hand elsewhere."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2 import WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule
from tests.helpers import DECAYED, EXEMPT, Net, Shrinking, assert_same_weights, batches, data, fp16, make_trainer

Make = Callable[[Any], Optimizer]
WAYS = ["coupled", "decoupled", "independent", "cautious"]
CLIP = {"gradient_clip_val": 0.05}


def train(make: Make, callbacks: list[pl.Callback], grouped: Any = None, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net(make, grouped=grouped)
    make_trainer(callbacks, **options).fit(model, data(samples=80))
    return model


def by_hand(module: torch.nn.Module) -> list[dict[str, Any]]:
    named = dict(module.named_parameters())
    return [
        {"params": [named[name] for name in sorted(DECAYED)], "weight_decay": 0.3},
        {"params": [named[name] for name in sorted(EXEMPT)], "weight_decay": 0.0},
    ]


def decay(apply: str, weight_decay: float | None = 0.3) -> list[pl.Callback]:
    return [WeightDecay(weight_decay, apply=apply, summary=False)]


# How an optimizer is made to decay the other way, and the torch optimizer that does it by itself.
SAME: dict[str, tuple[Make, str, Make]] = {
    "AdamW made coupled is Adam": (
        partial(torch.optim.AdamW, lr=0.01),
        "coupled",
        partial(torch.optim.Adam, lr=0.01),
    ),
    "Adam made decoupled is AdamW": (
        partial(torch.optim.Adam, lr=0.01),
        "decoupled",
        partial(torch.optim.AdamW, lr=0.01),
    ),
    "Adam made coupled stays Adam": (partial(torch.optim.Adam, lr=0.01), "coupled", partial(torch.optim.Adam, lr=0.01)),
    "AdamW made decoupled stays AdamW": (
        partial(torch.optim.AdamW, lr=0.01),
        "decoupled",
        partial(torch.optim.AdamW, lr=0.01),
    ),
    "NAdam made decoupled": (
        partial(torch.optim.NAdam, lr=0.01),
        "decoupled",
        partial(torch.optim.NAdam, lr=0.01, decoupled_weight_decay=True),
    ),
    "NAdam made coupled": (
        partial(torch.optim.NAdam, lr=0.01, decoupled_weight_decay=True),
        "coupled",
        partial(torch.optim.NAdam, lr=0.01),
    ),
    "RAdam made decoupled": (
        partial(torch.optim.RAdam, lr=0.01),
        "decoupled",
        partial(torch.optim.RAdam, lr=0.01, decoupled_weight_decay=True),
    ),
    "SGD made decoupled, without momentum, is SGD": (
        partial(torch.optim.SGD, lr=0.1),
        "decoupled",
        partial(torch.optim.SGD, lr=0.1),
    ),
    "SGD made coupled, with momentum": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "coupled",
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ),
    "RMSprop made coupled": (
        partial(torch.optim.RMSprop, lr=0.01),
        "coupled",
        partial(torch.optim.RMSprop, lr=0.01),
    ),
    "Adagrad made coupled": (partial(torch.optim.Adagrad, lr=0.1), "coupled", partial(torch.optim.Adagrad, lr=0.1)),
    "Adamax made coupled": (partial(torch.optim.Adamax, lr=0.01), "coupled", partial(torch.optim.Adamax, lr=0.01)),
    "Adadelta made coupled": (partial(torch.optim.Adadelta, lr=1.0), "coupled", partial(torch.optim.Adadelta, lr=1.0)),
}


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 3},
    "clip-by-norm": CLIP,
    "clip-by-value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
}
ONE_OF_EACH_WAY = ["AdamW made coupled is Adam", "Adam made decoupled is AdamW"]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *(pytest.param(case, {}, id=case) for case in SAME),
        *(
            pytest.param(case, options, id=f"{case}-{name}")
            for case in ONE_OF_EACH_WAY
            for name, options in OPTIONS.items()
        ),
    ],
)
def test_what_torch_does_by_itself(case: str, options: dict[str, Any]) -> None:
    """Clipped gradients too: decay acts after clipping, as an optimizer's own does."""
    make, apply, reference = SAME[case]
    actual = train(make, decay(apply), **options)
    expected = train(reference, [], grouped=by_hand, **options)
    for (name, value), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    undecayed = train(reference, [], grouped=lambda m: [{"params": m.parameters(), "weight_decay": 0.0}], **options)
    assert not torch.allclose(undecayed.head.weight, expected.head.weight, rtol=1e-4)


class Decoupled:
    """w <- w - s * lambda * w before the plain optimizer's step; s is lr, or 1 for the way that ignores lr."""

    def __init__(self, make: Make, ignore_lr: bool, cautious: bool = False) -> None:
        self.make, self.ignore_lr, self.cautious = make, ignore_lr, cautious

    def __call__(self, groups: Any) -> Optimizer:
        optimizer = self.make(groups)
        lambdas = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        before: dict[Tensor, Tensor] = {}

        def pre(opt: Optimizer, args: Any, kwargs: Any) -> None:
            before.update({p: p.detach().clone() for group in opt.param_groups for p in group["params"]})

        def post(opt: Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                for group, value in zip(opt.param_groups, lambdas, strict=True):
                    for p in group["params"]:
                        update = before[p] - p
                        mask = (update * before[p] >= 0) if self.cautious else 1.0
                        p -= (1.0 if self.ignore_lr else group["lr"]) * value * before[p] * mask

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)
        return optimizer


@pytest.mark.parametrize("apply", ["decoupled", "independent", "cautious"])
@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.RMSprop, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.Adagrad, lr=0.1),
        partial(torch.optim.Adafactor, lr=0.05),
    ],
    ids=lambda make: make.func.__name__,
)
def test_ways_no_torch_optimizer_has(make: Make, apply: str) -> None:
    """The formulas: update u from the data alone, then (eta or 1) lambda w, masked by u w >= 0 for the cautious one."""
    reference = Decoupled(make, ignore_lr=apply == "independent", cautious=apply == "cautious")

    def gently(module: torch.nn.Module) -> list[dict[str, Any]]:
        groups = by_hand(module)
        groups[0]["weight_decay"] = 0.05
        return groups

    actual = train(make, decay(apply, 0.05))
    expected = train(reference, [], grouped=gently)
    for (name, value), other in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(value, other[1], rtol=1e-5, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}")


def annealed(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def scheduled(apply: str) -> list[pl.Callback]:
    return [*decay(apply, 0.2), WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("apply", WAYS)
def test_schedule_and_lr_act_together(apply: str, accumulate: int) -> None:
    """Without a gradient: 1 - w'/w is lr lambda(t), or lambda(t) alone where lr doesn't count."""
    model = Shrinking(lambda params: torch.optim.SGD(params, lr=0.1), annealed)
    make_trainer(scheduled(apply), max_epochs=2, accumulate_grad_batches=accumulate).fit(model, batches(10))
    watch = model.watches[0]
    steps = {1: 20, 4: 6}[accumulate]
    lambdas = 0.2 * np.arange(steps) / (steps - 1)
    rates = np.ones(steps) if apply == "independent" else np.array(watch.lrs)
    np.testing.assert_allclose(model.head.weight.detach(), np.prod(1 - rates * lambdas), rtol=1e-12)
    assert torch.equal(model.head.bias.detach(), torch.ones(2, dtype=torch.float64))
    assert len(watch.lrs) == steps


@pytest.mark.parametrize("apply", WAYS)
def test_skipped_fp16_steps_decay_nothing(apply: str) -> None:
    class Overflowing(Shrinking):
        def __init__(self) -> None:
            super().__init__(lambda params: torch.optim.SGD(params, lr=0.1))
            self.float()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss() * (float("inf") if batch_idx in (3, 4) else 1.0)

    model = Overflowing()
    make_trainer(scheduled(apply), plugins=[fp16(init_scale=4.0)]).fit(model, batches(10))
    assert len(model.watches[0].steps) == 8
    lr = 1.0 if apply == "independent" else 0.1
    lambdas = np.delete(0.2 * np.arange(10) / 9, [3, 4])
    np.testing.assert_allclose(model.head.weight.detach(), np.prod(1 - lr * lambdas), rtol=1e-6)
    assert torch.equal(model.head.bias.detach(), torch.ones(2))


@pytest.mark.parametrize("raw", [False, True], ids=["lightning-optimizer", "raw-optimizer"])
@pytest.mark.parametrize("apply", WAYS)
def test_manual_optimization(apply: str, raw: bool) -> None:
    class Manual(Shrinking):
        def __init__(self) -> None:
            super().__init__(lambda params: torch.optim.SGD(params, lr=0.1))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers()[batch_idx % 2 :]:
                optimizer = optimizer.optimizer if raw else optimizer
                optimizer.zero_grad()
                self.manual_backward(self.loss())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [self.make_optimizer(part.parameters()) for part in (self.body, self.head)]

    model = Manual()
    make_trainer(scheduled(apply)).fit(model, batches(10))
    factors = 1 - 0.2 * np.arange(10) / 9 * (1.0 if apply == "independent" else 0.1)
    np.testing.assert_allclose(model.head.weight.detach(), np.prod(factors), rtol=1e-12)
    np.testing.assert_allclose(model.body[0].weight.detach(), np.prod(factors[::2]), rtol=1e-12)


@pytest.mark.parametrize("apply", WAYS)
def test_optimizers_without_weight_decay_get_it(apply: str) -> None:
    """Rprop has no such key; where there is no gradient its own update is 0 and what is left is decay."""
    model = Shrinking(lambda params: torch.optim.Rprop(params, lr=0.1))
    if apply == "coupled":
        # lambda w becomes Rprop's gradient, of which it takes the sign: the weights fall by its step size.
        make_trainer(decay(apply, 0.2)).fit(model, batches(1))
        torch.testing.assert_close(model.head.weight.detach(), torch.full((2, 3), 0.9, dtype=torch.float64))
    else:
        make_trainer(decay(apply, 0.2)).fit(model, batches(5))
        lr = 1.0 if apply == "independent" else 0.1
        torch.testing.assert_close(
            model.head.weight.detach(), torch.full((2, 3), (1 - lr * 0.2) ** 5, dtype=torch.float64)
        )
    assert torch.equal(model.head.bias.detach(), torch.ones(2, dtype=torch.float64))


class Lazy(pl.LightningModule):
    """A layer without shape until the first step is under way; the gradient of its weight is 0.1 w - `pull`."""

    pull = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).reshape(2, 4)

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.layer, self.make = torch.nn.LazyLinear(2, dtype=torch.float64), make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        zero = 0.0 * self.layer(batch[0].double()).sum()
        if batch_idx == 0:
            self.start = self.layer.weight.detach().cpu().clone(), self.layer.bias.detach().cpu().clone()
        return zero + 0.05 * self.layer.weight.square().sum() - (self.pull.to(self.device) * self.layer.weight).sum()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def lazy_by_hand(model: Lazy, apply: str, lambdas: list[float], eta: float) -> Tensor:
    """The formulas around an optimizer that decays nothing itself."""
    w = torch.nn.Parameter(model.start[0].clone())
    optimizer = model.make([w])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for value in lambdas:
        before = w.detach().clone()
        w.grad = 0.1 * before - model.pull + (value * before if apply == "coupled" else 0.0)
        with torch.no_grad():
            w *= 1 - {"decoupled": eta * value, "independent": value}.get(apply, 0.0)
            optimizer.step()
            if apply == "cautious":
                w -= eta * value * torch.where((before - w) * before >= 0, before, 0.0)
    return w.detach()


OF_LAZY_LAYERS = [
    partial(torch.optim.Rprop, lr=0.1),
    partial(torch.optim.RMSprop, lr=0.1),
    partial(torch.optim.AdamW, lr=0.1, weight_decay=0.7),
    partial(pytorch_optimizer.Lion, lr=0.1, weight_decay=0.7),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("apply", WAYS)
@pytest.mark.parametrize(
    ("make", "scheduler"),
    [*((make, "after") for make in OF_LAZY_LAYERS), (OF_LAZY_LAYERS[2], "none"), (OF_LAZY_LAYERS[2], "before")],
    ids=lambda value: value if isinstance(value, str) else value.func.__name__,
)
def test_lazy_layers_decay_from_their_first_step_on(make: Make, apply: str, scheduler: str) -> None:
    """Their groups come to be within that step, and then get the lambda of their rule and of the schedule."""
    model = Lazy(make)
    callbacks, lambdas = decay(apply), [0.3] * 3
    if scheduler != "none":
        callbacks.insert(scheduler == "after", WeightDecayScheduler(LinearSchedule(start=0.5, end=1.0)))
        lambdas = [0.15, 0.225, 0.3]
    make_trainer(callbacks).fit(model, batches(3))
    expected = lazy_by_hand(model, apply, lambdas, 0.1)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.layer.bias, model.start[1])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lambda_too_large_for_a_lazy_layer_is_refused_before_it_moves() -> None:
    model = Lazy(partial(torch.optim.Rprop, lr=0.1))
    with pytest.raises(ValueError, match=r"got weight_decay=1\.5\. Give a value of at most 1"):
        make_trainer(decay("independent", 1.5)).fit(model, batches(1))
    assert torch.equal(model.layer.weight, model.start[0])


@pytest.mark.parametrize("apply", WAYS)
def test_the_layout_is_the_users_again_and_steps_are_plain(apply: str) -> None:
    """After fit the optimizer decays in its own way by its own lambda."""

    class Kept(Net):
        def configure_optimizers(self) -> Any:
            self.kept = super().configure_optimizers()
            self.keys = [(list(g), g["weight_decay"], g["decoupled_weight_decay"]) for g in self.kept.param_groups]
            return self.kept

    model = Kept(partial(torch.optim.Adam, lr=0.01, weight_decay=0.1))
    make_trainer(decay(apply)).fit(model, data())
    groups = model.kept.param_groups
    assert [(list(g), g["weight_decay"], g["decoupled_weight_decay"]) for g in groups] == model.keys


@pytest.mark.parametrize("apply", ["optimizer", *WAYS])
def test_resume(apply: str, tmp_path: Any) -> None:
    """The way is the configuration's: stopped and resumed is the same as in one go."""

    def run(epochs: int, ckpt_path: Any = None, save: Any = None) -> Net:
        torch.manual_seed(0)
        model = Net(partial(torch.optim.Adam, lr=0.01))
        trainer = make_trainer(decay(apply), max_epochs=epochs)
        trainer.fit(model, batches(5), ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(save)
        return model

    run(1, save=tmp_path / "half.ckpt")
    assert_same_weights(run(2, tmp_path / "half.ckpt"), run(2))
