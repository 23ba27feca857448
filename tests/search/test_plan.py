import math

import pytest

from lightning_l2.search import Range, SearchPlan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1e-3, "high": 1e-3}, r"low=0.001, high=0.001 is empty. Give low < high"),
        ({"low": 1e-1, "high": 1e-5}, r"low=0.1, high=1e-05 is upside down: low is above high. Give low < high"),
        ({"low": 0.0}, r"log scale starts above 0 but got low=0.0. Give a small positive number"),
        ({"high": math.inf}, r"finite ends but got low=1e-05, high=inf"),
        ({"high": math.nan}, r"finite ends but got low=1e-05, high=nan"),
        ({"first": 0.0}, r"first, a lambda on the log scale, to be finite and above 0 but got 0.0"),
        ({"trials": 0}, r"trials to be at least 1 but got 0"),
        ({"seeds": 0}, r"seeds to be at least 1 but got 0"),
        ({"mode": "minimum"}, r"mode to be one of \('min', 'max'\) but got 'minimum'"),
        ({"method": "random"}, r"method to be one of \('grid', 'tpe', None\) but got 'random'"),
        ({"pick": "first"}, r"pick to be one of \('last', 'best'\) but got 'first'"),
        ({"method": "grid", "also": {"lr": Range(1e-4, 1e-2)}}, r"lambda alone but also=\['lr'\] asks for more"),
        ({"also": {"weight_decay": Range(1e-4, 1e-2)}}, r"also has 'weight_decay', which is searched anyway"),
    ],
)
def test_bad_values_say_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchPlan(**options)


def test_further_quantities_are_ranges() -> None:
    with pytest.raises(TypeError, match=r"`also` to be Mapping\[str, Range\], but got {'lr': \(1, 2\)}"):
        SearchPlan(also={"lr": (1, 2)})


def test_a_linear_range_may_start_at_zero() -> None:
    assert Range(0.0, 0.5, log=False).points(3) == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"trials": 1}, [1e-3]),
        ({"trials": 2}, [1e-3, 1e-1]),
        ({"trials": 3}, [1e-3, 1e-5, 1e-1]),
        # half of the trials, spaced evenly on both sides of the first: 1 decade below, 2/3 of one above
        ({"trials": 12}, [1e-3, 1e-5, 1e-4, 10 ** (-7 / 3), 10 ** (-5 / 3), 1e-1]),
        # outside of the range: the middle, sqrt(1e-4 * 1e-2), takes its place
        ({"trials": 6, "low": 1e-4, "high": 1e-2, "first": 1.0}, [1e-3, 1e-4, 1e-2]),
        ({"trials": 6, "first": 1e-5}, [1e-3, 1e-5, 1e-1]),
    ],
)
def test_the_coarse_grid(options: dict, values: list[float]) -> None:
    coarse = [trial["weight_decay"] for trial in SearchPlan(**options).coarse()]
    assert coarse == pytest.approx(values, rel=1e-9)
    assert all(SearchPlan(**options).low <= value <= SearchPlan(**options).high for value in coarse)


def test_the_ends_of_the_range_are_exact() -> None:
    """A value that rounding moved out of the range would be refused by the sampler's distribution."""
    for low, high in [(1e-5, 0.1), (3e-7, 0.7), (1 / 3, 2 / 3)]:
        values = [trial["weight_decay"] for trial in SearchPlan(low=low, high=high, trials=20).coarse()]
        assert min(values) == low
        assert max(values) == high
        assert len(set(values)) == len(values) == 10
