"""Tensor parallelism in two real processes, with FSDP2 in four: what is logged and learnt is what one process has."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processes import forked, tensor_parallel


@pytest.mark.parametrize("job", tensor_parallel.JOBS)
def test_fits_are_those_of_one_process(job: str, tmp_path: Path) -> None:
    """All fits in one test, since two workers would each start the processes."""
    tensor, data, without = tensor_parallel.JOBS[job]
    forked.ranks(tensor_parallel.work, job, tmp_path, processes=tensor * data)
    ranks = [torch.load(tmp_path / f"{job}-{rank}.pt", weights_only=False) for rank in range(tensor * data)]
    with warnings.catch_warnings():
        # as is wanted here
        warnings.filterwarnings("ignore", ".* parameters that the default exempts decay")
        alone = tensor_parallel.every_fit(without=without)
    for name, expected in alone.items():
        assert_same_rows(ranks[0][name]["rows"], expected["rows"], name)
        parts: dict[Any, Tensor] = {}
        for fits in ranks:
            for place, part in fits[name]["parts"].items():
                assert torch.equal(parts.setdefault(place, part), part), (name, place)
            if name == "stochastic":
                assert_right_on_average(fits[name]["weights"])
                continue
            for key, weight in fits[name]["weights"].items():
                torch.testing.assert_close(weight, expected["weights"][key], rtol=1e-6, atol=1e-9, msg=f"{name} {key}")


def test_resumed_trainings_are_the_whole_ones_bit_for_bit(tmp_path: Path) -> None:
    """And the whole ones those of one process, where rounding is not random."""
    forked.ranks(tensor_parallel.resume, tmp_path)
    ranks = [torch.load(tmp_path / f"resumed-{rank}.pt", weights_only=False) for rank in range(2)]
    (tmp_path / "alone").mkdir()
    alone = tensor_parallel.every_resume(None, tmp_path / "alone")
    for name, (expected, _) in alone.items():
        for whole, resumed in (fits[name] for fits in ranks):
            for key, weight in whole["weights"].items():
                assert torch.equal(resumed["weights"][key], weight), (name, key)
                if name not in ("accumulate", "stochastic"):
                    torch.testing.assert_close(weight, expected["weights"][key], rtol=1e-6, atol=1e-9, msg=name)
        whole, resumed = ranks[0][name]
        assert resumed["rows"] == {step: row for step, row in whole["rows"].items() if step >= 4}, name


def assert_same_rows(
    found: Mapping[int, Mapping[str, float]], expected: Mapping[int, Mapping[str, float]], name: str
) -> None:
    assert found.keys() == expected.keys(), name
    for step, row in expected.items():
        assert found[step] == pytest.approx(row, rel=1e-6, nan_ok=True), (name, step)


def assert_right_on_average(weights: Mapping[str, Tensor]) -> None:
    """Eight steps take 0.4 % each of weights of bfloat16, whose neighbours are 0.4 to 0.8 % away."""
    start = tensor_parallel.Net(None, torch.bfloat16, 0.0).state_dict()
    exact = torch.cat([(0.996**8 * weight.double()).flatten() for weight in start.values()])
    found = torch.cat([weights[name].double().flatten() for name in start])
    # an element is off by 0.8 %, one standard deviation, and there are 280; nothing taken would be off by 3.3 %
    assert ((found @ exact) / (exact @ exact)).item() == pytest.approx(1.0, abs=0.003)
