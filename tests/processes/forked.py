"""Programs in processes of their own, forked from one that has done the imports, which take longer than the programs.

That process starts once in a session, imports torch and Lightning but nothing of this package, and has one thread. What
runs is as fresh as a new interpreter otherwise, and whatever becomes of it, the next one is forked from the same state.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 250
IMPORTED = ["lightning.pytorch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


@dataclass(frozen=True)
class Done:
    """How a process ended and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def python(*arguments: str, environment: Mapping[str, str] | None = None, **options: Any) -> Done:
    """Run what ``python ARGUMENTS`` would: ``-c CODE``, ``-m MODULE`` or a file, each with its own arguments."""
    (done,) = pythons(*arguments, environments=[environment or {}], **options)
    return done


def pythons(*arguments: str, environments: Sequence[Mapping[str, str]], **options: Any) -> list[Done]:
    """Run the same side by side, once in each environment."""
    return _run([(_program, arguments)] * len(environments), environments, **options)


def ranks(function: Callable[..., None], *arguments: Any, processes: int = 2, **options: Any) -> None:
    """Call ``function(rank, *arguments)`` in processes that find each other as a launcher's do; all must end well.

    Each closes torch's process group once all have come to their end: one that closes early fails what others wait for,
    even in a barrier of the group's own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # with which a Trainer starts no processes of its own
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    end = _context.Barrier(processes)
    jobs = [(_rank, (function, rank, arguments, end)) for rank in range(processes)]
    ended = _run(jobs, [{**launched, **options.pop("environment", {})}] * processes, **options)
    failed = [f"process {rank} ended with {done.returncode}: {done.stderr[-3000:]}" for rank, done in enumerate(ended)]
    assert not any(done.returncode for done in ended), "\n".join(failed)


def _run(
    jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
    environments: Sequence[Mapping[str, str]],
    *,
    cwd: Path = ROOT,
    seconds: float = SECONDS,
) -> list[Done]:
    """Run jobs side by side; all are killed when one fails, since the others would wait for it, or time is up."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(number)) for number in range(len(jobs))]
        processes = [
            _context.Process(target=_begin, args=(*job, {**shared, **environment}, cwd, output))
            for job, environment, output in zip(jobs, environments, outputs, strict=True)
        ]
        end = time.monotonic() + seconds
        try:
            for process in processes:
                process.start()
            waiting = {process.sentinel: process for process in processes}
            while waiting and (left := end - time.monotonic()) > 0:
                ended = [waiting.pop(sentinel) for sentinel in wait(list(waiting), left)]
                for process in ended:
                    process.join()
                if any(process.exitcode for process in ended):
                    break
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [
            Done(process.exitcode, *(file.read_text() if file.exists() else "" for file in _written(output)))
            for process, output in zip(processes, outputs, strict=True)
        ]


def _written(output: Path) -> list[Path]:
    return [output.with_suffix(suffix) for suffix in (".out", ".err")]


def _begin(
    job: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], cwd: Path, output: Path
) -> None:
    """What a new interpreter has: files of its own to write to, its environment, its folder, and the usual signals."""
    for number, file in enumerate(_written(output), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    torch.set_num_threads(1)
    # which Lightning reads when it is imported
    rank_zero_only.rank = _get_rank() or 0
    job(*arguments)


def _program(*arguments: str) -> None:
    first, *rest = arguments
    if first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__builtins__ = builtins
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _rank(function: Callable[..., None], rank: int, arguments: tuple[Any, ...], end: Barrier) -> None:
    import torch.distributed as dist

    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank))
    warnings.simplefilter("ignore")
    function(rank, *arguments)
    end.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
