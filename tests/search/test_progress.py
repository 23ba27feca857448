"""What is seen of a search while it runs."""

import logging
import warnings

import pytest

from lightning_l2.search import TrialRun
from tests.search.functions import search, valley


def test_each_warning_is_shown_once_and_levels_come_back() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level

    def fit(run: TrialRun) -> float:
        assert logger.level >= logging.WARNING
        with warnings.catch_warnings():
            warnings.simplefilter("default")
        warnings.warn("the same each time", stacklevel=1)
        return valley(run)

    with pytest.warns(UserWarning, match="the same") as shown:
        search(fit=fit, trials=4)
    assert [str(warning.message) for warning in shown] == ["the same each time"]
    assert logger.level == before


def test_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    search(fit=valley, trials=2, seeds=2, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "weight decay: 100%" in last
    assert "4/4" in last
    assert "best lambda=0.1 with val_loss=1.5" in last
