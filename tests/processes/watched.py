"""What each of two processes sees under one strategy: in fits with our callbacks, without them, and by an expert."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_l2 import L2NormMonitor, L2Penalty, NormConstraint, WeightDecay
from tests.processes.worker import STEPS_AN_EPOCH, Expert, Runner, SaveIn, find, ramp, ramped
from tests.spies import Spies, checkpoint

KINDS = ("with", "without")


def ours(decay: float) -> list[pl.Callback]:
    monitor = L2NormMonitor(every_n_steps=1, updates=True)
    return [WeightDecay(decay, summary=False), ramp(), monitor, L2Penalty(0.0), NormConstraint(1e6)]


def watch(runner: Runner, callbacks: list[pl.Callback], save: str, values: bool = False, **options: Any) -> Any:
    """Fit; what the spies saw, the checkpoints from within and from the end of the last epoch, and the weights."""
    spies, midst = Spies(), runner.folder / f"{save}-midst.ckpt"
    saving = SaveIn("on_train_batch_end", STEPS_AN_EPOCH + 1, midst)
    weights, _ = runner.fit([spies.first, *callbacks, saving, spies.last], save=save, **options)
    paths = [midst, runner.folder / f"{save}.ckpt"] if runner.rank == 0 else []
    return {"seen": spies.seen, "files": [checkpoint(path, values) for path in paths], "weights": weights}


def whole(runner: Runner) -> dict[str, Any]:
    """At lambda 0 everything is as without the callbacks, at another lambda the weights are the expert's."""

    def without_decay(params: Any) -> Optimizer:
        optimizer = runner.adamw(params)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return optimizer

    return {
        "with-0": watch(runner, ours(0.0), "with-0", values=True, optimizer=without_decay),
        "without-0": watch(runner, [], "without-0", values=True, optimizer=without_decay),
        "with": watch(runner, ours(0.3), "with"),
        "without": watch(runner, [], "without"),
        "expert": runner.fit([Expert(ramped)], by_hand=True)[0],
    }


def resumed(runner: Runner) -> dict[str, Any]:
    """{with, without} -> {with, without}, each with the weights of an expert who changes lambda between the epochs."""
    found = {}
    for kind in KINDS:
        runner.fit(ours(0.3) if kind == "with" else [], epochs=1, save=f"first-{kind}")
    for kinds in product(KINDS, KINDS):

        def decay_of(name: str, step: int, kinds: tuple[str, str] = kinds) -> float:
            return 0.1 if kinds[step // STEPS_AN_EPOCH] == "without" else ramped(name, step)

        mine, name = ours(0.3) if kinds[1] == "with" else [], "-".join(kinds)
        found[name] = watch(runner, mine, f"resumed-{name}", resume=f"first-{kinds[0]}")
        found[name]["expert"], _ = runner.fit([Expert(decay_of)], by_hand=True)
    return found


def job(rank: int, name: str, folder: Path) -> None:
    find({"whole": whole, "resumed": resumed}, rank, name, folder)
