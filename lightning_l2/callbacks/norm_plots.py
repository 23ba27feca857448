"""Pictures of a fit, made when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_l2 import plots
from lightning_l2.arguments import check_types
from lightning_l2.rules.parameters import clean_name
from lightning_l2.trainer.callback import Callback

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from matplotlib.figure import Figure


class NormPlots(Callback):
    """Draw what the other callbacks logged, when a fit ends or breaks off.

    The pictures lie beside the metrics in the logger's `log_dir`, and go to all loggers that take figures (TensorBoard,
    and those with `log_image`, such as Weights & Biases):

    | picture | drawn from | logged by |
    |---|---|---|
    | `l2_norm_heatmap.png` | `l2_norm/<layer>` | L2NormMonitor |
    | `l2_norms.png` | the same, `weight_decay/<group>`, `lr-...` | L2NormMonitor, LearningRateMonitor |
    | `l2_penalty.png` | `l2_penalty/...` and the training loss | L2NormMonitor, the module |
    | `update_ratio.png` | `update_ratio/<layer>` | L2NormMonitor(updates=True) |

    It reads the metrics back from a CSVLogger or a TensorBoardLogger, so it does not matter in which order callbacks
    stand, and after a resume the pictures show the whole training. Costs nothing before the end.

    Args:
        loss: Name of the training loss among the metrics; by default `train_loss` and its like are looked for.
        dirpath: Directory for the pictures; by default the logger's.

    Raises:
        MisconfigurationException: Before training, if no logger keeps metrics that can be read back, or `dirpath` can't
            be made.
        ModuleNotFoundError: Before training, if matplotlib is not installed, or tensorboard where its files are to be
            read back.

    >>> callback = NormPlots(loss="train_loss")
    """

    def __init__(self, *, loss: str | None = None, dirpath: str | Path | None = None) -> None:
        check_types(NormPlots, locals())
        self.loss = loss
        self.dirpath = dirpath

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Complain before the training, not after it."""
        if stage != "fit" or _is_trial(trainer):
            return
        plots.style.new_figure(1, 1)
        if not _readable(trainer):
            raise MisconfigurationException(
                "NormPlots reads metrics back from the `log_dir` of a CSVLogger or a TensorBoardLogger, but got "
                f"{[type(logger).__name__ for logger in trainer.loggers] or 'no logger'}. "
                "Add a CSVLogger to the Trainer's loggers, or remove NormPlots."
            )
        logger = _readable(trainer)[0]
        if any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__):
            plots.history.event_accumulator(logger.log_dir)
        if self.dirpath is not None and trainer.is_global_zero:
            _make(Path(self.dirpath))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw here: everything is logged, and loggers are not yet closed."""
        self._draw(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what there is: a training that broke off is worth a look."""
        if trainer.training and trainer.global_step:
            try:
                self._draw(trainer, pl_module)
            except Exception as error:
                # It would hide why the training broke off, and keep the Trainer from cleaning up.
                rank_zero_warn(f"NormPlots could not draw the training that broke off: {error!r}.")

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_trial(trainer) or not trainer.is_global_zero:
            return
        logger = _readable(trainer)[0]
        logger.save()
        directory = Path(logger.log_dir if self.dirpath is None else self.dirpath)
        _make(directory)
        try:
            history = plots.read_history(logger.log_dir)
        except ValueError as error:
            rank_zero_warn(f"NormPlots has nothing to draw. {error}")
            return
        if self.loss and self.loss not in history:
            rank_zero_warn(f"NormPlots finds no loss named '{self.loss}' among {sorted(history)}. Correct `loss`.")
        written = []
        for name, figure in self._figures(history, _names(pl_module)).items():
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=150)
            _send(trainer, name, figure, path)
            written.append(str(path))
        if written:
            rank_zero_info(f"Pictures of the training: {', '.join(written)}")
        else:
            rank_zero_warn(
                f"NormPlots found no norms among {sorted(history)}. Add L2NormMonitor to the callbacks; where it is "
                "there, the training was shorter than its `every_n_steps`, by default the Trainer's "
                "`log_every_n_steps`."
            )

    def _figures(self, history: plots.History, layers: list[str]) -> dict[str, Figure]:
        """Return the pictures whose metrics were logged."""
        logged = {key.partition("/")[0] for key in history}
        figures = {}
        if "l2_norm" in logged:
            figures["l2_norm_heatmap"] = plots.plot_norm_heatmap(history, layers=layers)
            figures["l2_norms"] = plots.plot_norms(history, layers=layers)
        if "update_ratio" in logged:
            figures["update_ratio"] = plots.plot_update_ratios(history, layers=layers)
        if "l2_penalty" in logged:
            figures["l2_penalty"] = plots.plot_penalty(history, loss=self.loss if self.loss in history else None)
        return figures


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationException(
            f"NormPlots can't make the directory '{directory}' for its pictures ({error}). Give another `dirpath`."
        ) from error


def _is_trial(trainer: Any) -> bool:
    """Return whether it is a `fast_dev_run`, in which the Trainer mutes its loggers."""
    return bool(trainer.fast_dev_run)


def _readable(trainer: pl.Trainer) -> list[Any]:
    """Return the loggers that keep their metrics in a `log_dir`, of whichever Lightning package."""
    return [logger for logger in trainer.loggers if getattr(logger, "log_dir", None)]


def _names(pl_module: pl.LightningModule) -> list[str]:
    """Return the names of all modules and parameters in the order of the network."""
    names = []
    for path, module in pl_module.named_modules():
        own = [name for name, _ in module.named_parameters(prefix=path, recurse=False)]
        names += [clean_name(name) for name in (path, *own)]
    return names


def _send(trainer: pl.Trainer, name: str, figure: Figure, path: Path) -> None:
    """Give a picture to the loggers that take one."""
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)])
        elif hasattr(getattr(logger, "experiment", None), "add_figure"):
            logger.experiment.add_figure(name, figure, global_step=trainer.global_step, close=False)
