"""When NormPlots draws, from which loggers, and where its pictures go."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_l2 import L2NormMonitor, WeightDecay, plots
from lightning_l2.callbacks.norm_plots import NormPlots
from tests.helpers import Net, data, make_trainer

ALWAYS = {"l2_norm_heatmap", "l2_norms", "l2_penalty"}


class LoggedNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("objective", loss)
        return loss


class ImageLogger(Logger):
    """Takes pictures as Weights & Biases does, and keeps no metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, list[str]] = {}

    name = version = "images"

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        self.images[key] = images


def monitored(callback: NormPlots) -> list[Any]:
    return [callback, WeightDecay(0.1, summary=False), L2NormMonitor(updates=True), LearningRateMonitor()]


def pictures(path: Any) -> set[str]:
    found = {file.stem: file.read_bytes() for file in path.rglob("*.png")}
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    return set(found)


def test_pictures_lie_beside_the_metrics(tmp_path) -> None:
    """The callback stands first here, and what it draws comes from those after it."""
    logger = CSVLogger(tmp_path)
    callbacks = monitored(NormPlots(loss="objective"))
    make_trainer(callbacks, logger=logger, log_every_n_steps=1).fit(LoggedNet(), data())
    assert pictures(tmp_path) == {*ALWAYS, "update_ratio"}
    assert all(path.parent.samefile(logger.log_dir) for path in tmp_path.rglob("*.png"))


