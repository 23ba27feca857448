"""Tensors of many contents and layouts, their norms by float64 sums, and the size of temporaries."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = [torch.bfloat16, torch.float16]
CONTENTS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(n)),
    "constant": lambda n: torch.full((n,), 0.0577),  # the worst of 300 constants for a sum of fp32 squares
    "growing": lambda n: torch.linspace(1e-3, 3.0, n),
}


def reference(tensor: Tensor) -> float:
    """The norm, by float64 sums of a million squares each."""
    parts = [block.double().square().sum() for block in tensor.reshape(-1).split(2**20)]
    return math.sqrt(math.fsum(part.item() for part in parts))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda t: t.view(600, 1000),
    "transposed": lambda t: t.view(600, 1000).t(),
    "permuted": lambda t: t.view(60, 10, 1000).permute(2, 0, 1),
    "kernel": lambda t: t.view(1000, 200, 3, 1),
    "channels last": lambda t: t.view(100, 240, 5, 5).to(memory_format=torch.channels_last),
    "every other column": lambda t: t.view(600, 1000)[:, ::2],
    "slice of rows": lambda t: t.view(600, 1000)[7:402],
    "slice of columns": lambda t: t.view(600, 1000)[:, 3:998],
    "repeated": lambda t: t[:1000].expand(300, 1000),
    "one number repeated": lambda t: t[:1].expand(300_000),
    "offset": lambda t: t[5:],
    "flipped": lambda t: t.flip(0),
    "negated view": lambda t: torch._neg_view(t),
}


class Watch(TorchDispatchMode):
    """Note the largest tensor that an operator makes, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        known |= {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result
