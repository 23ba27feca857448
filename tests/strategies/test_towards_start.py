"""Decay and penalty towards the start in two real processes, as in one that has it written by hand."""

from __future__ import annotations

import pytest

from tests.processes import towards_start
from tests.processes.towards_start import OURS
from tests.strategies.test_strategies import Found, assert_equal, found_in


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_in(tmp_path_factory, towards_start.job)


@pytest.mark.parametrize("way", OURS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2-sharded", "fsdp2-full"])
def test_shards_are_pulled_to_their_start(strategy: str, way: str, found: Found) -> None:
    """Resumed runs are bit-equal; the checkpoint has the whole norms; another start is an error on all processes."""
    norms, expected = found("single", "start"), found("single", way)
    for rank in range(2):
        result = found(strategy, way, rank)
        assert_equal(result["whole"], expected, 1e-5)
        assert_equal(result["resumed"], result["whole"])
        (state,) = result["state"].values()
        assert state["start"] == pytest.approx(norms, rel=1e-6)
        assert result["elsewhere"].startswith("1 parameters don't start from the weights that training began with: the")
        assert f"norm of 'head.weight' is {1.5 * norms['head.weight']:.3g}"[:-1] in result["elsewhere"]
