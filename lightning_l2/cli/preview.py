"""`python -m lightning_l2 preview`: the lambda that a configuration asks for, as a picture."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Draw lambda over the training that configurations ask for, and print where the picture is.

    Args:
        arguments: The configurations, later ones over earlier ones, and on request the picture to write.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_l2 preview", description="Draw lambda over the training that YAML files ask for."
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="a YAML file with trainer.callbacks, as for `fit`")
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="the same; several times as for `fit`"
    )
    parser.add_argument("--output", metavar="FILE", help="picture to write; by default a PNG beside the last file")
    options = parser.parse_args(arguments)
    files = [*options.files, *options.config]
    if not files:
        parser.error("there is nothing to draw: give a YAML file, or --config FILE.")
    try:
        for file in files:
            _check_file(file)
        # Lightning takes seconds to import, and a missing file doesn't need it.
        from lightning_l2.plots import preview

        print(preview(files if len(files) > 1 else files[0], options.output))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        number = errno.EISDIR if Path(path).is_dir() else errno.ENOENT
        raise OSError(number, os.strerror(number), path)
