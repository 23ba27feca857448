"""What lambda can follow from where several processes train; the rest is in the tests of the callbacks."""

import json
from pathlib import Path

import pytest

from tests.processes import forked, training_setups

# each of 16 samples, in batches of 4, is in one step of an epoch; ranks that share tensors see the same ones
FOUND = {
    "ddp": {"batch_size": 8, "steps_per_epoch": 2},
    "tensor parallel": {"batch_size": 4, "steps_per_epoch": 4},
}


@pytest.mark.parametrize("strategy", FOUND)
def test_samples_of_a_step_are_those_of_the_processes_that_share_the_data(strategy: str, tmp_path: Path) -> None:
    forked.ranks(training_setups.work, strategy, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == FOUND[strategy]
