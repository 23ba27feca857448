"""Weight decay from what one knows instead: a timescale, a prior, a normalised value; and back.

The functions convert numbers. A `Conversion` stands in the place of a number in a configuration and becomes one when
the training's steps, learning rate and samples are known:

    weight_decay: {class_path: lightning_l2.convert.Timescale, init_args: {epochs: 4}}
"""

from lightning_l2.convert.conversion import Conversion, GaussianPrior, Normalised, Timescale, TrainingSetup
from lightning_l2.convert.formulas import (
    normalised_to_weight_decay,
    prior_to_weight_decay,
    timescale_to_weight_decay,
    weight_decay_to_normalised,
    weight_decay_to_prior,
    weight_decay_to_timescale,
)

__all__ = [
    "Conversion",
    "GaussianPrior",
    "Normalised",
    "Timescale",
    "TrainingSetup",
    "normalised_to_weight_decay",
    "prior_to_weight_decay",
    "timescale_to_weight_decay",
    "weight_decay_to_normalised",
    "weight_decay_to_prior",
    "weight_decay_to_timescale",
]


def __dir__() -> list[str]:
    return __all__