def test_layers_stand_in_the_order_of_the_network(tmp_path, monkeypatch) -> None:
    """A CSV file knows its columns by the alphabet only."""
    drawn = []
    for name in ("plot_norms", "plot_norm_heatmap"):
        monkeypatch.setattr(plots, name, lambda history, layers: drawn.append(layers) or plots.style.new_figure(1, 1))
    make_trainer(monitored(NormPlots()), logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(Net(), data())
    assert len(drawn) == 2
    body, head = ("body.0", "body.0.weight", "body.0.bias", "body.1", "body.1.weight"), ("head", "head.weight")
    for layers in drawn:
        assert [name for name in layers if name in (*body, *head)] == [*body, *head]


def test_pictures_go_to_loggers_that_take_them(tmp_path) -> None:
    board, images = TensorBoardLogger(tmp_path), ImageLogger()
    make_trainer(monitored(NormPlots()), logger=[images, board], log_every_n_steps=1).fit(LoggedNet(), data())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = {*ALWAYS, "update_ratio"}
    assert set(EventAccumulator(board.log_dir).Reload().Tags()["images"]) == expected
    assert images.images == {name: [f"{board.log_dir}/{name}.png"] for name in expected}
    assert pictures(tmp_path) == expected


def test_a_logger_without_an_experiment_is_passed_over(tmp_path) -> None:
    class Own(Logger):
        name = version = "own"

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

        def log_metrics(self, *_: Any, **__: Any) -> None: ...

    logger = [Own(), CSVLogger(tmp_path)]
    make_trainer(monitored(NormPlots()), logger=logger, log_every_n_steps=1).fit(LoggedNet(), data())
    assert pictures(tmp_path) >= ALWAYS


def test_pictures_go_where_they_are_told_to(tmp_path) -> None:
    callbacks = [NormPlots(dirpath=str(tmp_path / "new" / "pictures")), L2NormMonitor(per="total")]
    make_trainer(callbacks, logger=CSVLogger(tmp_path / "logs"), log_every_n_steps=1).fit(Net(), data())
    assert pictures(tmp_path / "new" / "pictures") == ALWAYS
    assert not pictures(tmp_path / "logs")


@pytest.mark.parametrize("loggers", [False, [ImageLogger()]])
def test_a_trainer_whose_metrics_cannot_be_read_back_is_an_error(loggers) -> None:
    with pytest.raises(MisconfigurationException, match=r"but got (no logger|\['ImageLogger'\]). Add a CSVLogger"):
        make_trainer([NormPlots()], logger=loggers).fit(Net(), data())


def test_a_missing_matplotlib_is_an_error_before_the_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_l2\[plots\]"):
        make_trainer([NormPlots()], logger=CSVLogger(tmp_path)).fit(Net(), data())


def test_a_missing_tensorboard_is_an_error_before_the_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    trainer = make_trainer([NormPlots()], logger=TensorBoardLogger(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"Install it with `pip install tensorboard`"):
        trainer.fit(Net(), data())
    assert trainer.global_step == 0


def test_a_trial_run_leaves_no_pictures(tmp_path) -> None:
    make_trainer([NormPlots()], logger=CSVLogger(tmp_path), fast_dev_run=True).fit(Net(), data())
    assert not pictures(tmp_path)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [([], "NormPlots has nothing to draw. No metrics at"), ([LearningRateMonitor()], "found no norms among")],
)
def test_nothing_to_draw_is_a_warning(callbacks, message, tmp_path) -> None:
    model = Net(scheduler=torch.optim.lr_scheduler.ConstantLR)
    with pytest.warns(UserWarning, match=message):
        make_trainer([NormPlots(), *callbacks], logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(model, data())


def test_a_training_shorter_than_the_monitors_cadence_is_told_of_it(tmp_path) -> None:
    model = Net(scheduler=torch.optim.lr_scheduler.ConstantLR)
    callbacks = [NormPlots(), L2NormMonitor(), LearningRateMonitor("epoch")]
    trainer = make_trainer(callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=50)
    with pytest.warns(UserWarning, match=r"no norms .* shorter than its `every_n_steps`, .* `log_every_n_steps`\."):
        trainer.fit(model, data())


def test_a_directory_that_cannot_be_made_is_refused_before_training(tmp_path) -> None:
    (tmp_path / "file").touch()
    trainer = make_trainer([NormPlots(dirpath=tmp_path / "file")], logger=CSVLogger(tmp_path))
    with pytest.raises(MisconfigurationException, match=r"can't make the directory .*file' .* another `dirpath`"):
        trainer.fit(Net(), data())
    assert trainer.global_step == 0


class Breaking(LoggedNet):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) if batch_idx < 2 else 1 / 0


def test_a_picture_that_fails_does_not_hide_why_a_training_broke_off(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plots, "plot_norms", lambda history, layers: None)  # None is no figure
    trainer = make_trainer([NormPlots(), L2NormMonitor(per="total")], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match=r"could not draw .* AttributeError"):
        trainer.fit(Breaking(), data())


def test_a_training_that_breaks_off_is_drawn(tmp_path) -> None:
    trainer = make_trainer([NormPlots(), L2NormMonitor(per="total")], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Breaking(), data())
    assert pictures(tmp_path) == {*ALWAYS}


def test_a_loss_that_is_not_there_is_a_warning(tmp_path) -> None:
    callbacks = [NormPlots(loss="los"), L2NormMonitor(per="total")]
    trainer = make_trainer(callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"finds no loss named 'los' among \[.*'objective'.*\]. Correct `loss`"):
        trainer.fit(LoggedNet(), data())
    assert pictures(tmp_path) == ALWAYS


def test_a_resumed_training_is_drawn_whole(tmp_path, monkeypatch) -> None:
    """TensorBoard's directory may go on where the first part ended."""
    shown = []
    plot = plots.plot_norms
    monkeypatch.setattr(plots, "plot_norms", lambda history, layers: shown.append(history) or plot(history))
    for epochs, ckpt_path in ((1, None), (2, tmp_path / "last.ckpt")):
        logger = TensorBoardLogger(tmp_path, version="same")
        callbacks = [NormPlots(), L2NormMonitor(per="total")]
        trainer = make_trainer(callbacks, logger=logger, log_every_n_steps=1, max_epochs=epochs)
        trainer.fit(Net(), data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert [history["l2_norm/total"][0] for history in shown] == [list(range(8)), list(range(16))]


def test_it_copies_and_pickles() -> None:
    callback = NormPlots(loss="objective", dirpath="somewhere")
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (other.loss, other.dirpath) == ("objective", "somewhere")
