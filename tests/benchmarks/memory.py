"""Peak memory of norms and of a monitored step, beyond what was there before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lightning_l2.monitor import NormOptions, NormTracker
from lightning_l2.norms import squared_norms
from tests.benchmarks.timing import table

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak(run: Callable[[], object], device: torch.device) -> float:
    """Return how many bytes a call needs at its peak; on a CPU by what Linux says of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    RESET.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def memory(device: torch.device) -> None:
    """Peak memory over that of the parameters, in a process whose allocator holds nothing yet that hides a peak."""
    torch.multiprocessing.spawn(_memory, args=(device,))


def _memory(_: int, device: torch.device) -> None:
    if device.type == "cpu" and not RESET.exists():
        print("\nPeak memory: only where Linux tells it.")
        return
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(4)).to(device, dtype)
        size = sum(p.nbytes for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(options: NormOptions, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            tracker = NormTracker(options, {})
            tracker.begin(0, model, [optimizer], None, 0)
            tracker.observe()

        cases: dict[str, Callable[[], object]] = {
            "norms": lambda model=model: squared_norms(list(model.parameters())),
            "a monitored step": lambda step=step: step(NormOptions()),
            "with updates, rotation": lambda step=step: step(NormOptions(updates=True, rotation=True)),
            "with histograms": lambda step=step: step(NormOptions(histograms=1)),
            "with spectra": lambda step=step: step(NormOptions(spectra=1)),
            "float64 norms": lambda model=model: [torch.linalg.vector_norm(p.double()) for p in model.parameters()],
        }
        for case in cases.values():
            case()
        rows += [[f"{str(dtype)[6:]}, {name}", f"{peak(case, device) / size:.3f}"] for name, case in cases.items()]
    table("Peak memory over that of the parameters (67 million)", ["what", "ratio"], rows)
    rows = []
    lists = {"one of 2e6 x 64": [(2_000_000, 64)], "one of 2^26": [(2**26,)], "100 x 2^20": [(1024, 1024)] * 100}
    for name, shapes in lists.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.ones(shape, device=device, dtype=dtype) for shape in shapes]
            squared_norms([tensors[0][:600].flatten()[:70_000]])  # code that is loaded once doesn't count
            rows.append(
                [f"{name}, {str(dtype)[6:]}", f"{peak(partial(squared_norms, tensors), device) / 2**20:.1f} MiB"]
            )
    table("Peak memory of norms beside their tensors", ["tensors", "peak"], rows)
