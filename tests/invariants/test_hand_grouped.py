"""An optimizer that the callback regroups trains as the same optimizer grouped by hand by an expert."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2 import DecayRule, WeightDecay
from tests.helpers import DECAYED, DEVICE, Net, assert_same_weights, data, fp16, hand_grouped, make_trainer

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "AdamW-amsgrad-foreach": partial(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
    "AdamW-fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "AdamW-for-loop": partial(torch.optim.AdamW, lr=0.01, foreach=False),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "Adam-decoupled": partial(torch.optim.Adam, lr=0.01, decoupled_weight_decay=True),
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD-nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "ASGD": partial(torch.optim.ASGD, lr=0.1),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.05),
    "SGD-fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "AdamW-tensor-lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01), foreach=False),
}
if DEVICE == "cuda":  # where alone torch offers them
    OPTIMIZERS["AdamW-capturable"] = lambda params: torch.optim.AdamW(
        params, lr=torch.tensor(0.01, device=DEVICE), capturable=True
    )
    OPTIMIZERS["Adagrad-foreach"] = partial(torch.optim.Adagrad, lr=0.1, foreach=True)
# Of another library: a wrapper that shares the list of groups, one with state across groups, a second-order one
OTHERS: dict[str, Callable[[Any], Optimizer]] = {
    "Lookahead": lambda params: pytorch_optimizer.Lookahead(torch.optim.AdamW(params, lr=0.01), k=3),
    "Prodigy": lambda params: pytorch_optimizer.Prodigy(params, lr=1.0),
    "Lion": lambda params: pytorch_optimizer.Lion(params, lr=0.01),
    "SOAP": lambda params: pytorch_optimizer.SOAP(params, lr=0.01),
    "ScheduleFreeAdamW": lambda params: pytorch_optimizer.ScheduleFreeAdamW(params, lr=0.01),
}


def train(model: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.LightningModule:
    """20 steps."""
    make_trainer(callbacks, **options).fit(model, data(samples=80 * options.get("accumulate_grad_batches", 1)))
    return model


def seeded(make: Callable[..., pl.LightningModule], *args: Any, **kwargs: Any) -> pl.LightningModule:
    torch.manual_seed(0)
    return make(*args, **kwargs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_each_torch_optimizer(optimizer: Callable[[Any], Optimizer]) -> None:
    model = train(seeded(Net, optimizer), WeightDecay(0.3, summary=False))
    assert_same_weights(model, train(seeded(Net, optimizer, grouped=hand_grouped(0.3))))
    undecayed = train(seeded(Net, optimizer, grouped=hand_grouped(0.0)))
    assert not torch.equal(model.head.weight, undecayed.head.weight)


@pytest.mark.parametrize("optimizer", OTHERS.values(), ids=OTHERS.keys())
def test_optimizers_of_another_library(optimizer: Callable[[Any], Optimizer]) -> None:
    model = train(seeded(Net, optimizer), WeightDecay(0.3, summary=False))
    assert_same_weights(model, train(seeded(Net, optimizer, grouped=hand_grouped(0.3))))


def test_every_torch_optimizer_that_can_be_split_is_tried() -> None:
    names = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    without_weight_decay_key_or_dense_gradients = {"LBFGS", "Rprop", "SparseAdam"}
    tried = {name.split("-")[0] for name in OPTIMIZERS} | {"Muon", "Optimizer"}
    assert names == tried | without_weight_decay_key_or_dense_gradients


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=["clip-by-value", "accumulation", "bf16-mixed", "bf16-true", "float64"],
)
# bfloat16 rounds decay of 0.003 a step to 0.0039; it does so by hand too
@pytest.mark.filterwarnings("ignore:Weight decay of group 'decay' is distorted")
@pytest.mark.parametrize("name", ["AdamW", "SGD-nesterov"])
def test_training_options(name: str, options: dict[str, Any]) -> None:
    make = OPTIMIZERS[name]
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32

    class CastNet(Net):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(tuple(t.to(self.head.weight.dtype) for t in batch), batch_idx)

    model = train(seeded(CastNet, make), WeightDecay(0.3, summary=False), **options)
    assert_same_weights(model, train(seeded(CastNet, make, grouped=hand_grouped(0.3)), **options))
    assert dtype != torch.float64 or model.head.weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["AdamW", "AdamW-fused", "SGD-nesterov", "Adafactor"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_fp16_steps(name: str, accumulate: int) -> None:
    """The first scale is absurd, so the scaler leaves out several steps."""
    scales: list[float] = []

    class Scaled(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def run(*mine: pl.Callback, **options: Any) -> pl.LightningModule:
        precision = fp16(init_scale=2.0**22, growth_interval=4)
        model = seeded(Scaled, OPTIMIZERS[name], **options)
        return train(model, *mine, plugins=[precision], accumulate_grad_batches=accumulate)

    assert_same_weights(run(WeightDecay(0.3, summary=False)), run(grouped=hand_grouped(0.3)))
    lowered = sum(after < before for before, after in itertools.pairwise(scales))
    assert 2 < lowered < 20, "some steps of each training were to be skipped, and some to be taken"


@pytest.mark.parametrize("name", ["AdamW", "SGD-nesterov"])
def test_clipping_by_norm_differs_by_rounding_only(name: str) -> None:
    """The norm sums the gradients in the order of the groups."""
    make = OPTIMIZERS[name]
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}
    model = train(seeded(Net, make), WeightDecay(0.3, summary=False), **clip)
    expected = train(seeded(Net, make, grouped=hand_grouped(0.3)), **clip)
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=1e-6, atol=1e-6)
    assert not torch.equal(model.head.weight, train(seeded(Net, make), WeightDecay(0.3, summary=False)).head.weight)


class Matrices(pl.LightningModule):
    """Only two-dimensional parameters, all that Muon takes."""

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
        self.halves = halves

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.body(batch[0]).tanh()), batch[1])

    def configure_optimizers(self) -> Optimizer:
        if not self.halves:
            return torch.optim.Muon(self.parameters(), lr=0.02)
        groups = [
            {"params": [self.head.weight], "weight_decay": 0.15},
            {"params": [self.body.weight], "weight_decay": 0.3},
        ]
        return torch.optim.Muon(groups, lr=0.02)


def test_muon() -> None:
    rules = [DecayRule("head", pattern=r"^head\.", multiplier=0.5), DecayRule("decay")]
    model = train(seeded(Matrices), WeightDecay(0.3, rules=rules, summary=False))
    assert_same_weights(model, train(seeded(Matrices, halves=True)))


def with_two_groups(body_decay: float, head_decay: float, exempt: bool) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """A user's own groups, slow body and fast head; ``exempt`` takes the 1-D parameters out as an expert would."""

    def groups(module: Net) -> list[dict[str, Any]]:
        parts = []
        for part, lr, decay in (("body", 0.01, body_decay), ("head", 0.03, head_decay)):
            named = {n: p for n, p in module.named_parameters() if n.startswith(part)}
            if not exempt:
                parts.append({"params": list(named.values()), "lr": lr, "weight_decay": decay})
                continue
            for value, chosen in ((decay, DECAYED & named.keys()), (0.0, named.keys() - DECAYED)):
                parts.append({"params": [named[n] for n in sorted(chosen)], "lr": lr, "weight_decay": value})
        return parts

    return groups


