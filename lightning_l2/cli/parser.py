"""A LightningCLI that only parses a command line, or builds what a configuration describes without training."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lightning_l2.extras import brought_by, in_short


def import_class(path: str) -> Any:
    """Return a class by `package.module.Class`.

    Raises:
        ValueError: If there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"There is no class {path!r} ({error}). Give package.module.Class.") from error


def is_a(path: str, name: str) -> bool:
    """Return whether the class at a path is, or derives from, one of a name."""
    # A class path may also name a function that makes an instance.
    return any(kind.__name__ == name for kind in getattr(import_class(path), "__mro__", ()))


def explain(message: str, absent: Sequence[str], parser: Any) -> str:
    """Add a way out to what a parser complains about: the closest options, or the classes that were not given."""
    if unknown := re.search(r"^unrecognized arguments: --([\w.]+)", message, re.IGNORECASE):
        close = get_close_matches(unknown[1], list(parser.get_defaults().keys()), cutoff=0.5)
        return f"{message}. Closest options: {', '.join(f'--{name}' for name in close) or 'none'}."
    missing = [name for name in absent if re.search(rf'(key "|fit\.){name}', message)]
    if not missing:
        return in_short(message)
    options = " and ".join(
        f"--{name}_class package.module.Class" for name in (absent if "model" in missing else missing)
    )
    return (
        f"{in_short(message)}\nWhere the program names its classes itself, as LightningCLI(Model, Data) or "
        f"MyCLI(Model, Data) does, so that the configuration has no class_path, give them here too: {options}."
    )


class Parsed(Exception):
    """What stops a command line once it is parsed."""

    def __init__(self, configuration: Any, parser: Any) -> None:
        self.configuration = configuration
        self.parser = parser


def search_cli(path: str | None, options: type) -> Any:
    """Return a LightningCLI that parses a command line, or builds what a configuration describes without training.

    Args:
        path: A project's own subclass of LightningCLI, `package.module.Class`, which it then derives from.
        options: What `--search.*` stands for.

    Raises:
        ModuleNotFoundError: If jsonargparse isn't installed.
    """
    with brought_by("search", "The command line needs"):
        import_module("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    base: Any = LightningCLI if path is None else import_class(path)

    class SearchCLI(base):  # type: ignore[misc]
        # It would run before the training does.
        after_fit = None

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": base.subcommands()["fit"]}

        def init_parser(self, **settings: Any) -> Any:
            parser = super().init_parser(usage=argparse.SUPPRESS, **settings)
            # So that it raises: its own way prints hundreds of options before the error.
            parser.exit_on_error = False
            return parser

        def add_core_arguments_to_parser(self, parser: Any) -> None:
            type(self).fit_parser = parser
            parser.add_class_arguments(options, "search")
            super().add_core_arguments_to_parser(parser)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            # Without the warning that arguments are given although the process has some of its own.
            self.only_parses = isinstance(args, list)
            self.config = parser.parse_args(args) if self.only_parses else parser.parse_object(args)

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            if self.only_parses:
                raise Parsed(self.config, self.parser)

        def fit(self, model: Any, datamodule: Any = None, **fit_arguments: Any) -> None:
            self.fit_arguments = fit_arguments

    return SearchCLI
