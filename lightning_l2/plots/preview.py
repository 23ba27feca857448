"""The weight decay that a LightningCLI configuration asks for, drawn without the model, the data or a Trainer."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_l2.arguments import check_pattern
from lightning_l2.extras import brought_by, in_short
from lightning_l2.plots.schedule import plot_schedule
from lightning_l2.plots.style import style_axes
from lightning_l2.rules.assign import Rules, decay_param_groups, resolve_rules
from lightning_l2.schedules.base import Schedule
from lightning_l2.schedules.feedback import FeedbackSchedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_l2.rules.rule import DecayRule


_STRONGEST = "strongest group"


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
    schedulers = [one for one in _callbacks(trainer, "WeightDecayScheduler") if one.get("schedule")]
    if not schedulers:
        raise ValueError(
            f"{names} has no WeightDecayScheduler with a `schedule` under `trainer.callbacks`, so weight decay is "
            "constant and there is nothing to draw."
        )
    try:
        schedules = [_parse(Schedule | FeedbackSchedule, one["schedule"], "schedule") for one in schedulers]
        taken = [_taken(one, _groups(settings, trainer, one.get("values") == "weight_decay")) for one in schedulers]
        axes = _axes([one for one, schedule in zip(schedulers, schedules, strict=True) if _is_drawn(schedule)], trainer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{names}: {error}") from error
    answering = " and ".join(type(schedule).__name__ for schedule in schedules if not _is_drawn(schedule))
    if not axes:
        raise ValueError(
            f"{answering} answers to the training itself, so it can't be drawn before it. Train, and draw what was "
            "logged: plot_norms(read_history(logger.log_dir))."
        )
    drawn = [one for one in zip(schedulers, schedules, taken, strict=True) if _is_drawn(one[1])]
    are_known = all(groups is not None for _, _, groups in drawn)
    curves: dict[str, Schedule] = {}
    weight_decay: dict[str, float] = {}
    for scheduler, schedule, groups in drawn:
        # without lambda there is only the multiplier, of groups that are known by what takes them
        bases = groups if are_known and groups is not None else {scheduler.get("groups") or "multiplier": 1.0}
        curves |= dict.fromkeys(bases, schedule)
        weight_decay |= bases
    lr = _peak(settings, _callback(trainer, "WeightDecay"))
    figure = plot_schedule(curves, weight_decay=weight_decay if are_known else None, lr=lr, **axes)
    if answering:
        first = figure.axes[0]
        style_axes(first, f"{first.get_title(loc='left')}, without {answering}", first.get_ylabel())
    return figure


def _is_drawn(schedule: object) -> bool:
    return isinstance(schedule, Schedule)


def _axes(schedulers: Sequence[Mapping[str, Any]], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the length of the training as schedulers count it, which has to be the same for all; empty without one."""
    max_steps, max_epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    found: list[dict[str, Any]] = []
    for scheduler in schedulers:
        by_epoch, total = scheduler.get("interval") == "epoch", scheduler.get("total_steps")
        axes = {
            "steps": None if by_epoch else _length(total, max_steps),
            "epochs": _length(total, max_epochs) if by_epoch else _length(max_epochs),
            "per_epoch": by_epoch,
        }
        if axes not in found:
            found.append(axes)
    if len(found) > 1:
        raise ValueError(
            "one picture can't show schedulers of different `interval` or `total_steps`. Give a file with one of them."
        )
    return found[0] if found else {}


def _taken(scheduler: Mapping[str, Any], groups: dict[str, float] | None) -> dict[str, float] | None:
    """Return the groups that a scheduler takes, or None where only the training knows them."""
    pattern = _parse(str | None, scheduler.get("groups"), "groups")
    check_pattern(groups=pattern)
    if groups is None or pattern is None:
        return groups
    if list(groups) == [_STRONGEST]:
        return {pattern: 1.0}
    return {name: value for name, value in groups.items() if re.search(pattern, name)} or None


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
        return {_STRONGEST: 1.0} if absolute else None
    rules = resolve_rules(_parse(Rules, decay["rules"], "rules") if "rules" in decay else "default")
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

    groups = decay_param_groups(_parse(pl.LightningModule, model, "model"), base, rules)
    return {group["name"]: group["weight_decay"] for group in groups}


def _callbacks(trainer: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the `init_args` of each callback of a class, by its name."""
    callbacks = trainer.get("callbacks") or trainer.get("callbacks+") or []
    return [
        _section(callback, "init_args")
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if isinstance(callback, dict) and str(callback.get("class_path")).rpartition(".")[2] == name
    ]


def _callback(trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(iter(_callbacks(trainer, name)), {})


def _section(settings: object, key: str) -> dict[str, Any]:
    section = settings.get(key) if isinstance(settings, dict) else None
    return section if isinstance(section, dict) else {}


def _length(*candidates: int | None) -> int | None:
    return next((length for length in candidates if isinstance(length, int) and length > 0), None)


def _parse(kind: object, value: object, name: str) -> Any:
    """Build an object from YAML as LightningCLI does."""
    with brought_by("cli", "To read a configuration needs"):
        from jsonargparse import ArgumentParser
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        return parser.instantiate(parser.parse_object({name: value}))[name]
    except (ArgumentError, ValueError) as error:
        raise ValueError(in_short(str(error))) from error
