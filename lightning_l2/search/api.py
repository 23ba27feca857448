"""`search_weight_decay`: a search for lambda as one function call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_l2.search.plan import Range, SearchPlan
from lightning_l2.search.ranks import search_on_all_ranks
from lightning_l2.search.result import SearchResult
from lightning_l2.search.run import Fit
from lightning_l2.search.training import Make, fit_from

if TYPE_CHECKING:
    import optuna


def search_weight_decay(
    make: Make | None = None,
    *,
    fit: Fit | None = None,
    monitor: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    low: float = 1e-5,
    high: float = 1e-1,
    first: float = 1e-3,
    trials: int = 12,
    seeds: int = 3,
    seed: int = 0,
    method: Literal["grid", "tpe"] | None = None,
    also: Mapping[str, Range] | None = None,
    prune: bool = True,
    pick: Literal["last", "best"] = "last",
    storage: str | Path | optuna.storages.BaseStorage | None = None,
    name: str = "weight_decay",
    progress: bool = True,
) -> SearchResult:
    """Choose lambda: train with values on a log scale and compare them on held-out data.

    The first trial is 1e-3, then comes a coarse grid over the range, then the neighbourhood of the best and of the
    suggestion. Each value is trained with the same few seeds. The suggestion is the largest lambda whose metric is
    within one standard error of the best; the plain best is beside it. A search costs `trials * seeds` trainings.

    A trial that ends in nan or infinity, or raises once others are complete, counts as failed and the search goes
    on. An error in the first trial ends the search. Random states are as before afterwards.

    With a `storage` a search continues where it was stopped, and several processes or machines that call this with
    the same arguments share the trials: none is lost and none done twice, and one whose process died is run again.
    All of them return when everything is done, each with the whole result.

    Args:
        make: called as `make(weight_decay, **others)`; returns a new `(trainer, module)`, `(trainer, module, data)`
            or `(trainer, module, train_dataloaders, val_dataloaders)`. Seeds are set before the call. These Trainers
            show no progress bars and no summaries and write no checkpoints.
        fit: in place of `make`, a function that does one training itself. It is given a `TrialRun` with
            `weight_decay`, `seed`, `others` and `report(epoch, value)`, and returns the metric, or a mapping with
            all metrics, each one number or one for each epoch.
        monitor: the metric that decides, by the name it is logged under.
        mode: whether a small ("min") or a large ("max") value of it is good.
        low: smallest lambda (weight_decay), dimensionless.
        high: largest lambda.
        first: lambda of the first trial; the middle of the range on the log scale where it lies outside of it.
        trials: number of values of lambda.
        seeds: trainings for each of them. With one, the noise is unknown and the suggestion is the plain best.
        seed: the first random seed; it also decides which values "tpe" samples.
        method: "grid" halves the widest gap beside the best and the suggested value, "tpe" samples where good values
            are likely. None is "grid" for lambda alone, "tpe" for a joint search.
        also: what to search jointly, name to `Range`, such as `{"lr": Range(1e-4, 1e-2)}`.
        prune: whether a training is stopped that, once the grid is complete, is worse than three quarters of the
            complete trials at the same epoch, by more than seeds differ; nothing is stopped in the first half of a
            training.
        pick: which value of the metric counts, the "last" of a training or its "best".
        storage: None to keep trials in this process; a path that ends in .db, .sqlite or .sqlite3 for SQLite; any
            other path for a journal file; a database URL; or an Optuna storage.
        name: the study's name in the storage.
        progress: whether to show a progress bar with the best so far and the time left.

    Raises:
        ModuleNotFoundError: If Optuna isn't installed.
        TypeError: If neither or both of `make` and `fit` are given, or `also` has something else than a `Range`.
        ValueError: If a value is out of its range, or the monitored metric is not in what `fit` returns.
        MisconfigurationException: If `make` returns something else or a Trainer that trained before, the monitored
            metric never appeared in a training, or the storage holds another search under this name.
        RuntimeError: If every trial failed.

    Example:
        >>> import lightning.pytorch as pl
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 1)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        ...     def validation_step(self, batch):
        ...         self.log("val_loss", self.training_step(batch))
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), weight_decay=self.weight_decay)
        >>> def make(weight_decay):
        ...     data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
        ...     trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                          enable_progress_bar=False, enable_model_summary=False)
        ...     module = Net()
        ...     module.weight_decay = weight_decay
        ...     return trainer, module, DataLoader(data, 16), DataLoader(data, 16)
        >>> result = search_weight_decay(make, trials=3, seeds=2, progress=False)
        >>> sorted(trial.weight_decay for trial in result.trials)
        [1e-05, 0.001, 0.1]
        >>> chosen, best, table = result.weight_decay, result.best.weight_decay, result.table()

        `result.save("folder")` writes the trials as a table and as pictures.
    """
    if (make is None) == (fit is None):
        given = "neither" if make is None else "both"
        raise TypeError(
            f"Expected either make or fit but got {given}. Give make, which builds a Trainer, a module and data, "
            "or fit, which trains by itself."
        )
    plan = SearchPlan(
        monitor=monitor, mode=mode, low=low, high=high, first=first, trials=trials, seeds=seeds, seed=seed,
        method=method, also=dict(also or {}), prune=prune, pick=pick,
    )  # fmt: skip
    if fit is None:
        assert make is not None
        fit = fit_from(make, monitor)
    return search_on_all_ranks(fit, plan, storage=storage, name=name, progress=progress)
