"""Libraries that are not installed are told with the extra that brings them."""

import re
from pathlib import Path

import pytest

import lightning_l2
from lightning_l2.extras import brought_by


def test_the_library_and_the_command_are_named() -> None:
    message = 'Pictures need no_such_library, which isn\'t installed. Get it with `pip install "lightning_l2[plots]"`.'
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)) as error, brought_by("plots", "Pictures need"):
        import no_such_library  # noqa: F401
    assert error.value.name == "no_such_library"


def test_other_errors_and_none_pass() -> None:
    with brought_by("plots", "Pictures need"):
        import re as found
    assert found is re
    with pytest.raises(KeyError, match="mine"), brought_by("plots", "Pictures need"):
        raise KeyError("mine")


def test_every_extra_that_is_named_can_be_installed() -> None:
    package = Path(lightning_l2.__file__).parent
    named = {extra for path in package.rglob("*.py") for extra in re.findall(r'brought_by\("(\w+)"', path.read_text())}
    (section,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (package.parent / "pyproject.toml").read_text(), re.M | re.S
    )
    assert named
    assert named <= set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
