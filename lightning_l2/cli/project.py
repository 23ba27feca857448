"""A project that trains by LightningCLI: its configuration, with lambda in it, becomes a training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from lightning_l2.cli.parser import Parsed, explain, import_class, is_a, search_cli
from lightning_l2.rules.rule import DecayRule
from lightning_l2.search.plan import Range, SearchPlan
from lightning_l2.search.training import train
from lightning_l2.search.trials import Outcome, Trial, TrialRun

# Callbacks by the names of their classes, the first that is there first.
TAKE_LAMBDA = ("WeightDecay", "L2Penalty")

# What may differ between processes that share a search.
INCOMPARABLE = ("config", "search", "seed_everything", "trainer.default_root_dir", "trainer.logger")


@dataclass(frozen=True)
class SearchOptions(SearchPlan):
    """What to search and where to keep it.

    Args:
        key: Configuration key that takes lambda, such as `model.init_args.weight_decay`. None is the callback
            `WeightDecay`, else `L2Penalty`; a `WeightDecay` is added where the configuration has neither.
        folder: Where results are written: the trials as a table and pictures, `best.yaml`, and what trainings log; they
            write no checkpoints.
        storage: Where trials are kept: a path for an SQLite file, or a database URL for many machines. None is
            `study.db` in the folder.
        name: The study's name in the storage.
    """

    key: str | None = None
    folder: str = "weight_decay_search"
    storage: str | None = None
    name: str = "weight_decay"


class Project:
    """What a command line describes.

    Args:
        arguments: Those of `fit` of a LightningCLI, with the options `--search.*`.
        cli: The project's own subclass of LightningCLI, `package.module.Class`.
        model_class: Class of the model where the configuration names none.
        data_class: Class of the data module where the configuration names none.

    Raises:
        ModuleNotFoundError: If jsonargparse isn't installed.
        ValueError: If an option is out of its range, or the configuration has no such key.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cli: str | None = None,
        model_class: str | None = None,
        data_class: str | None = None,
    ) -> None:
        given = {"model_class": model_class, "datamodule_class": data_class}
        classes = {name: import_class(path) for name, path in given.items() if path is not None}
        cli_class = search_cli(cli, SearchOptions)
        self._cli_class = partial(cli_class, **classes, save_config_callback=None, seed_everything_default=False)
        try:
            self._cli_class(args=["fit", *arguments])
        except argparse.ArgumentError as error:
            absent = [name for name, path in (("model", model_class), ("data", data_class)) if path is None]
            raise ValueError(explain(str(error), absent, cli_class.fit_parser)) from error
        except Parsed as parsed:
            self._configuration, self._parser = parsed.configuration, parsed.parser
        self._configuration["fit"].pop("config", None)
        options = self._configuration["fit"]["search"].as_dict()
        options["also"] = {name: Range(**space) for name, space in options["also"].items()}
        self.options = SearchOptions(**options)
        for key in (self.options.key, *self.options.also):
            self._check_key(key)

    def settings(self) -> dict[str, Any]:
        """Return the configuration as plain values by key, for comparison with those of other processes."""
        values = _flat(self._plain(self._configuration))
        own = tuple(f"{key}." for key in INCOMPARABLE)
        return {f"config.{key}": value for key, value in values.items() if not f"{key}.".startswith(own)}

    def fit(self, run: TrialRun) -> Outcome:
        """Build everything with the lambda, the seed and the other values of a run, and train."""
        changed = self._with(run.weight_decay, run.others)
        fit = changed["fit"]
        fit["seed_everything"] = run.seed
        folder = Path(self.options.folder) / "trainings" / f"trial_{run.trial}_seed_{run.seed}"
        fit["trainer.default_root_dir"] = str(folder)
        cli = self._cli_class(args=changed)
        data = [] if cli.datamodule is None else [cli.datamodule]
        return train(cli.trainer, cli.model, *data, monitor=self.options.monitor, run=run, **cli.fit_arguments)

    def best(self, trial: Trial) -> dict[str, Any]:
        """Return a configuration that, after the others, trains with the values of a trial."""
        values: dict[str, Any] = dict(trial.others)
        if self.options.key is not None:
            values[self.options.key] = trial.weight_decay
        elif self._place() is None:
            values["trainer.callbacks+"] = [_callback(trial.weight_decay)]
        else:
            callbacks = self._plain(self._with(trial.weight_decay, {}))["trainer"]["callbacks"]
            values["trainer.callbacks"] = _without_defaults(callbacks)
        nested: dict[str, Any] = {}
        for key, value in values.items():
            *parents, last = key.split(".")
            inner = nested
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        return nested

    def _with(self, weight_decay: float, others: Mapping[str, float]) -> Any:
        changed = self._configuration.clone()
        fit = changed["fit"]
        callbacks, place = _callbacks(fit), self._place()
        if self.options.key is not None:
            fit[self.options.key] = weight_decay
        elif place is None:
            fit["trainer.callbacks"] = [*callbacks, _callback(weight_decay)]
        else:
            callbacks[place]["init_args.weight_decay"] = weight_decay
        for key, value in others.items():
            fit[key] = value
        return changed

    def _place(self) -> int | None:
        """Return which of the configuration's callbacks is the one that takes lambda."""
        paths = [callback["class_path"] for callback in _callbacks(self._configuration["fit"])]
        places = (place for name in TAKE_LAMBDA for place, path in enumerate(paths) if is_a(path, name))
        return next(places, None)

    def _check_key(self, key: str | None) -> None:
        if key is not None and key not in self._configuration["fit"]:
            known = _flat(self._plain(self._configuration))
            close = ", ".join(get_close_matches(key, known, cutoff=0.5)) or "none"
            raise ValueError(f"The configuration has no key {key!r} to search. Closest keys: {close}.")

    def _plain(self, configuration: Any) -> dict[str, Any]:
        import yaml

        text = self._parser.dump(configuration, skip_none=False, skip_validation=True)
        plain: dict[str, Any] = yaml.safe_load(text)["fit"]
        return plain


def _callbacks(fit: Any) -> list[Any]:
    callbacks = fit["trainer.callbacks"]
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _callback(weight_decay: float) -> dict[str, Any]:
    return {"class_path": "lightning_l2.WeightDecay", "init_args": {"weight_decay": weight_decay}}


def _without_defaults(value: Any) -> Any:
    """Return plain values without the arguments that are as they would be anyway."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {field.name for field in fields(DecayRule)}:
        return {key: entry for key, entry in value.items() if not _is_default(entry, DecayRule, key)}
    if "class_path" not in value:
        return value
    kind, given = import_class(value["class_path"]), value.get("init_args") or {}
    kept = {key: _without_defaults(entry) for key, entry in given.items() if not _is_default(entry, kind, key)}
    return {"class_path": value["class_path"], **({"init_args": kept} if kept else {})}


def _is_default(value: Any, kind: Any, name: str) -> bool:
    parameter = signature(kind).parameters.get(name)
    default: Any = Parameter.empty if parameter is None else parameter.default
    if is_dataclass(default) and not isinstance(default, type):
        default = asdict(default)
    return bool(value == (list(default) if isinstance(default, tuple) else default))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
