"""The weight decay that a LightningCLI configuration asks for, drawn without the model, the data or a Trainer."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_l2 import schedules
from lightning_l2.extras import brought_by
from lightning_l2.plots.schedule import plot_schedule
from lightning_l2.rules.assign import Rules, decay_param_groups, resolve_rules
from lightning_l2.schedules.base import Schedule
from lightning_l2.schedules.feedback import FeedbackSchedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_l2.rules.rule import DecayRule


def preview(config: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Draw lambda of each group over the training that a configuration asks for, and write the picture.

    Args:
        config: A YAML file with `trainer.callbacks`, as LightningCLI takes it; or several, later over earlier.
        output: The picture to write, of any type that matplotlib writes; by default a PNG beside the last file.

    Returns:
        Where the picture is.

    Raises:
        ValueError: If a file is no YAML, or they have no `WeightDecayScheduler`, a wrong one or wrong rules, or one
            whose values only the training can tell.
        ModuleNotFoundError: If matplotlib or jsonargparse is not installed.
    """
    files = [Path(file) for file in ([config] if isinstance(config, str | Path) else config)]
    figure = _draw(files)
    output = files[-1].with_suffix(".png") if output is None else Path(output)
    figure.savefig(output, dpi=150)
    return output


def _load(file: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no YAML: {error}") from error
    return _section(settings, "fit") or _section({"settings": settings}, "settings")


def _merged(first: Any, second: Any) -> Any:
    """Return what LightningCLI makes of a value in two configurations: lists by position, `callbacks+` at their end."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.get("class_path") != second.get("class_path", first.get("class_path")):
            return second
        merged = {**first, **{key: _merged(first.get(key), value) for key, value in second.items()}}
        if (more := second.get("callbacks+")) is not None:
            merged["callbacks"] = [*(first.get("callbacks") or []), *(more if isinstance(more, list) else [more])]
        return merged
    if isinstance(first, list) and isinstance(second, list):
        return [_merged(*pair) for pair in zip(first, second, strict=False)] + second[len(first) :]
    return second


def _draw(files: Sequence[Path]) -> Figure:
    settings: dict[str, Any] = {}
    for file in files:
        settings = _merged(settings, _load(file))
    names = " and ".join(f"'{file}'" for file in files)
    trainer = _section(settings, "trainer")
    scheduler = _callback(trainer, "WeightDecayScheduler")
    if not scheduler.get("schedule"):
        raise ValueError(
            f"{names} has no WeightDecayScheduler with a `schedule` under `trainer.callbacks`, so weight decay is "
            "constant and there is nothing to draw."
        )
    try:
        schedule = _parse(Schedule | FeedbackSchedule, scheduler["schedule"])
        groups = _groups(settings, trainer, scheduler.get("values") == "weight_decay")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{names}: {_closest(scheduler['schedule'])}{error}") from error
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"{type(schedule).__name__} answers to the training itself, so it can't be drawn before it. Train, and "
            "draw what was logged: plot_norms(read_history(logger.log_dir))."
        )
    by_epoch = scheduler.get("interval") == "epoch"
    total, max_steps, max_epochs = scheduler.get("total_steps"), trainer.get("max_steps"), trainer.get("max_epochs")
    groups = _groups(settings, trainer, scheduler.get("values") == "weight_decay")
    if groups is not None and scheduler.get("groups") is not None:
        groups = {name: value for name, value in groups.items() if re.search(scheduler["groups"], name)} or groups
    return plot_schedule(
        schedule,
        weight_decay=groups,
        steps=None if by_epoch else _length(total, max_steps),
        epochs=_length(total, max_epochs) if by_epoch else _length(max_epochs),
        per_epoch=by_epoch,
        lr=_peak(settings, _callback(trainer, "WeightDecay")),
    )


def _peak(settings: Mapping[str, Any], decay: Mapping[str, Any]) -> float | None:
    """Return what lambda is multiplied with in a step, at most, as far as the configuration tells."""
    optimizer = _section(settings, "optimizer")
    options, name = _section(optimizer, "init_args"), str(optimizer.get("class_path")).rpartition(".")[2]
    apply, lr = decay.get("apply", "optimizer"), options.get("lr")
    if apply == "independent":
        return 1.0
    if not isinstance(lr, int | float):
        return None
    if apply in ("decoupled", "cautious") or (apply == "optimizer" and name in ("AdamW", "Adafactor", "Muon")):
        return float(lr)
    return lr / (1 - options.get("momentum", 0.0)) if name == "SGD" else None


def _groups(settings: Mapping[str, Any], trainer: Mapping[str, Any], absolute: bool) -> dict[str, float] | None:
    """Return what the schedule's values are multiplied with, by group, or None where only the optimizer knows it."""
    decay = _callback(trainer, "WeightDecay")
    base = decay.get("weight_decay")
    if base is None:
        base = _section(_section(settings, "optimizer"), "init_args").get("weight_decay")
    if not isinstance(base, int | float):
        return {"strongest group": 1.0} if absolute else None
    rules = resolve_rules(_parse(Rules, decay["rules"]) if "rules" in decay else "default")
    groups = {rule.name: rule.resolve(base) for rule in rules} if decay else {"all parameters": base}
    if any(rule.layer_multiplier for rule in rules):
        groups = _layers(settings, rules, base) or groups
    anchor = float(base) if absolute else 1.0
    return {name: value / anchor for name, value in groups.items()} if anchor else groups


def _layers(settings: Mapping[str, Any], rules: Sequence[DecayRule], base: float) -> dict[str, float]:
    """Return lambda of each layer of a rule with `layer_multiplier`, if the configuration says of which model."""
    model = settings.get("model")
    if not isinstance(model, dict) or "class_path" not in model:
        return {}
    import lightning.pytorch as pl

    groups = decay_param_groups(_parse(pl.LightningModule, model), base, rules)
    return {group["name"]: group["weight_decay"] for group in groups}


def _closest(schedule: object) -> str:
    """Return in words which schedule may be meant, where there is none of that name."""
    path = schedule.get("class_path") if isinstance(schedule, dict) else schedule
    name = str(path).rpartition(".")[2]
    known = [] if name in schedules.__all__ else get_close_matches(name, schedules.__all__, n=1)
    return f"there is no schedule {name!r}. The closest is {known[0]!r}. " if known else ""


def _callback(trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the `init_args` of a callback by the name of its class; empty where it is not there."""
    callbacks = trainer.get("callbacks") or trainer.get("callbacks+") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path")).rpartition(".")[2] == name:
            return _section(callback, "init_args")
    return {}


def _section(settings: object, key: str) -> dict[str, Any]:
    section = settings.get(key) if isinstance(settings, dict) else None
    return section if isinstance(section, dict) else {}


def _length(*candidates: int | None) -> int | None:
    return next((length for length in candidates if isinstance(length, int) and length > 0), None)


def _parse(kind: object, value: object) -> Any:
    """Build an object from YAML as LightningCLI does."""
    with brought_by("cli", "To read a configuration needs"):
        from jsonargparse import ArgumentParser
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"value": value})).value
    except ArgumentError as error:
        raise ValueError(str(error)) from error
