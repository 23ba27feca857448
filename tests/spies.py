"""What everybody else sees of an optimizer's groups while a fit goes on, and what checkpoints keep of it.

Nothing here imports the package under test, so no expectation can come from it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim import Optimizer

HOOKS = [name for name, value in vars(pl.Callback).items() if inspect.isfunction(value) and name[0] != "_"]
METHODS = [
    *(name for name in HOOKS if hasattr(pl.LightningModule, name)),
    *("configure_model", "configure_optimizers", "on_before_batch_transfer", "transfer_batch_to_device"),
    *("on_after_batch_transfer", "forward", "training_step", "validation_step", "backward", "manual_backward"),
    *("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step"),
    *("on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train"),
]
Seen = list[Any]


def frozen(value: Any, values: bool = True) -> Any:
    """Nested data as lists that ``==`` compares bit for bit and in the order of keys; else the tensors' shapes only."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist() if values else list(value.shape)]
    if isinstance(value, dict):
        return [[key, frozen(entry, values)] for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(frozen(entry, values) for entry in value)]
    return value


def checkpoint(path: Path, values: bool = True) -> Any:
    """All that a checkpoint holds but for the callbacks' states; without ``values``, only the shapes of what moves."""
    if path.is_dir():
        dcp_to_torch_save(path, whole := path.with_suffix(".whole"))
        content = {**torch.load(path / "meta.pt", weights_only=True), "sharded": torch.load(whole, weights_only=True)}
        held = content["sharded"]
        optimizers = [held[key] for key in held if key.startswith("optimizer_")]
    else:
        content = torch.load(path, weights_only=True)
        held, optimizers = content, content["optimizer_states"]
    content.pop("callbacks", None)
    weights = [held.pop(key) for key in ("state_dict", "model") if key in held]
    # in the order of the parameters: that of their first update leaves no trace once it is loaded
    states = [sorted(optimizer.pop("state").items()) for optimizer in optimizers]
    return [frozen(content), frozen([weights, states], values)]


def difference(actual: Any, expected: Any, path: str = "") -> str:
    """The first place where frozen data differ, and how."""
    if not (isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected)):
        return f"{path}: {actual}, expected {expected}"
    entries = enumerate(zip(actual, expected, strict=True))
    index, (mine, theirs) = next(entry for entry in entries if entry[1][0] != entry[1][1])
    label = mine[0] if isinstance(mine, list) and mine and isinstance(mine[0], str) else index
    return difference(mine, theirs, f"{path}[{label}]")


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    """Frozen data, entry by entry, so that a failure tells the first that differs."""
    assert expected
    for mine, theirs in zip(actual, expected, strict=False):
        assert mine == theirs, difference([mine], [theirs])
    assert len(actual) == len(expected)


class Spies:
    """A callback to put first, one to put last, the module's own methods, and step hooks made with the optimizer.

    Each notes in `seen` how the groups look to it: keys in their order, values, parameters by name, and for lists,
    groups and tensors a number that tells whether it is the same object as before. Two equal runs see the same.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.first, self.last = Spy(self, "first"), Spy(self, "last")
        self.trainer: pl.Trainer | None = None
        # kept alive, so that no id is given twice
        self.objects: dict[int, tuple[int, Any]] = {}
        self.names: dict[int, tuple[str, Any]] = {}

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer, self.module, make = trainer, module, module.make_optimizer
        for name in METHODS:
            setattr(module, name, self.watched(name, getattr(module, name)))
        module.make_optimizer = lambda params: self.watch_steps(make(params))
        module.look = self.look

    def watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        # Lightning looks through `wraps` to tell what a module overrides
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.look(f"module, {name}")
            if name == "optimizer_step" and callable(args[-1]):
                args = (*args[:-1], self.watched("closure", args[-1]))
            result = method(*args, **kwargs)
            self.look(f"module, {name} is over")
            return result

        return call

    def watch_steps(self, optimizer: Optimizer, whose: str = "the module's") -> Optimizer:
        optimizer.register_step_pre_hook(lambda *args: self.look(f"{whose} step hook, before"))
        optimizer.register_step_post_hook(lambda *args: self.look(f"{whose} step hook, after"))
        return optimizer

    def look(self, where: str) -> None:
        if self.trainer is None:
            return
        for name, parameter in self.module.named_parameters():
            self.names.setdefault(id(parameter), (name, parameter))
        optimizers = [*self.trainer.optimizers]
        # of an optimizer that shares its work with other processes
        optimizers += [optimizer.optim for optimizer in optimizers if hasattr(optimizer, "optim")]
        self.seen.append([where, [self.groups(optimizer) for optimizer in optimizers]])

    def groups(self, optimizer: Optimizer) -> Seen:
        groups = [
            [self.number(group), *([key, self.value(key, value)] for key, value in group.items())]
            for group in optimizer.param_groups
        ]
        return [self.number(optimizer), self.number(optimizer.param_groups), groups]

    def value(self, key: str, value: Any) -> Any:
        if key == "params":
            return [self.number(value), *(self.names[id(parameter)][0] for parameter in value)]
        return [self.number(value), frozen(value)] if isinstance(value, Tensor) else frozen(value)

    def number(self, thing: Any) -> int:
        return self.objects.setdefault(id(thing), (len(self.objects), thing))[0]


class Spy(pl.Callback):
    """Looks in every hook that a callback has."""

    def __init__(self, spies: Spies, position: str) -> None:
        self.spies, self.position = spies, position

    @property
    def state_key(self) -> str:
        return f"spy-{self.position}"


def _looks(name: str) -> Callable[..., Any]:
    def hook(self: Spy, *args: Any, **kwargs: Any) -> Any:
        if name == "setup" and self.position == "first":
            self.spies.attach(*args[:2])
        self.spies.look(f"{self.position} callback, {name}")
        return {} if name == "state_dict" else None

    return hook


for _name in HOOKS:
    setattr(Spy, _name, _looks(_name))
