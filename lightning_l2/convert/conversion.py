"""Conversions that stand in the place of a number in a configuration until the training is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from lightning_l2.arguments import check_not_negative, check_positive, check_types
from lightning_l2.convert.formulas import (
    normalised_to_weight_decay,
    prior_to_weight_decay,
    timescale_to_weight_decay,
)


@final
@dataclass(frozen=True)
class TrainingSetup:
    """What a conversion may need to know of a training; None where it is unknown.

    Args:
        lr: Learning rate (its peak, where it has a schedule).
        steps_per_epoch: Optimizer steps in an epoch.
        epochs: Length of the training in epochs.
        batch_size: Samples in an optimizer step, over all devices and accumulated batches.
        samples: Training samples in an epoch.

    Raises:
        ValueError: If a known value is not finite and above 0.

    >>> TrainingSetup(lr=1e-3, steps_per_epoch=1000, epochs=10).samples is None
    True
    """

    lr: float
    steps_per_epoch: float | None = None
    epochs: float | None = None
    batch_size: float | None = None
    samples: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(**vars(self))


class Conversion(ABC):
    """Become a weight decay once the training is known. Derive a frozen dataclass and define `__call__`.

    >>> @dataclass(frozen=True)
    ... class PerStep(Conversion):
    ...     share: float  # of the weights that a step takes
    ...     def __call__(self, setup):
    ...         return self.share / setup.lr
    >>> PerStep(1e-4)(TrainingSetup(lr=1e-3))
    0.1
    """

    @abstractmethod
    def __call__(self, setup: TrainingSetup) -> float:
        """Return the weight decay for a training.

        Raises:
            ValueError: If something of the training that the conversion needs is unknown.
        """


@final
@dataclass(frozen=True)
class Timescale(Conversion):
    """Average the updates over so many epochs: $weight_decay = 1 / (lr * epochs * steps_per_epoch)$.

    Args:
        epochs: Timescale of the moving average that decoupled decay makes of the updates, in epochs, above 0; between
            1 and the length of the training as a rule.

    Raises:
        ValueError: If `epochs` is not finite and above 0; if the steps of an epoch are unknown.

    Source: Wang and Aitchison, "How to set AdamW's weight decay as you scale model and dataset size",
    arXiv 2405.13698, 2024.

    >>> Timescale(epochs=4)(TrainingSetup(lr=1e-3, steps_per_epoch=1000))
    0.25
    """

    epochs: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(epochs=self.epochs)

    def __call__(self, setup: TrainingSetup) -> float:
        """Return the weight decay for a training."""
        steps = known(self, "steps_per_epoch", setup.steps_per_epoch, "use data with a length")
        return timescale_to_weight_decay(self.epochs, lr=setup.lr, steps_per_epoch=steps)


@final
@dataclass(frozen=True)
class GaussianPrior(Conversion):
    """Believe the weights to be drawn from $N(0, sigma^2)$: $weight_decay = 1 / (samples * sigma^2)$.

    For a loss that is the mean over the samples, and decay that is part of the objective (coupled, `L2Penalty`).

    Args:
        sigma: Standard deviation of the prior, in the weights' unit, above 0.
        samples: Number of training samples, above 0; by default those of an epoch.

    Raises:
        ValueError: If an argument is not finite and above 0; if the number of samples is unknown.

    Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", Neural Computation 4, 1992.

    >>> GaussianPrior(sigma=0.1, samples=50_000)(TrainingSetup(lr=1e-3))
    0.002
    """

    sigma: float
    samples: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_positive(sigma=self.sigma)
        if self.samples is not None:
            check_positive(samples=self.samples)

    def __call__(self, setup: TrainingSetup) -> float:
        """Return the weight decay for a training."""
        samples = setup.samples if self.samples is None else self.samples
        samples = known(self, "samples", samples, "give `samples` to GaussianPrior, or use data with a length")
        return prior_to_weight_decay(self.sigma, samples=samples)


@final
@dataclass(frozen=True)
class Normalised(Conversion):
    r"""Keep a value that suits any length: $weight_decay = normalised * \sqrt{batch_size / (samples * epochs)}$.

    Args:
        weight_decay: Normalised weight decay, that of a training with a single step, at least 0.

    Raises:
        ValueError: If `weight_decay` is negative or not finite; if batch size, samples or epochs are unknown.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, appendix B.1, 2017.

    >>> setup = TrainingSetup(lr=1e-3, epochs=100, batch_size=100, samples=10_000)
    >>> Normalised(weight_decay=0.5)(setup)
    0.005
    """

    weight_decay: float

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_not_negative(weight_decay=self.weight_decay)

    def __call__(self, setup: TrainingSetup) -> float:
        """Return the weight decay for a training."""
        return normalised_to_weight_decay(
            self.weight_decay,
            batch_size=known(self, "batch_size", setup.batch_size, "use a DataLoader with a batch size"),
            samples=known(self, "samples", setup.samples, "use data with a length"),
            epochs=known(self, "epochs", setup.epochs, "set `max_epochs` or `max_steps` on the Trainer"),
        )


def known(conversion: Conversion, name: str, value: float | None, way_out: str) -> float:
    """Return a value of the training, or raise a `ValueError` if it is unknown."""
    if value is None:
        raise ValueError(
            f"{conversion} needs `{name}` of the training, which is unknown: {way_out}, or give the weight decay as a "
            "number."
        )
    return value
