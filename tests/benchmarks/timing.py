"""Interleaved measurements: every contender in every round, so that a busy machine is equally busy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

# What measures time; `time.process_time` leaves out what other processes take, where one thread does all the work.
clock: Callable[[], float] = time.perf_counter


def use_cpu_time() -> None:
    """Measure the time that this process has had."""
    global clock
    clock = time.process_time


def now() -> float:
    """Return the time in seconds."""
    return clock()


def wait(device: torch.device) -> None:
    """Let a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int = 15, device: torch.device | None = None
) -> dict[str, float]:
    """Return the best time of each contender in seconds."""
    return {name: min(found) for name, found in _turns(contenders, rounds, device).items()}


def medians(
    contenders: dict[str, Callable[[], object]], rounds: int = 15, device: torch.device | None = None
) -> dict[str, float]:
    """Return the median time of each contender in seconds."""
    return {name: statistics.median(found) for name, found in _turns(contenders, rounds, device).items()}


def _turns(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device | None
) -> dict[str, list[float]]:
    device = device or torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            wait(device)
            start = now()
            run()
            wait(device)
            times[name].append(now() - start)
    return times


def robust(times: Sequence[float]) -> float:
    """Return the mean of the faster half, which neither a hiccup nor one lucky step decides."""
    return statistics.fmean(sorted(times)[: max(1, len(times) // 2)])


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table."""
    lines = [[str(cell) for cell in row] for row in [list(head), *map(list, rows)]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n### {title}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
