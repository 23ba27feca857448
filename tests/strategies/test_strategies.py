"""Two real processes a strategy, forked once; the tests read what they left."""

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processes import forked, worker

STRATEGIES = ["ddp", "fsdp1", "fsdp2-sharded"]
# What differs for these is only the optimizer's state and how it is saved
WITH_CHECKPOINTS = [*STRATEGIES, "fsdp2-full", "zero"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
DEEPSPEED = [pytest.param(f"deepspeed{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]


def ranks_of(strategy: str) -> range:
    return range(1 if strategy == "single" else worker.PROCESSES)


def results(strategy: str, folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in ranks_of(strategy)]


class Found:
    """The results of each strategy, launched when a test first asks for them, of any worker of pytest-xdist."""

    def __init__(self, folder: Path, job: Callable[[int, str, Path], None]) -> None:
        self.folder, self.job = folder, job
        self.by_strategy: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, strategy: str, scenario: str, rank: int = 0) -> dict[str, Any]:
        if strategy not in self.by_strategy:
            self.by_strategy[strategy] = self.launched(strategy, self.folder / strategy)
        found = self.by_strategy[strategy][rank][scenario]
        assert "error" not in found, f"{strategy}, {scenario}: {found['error']}"
        return found

    def launched(self, strategy: str, folder: Path) -> list[dict[str, Any]]:
        done = folder / "done"
        try:
            folder.mkdir()
        except FileExistsError:
            end = time.monotonic() + forked.SECONDS
            while not done.exists() and time.monotonic() < end:
                time.sleep(0.1)
            return results(strategy, folder)
        try:
            device = {"DS_ACCELERATOR": "cuda" if worker.ON_GPU else "cpu"}
            forked.ranks(self.job, strategy, folder, processes=len(ranks_of(strategy)), environment=device)
        finally:
            done.touch()
        return results(strategy, folder)


def found_in(tmp_path_factory: pytest.TempPathFactory, job: Callable[[int, str, Path], None]) -> Found:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"strategies-{job.__module__}"
    folder.mkdir(exist_ok=True)
    return Found(folder, job)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_in(tmp_path_factory, worker.job)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        distance = float((actual[name] - value).abs().max() / max(1.0, float(value.abs().max())))
        assert distance <= tolerance, f"{name} is off by {distance}"


@pytest.mark.parametrize("strategy", [*WITH_CHECKPOINTS, *DEEPSPEED])
def test_it_trains_as_the_expert_on_the_same_strategy(strategy: str, found: Found) -> None:
    for rank in ranks_of(strategy):
        results = found(strategy, "rules_and_schedule", rank)
        assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("strategy", [*WITH_CHECKPOINTS, *DEEPSPEED])
def test_it_trains_as_one_process(strategy: str, found: Found) -> None:
    """Gradients are the mean over both processes, which see halves of one process's batch."""
    actual = found(strategy, "rules_and_schedule")["actual"]
    assert_equal(actual, found("single", "rules_and_schedule")["expected"], 1e-5)


@pytest.mark.parametrize("strategy", DEEPSPEED)
def test_resume_goes_on_as_the_uninterrupted_run(strategy: str, found: Found) -> None:
    results = found(strategy, "resume_with_a_schedule")
    assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("policy", ["config", "checkpoint"])
@pytest.mark.parametrize("strategy", [*WITH_CHECKPOINTS, *DEEPSPEED])
def test_an_edited_lambda_follows_the_policy(strategy: str, policy: str, found: Found) -> None:
    results = found(strategy, "on_resume")[policy]
    assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES, *DEEPSPEED])
def test_schedules_count_steps_not_batches(strategy: str, found: Found) -> None:
    results = found(strategy, "accumulation")
    assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("batch", [worker.STEPS_AN_EPOCH + 1, worker.STEPS_AN_EPOCH + 2])
@pytest.mark.parametrize("strategy", WITH_CHECKPOINTS)
def test_resume_in_the_middle_of_an_epoch_and_of_a_window(strategy: str, batch: int, found: Found) -> None:
    results = found(strategy, "middle")[str(batch)]
    assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("policy", ["config", "checkpoint"])
def test_lambda_edited_in_an_optimizer_that_holds_another_one(policy: str, found: Found) -> None:
    results = found("zero", "edited")[policy]
    assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("kind", ["independent", "cautious", "lagrangian"])
