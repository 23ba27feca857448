"""What each of two processes runs: fits under one strategy, with our callbacks and as an expert does it without them.

Each writes FOLDER/RANK.pt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_l2 import L2NormMonitor, L2Penalty, NormConstraint, WeightDecay, WeightDecayScheduler
from lightning_l2.schedules import LinearSchedule

ON_GPU = os.environ.get("LIGHTNING_L2_ACCELERATOR") == "gpu"
# NCCL gives a GPU to one process alone
PROCESSES = 1 if ON_GPU else 2
BACKEND = "nccl" if ON_GPU else "gloo"
DECAYED = {"body.0.weight", "head.weight"}
STEPS_AN_EPOCH, EPOCHS = 4, 2
MakeOptimizer = Callable[[Any], Optimizer]


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on the CPU, which Lightning's own class has no way to ask for."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on the CPU, where it runs with gloo; only Lightning's wish for a GPU is lifted."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed

        # its collectives in shared memory take a compiler, and gloo has the same ones
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        # the index is what DeepSpeed goes by
        return torch.device("cpu", 0)


def strategy_of(name: str) -> Any:
    if name == "single":
        return "auto"
    if name in ("ddp", "zero"):
        return DDPStrategy(process_group_backend=BACKEND)
    if name == "fsdp1":
        fsdp = FSDPStrategy if ON_GPU else CPUFSDPStrategy
        return fsdp(auto_wrap_policy={nn.Linear}, state_dict_type="sharded", process_group_backend=BACKEND)
    if name.startswith("deepspeed"):
        deepspeed = DeepSpeedStrategy if ON_GPU else CPUDeepSpeedStrategy
        return deepspeed(stage=int(name[-1]), process_group_backend=BACKEND)
    return ModelParallelStrategy(
        data_parallel_size=PROCESSES, tensor_parallel_size=1, save_distributed_checkpoint=name == "fsdp2-sharded"
    )


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def zero_adamw(params: Any) -> Optimizer:
    # torch's package of distributed optimizers warns of a deprecation as it is imported
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, lr=0.01, weight_decay=0.1)


class Net(pl.LightningModule):
    """Two linear layers; the head has three rows, which two processes can't share evenly."""

    def __init__(self, optimizer: MakeOptimizer, by_hand: bool = False, fsdp2: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.make_optimizer, self.by_hand, self.fsdp2 = optimizer, by_hand, fsdp2

    def configure_model(self) -> None:
        if self.fsdp2:
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.body[0], self.body, self.head):
                fully_shard(layer, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        groups = [{"params": [p], "weight_decay": 0.1} for p in self.parameters()]
        optimizer = self.make_optimizer(groups if self.by_hand else self.parameters())
        if self.make_optimizer is sgd:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Expert(pl.Callback):
    """The reference: a group for each parameter, lambda written by hand for each step."""

    def __init__(self, decay_of: Callable[[str, int], float]) -> None:
        self.decay_of = decay_of

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        names = [clean(name) for name, _ in pl_module.named_parameters()]
        for name, group in zip(names, trainer.optimizers[0].param_groups, strict=True):
            group["weight_decay"] = self.decay_of(name, trainer.global_step)


@contextmanager
def gathered(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[dict[str, Tensor]]:
    """The whole weights by clean name, in float64, on every process."""
    wrapped = trainer.strategy.model
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            yield {clean(name): p.detach().double().clone() for name, p in module.named_parameters()}
        return
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(module.parameters())):
            yield {name: p.detach().double().clone() for name, p in module.named_parameters()}
        return
    whole = {name: getattr(p.detach(), "full_tensor", p.detach)() for name, p in module.named_parameters()}
    yield {name: tensor.double().clone() for name, tensor in whole.items()}


class Collect(pl.Callback):
    """Keeps the whole weights before each step and at the end."""

    def __init__(self, every_step: bool = False) -> None:
        self.every_step = every_step
        self.before: list[dict[str, Tensor]] = []
        self.last: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.every_step:
            with gathered(trainer, pl_module) as weights:
                self.before.append(weights)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with gathered(trainer, pl_module) as weights:
            self.last = weights


class Rows(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    name, version = "rows", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)


class Runner:
    """Fits under one strategy."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.processes = 1 if name == "single" else PROCESSES
        self.rank = int(os.environ["LOCAL_RANK"])
        self.adamw = zero_adamw if name == "zero" else adamw

    def data(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        samples = 8 * STEPS_AN_EPOCH
        x, y = torch.randn(samples, 4, generator=generator), torch.randn(samples, 3, generator=generator)
        # Lightning's own sampler shuffles; in order, both halves make up the batch that one process sees
        samples_of_this = TensorDataset(x[self.rank :: self.processes], y[self.rank :: self.processes])
        return DataLoader(samples_of_this, batch_size=8 // self.processes)

    def fit(
        self,
        callbacks: list[pl.Callback],
        optimizer: MakeOptimizer | None = None,
        *,
        by_hand: bool = False,
        epochs: int = EPOCHS,
        save: str | None = None,
        resume: str | None = None,
        **options: Any,
    ) -> tuple[dict[str, Tensor], pl.Trainer]:
        collect = Collect()
        model = Net(optimizer or self.adamw, by_hand, fsdp2=self.name.startswith("fsdp2"))
        saving = [ModelCheckpoint(self.folder, save)] if save else []
        trainer = pl.Trainer(
            accelerator="gpu" if ON_GPU else "cpu",
            devices=self.processes,
            callbacks=[*callbacks, *saving, collect],
            max_epochs=epochs,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(saving),
            use_distributed_sampler=False,
            **{"logger": False, "strategy": strategy_of(self.name), **options},
        )
        trainer.fit(model, self.data(), ckpt_path=str(self.folder / f"{resume}.ckpt") if resume else None)
        return collect.last, trainer


def decay(**options: Any) -> WeightDecay:
    return WeightDecay(0.3, summary=False, **options)


def ramp() -> WeightDecayScheduler:
    return WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0), total_steps=STEPS_AN_EPOCH * EPOCHS)


def ramped(name: str, step: int) -> float:
    return 0.3 * step / (STEPS_AN_EPOCH * EPOCHS - 1) if name in DECAYED else 0.0


def scenario_rules_and_schedule(runner: Runner) -> dict[str, Any]:
    return {
        "actual": runner.fit([decay(), ramp()])[0],
        "expected": runner.fit([Expert(ramped)], by_hand=True)[0],
    }


def scenario_resume_with_a_schedule(runner: Runner) -> dict[str, Any]:
    runner.fit([decay(), ramp()], epochs=1, save="ramp")
    return {
        "actual": runner.fit([decay(), ramp()], resume="ramp")[0],
        "expected": runner.fit([decay(), ramp()])[0],
    }


def scenario_on_resume(runner: Runner) -> dict[str, Any]:
    """lambda is edited between the epochs; beside each policy the expert."""
    runner.fit([decay()], epochs=1, save="edited")
    found: dict[str, Any] = {}
    for policy, second in (("config", 0.1), ("checkpoint", 0.3)):

        def decay_of(name: str, step: int, second: float = second) -> float:
            return (second if step >= STEPS_AN_EPOCH else 0.3) if name in DECAYED else 0.0

        actual, _ = runner.fit([WeightDecay(0.1, on_resume=policy, summary=False)], resume="edited")
        found[policy] = {"actual": actual, "expected": runner.fit([Expert(decay_of)], by_hand=True)[0]}
    return found


def scenario_accumulation(runner: Runner) -> dict[str, Any]:
    """Three batches a step in epochs of four, so that the last window of each is a short one."""
    batches = {"accumulate_grad_batches": 3}
    ramp = WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))
    # DeepSpeed makes no step of a short window
    steps = EPOCHS if runner.name.startswith("deepspeed") else 2 * EPOCHS
    return {
        "actual": runner.fit([decay(), ramp], sgd, **batches)[0],
        "expected": runner.fit(
            [Expert(lambda name, step: 0.3 * step / (steps - 1) if name in DECAYED else 0.0)],
            sgd,
            by_hand=True,
            **batches,
        )[0],
    }


def scenario_monitor(runner: Runner) -> dict[str, Any]:
    """Every step's rows, beside the whole weights before each step; SGD, so that the gradient follows from two."""
    rows, collect = Rows(), Collect(every_step=True)
    gradients = not runner.name.startswith("deepspeed")
    monitor = L2NormMonitor(every_n_steps=1, gradients=gradients, updates=True, spectra=1)
    last, trainer = runner.fit([decay(), monitor, collect], sgd, logger=rows, log_every_n_steps=1)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"rows": rows.rows, "weights": [*collect.before, last], "metrics": metrics}


