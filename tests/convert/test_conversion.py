"""What takes the place of a weight decay: its number, what it misses, and its way through YAML."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest

from lightning_l2.convert import (
    Conversion,
    GaussianPrior,
    Normalised,
    Timescale,
    TrainingSetup,
)
from tests.convert.test_formulas import ABOVE
from tests.helpers import through_yaml

SETUP = TrainingSetup(lr=0.002, steps_per_epoch=50, epochs=80, batch_size=100, samples=5000)
CONVERSIONS: list[tuple[Conversion, float]] = [
    (Timescale(epochs=4), 1 / (0.002 * 4 * 50)),
    (GaussianPrior(sigma=0.5), 1 / (5000 * 0.25)),
    (GaussianPrior(sigma=0.5, samples=100), 1 / (100 * 0.25)),
    (Normalised(weight_decay=0.2), 0.2 * math.sqrt(100 / (5000 * 80))),
    (Normalised(weight_decay=0.0), 0.0),
]


@pytest.mark.parametrize(("conversion", "expected"), CONVERSIONS, ids=repr)
def test_conversion_becomes_its_formula(conversion: Conversion, expected: float) -> None:
    assert conversion(SETUP) == pytest.approx(expected, rel=1e-14)
    assert type(conversion(SETUP)) is float
    assert pickle.loads(pickle.dumps(conversion)) == copy.deepcopy(conversion) == conversion
    assert isinstance(hash(conversion), int)


UNKNOWN = r"{} needs `{}` of the training, which is unknown: {}.*, or give the weight decay as a number"


@pytest.mark.parametrize(
    ("conversion", "setup", "message"),
    [
        (Timescale(4), TrainingSetup(lr=0.1), UNKNOWN.format(r"Timescale\(epochs=4\)", "steps_per_epoch", "use data")),
        (GaussianPrior(0.1), TrainingSetup(lr=0.1), UNKNOWN.format("GaussianPrior.*", "samples", "give `samples`")),
        (
            Normalised(0.1),
            TrainingSetup(lr=0.1, samples=10, epochs=1),
            UNKNOWN.format("Normalised.*", "batch_size", "use a DataLoader"),
        ),
        (
            Normalised(0.1),
            TrainingSetup(lr=0.1, batch_size=10, epochs=1),
            UNKNOWN.format("Normalised.*", "samples", "use data with a length"),
        ),
        (
            Normalised(0.1),
            TrainingSetup(lr=0.1, batch_size=10, samples=10),
            UNKNOWN.format("Normalised.*", "epochs", "set `max_epochs`"),
        ),
    ],
    ids=range(5),
)
def test_what_is_unknown_is_an_error_with_a_way_out(conversion: Conversion, setup: TrainingSetup, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversion(setup)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: Timescale(0.0), ABOVE.format("epochs")),
        (lambda: GaussianPrior(-1.0), ABOVE.format("sigma")),
        (lambda: GaussianPrior(1.0, samples=0), ABOVE.format("samples")),
        (lambda: Normalised(-0.1), "Expected `weight_decay` to be finite and at least 0, got -0.1"),
        (lambda: TrainingSetup(lr=0.0), ABOVE.format("lr")),
        (lambda: TrainingSetup(lr=0.1, epochs=math.inf), ABOVE.format("epochs")),
    ],
    ids=range(6),
)
def test_misuse_is_a_clear_error(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()


def parse(weight_decay: object) -> tuple[object, str]:
    return through_yaml(float | Conversion | None, weight_decay)


@pytest.mark.parametrize("conversion", [conversion for conversion, _ in CONVERSIONS], ids=repr)
def test_yaml_takes_a_conversion_in_the_place_of_a_number(conversion: Conversion) -> None:
    path = f"lightning_l2.convert.{type(conversion).__name__}"
    parsed, printed = parse({"class_path": path, "init_args": vars(conversion)})
    assert parsed == conversion
    assert f"class_path: {path}\n" in printed
    assert parse(0.05)[0] == 0.05
    assert parse(None)[0] is None
