"""What each process runs under tensor parallelism, alone and with FSDP2; `every_fit()` makes the same in one."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.adaptive import AdaptiveDecay, AlphaDecay, StableDecay
from lightning_l2.constraints import InflectionBound, InitialBound
from lightning_l2.schedules import CosineSchedule
from tests.processes.worker import Rows

# by the name of the job: processes that share a tensor, processes that share the data, and what is left out
JOBS: dict[str, tuple[int, int, set[str]]] = {
    "tp": (2, 1, set()),
    "mixed": (2, 2, {"monitor sgd", "optimizer", "decoupled", "independent", "cautious", "alpha", "parameter"}),
}
PLAN: dict[str, Any] = {
    # its gradient is whole on each process, where the rows of the weight are not
    "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    # their weights are whole, and the gradients partial sums
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
ALL = [{"name": "all", "pattern": ".*", "weight_decay": 0.2}]


class Net(pl.LightningModule):
    """Eleven words, which two processes can't share evenly, a block with a norm, and a parameter that nobody cuts."""

    def __init__(self, optimizer: Any, dtype: torch.dtype, steepness: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 11, bias=False)
        self.scale = nn.Parameter(torch.ones(11))
        self.to(dtype)
        self.optimizer, self.steepness = optimizer, steepness
        self.parallel = False

    def configure_model(self) -> None:
        if self.device_mesh is None or self.parallel:
            return
        self.parallel = True
        parallelize_module(self, self.device_mesh["tensor_parallel"], PLAN)
        if self.device_mesh["data_parallel"].size() > 1:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        return self.head(hidden) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0]).flatten(0, 1)
        return self.steepness * nn.functional.cross_entropy(logits, batch[0].roll(1, 1).flatten())

    def configure_optimizers(self) -> Any:
        kind, options = self.optimizer
        # torch has no foreach over sharded and plain tensors
        return kind(self.parameters(), foreach=False, **options)


def scenarios() -> Iterator[tuple[str, list[pl.Callback], dict[str, Any]]]:
    """Yield a name, callbacks, and the options of `fit`."""
    sgd = {"optimizer": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9})}
    amsgrad = {"optimizer": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True})}
    quantities: Any = {"updates": True, "rotation": True, "spectra": 1, "initial_ratio": True, "rms": True}
    for gradients in ("before_clipping", "after_clipping"):
        yield f"monitor {gradients}", [L2NormMonitor(per="parameter", gradients=gradients, **quantities)], {}
    yield "monitor sgd", [L2NormMonitor(per="parameter", gradients=True, **quantities)], sgd
    for apply in ("optimizer", "coupled", "decoupled", "independent", "cautious"):
        yield apply, [WeightDecay(0.05, apply=apply, summary=False)], {}
        yield f"{apply} all", [WeightDecay(0.2, rules=ALL, apply=apply, summary=False)], sgd
    yield "towards start", [WeightDecay(0.1, apply="decoupled", towards="start", summary=False)], sgd
    yield "penalty", [L2Penalty(0.3)], sgd
    yield "penalty all", [L2Penalty(0.3, rules=ALL)], sgd
    feedback = {"awd": AdaptiveDecay(), "alpha": AlphaDecay(min_eigenvalues=2), "swd": StableDecay()}
    for name, schedule in {**feedback, "swd amsgrad": StableDecay()}.items():
        decay, monitor = WeightDecay(0.02, summary=False), L2NormMonitor(per="total")
        yield name, [decay, WeightDecayScheduler(schedule), monitor], amsgrad if "amsgrad" in name else {}
    for per, bound in (("parameter", 1.0), ("row", 0.7), ("group", 2.0)):
        yield per, [NormConstraint(bound, per=per, log_each=True)], sgd
        if per != "group":
            kept = NormConstraint(InitialBound(1.2), per=per, method="sphere", log_each=True)
            yield f"sphere {per}", [kept], {"optimizer": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0})}
    yield "lagrangian", [NormConstraint(2.0, method="lagrangian", update_rate=0.1, log_each=True)], sgd
    for rounding in ("accumulate", "stochastic"):
        decay = WeightDecay(0.2, rules=ALL, apply="decoupled", rounding=rounding, summary=False)
        # gradients of 0: what moves the weights is their decay
        still = {"dtype": torch.bfloat16, "steepness": 0.0, "steps": 8}
        yield rounding, [decay], {"optimizer": (torch.optim.SGD, {"lr": 0.02}), **still}


