"""`python -m lightning_l2 COMMAND`, also installed as `lightning-l2 COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lightning_l2.cli import preview_command, search_command

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "search": ("choose lambda by trainings with several values of it", search_command),
    "preview": ("draw lambda over the training that YAML files ask for", preview_command),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: The command's name and its arguments; by default those of the process.
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
