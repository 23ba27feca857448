"""Callbacks for training scripts that nobody may change, from a file that an environment variable names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning_l2.extras import brought_by, in_short
from lightning_l2.trainer.callback import Callback, callbacks_of_trainer_in_the_making

VARIABLE = "LIGHTNING_L2_CONFIG"


def callbacks_from_environment() -> list[Any]:
    """Return the callbacks of the YAML file that `LIGHTNING_L2_CONFIG` names, none if it is not set.

    Lightning calls this whenever a Trainer is made, through the entry points `lightning.pytorch.callbacks_factory` and
    `pytorch_lightning.callbacks_factory`. The file holds what stands under `callbacks` in a LightningCLI configuration:

        callbacks:
          - class_path: lightning_l2.WeightDecay
            init_args: {weight_decay: 0.05}

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything else.
        ModuleNotFoundError: If jsonargparse isn't installed.

    >>> callbacks_from_environment()
    []
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        return []
    if not Path(path).is_file():
        raise FileNotFoundError(f"{VARIABLE} names the file {path!r}, which doesn't exist. Correct it or unset it.")
    leave_out_earlier_ones()
    with brought_by("cli", f"{VARIABLE} needs"):
        from jsonargparse import ArgumentParser
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback], required=True)
    try:
        callbacks = list(parser.instantiate(parser.parse_path(path)).callbacks)
    except Exception as error:
        raise ValueError(
            f"{VARIABLE}: the file {path!r} can't be read as `callbacks:` and the list that LightningCLI has under "
            f"`trainer.callbacks`: {in_short(str(error))}"
        ) from error
    for callback in callbacks:
        setattr(callback, _MARK, True)
    return callbacks


# A mark that copies of a callback have, too.
_MARK = "_is_from_environment"


def leave_out_earlier_ones() -> None:
    """Take ours out of a list of callbacks that has them from another Trainer, as Lightning adds to the user's own."""
    callbacks = callbacks_of_trainer_in_the_making()
    callbacks[:] = [callback for callback in callbacks if not hasattr(callback, _MARK)]
