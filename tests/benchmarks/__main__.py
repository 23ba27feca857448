"""`python -m tests.benchmarks` prints all tables; name some of them to see only those."""

from __future__ import annotations

import argparse
import logging
import platform
import warnings

import torch

from tests.benchmarks import memory, norms, penalty, scheduling, steps, synchronisation, timing

TABLES = ("norms", "steps", "penalty", "scheduling", "memory", "synchronisation")


def main() -> None:
    """Run the tables that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="by default all that the device can run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: CPU time, on one thread")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.cpu_time:
        arguments.threads = 1
        timing.use_cpu_time()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {name}, {arguments.threads} threads")
    chosen = arguments.tables or TABLES
    million = 16 if arguments.quick else 64
    if "norms" in chosen:
        norms.large(device, million)
        norms.constant(device, 16)
        norms.many(device)
        norms.growth(device)
    if "steps" in chosen:
        steps.monitors(device, arguments.quick)
    if "penalty" in chosen:
        penalty.penalties(device)
    if "scheduling" in chosen:
        scheduling.scheduling()
        scheduling.many_lambdas()
        scheduling.decayed_weights()
    if "memory" in chosen:
        memory.memory(device)
    if "synchronisation" in chosen and device.type == "cuda":
        synchronisation.synchronisation()


if __name__ == "__main__":
    main()
