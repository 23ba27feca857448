"""One of two processes that train with a norm constraint on sharded weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2.callbacks.norm_constraint import NormConstraint
from lightning_l2.constraints import InitialBound, RmsBound
from lightning_l2.rules import DecayRule

RULES: Any = [DecayRule("head", pattern=r"head\.weight"), "default"]
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "parameter": {"bound": 0.9},
    "row": {"bound": 0.4, "per": "row"},
    "group": {"bound": 1.5, "per": "group"},
    "lagrangian": {"bound": InitialBound(1.0), "method": "lagrangian", "log_each": True},
    "sphere": {"bound": None, "method": "sphere", "rules": RULES},
    "sphere_rows": {"bound": InitialBound(1.5), "method": "sphere", "per": "row", "rules": RULES},
    "rms": {"bound": RmsBound(0.1)},
}


class Net(pl.LightningModule):
    """The head has an odd number of rows, so that two processes get different shares."""

    def __init__(self, shard_dim: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.shard_dim = shard_dim
        self.logged: list[dict[str, float]] = []

    def configure_model(self) -> None:
        if self.shard_dim is not None and not isinstance(self.hidden.weight, DTensor):
            for layer in (self.hidden, self.head):
                cut = Shard(self.shard_dim)
                fully_shard(
                    layer,
                    mesh=self.device_mesh["data_parallel"],
                    shard_placement_fn=lambda parameter, cut=cut: cut if parameter.ndim > 1 else Shard(0),
                )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 10 * nn.functional.mse_loss(self.head(torch.tanh(self.hidden(batch[0]))), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        metrics = self.trainer.callback_metrics.items()
        self.logged.append({key: value.item() for key, value in metrics if key.startswith("norm_constraint")})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class FSDP1OnCPU(FSDPStrategy):
    """FSDP1, whose Lightning strategy insists on a GPU otherwise."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def data() -> DataLoader[Any]:
    """Every process sees all samples, as the process that trains alone does."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)), 8)


def train(net: Net, kind: str, steps: int, **options: Any) -> tuple[pl.Trainer, NormConstraint]:
    constraint = NormConstraint(**CONSTRAINTS[kind])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=steps,
        logger=False,
        callbacks=[constraint],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **{key: value for key, value in options.items() if key != "ckpt_path"},
    )
    trainer.fit(net, data(), ckpt_path=options.get("ckpt_path"))
    return trainer, constraint


def whole(net: Net) -> dict[str, torch.Tensor]:
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for name, p in net.named_parameters()
    }


def fsdp2(kind: str, shard_dim: int, folder: Path) -> dict[str, Any]:
    """Train 4 steps at once, and 2 steps, save, 2 more steps from the sharded checkpoint."""

    def options() -> dict[str, Any]:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return {"strategy": strategy, "devices": 2}

    net = Net(shard_dim)
    _, constraint = train(net, kind, 4, **options())
    result = {"weights": whole(net), "logged": net.logged, "state": constraint.state_dict()["parameters"]}
    if kind in ("lagrangian", "sphere", "sphere_rows"):
        trainer, _ = train(Net(shard_dim), kind, 2, **options())
        path = folder / f"{kind}{shard_dim}"
        trainer.save_checkpoint(path)
        net = Net(shard_dim)
        _, constraint = train(net, kind, 4, ckpt_path=path, **options())
        result["resumed"] = {"weights": whole(net), "state": constraint.state_dict()["parameters"]}
    return result


def fsdp1(kind: str) -> dict[str, Any]:
    net = Net()
    seen: dict[str, torch.Tensor] = {}

    def gather(*_: Any) -> None:
        with FullyShardedDataParallel.summon_full_params(net.trainer.model):
            seen.update({name: p.detach().clone() for name, p in net.named_parameters()})

    net.on_train_end = gather
    _, constraint = train(net, kind, 4, strategy=FSDP1OnCPU(), devices=2)
    return {"weights": seen, "logged": net.logged, "state": constraint.state_dict()["parameters"]}


def ddp(kind: str) -> dict[str, Any]:
    net = Net()
    _, constraint = train(net, kind, 4, strategy="ddp", devices=2)
    return {"weights": whole(net), "logged": net.logged, "state": constraint.state_dict()["parameters"]}


def work(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {"ddp-lagrangian": ddp("lagrangian")}
    for kind in CONSTRAINTS:
        for shard_dim in (0, 1):
            results[f"fsdp2-{shard_dim}-{kind}"] = fsdp2(kind, shard_dim, folder)
        if CONSTRAINTS[kind].get("per") != "row":
            results[f"fsdp1-{kind}"] = fsdp1(kind)
    torch.save(results, folder / f"rank{rank}.pt")
