import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# the same examples in each run; others with `--hypothesis-profile=default`
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """What is imported by now stays: tests of leaks need not look through it whenever they collect."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a Trainer leaves in the environment, such as its rank, keeps the next one from starting processes."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]