def scenario_collectives(runner: Runner) -> dict[str, Any]:
    """How many collectives two logged steps cost more than none."""

    def count(callbacks: list[pl.Callback]) -> dict[str, int]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            runner.fit(callbacks, sgd, logger=Rows(), log_every_n_steps=4)
        return {e.key: e.count for e in profiler.key_averages() if e.key.startswith(("c10d::", "_c10d_functional"))}

    return {"plain": count([decay()]), "monitored": count([decay(), L2NormMonitor(every_n_steps=4)])}


def scenario_ways(runner: Runner) -> dict[str, Any]:
    ways = ("coupled", "decoupled", "independent", "cautious")
    return {way: runner.fit([WeightDecay(0.05, apply=way, summary=False)])[0] for way in ways}


def scenario_penalty(runner: Runner) -> dict[str, Any]:
    return {"actual": runner.fit([L2Penalty(0.3)], sgd)[0], "expected": runner.fit([decay()], sgd)[0]}


class SaveIn(pl.Callback):
    """Writes a checkpoint in one hook of one batch, counted from the start of training."""

    def __init__(self, hook: str, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path
        setattr(self, hook, self.save)

    def save(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.batch == trainer.fit_loop.epoch_loop.total_batch_idx:
            self.batch = -1
            trainer.save_checkpoint(self.path)


def scenario_middle(runner: Runner) -> dict[str, Any]:
    """Resume in the middle of an epoch and of an accumulation window, beside the expert who does the same."""
    steps = STEPS_AN_EPOCH // 2 * EPOCHS

    def expert(name: str, step: int) -> float:
        return 0.3 * step / (steps - 1) if name in DECAYED else 0.0

    def ours() -> list[pl.Callback]:
        return [decay(), WeightDecayScheduler(LinearSchedule(start=0.0, end=1.0))]

    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    batches = (STEPS_AN_EPOCH + 1, STEPS_AN_EPOCH + 2)
    for kind, callbacks in (("ours", ours()), ("expert", [Expert(expert)])):
        saves = [SaveIn("on_train_batch_end", batch, runner.folder / f"{batch}-{kind}.ckpt") for batch in batches]
        runner.fit([*callbacks, *saves], by_hand=kind == "expert", **options)
    found = {}
    for batch in batches:
        actual, _ = runner.fit(ours(), resume=f"{batch}-ours", **options)
        expected, _ = runner.fit([Expert(expert)], by_hand=True, resume=f"{batch}-expert", **options)
        found[str(batch)] = {"actual": actual, "expected": expected}
    return found


def scenario_edited(runner: Runner) -> dict[str, Any]:
    """lambda edited in the optimizer between two epochs: whose holds, beside the expert who changes it."""

    def edited(weight_decay: float) -> MakeOptimizer:
        def make(params: Any) -> Optimizer:
            optimizer = runner.adamw(params)
            for group in optimizer.param_groups:
                group["weight_decay"] = weight_decay
            return optimizer

        return make

    def holding(last: float) -> Callable[[str, int], float]:
        return lambda name, step: (0.1, last)[step // STEPS_AN_EPOCH] if name in DECAYED else 0.0

    runner.fit([WeightDecay(summary=False)], edited(0.1), epochs=1, save="held")
    found = {}
    for policy, last in (("config", 0.4), ("checkpoint", 0.1)):
        actual, _ = runner.fit([WeightDecay(summary=False, on_resume=policy)], edited(0.4), resume="held")
        found[policy] = {"actual": actual, "expected": runner.fit([Expert(holding(last))], by_hand=True)[0]}
    return found


def scenario_saving(runner: Runner) -> dict[str, Any]:
    """Save while no gradients are there: torch.distributed then steps an optimizer without state by itself."""
    kinds: dict[str, Callable[[], pl.Callback]] = {
        "independent": lambda: WeightDecay(0.05, apply="independent", summary=False),
        "cautious": lambda: WeightDecay(0.05, apply="cautious", summary=False),
        "lagrangian": lambda: NormConstraint(0.5, method="lagrangian"),
    }
    found = {}
    for kind, make in kinds.items():
        save = SaveIn("on_before_backward", 2, runner.folder / f"{kind}.ckpt")
        found[kind] = {"actual": runner.fit([make(), save], sgd)[0], "expected": runner.fit([make()], sgd)[0]}
    return found


def scenario_options(runner: Runner) -> dict[str, Any]:
    """What DistributedDataParallel can be told; all with the penalty, which writes to gradients, and clipping."""
    options: list[dict[str, bool]] = [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ]
    found = {}
    for option in options:
        strategy = DDPStrategy(process_group_backend=BACKEND, **option)
        mine = [WeightDecay(0.3, apply="coupled", before_clipping=True, summary=False), L2NormMonitor(every_n_steps=1)]
        found[next(iter(option), "plain")] = runner.fit(mine, strategy=strategy, gradient_clip_val=0.05)[0]
    return found


SCENARIOS = {name.removeprefix("scenario_"): f for name, f in dict(globals()).items() if name.startswith("scenario_")}
OF_CHECKPOINTS = {"rules_and_schedule", "on_resume", "middle"}
OF_DEEPSPEED = {"rules_and_schedule", "resume_with_a_schedule", "monitor", "collectives", "accumulation", "on_resume"}
# What only one strategy can do or get wrong
OF_ONE = {"saving": "fsdp2-sharded", "options": "ddp", "edited": "zero"}


def find(scenarios: dict[str, Callable[[Runner], Any]], rank: int, name: str, folder: Path) -> None:
    """Write what scenarios find, each with the error it ended with instead of results."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    for scenario, function in scenarios.items():
        try:
            found[scenario] = function(Runner(name, folder))
        except Exception as error:
            found[scenario] = {"error": f"{type(error).__name__}: {error}"}
            if os.environ.get("SHOW_ERRORS"):
                logging.exception(scenario)
    torch.save(found, folder / f"{rank}.pt")


def job(rank: int, name: str, folder: Path) -> None:
    """All scenarios of a strategy."""
    chosen = {k: f for k, f in SCENARIOS.items() if OF_ONE.get(k, name) == name}
    if not name.startswith("deepspeed"):
        chosen.pop("resume_with_a_schedule")  # which others do in `watched`
    if name in ("zero", "fsdp2-full"):
        chosen = {k: f for k, f in chosen.items() if k in OF_CHECKPOINTS or k in OF_ONE}
    elif name.startswith("deepspeed"):
        chosen = {k: f for k, f in chosen.items() if k in OF_DEEPSPEED}
    find(chosen, rank, name, folder)
