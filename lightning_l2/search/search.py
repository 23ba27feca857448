"""`search_weight_decay`: a search for lambda as one function call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_l2.search.distributed import search_on_all_ranks
from lightning_l2.search.plan import Range, SearchPlan
from lightning_l2.search.result import SearchResult
from lightning_l2.search.training import Make, fit_from
from lightning_l2.search.trials import Fit

if TYPE_CHECKING:
    import optuna


def search_weight_decay(
    make: Make | None = None,
    *,
    fit: Fit | None = None,
    monitor: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    low: float | None = None,
    high: float | None = None,
    first: float = 1e-3,
    trials: int = 12,
    seeds: int = 3,
    seed: int = 0,
    zero: bool = True,
    method: Literal["grid", "tpe"] | None = None,
    also: Mapping[str, Range] | None = None,
    prune: bool = True,
    pick: Literal["last", "best"] = "last",
    storage: str | Path | optuna.storages.BaseStorage | None = None,
    name: str = "weight_decay",
    progress: bool = True,
) -> SearchResult:
    r"""Choose lambda: train with values on a log scale and compare them, paired by seed, on held-out data.

    The range is where decay acts: $\eta \lambda T$ from 0.01 to 10, with the peak of the learning rate $\eta$ and $T$
    optimizer steps. These are read from a first Trainer that is set up and doesn't train; where they can't be known,
    as with `fit`, the range is 1e-5 to 1e-1. The first trial is 1e-3 where that lies inside, else the middle. Then come
    lambda = 0, a coarse grid, and the neighbourhood of the best and of the suggestion. Each value is trained with the
    same few seeds. A search costs $(trials + 1) * seeds$ trainings.

    The suggestion is the largest lambda whose metric is within one standard error of the best by differences paired by
    seed, at most one decade above the best, and not worse than lambda = 0. Where the best is not better than lambda = 0
    by more than its standard error, or by less than 1 % (of what an accuracy lacks to 1), the table says that weight
    decay does not help, and the suggestion is the largest lambda that is worse than 0 by less than 1 %.

    A trial that ends in nan or infinity, or raises once others are complete, counts as failed and the search goes
    on. An error in the first trial ends the search. Random states are as before afterwards.

    With a `storage` a search continues where it was stopped, and several processes or machines that call this with
    the same arguments share the trials: none is lost and none done twice. One whose process died is run again after a
    minute without a sign of life, with the seeds that it had done. All of them return when everything is done, each
    with the whole result.

    Once the grid is complete, Optuna's pruners stop what is hopeless. With five seeds or more `WilcoxonPruner` compares
    the seeds of a trial with those of the best one, in pairs, from the fourth on (p < 0.1). With fewer it could never
    speak, and `PercentilePruner` stops a trial whose first seed is worse than three quarters of the complete trials at
    the same epoch, in the second half of its training. There is no margin for the noise between seeds any more.

    Args:
        make: Called as `make(weight_decay, **others)`; returns a new `(trainer, module)`, `(trainer, module, data)`
            or `(trainer, module, train_dataloaders, val_dataloaders)`. Seeds are set before the call. These Trainers
            show no progress bars and no summaries and write no checkpoints.
        fit: In place of `make`, a function that does one training itself. It is given a `TrialRun` with
            `weight_decay`, `seed`, `others` and `report(epoch, value)`, and returns the metric, or a mapping with
            all metrics, each one number or one for each epoch.
        monitor: The metric that decides, by the name it is logged under.
        mode: Whether a small ("min") or a large ("max") value of it is good.
        low: Smallest lambda (weight_decay), dimensionless.
        high: Largest lambda.
        first: Lambda of the first trial; the middle of the range on the log scale where it lies outside of it.
        trials: Number of values of lambda above 0.
        seeds: Trainings for each of them. With one, the noise is unknown and the suggestion is the plain best.
        seed: The first random seed; it also decides which values "tpe" samples.
        zero: Whether lambda = 0 is tried too, as one trial more; not in a joint search.
        method: "grid" halves the widest gap beside the best and the suggested value, "tpe" samples where good values
            are likely. None is "grid" for lambda alone, "tpe" for a joint search.
        also: What to search jointly, name to `Range`, such as `{"lr": Range(1e-4, 1e-2)}`.
        prune: Whether hopeless trials are stopped.
        pick: Which value of the metric counts, the "last" of a training or its "best".
        storage: None to keep trials in this process; a path for an SQLite file; a database URL, for many machines; or
            an Optuna storage.
        name: The study's name in the storage.
        progress: Whether to show a progress bar with the best so far and the time left.

    Raises:
        ModuleNotFoundError: If Optuna isn't installed.
        TypeError: If neither or both of `make` and `fit` are given, or `also` has something else than a `Range`.
        ValueError: If a value is out of its range, or the monitored metric is not in what `fit` returns.
        MisconfigurationException: If `make` returns something else or a Trainer that trained before, the monitored
            metric never appeared in a training, or the storage holds another search under this name.
        RuntimeError: If every trial failed.

    >>> def make(weight_decay):
    ...     callbacks = [WeightDecay(weight_decay), *others]
    ...     return Trainer(max_epochs=10, callbacks=callbacks), Net(), Data()
    >>> def fit(run):
    ...     return 1 + (run.weight_decay - 0.01) ** 2 + 0.01 * run.seed
    >>> result = search_weight_decay(fit=fit, high=1.0, first=0.01, trials=3, seeds=2, progress=False)
    >>> result.weight_decay, sorted(trial.weight_decay for trial in result.trials)
    (0.01, [0.0, 1e-05, 0.01, 1.0])

    `result.table()` and `result.save("folder")` show the trials as a table and as pictures.
    """
    if (make is None) == (fit is None):
        given = "neither" if make is None else "both"
        raise TypeError(
            f"Expected either make or fit but got {given}. Give make, which builds a Trainer, a module and data, "
            "or fit, which trains by itself."
        )
    plan = SearchPlan(
        monitor=monitor, mode=mode, low=low, high=high, first=first, trials=trials, seeds=seeds, seed=seed,
        zero=zero, method=method, also=dict(also or {}), prune=prune, pick=pick,
    )  # fmt: skip
    looks = fit is None
    if fit is None:
        assert make is not None
        fit = fit_from(make, monitor)
    return search_on_all_ranks(fit, plan, storage=storage, name=name, progress=progress, looks=looks)
