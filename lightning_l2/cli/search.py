"""`python -m lightning_l2 search`: the search for projects that train by LightningCLI, without code."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_l2.cli.project import Project
from lightning_l2.search.distributed import is_first_rank, search_on_all_ranks

if TYPE_CHECKING:
    from lightning_l2.search.result import SearchResult
    from lightning_l2.search.trials import Trial

DESCRIPTION = """\
Choose lambda: train with several values of weight decay and compare them on the validation data, paired by seed. The
range is where decay acts: eta * lambda * T from 0.01 to 10, by the peak of the learning rate and the optimizer steps.

Takes everything that `fit` of a LightningCLI takes: --config, once or several times, and overrides of single values.
What to search is set by the options --search.*, or by a section `search:` in a configuration. The same command
continues a search that was stopped, and shares it with other processes and machines that have the same
--search.storage.

  python -m lightning_l2 search --config fit.yaml
  python -m lightning_l2 search --config fit.yaml --search.monitor val_acc --search.mode max --search.trials 8
  python -m lightning_l2 search --config fit.yaml --search.also '{model.init_args.lr: {low: 1.0e-4, high: 1.0e-2}}'

Most programs name their classes themselves, as `LightningCLI(Model, Data)` or `MyCLI(Model, Data)` does; then the
configuration has no class_path, and the classes are given here:

  python -m lightning_l2 search --config fit.yaml --model_class train.Model --data_class train.Data
  python -m lightning_l2 search --config fit.yaml --cli train.MyCLI --model_class train.Model --data_class train.Data
"""
OPTIONS = {
    "--model_class": "class of the model, package.module.Class, where the configuration's `model` has no class_path",
    "--data_class": "class of the data module, where the configuration's `data` has no class_path",
    "--cli": "the project's own subclass of LightningCLI, with its links and arguments",
}


def run(arguments: Sequence[str]) -> int:
    """Run the search and return the exit code.

    It is 0, 1 if the training can't be searched as it is set up, 2 if an option is wrong, 130 after an interrupt.

    Args:
        arguments: What follows `search` on the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_l2 search",
        usage="%(prog)s --config FILE [--config FILE ...] [--search.trials N ...] [overrides ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    for option, words in OPTIONS.items():
        parser.add_argument(option, metavar="CLASS", help=words)
    given, rest = parser.parse_known_args(arguments)
    if not rest or "-h" in rest or "--help" in rest:
        parser.print_help()
        print("\nOptions of the search and of the training:\n")
        rest = [*rest, "--help"]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        project = Project(rest, **vars(given))
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return _search(project)


def _search(project: Project) -> int:
    options = project.options
    folder = Path(options.folder)
    storage = options.storage or str(folder / "study.db")
    try:
        result = search_on_all_ranks(
            project.fit, options, storage=storage, name=options.name, setting=project.settings(), looks=True
        )
    except MisconfigurationException as error:
        if is_first_rank():
            print(f"\npython -m lightning_l2 search: error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit):
        # The Trainer turns an interrupt into an exit of the process.
        if is_first_rank():
            from lightning_l2.search.study import load_result

            with suppress(KeyError):  # from a study that hadn't begun
                _tell_interrupted(load_result(options, storage, options.name), folder, storage)
        return 130
    if is_first_rank():
        print(result.table())
        written = [*result.save(folder), _write_best(project, result, folder / "best.yaml")]
        print(f"\nWritten to {folder}: {', '.join(path.name for path in written)}")
        print(f"Train with the suggested lambda: append  --config {written[-1]}  to the command of `fit`.")
    return 0


def _tell_interrupted(result: SearchResult, folder: Path, storage: str) -> None:
    result.save(folder)
    finished = sum(trial.state in ("complete", "pruned", "failed") for trial in result.trials)
    print(
        f"\nStopped. {finished} of {result.plan.places} trials are finished and kept in {storage}, "
        f"as a table and pictures in {folder}. The same command continues.",
        file=sys.stderr,
    )


def _write_best(project: Project, result: SearchResult, path: Path) -> Path:
    import yaml

    def words(name: str, trial: Trial) -> str:
        values = ", ".join(f"{key}={value:.6g}" for key, value in trial.parameters.items())
        spread = "" if math.isnan(trial.spread) else f" with spread {trial.spread:.4g}"
        return f"# {name}: {values}: {result.plan.monitor}={trial.mean:.6g}{spread} over {len(trial.runs)} seeds\n"

    head = words("suggested", result.suggestion) + words("plain best", result.best)
    path.write_text(head + yaml.safe_dump(project.best(result.suggestion), sort_keys=False))
    return path
