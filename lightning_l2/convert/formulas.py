"""Weight decay as a number, from a timescale, a prior or a normalised value, and back."""

from __future__ import annotations

import math

from lightning_l2.arguments import check_not_negative, check_positive


def timescale_to_weight_decay(epochs: float, *, lr: float, steps_per_epoch: float = 1.0) -> float:
    """Return the weight decay under which decoupled weights average their updates over so many epochs.

    AdamW keeps an exponential moving average of its updates with a timescale of $1 / (lr * weight_decay)$ steps, so
    $weight_decay = 1 / (lr * epochs * steps_per_epoch)$.

    Args:
        epochs: Timescale of the average, in epochs, above 0.
        lr: Learning rate (its peak, where it has a schedule), above 0.
        steps_per_epoch: Optimizer steps in an epoch, above 0; with 1 `epochs` counts steps.

    Raises:
        ValueError: If an argument is not finite and above 0.

    Source: Wang and Aitchison, "How to set AdamW's weight decay as you scale model and dataset size",
    arXiv 2405.13698, 2024.

    >>> timescale_to_weight_decay(4, lr=1e-3, steps_per_epoch=1000)
    0.25
    """
    check_positive(epochs=epochs, lr=lr, steps_per_epoch=steps_per_epoch)
    return 1.0 / (lr * epochs * steps_per_epoch)


def weight_decay_to_timescale(weight_decay: float, *, lr: float, steps_per_epoch: float) -> float:
    """Return over how many epochs decoupled weights average updates: $1 / (lr * weight_decay * steps_per_epoch)$.

    The inverse of `timescale_to_weight_decay`, with the same units, errors and source.

    >>> weight_decay_to_timescale(0.25, lr=1e-3, steps_per_epoch=1000)
    4.0
    """
    check_positive(weight_decay=weight_decay, lr=lr, steps_per_epoch=steps_per_epoch)
    return 1.0 / (lr * weight_decay * steps_per_epoch)


def prior_to_weight_decay(sigma: float, *, samples: float) -> float:
    r"""Return the weight decay that makes training a maximum a posteriori estimate: $1 / (samples * sigma^2)$.

    For a loss that is the *mean* negative log-likelihood of the samples, and a prior $w \sim N(0, sigma^2)$ for each
    weight. Coupled decay and `L2Penalty` minimise that objective; decoupled decay with an adaptive optimizer doesn't.

    Args:
        sigma: Standard deviation of the prior, in the weights' unit, above 0.
        samples: Number of training samples, above 0.

    Raises:
        ValueError: If an argument is not finite and above 0.

    Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", Neural Computation 4, 1992.

    >>> prior_to_weight_decay(0.1, samples=50_000)
    0.002
    """
    check_positive(sigma=sigma, samples=samples)
    return 1.0 / (samples * sigma * sigma)


def weight_decay_to_prior(weight_decay: float, *, samples: float) -> float:
    r"""Return the standard deviation of the prior that a weight decay stands for: $1 / \sqrt{samples * weight_decay}$.

    The inverse of `prior_to_weight_decay`, with the same units, errors and source.

    >>> round(weight_decay_to_prior(0.002, samples=50_000), 12)
    0.1
    """
    check_positive(weight_decay=weight_decay, samples=samples)
    return 1.0 / math.sqrt(samples * weight_decay)


def normalised_to_weight_decay(normalised: float, *, batch_size: float, samples: float, epochs: float) -> float:
    r"""Return the weight decay of a normalised one: $normalised * \sqrt{batch_size / (samples * epochs)}$.

    Normalised values stay about right when the length of the training changes.

    Args:
        normalised: Weight decay of a training with one step, at least 0.
        batch_size: Samples in an optimizer step (over all devices and accumulated batches), above 0.
        samples: Training samples in an epoch, above 0.
        epochs: Length of the training in epochs, above 0.

    Raises:
        ValueError: If an argument is not finite or below its bound.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, appendix B.1, 2017.

    >>> normalised_to_weight_decay(0.5, batch_size=100, samples=10_000, epochs=100)
    0.005
    """
    check_not_negative(normalised=normalised)
    check_positive(batch_size=batch_size, samples=samples, epochs=epochs)
    return normalised * math.sqrt(batch_size / (samples * epochs))


def weight_decay_to_normalised(weight_decay: float, *, batch_size: float, samples: float, epochs: float) -> float:
    r"""Return the normalised weight decay: $weight_decay * \sqrt{samples * epochs / batch_size}$.

    The inverse of `normalised_to_weight_decay`, with the same units, errors and source.

    >>> weight_decay_to_normalised(0.005, batch_size=100, samples=10_000, epochs=100)
    0.5
    """
    check_not_negative(weight_decay=weight_decay)
    check_positive(batch_size=batch_size, samples=samples, epochs=epochs)
    return weight_decay * math.sqrt(samples * epochs / batch_size)
