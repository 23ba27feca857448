"""Choose lambda by training with several values of it."""

from lightning_l2.search.plan import Range, SearchPlan
from lightning_l2.search.result import SearchResult
from lightning_l2.search.search import search_weight_decay
from lightning_l2.search.suggestion import Difference
from lightning_l2.search.trials import Run, Trial, TrialRun

__all__ = ["Difference", "Range", "Run", "SearchPlan", "SearchResult", "Trial", "TrialRun", "search_weight_decay"]


def __dir__() -> list[str]:
    return __all__
