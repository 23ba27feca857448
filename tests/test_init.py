"""The face of the package: names come when they are asked for."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_l2


def test_names_and_wings_are_there_without_an_import_of_their_own() -> None:
    assert dir(lightning_l2) == sorted(lightning_l2.__all__)
    for name in lightning_l2.__all__:
        found = getattr(lightning_l2, name)
        assert found.__name__ == name
        assert getattr(import_module(found.__module__), name) is found
    assert lightning_l2.schedules is import_module("lightning_l2.schedules")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("WeightDecai", ". Did you mean 'lightning_l2.WeightDecay'?"),
        ("CosineSchedule", ". Did you mean 'lightning_l2.schedules.CosineSchedule'?"),
        ("Timescales", ". Did you mean 'lightning_l2.convert.Timescale'?"),
        ("Xyz", ""),
        ("weight_decai", ""),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_the_one_that_may_be_meant(name: str, meant: str) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(lightning_l2, name)
    assert str(error.value) == f"module 'lightning_l2' has no attribute {name!r}{meant}"


def test_a_mistyped_file_does_not_cost_the_seconds_of_lightning() -> None:
    program = """
import sys
from lightning_l2.__main__ import main
print(main(["preview", "--config", "no_such.yaml"]), {"torch", "lightning", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.split() == ["1", "set()"]
    assert done.stderr.strip().endswith("No such file or directory: 'no_such.yaml'")
