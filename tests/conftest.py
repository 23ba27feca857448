import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


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
