"""What the callbacks cost a step that does nothing else, and a step with many lambdas."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.schedules import CosineSchedule
from tests.benchmarks.models import Trained, loader
from tests.benchmarks.timing import interleaved, medians, now, table

ROUNDS = 2000


class Still(torch.optim.AdamW):
    """Steps without an update, so that only what is attached to the step takes time."""

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


# one of torch's, whose groups need no watching
Still.__name__, Still.__module__ = "AdamW", torch.optim.AdamW.__module__
Still.step.__module__ = torch.optim.AdamW.__module__


class Many(torch.nn.Module):
    """Small weights and biases."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(count // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x) for layer in self.layers)


class Measured(pl.Callback):
    """Times the hooks of other callbacks and of the optimizer's step, over and over in the middle of a training."""

    def __init__(self, *callbacks: pl.Callback) -> None:
        self.callbacks = callbacks
        self.spent = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        _, batch, index = args
        optimizer = trainer.optimizers[0]
        bare = Still(optimizer.param_groups[0]["params"])
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for whole in (True, False):
                them = self.callbacks if whole else ()
                step = (optimizer if whole else bare).step
                start = now()
                for callback in them:
                    callback.on_train_batch_start(trainer, module, batch, index)
                    callback.on_before_backward(trainer, module, None)
                    callback.on_after_backward(trainer, module)
                    callback.on_before_optimizer_step(trainer, module, optimizer)
                step(closure=_nothing)
                for callback in them:
                    callback.on_train_batch_end(trainer, module, None, batch, index)
                times[whole].append(now() - start)
        self.spent = statistics.median(times[True]) - statistics.median(times[False])


def _nothing() -> None:
    """Stand for the closure, with gradients at hand."""


def spent(count: int, groups: int, *callbacks: pl.Callback) -> float:
    """Microseconds a step in hooks of callbacks and of the optimizer."""
    network = Many(count)
    parameters = list(network.parameters())
    size = len(parameters) // groups
    split = [{"params": parameters[index * size : (index + 1) * size]} for index in range(groups)]
    measured = Measured(*callbacks)
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[*callbacks, measured],
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(
        Trained(network, lambda _: Still(split, lr=1e-4)),
        loader((torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)), 2),
    )
    return measured.spent * 1e6


def scheduling() -> None:
    """Microseconds a step."""
    rows = []
    for count, groups in ((200, 1), (200, 8), (1000, 1)):
        decay = WeightDecay(0.1, summary=False)
        scheduler = WeightDecayScheduler(CosineSchedule(start=1.0, end=2.0))
        monitor = L2NormMonitor(every_n_steps=10**9)
        rows.append(
            [
                f"{count} parameters, {groups} group{'s' * (groups > 1)}",
                *(f"{spent(count, groups, *them):.1f} us" for them in ([decay, scheduler], [decay], [monitor])),
            ]
        )
    table("Cost of a step's hooks", ["of", "WeightDecay, scheduler", "WeightDecay", "L2NormMonitor, not logged"], rows)


def many_lambdas() -> None:
    """Time of a step with 400 lambdas over that with 2, interleaved."""
    rows = []
    for name, make in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        steps = {str(count): _step(make, count) for count in (400, 2)}
        times = interleaved(steps, rounds=60)
        rows.append([name, f"{times['400'] * 1e6:.0f} us", f"{times['400'] / times['2']:.3f}"])
    table("A step of apply='decoupled' with 400 lambdas over one with 2", ["optimizer", "400 lambdas", "ratio"], rows)


def _step(make: Callable[..., torch.optim.Optimizer], lambdas: int) -> Callable[[], object]:
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(64, 64)) for _ in range(400))
    optimizer = make(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    own = {index: 1e-4 * (1 + index) for index in range(lambdas - 1)}
    rules = [DecayRule(f"rule{index}", pattern=rf"^{index}$", weight_decay=value) for index, value in own.items()]
    decay = RuleDecay(model, [optimizer], 0.1, rules=[*rules, DecayRule("rest")], apply="decoupled")

    def step() -> object:
        assert decay.is_decided
        return optimizer.step()

    return step


def decayed_weights() -> None:
    """Time of a step with one thing more done to the decayed weights over one without, medians of turns."""
    rows = []
    small = [(64, 64)] * 400
    large = [(1024, 1024)] * 8
    for name, make in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        for shapes in (small, large):
            size = f"{len(shapes)} of {shapes[0][0]}^2"
            steps = {way: _decaying(make, shapes, towards=way) for way in ("zero", "start")}
            weights = [torch.ones(shape) for shape in shapes]
            steps["pass"] = lambda weights=weights: torch._foreach_mul_(weights, 1.0)
            times = medians(steps, rounds=60)
            passes = (times["start"] - times["zero"]) / times["pass"]
            cells = [f"{times['start'] / times['zero']:.3f}", f"{passes:.2f}"]
            rows.append([f"towards='start' over 'zero', {size}, {name}", *cells])
            bf16 = [(shape, torch.bfloat16) for shape in shapes]
            steps = {one: _decaying(make, bf16, rounding=one) for one in ("nearest", "accumulate")}
            times = medians(steps, rounds=60)
            ratio = times["accumulate"] / times["nearest"]
            rows.append([f"rounding='accumulate' over 'nearest', bfloat16, {size}, {name}", f"{ratio:.3f}", ""])
    head = ["what", "ratio", "more, in reads and writes of the weights"]
    table("A step of apply='decoupled' over one that does less to the weights", head, rows)


def _decaying(make: Callable[..., torch.optim.Optimizer], shapes: Any, **options: Any) -> Callable[[], object]:
    sizes = [one if isinstance(one[1], torch.dtype) else (one, torch.float32) for one in shapes]
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in sizes)
    optimizer = make(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    # a share of 0.008 a step, which bfloat16 feels too
    decay = RuleDecay(model, [optimizer], 8.0, apply="decoupled", **options)

    def step() -> object:
        assert decay.is_decided
        return optimizer.step()

    return step