@pytest.mark.parametrize(("weight_decay", "expected"), [(None, (0.1, 0.4)), (0.2, (0.2, 0.2))])
def test_groups_the_user_made_keep_their_options(weight_decay: float | None, expected: tuple[float, float]) -> None:
    """Without a lambda of its own the callback keeps each group's as the base."""
    make = OPTIMIZERS["AdamW"]
    model = train(
        seeded(Net, make, grouped=with_two_groups(0.1, 0.4, exempt=False)), WeightDecay(weight_decay, summary=False)
    )
    assert_same_weights(model, train(seeded(Net, make, grouped=with_two_groups(*expected, exempt=True))))


@pytest.mark.filterwarnings("ignore:2 parameters that the default exempts decay by the rules")
def test_rules_take_multipliers_and_absolute_values() -> None:
    rules = [
        DecayRule("norms", modules=("LayerNorm",), weight_decay=0.0),
        DecayRule("head", pattern=r"^head\.weight$", multiplier=0.25),
        DecayRule("biases", max_ndim=1, weight_decay=0.7),
        DecayRule("rest"),
    ]
    lambdas = {"head.weight": 0.1, "head.bias": 0.7, "body.0.bias": 0.7, "body.0.weight": 0.4}

    def by_hand(module: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p], "weight_decay": lambdas.get(n, 0.0)} for n, p in module.named_parameters()]

    make = OPTIMIZERS["AdamW"]
    model = train(seeded(Net, make), WeightDecay(0.4, rules=rules, summary=False))
    assert_same_weights(model, train(seeded(Net, make, grouped=by_hand)))


def test_parameters_out_of_the_optimizer_stay_out() -> None:
    """A user who freezes or leaves out a part finds it untouched."""
    make = OPTIMIZERS["SGD"]

    def only_the_head(module: Net) -> list[dict[str, Any]]:
        return [{"params": list(module.head.parameters()), "weight_decay": 0.1}]

    def by_hand(module: Net) -> list[dict[str, Any]]:
        return [
            {"params": [module.head.weight], "weight_decay": 0.3},
            {"params": [module.head.bias], "weight_decay": 0.0},
        ]

    model = train(seeded(Net, make, grouped=only_the_head), WeightDecay(0.3, summary=False))
    assert_same_weights(model, train(seeded(Net, make, grouped=by_hand)))


class Adversaries(pl.LightningModule):
    """Two manual optimizers of different cadence, toggled, each with its own scheduler and clipped gradients."""

    def __init__(self, by_hand: bool, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.by_hand, self.raw = by_hand, raw
        self.maker = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
        self.judge = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def groups(self, part: nn.Module) -> Any:
        if not self.by_hand:
            return part.parameters()
        return [
            {"params": [p for p in part.parameters() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in part.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        maker = torch.optim.AdamW(self.groups(self.maker), lr=0.01)
        judge = torch.optim.Adam(self.groups(self.judge), lr=0.01)
        decay = torch.optim.lr_scheduler.ExponentialLR(maker, 0.95)
        return [maker, judge], [decay, torch.optim.lr_scheduler.LambdaLR(judge, lambda step: 1 / (1 + step))]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        maker, judge = self.optimizers()
        for sign, optimizer in ((1, judge), *(((-1, maker),) if batch_idx % 3 == 0 else ())):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = nn.functional.softplus(sign * self.judge(self.maker(batch[0]))).mean()
            self.manual_backward(loss + nn.functional.softplus(-sign * self.judge(batch[0])).mean())
            self.clip_gradients(optimizer, 0.05, "value")
            (optimizer.optimizer if self.raw else optimizer).step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()


@pytest.mark.parametrize("raw", [False, True], ids=["lightning-optimizer", "raw-optimizer"])
def test_adversaries_with_two_manual_optimizers(raw: bool) -> None:
    model = train(seeded(Adversaries, False, raw), WeightDecay(0.3, summary=False))
    assert_same_weights(model, train(seeded(Adversaries, True, raw)))
