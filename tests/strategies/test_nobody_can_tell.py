"""Nobody can tell that the callbacks are there, in two processes that share out batches, weights or states."""

import pytest

from tests.processes import watched as watched_processes
from tests.spies import assert_same
from tests.strategies.test_strategies import WITH_CHECKPOINTS, Found, assert_equal, found_in, ranks_of

each_strategy = pytest.mark.parametrize("strategy", WITH_CHECKPOINTS)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_in(tmp_path_factory, watched_processes.job)


def assert_alike(actual: dict, expected: dict, rank: int) -> None:
    """All that the spies saw, and what the first process finds in checkpoints."""
    assert_same(actual["seen"], expected["seen"])
    if rank == 0:
        assert_same(actual["files"], expected["files"])


@each_strategy
def test_with_lambda_0_all_is_as_without(strategy: str, watched: Found) -> None:
    for rank in ranks_of(strategy):
        results = watched(strategy, "whole", rank)
        assert_alike(results["with-0"], results["without-0"], rank)
        assert_equal(results["with-0"]["weights"], results["without-0"]["weights"])


@each_strategy
def test_with_another_lambda_only_weights_differ(strategy: str, watched: Found) -> None:
    for rank in ranks_of(strategy):
        results = watched(strategy, "whole", rank)
        assert_alike(results["with"], results["without"], rank)
        assert_equal(results["with"]["weights"], results["expert"])


@pytest.mark.parametrize("second", ["with", "without"])
@pytest.mark.parametrize("first", ["with", "without"])
@each_strategy
def test_resumed_with_and_without(strategy: str, first: str, second: str, watched: Found) -> None:
    for rank in ranks_of(strategy):
        results = watched(strategy, "resumed", rank)
        assert_alike(results[f"{first}-{second}"], results["without-without"], rank)
        assert_equal(results[f"{first}-{second}"]["weights"], results[f"{first}-{second}"]["expert"])
