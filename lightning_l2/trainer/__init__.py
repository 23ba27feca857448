"""What a training is to Lightning: its callbacks, clock, loggers, optimizers and length."""

from lightning_l2.trainer.callback import Callback
from lightning_l2.trainer.length import steps_per_epoch, total_epochs, total_steps, training_setup

__all__ = ["Callback", "steps_per_epoch", "total_epochs", "total_steps", "training_setup"]


def __dir__() -> list[str]:
    return __all__
