"""Conversions that stand in the place of a number in a configuration until the training is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
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
        steps: Length of the training in optimizer steps.

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
    steps: float | None = None

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
    r"""Average the updates over so many steps $\tau$: $weight_decay = 1 / (lr * tau)$.

    Decoupled decay makes the weights a moving average of their updates. Its timescale is between an epoch and the
    training as a rule. As a fraction $f$ of a training of $T$ steps, $\lambda = 1 / (\eta f T)$, it keeps its meaning
    when batch size, learning rate or length change. Give one of the three.

    Args:
        epochs: The timescale in epochs, above 0.
        fraction: The timescale as a fraction of the training, above 0.
        steps: The timescale in optimizer steps, above 0.

    Raises:
        ValueError: If not one of them is given, or it is not finite and above 0; if the steps of an epoch, or of the
            training, are needed and unknown.

    Source: Wang and Aitchison, "How to set AdamW's weight decay as you scale model and dataset size",
    arXiv 2405.13698, 2024.

    >>> Timescale(epochs=4)(TrainingSetup(lr=1e-3, steps_per_epoch=1000))
    0.25
    >>> Timescale(fraction=0.2)(TrainingSetup(lr=1e-3, steps=20_000))
    0.25
    """

    epochs: float | None = None
    fraction: float | None = field(default=None, kw_only=True)
    steps: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Expected one of `epochs`, `fraction` and `steps` of Timescale, got {given or 'none'}.")
        check_positive(**given)

    def __call__(self, setup: TrainingSetup) -> float:
        """Return the weight decay for a training."""
        (timescale,) = (value for value in vars(self).values() if value is not None)
        unit = 1.0
        if self.fraction is not None:
            unit = known(self, "steps", setup.steps, "set `max_steps` on the Trainer")
        elif self.epochs is not None:
            way_out = "use data with a length, or give the timescale in `steps` or as a `fraction`"
            unit = known(self, "steps_per_epoch", setup.steps_per_epoch, way_out)
        return timescale_to_weight_decay(timescale, lr=setup.lr, steps_per_epoch=unit)


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

    Where the data has no length this is $normalised / \sqrt{steps}$, of the training's steps.

    Args:
        weight_decay: Normalised weight decay, that of a training with a single step, at least 0.

    Raises:
        ValueError: If `weight_decay` is negative or not finite; if batch size, samples or epochs are unknown, and
            the steps too.

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
        if setup.steps is not None and None in (setup.batch_size, setup.samples, setup.epochs):
            return normalised_to_weight_decay(self.weight_decay, batch_size=1.0, samples=setup.steps, epochs=1.0)
        return normalised_to_weight_decay(
            self.weight_decay,
            batch_size=known(self, "batch_size", setup.batch_size, "use a DataLoader with a batch size"),
            samples=known(self, "samples", setup.samples, "use data with a length, or set `max_steps` on the Trainer"),
            epochs=known(self, "epochs", setup.epochs, "set `max_epochs` or `max_steps` on the Trainer"),
        )


def known(conversion: Conversion, name: str, value: float | None, way_out: str) -> float:
    """Return a value of the training, or raise a `ValueError` if it is unknown."""
    if value is None:
        given = ", ".join(f"{key}={one!r}" for key, one in vars(conversion).items() if one is not None)
        raise ValueError(
            f"{type(conversion).__name__}({given}) needs `{name}` of the training, which is unknown: {way_out}, or "
            "give the weight decay as a number."
        )
    return value