def resumed_scenarios() -> dict[str, tuple[Callable[[], list[pl.Callback]], dict[str, Any]]]:
    """Return what makes the callbacks of a training that is resumed after half of its steps, and options of `fit`."""

    def decay(**options: Any) -> WeightDecay:
        return WeightDecay(0.2, summary=False, **options)

    def monitor() -> L2NormMonitor:
        return L2NormMonitor(per="parameter", updates=True, initial_ratio=True)

    def scheduled(schedule: Any) -> WeightDecayScheduler:
        return WeightDecayScheduler(schedule)

    def towards_start() -> list[pl.Callback]:
        pulled = decay(apply="decoupled", towards="start")
        return [pulled, scheduled(CosineSchedule(1.0, 0.0)), L2NormMonitor(per="parameter", distance=True)]

    def constrained() -> list[pl.Callback]:
        return [NormConstraint(InflectionBound(2), method="lagrangian", update_rate=0.1, log_each=True), monitor()]

    still = {"dtype": torch.bfloat16, "optimizer": (torch.optim.SGD, {"lr": 0.02})}
    return {
        "schedule": (lambda: [decay(), scheduled(CosineSchedule(0.0, 1.0)), monitor()], {}),
        "feedback": (lambda: [decay(apply="cautious"), scheduled(AdaptiveDecay()), monitor()], {}),
        "towards start": (towards_start, {}),
        "penalty": (
            lambda: [L2Penalty(0.3, towards="start"), monitor()],
            {"optimizer": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9})},
        ),
        "accumulate": (lambda: [decay(apply="decoupled", rounding="accumulate"), monitor()], still),
        "stochastic": (lambda: [decay(apply="decoupled", rounding="stochastic"), monitor()], still),
        "constraint": (constrained, {}),
    }


ADAMW = (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1})


def fit(
    callbacks: list[pl.Callback],
    sizes: tuple[int, int] | None,
    optimizer: Any = ADAMW,
    dtype: torch.dtype = torch.float64,
    steepness: float = 1.0,
    steps: int = 3,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return what was logged, the whole weights, and the parts of them that this process holds."""
    net, rows = Net(optimizer, dtype, steepness), Rows()
    if sizes is not None:
        tensor, data = sizes
        strategy = ModelParallelStrategy(tensor_parallel_size=tensor, data_parallel_size=data)
        options |= {"strategy": strategy, "devices": tensor * data}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=rows,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in callbacks),
        use_distributed_sampler=False,
        **{"devices": 1, **options},
    )
    words = torch.randint(0, 7, (16, 4), generator=torch.Generator().manual_seed(1))
    trainer.fit(net, DataLoader(TensorDataset(words), batch_size=4), ckpt_path=resume)
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    return {
        "rows": rows.rows,
        "weights": {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()},
        "parts": {(name, *place(w)): w.to_local() if isinstance(w, DTensor) else w for name, w in weights.items()},
    }


def place(weight: Tensor) -> list[int]:
    """Return which of its parts this process holds of a weight, by mesh dimension that it is cut over."""
    if not isinstance(weight, DTensor):
        return []
    coordinates = weight.device_mesh.get_coordinate() or []
    return [at for at, how in zip(coordinates, weight.placements, strict=True) if not how.is_replicate()]


def every_fit(sizes: tuple[int, int] | None = None, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    fits = [one for one in scenarios() if one[0] not in without]
    return {name: fit(callbacks, sizes, **options) for name, callbacks, options in fits}


class Saves(Checkpoint):
    """A checkpoint after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def every_resume(sizes: tuple[int, int] | None, folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return of each scenario what two epochs show, and what the second one shows that goes on from a checkpoint."""
    found = {}
    for name, (make, options) in resumed_scenarios().items():
        path = folder / f"{name}.ckpt"
        whole = fit([*make(), Saves(path)], sizes, steps=8, **options)
        found[name] = whole, fit(make(), sizes, steps=8, resume=path, **options)
    return found


def resume(rank: int, folder: Path) -> None:
    torch.save(every_resume((2, 1), folder), folder / f"resumed-{rank}.pt")


def work(rank: int, job: str, folder: Path) -> None:
    tensor, data, without = JOBS[job]
    torch.save(every_fit((tensor, data), without), folder / f"{job}-{rank}.pt")
