"""Weight decay from what the training does: its learning rate, gradients, optimizer state, spectra or losses.

Each class is a `FeedbackSchedule` for `WeightDecayScheduler` and multiplies the base weight decay of each group. What
it reads, from which optimizers, and what it costs in transfers from an accelerator is in its docstring.
"""

from lightning_l2.adaptive.adamc import CorrectedDecay
from lightning_l2.adaptive.alpha_decay import AlphaDecay, hill_exponent
from lightning_l2.adaptive.auto_l2 import AutoL2Decay
from lightning_l2.adaptive.awd import AdaptiveDecay
from lightning_l2.adaptive.swd import StableDecay

__all__ = ["AdaptiveDecay", "AlphaDecay", "AutoL2Decay", "CorrectedDecay", "StableDecay", "hill_exponent"]


def __dir__() -> list[str]:
    return __all__
