"""The weight decay that a LightningCLI configuration asks for, drawn without the model, the data or a Trainer."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_l2.extras import brought_by
from lightning_l2.plots.schedule import plot_schedule
from lightning_l2.rules import Rules, resolve_rules
from lightning_l2.schedules import FeedbackSchedule, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def preview(config: str | Path, output: str | Path | None = None) -> Path:
    """Draw lambda of each group over the training that a configuration asks for, and write the picture.

    Args:
        config: A YAML file with `trainer.callbacks`, as LightningCLI takes it.
        output: The picture to write, of any type that matplotlib writes; by default a PNG beside `config`.

    Returns:
        Where the picture is.

    Raises:
        ValueError: If the file is no YAML, or has no `WeightDecayScheduler`, a wrong one, or one whose values only the
            training can tell.
        ModuleNotFoundError: If matplotlib or jsonargparse is not installed.
    """
    config = Path(config)
    figure = _draw(config)
    output = config.with_suffix(".png") if output is None else Path(output)
    figure.savefig(output, dpi=150)
    return output


def _draw(config: Path) -> Figure:
    import yaml

    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{config}' is no YAML: {error}") from error
    settings = _section(settings, "fit") or _section({"settings": settings}, "settings")
    trainer = _section(settings, "trainer")
    scheduler = _callback(trainer, "WeightDecayScheduler")
    if not scheduler.get("schedule"):
        raise ValueError(
            f"'{config}' has no WeightDecayScheduler with a `schedule` under `trainer.callbacks`, so weight decay is "
            "constant and there is nothing to draw."
        )
    schedule = _parse(Schedule | FeedbackSchedule, scheduler["schedule"])
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"{type(schedule).__name__} answers to the training itself, so it can't be drawn before it. Train, and "
            "draw what was logged: plot_norms(read_history(logger.log_dir))."
        )
    by_epoch = scheduler.get("interval") == "epoch"
    total, max_steps, max_epochs = scheduler.get("total_steps"), trainer.get("max_steps"), trainer.get("max_epochs")
    return plot_schedule(
        schedule,
        weight_decay=_groups(settings, trainer, scheduler.get("values") == "weight_decay"),
        steps=None if by_epoch else _length(total, max_steps),
        epochs=_length(total, max_epochs) if by_epoch else _length(max_epochs),
        per_epoch=by_epoch,
    )


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
    strongest = max(groups.values()) if absolute else 1.0
    return {name: value / strongest for name, value in groups.items()} if strongest else groups


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
