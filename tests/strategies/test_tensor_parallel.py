"""Tensor parallelism in two real processes, with FSDP2 in four: what is logged and learnt is what one process has."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import tensor_parallel

REPOSITORY = Path(__file__).parents[2]
NAMES = [name for name, _, _ in tensor_parallel.scenarios()]
Fits = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def alone() -> Fits:
    with warnings.catch_warnings():
        # as is wanted here
        warnings.filterwarnings("ignore", "Rule 'all' decays .* that the default exempts")
        return tensor_parallel.every_fit()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Fits]]:
    """By job, the fits of each rank."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    command = [sys.executable, "-W", "ignore", "-m", "tests.processes.tensor_parallel", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=500)
    return {
        job: [torch.load(folder / f"{job}-{rank}.pt", weights_only=False) for rank in range(tensor * data)]
        for job, (tensor, data, _) in tensor_parallel.JOBS.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_fits_are_those_of_one_process(name: str, alone: Fits, shared: dict[str, list[Fits]]) -> None:
    expected = alone[name]
    for ranks in shared.values():
        found = [fits[name] for fits in ranks if name in fits]
        parts: dict[Any, torch.Tensor] = {}
        for rank, one in enumerate(found):
            if rank == 0:
                assert one["rows"].keys() == expected["rows"].keys()
                for step, row in expected["rows"].items():
                    assert one["rows"][step] == pytest.approx(row, rel=1e-6, nan_ok=True)
            for place, part in one["parts"].items():
                assert torch.equal(parts.setdefault(place, part), part)
            for key, weight in one["weights"].items():
                if name != "stochastic":  # other random numbers
                    torch.testing.assert_close(weight, expected["weights"][key], rtol=1e-6, atol=1e-9)


def test_what_is_rounded_at_random_is_right_on_average(alone: Fits, shared: dict[str, list[Fits]]) -> None:
    """Eight steps take 0.4 % each of weights of bfloat16, whose neighbours are 0.4 to 0.8 % away."""
    start = tensor_parallel.Net(None, torch.bfloat16, 0.0).state_dict()
    exact = torch.cat([(0.996**8 * weight.double()).flatten() for weight in start.values()])
    for fits in [alone, *shared["tp"], *shared["mixed"]]:
        weights = fits["stochastic"]["weights"]
        found = torch.cat([weights[name].double().flatten() for name in start])
        # off by 0.8 % an element at most, one standard deviation, and there are 280; nothing taken were off by 3.3 %
        assert ((found @ exact) / (exact @ exact)).item() == pytest.approx(1.0, abs=0.003)
