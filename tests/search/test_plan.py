import math

import pytest

from lightning_l2.search import Range, SearchPlan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1e-3, "high": 1e-3}, r"low=0.001, high=0.001 is empty. Give low < high"),
        ({"low": 1e-1, "high": 1e-5}, r"low=0.1, high=1e-05 is upside down: low is above high. Give low < high"),
        ({"low": 0.0}, r"`low`, on the log scale, to be above 0, got 0.0. Give a small positive number"),
        ({"low": 1e-5, "high": math.inf}, r"finite ends, got low=1e-05, high=inf"),
        ({"low": 1e-5, "high": math.nan}, r"finite ends, got low=1e-05, high=nan"),
        ({"high": -1.0}, r"upside down"),
        (
            {"first": 0.0},
            r"`first`, a lambda on the log scale, to be finite and above 0, got 0.0. Lambda = 0 is a trial of",
        ),
        ({"trials": 0}, r"`trials` to be at least 1, got 0"),
        ({"seeds": 0}, r"`seeds` to be at least 1, got 0"),
        ({"seed": -1}, r"`seed` to be at least 0, got -1"),
        ({"mode": "minimum"}, r"`mode` to be one of \('min', 'max'\), got 'minimum'"),
        ({"method": "random"}, r"`method` to be one of \('grid', 'tpe', None\), got 'random'"),
        ({"pick": "first"}, r"`pick` to be one of \('last', 'best'\), got 'first'"),
        ({"method": "grid", "also": {"lr": Range(1e-4, 1e-2)}}, r"'tpe' beside also=\['lr'\], got 'grid'. It searches"),
        ({"also": {"weight_decay": Range(1e-4, 1e-2)}}, r"other quantities, got 'weight_decay'. Set its range"),
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
    plan = SearchPlan(zero=False, **options).within(None)
    assert plan.coarse() == pytest.approx(values, rel=1e-9)
    with_zero = SearchPlan(**options).within(None).coarse()
    assert with_zero == pytest.approx([values[0], 0.0, *values[1:]], rel=1e-9), "0 comes second, as one trial more"


def test_a_joint_search_has_no_zero() -> None:
    """There the others would differ in more than lambda."""
    plan = SearchPlan(trials=3, also={"lr": Range(0.1, 1.0)}).within(None)
    assert 0 not in plan.coarse()
    assert plan.places == 3


def test_the_ends_of_the_range_are_exact() -> None:
    """A value that rounding moved out of the range would be refused by the sampler's distribution."""
    for low, high in [(1e-5, 0.1), (3e-7, 0.7), (1 / 3, 2 / 3)]:
        values = SearchPlan(low=low, high=high, trials=20, zero=False).coarse()
        assert min(values) == low
        assert max(values) == high
        assert len(set(values)) == len(values) == 10


@pytest.mark.parametrize(
    ("given", "lr_steps", "ends"),
    [
        # AdamW(lr=1e-3) for 100 steps: eta * lambda * T from 0.01 to 10
        ({}, 0.1, (0.1, 100.0)),
        ({}, 300.0, (3.33e-5, 3.33e-2)),
        ({}, None, (1e-5, 1e-1)),
        ({"low": 1e-4, "high": 1.0}, 0.1, (1e-4, 1.0)),
        ({"low": 1e-4}, 0.1, (1e-4, 100.0)),
        ({"high": 1.0}, None, (1e-5, 1.0)),
    ],
)
def test_the_range_is_where_decay_acts(given: dict, lr_steps: float | None, ends: tuple[float, float]) -> None:
    plan = SearchPlan(**given).within(lr_steps)
    assert (plan.low, plan.high) == ends


def test_the_first_trial_is_the_usual_lambda_or_the_middle() -> None:
    assert SearchPlan().within(300.0).coarse()[0] == 1e-3
    assert SearchPlan().within(0.1).coarse()[0] == pytest.approx(math.sqrt(0.1 * 100.0), rel=1e-5)
