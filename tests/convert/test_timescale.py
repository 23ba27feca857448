"""A timescale in epochs, in steps and as a fraction of the training, also where the data has no length."""

from __future__ import annotations

import math
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_l2 import WeightDecay
from lightning_l2.convert import Conversion, Normalised, Timescale, TrainingSetup
from tests.helpers import Shrinking, batches, make_trainer, stream

LR = 0.1


def lambda_of(conversion: Conversion, data: Any, **options: Any) -> float:
    """Return lambda as a training's steps take it from weights without a gradient."""
    model = Shrinking()
    make_trainer([WeightDecay(conversion, summary=False)], **options).fit(model, data)
    found = set(model.watches[0].of("head.weight"))
    assert max(found) == pytest.approx(min(found), rel=1e-9)
    return max(found)


ENDLESS = {"max_epochs": -1, "max_steps": 8}


@pytest.mark.parametrize(
    ("conversion", "data", "options", "expected"),
    [
        (Timescale(fraction=4.0), batches(5), {"max_epochs": 3}, 1 / (LR * 4.0 * 15)),
        (Timescale(fraction=4.0), batches(5), {"max_epochs": 3, "accumulate_grad_batches": 2}, 1 / (LR * 4.0 * 9)),
        (Timescale(fraction=4.0), batches(5), {"max_epochs": 3, "max_steps": 8}, 1 / (LR * 4.0 * 8)),
        (Timescale(fraction=4.0), stream(20), ENDLESS, 1 / (LR * 4.0 * 8)),
        (Timescale(fraction=4.0), stream(5), {**ENDLESS, "accumulate_grad_batches": 2}, 1 / (LR * 4.0 * 8)),
        (Timescale(steps=50), stream(20), ENDLESS, 1 / (LR * 50)),
        (Timescale(steps=50), stream(4), {"max_epochs": 2}, 1 / (LR * 50)),
        (Timescale(epochs=6), stream(20), {**ENDLESS, "limit_train_batches": 10}, 1 / (LR * 6 * 10)),
        (Normalised(0.5), stream(20), ENDLESS, 0.5 / math.sqrt(8)),
        (Normalised(0.5), batches(5), {"max_epochs": 3}, 0.5 / math.sqrt(15)),
    ],
    ids=range(10),
)
def test_lambda_in_the_steps_of_a_training(
    conversion: Conversion, data: Any, options: dict[str, Any], expected: float
) -> None:
    assert lambda_of(conversion, data, **options) == pytest.approx(expected, rel=1e-9)


def test_a_fraction_leaves_the_same_share_of_the_weights_whatever_the_length() -> None:
    """With a constant learning rate (1 - 1/(f T))^T, near exp(-1/f)."""
    for steps in (40, 200):
        model = Shrinking()
        callback = WeightDecay(Timescale(fraction=0.5), summary=False)
        make_trainer([callback], max_epochs=-1, max_steps=steps).fit(model, stream(50))
        assert model.head.weight[0, 0].item() == pytest.approx((1 - 2 / steps) ** steps, rel=1e-12)


UNKNOWN = r"{} needs `{}` of the training, which is unknown: {}"


@pytest.mark.parametrize(
    ("conversion", "data", "options", "message"),
    [
        (
            Timescale(4),
            stream(20),
            ENDLESS,
            UNKNOWN.format(r"Timescale\(epochs=4\)", "steps_per_epoch", ".* in `steps` or as a `fraction`"),
        ),
        (
            Timescale(fraction=0.5),
            stream(4),
            {"max_epochs": 1},
            UNKNOWN.format(r"Timescale\(fraction=0\.5\)", "steps", "set `max_steps` on the Trainer"),
        ),
        (Normalised(0.5), stream(4), {"max_epochs": 1}, UNKNOWN.format(".*", "samples", ".*, or set `max_steps`")),
    ],
)
def test_what_no_training_says_is_asked_for(conversion: Conversion, data: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lambda_of(conversion, data, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Expected one of `epochs`, `fraction` and `steps` of Timescale, got none."),
        (
            {"epochs": 1, "fraction": 0.5},
            "Expected one of `epochs`, `fraction` and `steps` of Timescale, got {'epochs': 1, 'fraction': 0.5}.",
        ),
        ({"fraction": 0.0}, "Expected `fraction` to be finite and above 0, got 0.0."),
        ({"steps": -3}, "Expected `steps` to be finite and above 0, got -3."),
    ],
)
def test_messages(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="Expected") as caught:
        Timescale(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("given", [{"fraction": 0.2}, {"steps": 500}, {"epochs": 4}])
def test_yaml(given: dict[str, float]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--conversion", type=Conversion)
    value = {"class_path": "lightning_l2.convert.Timescale", "init_args": given}
    printed = parser.dump(parser.parse_object({"conversion": value}))
    assert parser.instantiate(parser.parse_string(printed)).conversion == Timescale(**given)


def test_published_settings() -> None:
    """Lambda 0.1 at a learning rate of 3e-4 over 100,000 steps is a timescale of a third of the training."""
    setup = TrainingSetup(lr=3e-4, steps=100_000)
    assert Timescale(fraction=1 / 3)(setup) == pytest.approx(0.1, rel=1e-12)
    assert Timescale(steps=100_000 / 3)(setup) == pytest.approx(0.1, rel=1e-12)