def test_saving_within_a_step_changes_no_weight(kind: str, found: Found) -> None:
    results = found("fsdp2-sharded", "saving")[kind]
    assert_equal(results["actual"], results["expected"])


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_options_of_ddp(option: str, found: Found) -> None:
    results = found("ddp", "options")
    assert_equal(results[option], results["plain"], 1e-7)


def norm(tensors: list[Tensor]) -> float:
    return float(np.sqrt(sum(float(t.square().sum()) for t in tensors)))


def expected_rows(weights: list[dict[str, Tensor]], step: int) -> dict[str, float]:
    """All keys of one step from whole float64 weights; SGD gives the gradient: (w - w') / lr - lambda w."""
    now, after = weights[step], weights[step + 1]
    update = {name: after[name] - now[name] for name in now}
    lambdas = {name: 0.3 if name in worker.DECAYED else 0.0 for name in now}
    gradient = {name: -update[name] / 0.1 - lambdas[name] * now[name] for name in now}
    rows = {}
    for prefix, tensors in (("l2_norm", now), ("update_norm", update), ("grad_norm", gradient)):
        for part in ("body.0", "body.1", "head"):
            rows[f"{prefix}/{part}"] = norm([t for name, t in tensors.items() if name.startswith(part)])
        rows[f"{prefix}/total"] = norm(list(tensors.values()))
    penalty = 0.3 / 2 * sum(float(now[name].square().sum()) for name in worker.DECAYED)
    return {
        **rows,
        "l2_penalty/decay": penalty,
        "l2_penalty/no_decay": 0.0,
        "l2_penalty/total": penalty,
        "weight_decay/decay": 0.3,
        "weight_decay/no_decay": 0.0,
    }


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES, *DEEPSPEED])
def test_logged_values_are_those_of_the_whole_model(strategy: str, found: Found) -> None:
    results = found(strategy, "monitor")
    assert sorted(results["rows"]) == list(range(worker.STEPS_AN_EPOCH * worker.EPOCHS))
    for step, row in results["rows"].items():
        expected = expected_rows(results["weights"], step)
        if strategy.startswith("deepspeed"):
            expected = {key: value for key, value in expected.items() if not key.startswith("grad_norm")}
        for key, value in expected.items():
            tolerance = 1e-6 if key.startswith(("l2", "weight_decay")) else 1e-4
            assert row[key] == pytest.approx(value, rel=tolerance, abs=1e-9), (step, key)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2-sharded", *DEEPSPEED])
def test_spectra_are_those_of_whole_matrices(strategy: str, found: Found) -> None:
    results = found(strategy, "monitor")
    for step, row in results["rows"].items():
        largest = np.linalg.norm(results["weights"][step]["head.weight"].numpy(), 2)
        assert row["spectral_norm/head.weight"] == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *DEEPSPEED])
def test_both_processes_can_monitor_the_total(strategy: str, found: Found) -> None:
    """Early stopping and checkpoints decide alike only if every process has the value."""
    values = [found(strategy, "monitor", rank)["metrics"] for rank in ranks_of(strategy)]
    for key in ("l2_norm/total", "l2_penalty/total"):
        assert values[0][key] == values[-1][key]


@pytest.mark.parametrize("strategy", [*STRATEGIES, *DEEPSPEED])
def test_a_logged_step_costs_at_most_one_collective(strategy: str, found: Found) -> None:
    """Two steps are logged, and the first one is read too, so that the totals can be monitored from the start."""
    results = found(strategy, "collectives")
    assert sum(results["plain"].values()) > 0, "the reference run was to communicate"
    extra = sum(results["monitored"].values()) - sum(results["plain"].values())
    assert extra <= (0 if strategy in ("ddp", "deepspeed1", "deepspeed2") else 3), results


@pytest.mark.parametrize("way", ["coupled", "decoupled", "independent", "cautious"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ways_to_apply_act_on_shards_as_on_the_whole(strategy: str, way: str, found: Found) -> None:
    assert_equal(found(strategy, "ways")[way], found("single", "ways")[way], 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_penalty_is_that_of_the_whole_model(strategy: str, found: Found) -> None:
    results = found(strategy, "penalty")
    assert_equal(results["actual"], results["expected"], 1e-6)
