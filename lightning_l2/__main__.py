"""`python -m lightning_l2 COMMAND`, also installed as `lightning-l2 COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from lightning_l2.plots import preview
from lightning_l2.search.command import search_command


def preview_command(arguments: Sequence[str]) -> int:
    """Draw lambda over the training that a configuration asks for, and print where the picture is.

    Args:
        arguments: the configuration, and on request the picture to write.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_l2 preview", description=COMMANDS["preview"][0])
    parser.add_argument("config", help="YAML file with trainer.callbacks, as LightningCLI takes it")
    parser.add_argument("--output", help="picture to write; by default a PNG beside the configuration")
    options = parser.parse_args(arguments)
    try:
        print(preview(options.config, options.output))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "search": ("choose lambda by trainings with several values of it", search_command),
    "preview": ("draw lambda over the training that a YAML file asks for", preview_command),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: the command's name and its arguments; by default those of the process.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in COMMANDS:
        return COMMANDS[name][1](rest[:-1])
    lines = [f"  {command:<10}{words}" for command, (words, _) in COMMANDS.items()]
    usage = "\n".join(["usage: python -m lightning_l2 COMMAND ...", "", "commands:", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(f"{usage}\n\nThere is no command {name!r}." if name else usage, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
