"""Libraries that are not installed are told with the extra that brings them."""

import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import lightning_l2
from lightning_l2.extras import brought_by, in_short
from lightning_l2.trainer.callback import Callback


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


def complaint(**arguments: object) -> str:
    """Return what jsonargparse says of a callback."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    with pytest.raises(Exception) as error:  # noqa: PT011
        parser.instantiate(parser.parse_object({"callbacks": [{"class_path": "lightning_l2.WeightDecay"} | arguments]}))
    return in_short(str(error.value))


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ({"class_path": "lightning_l2.WeigthDecay"}, "Did you mean 'lightning_l2.WeightDecay'?"),
        ({"class_path": "lightning_l2.callbacks.WeigthDecay"}, "Did you mean 'WeightDecay'?"),
        ({"weight_decay": 0.1}, "the arguments of a class stand under `init_args`, beside its class_path"),
        ({"init_args": {"apply": "adamw"}}, "Got value: adamw"),
        ({"init_args": {"weight_deccay": 1}}, "Option 'weight_deccay' is not accepted"),
        ({"init_args": {"rules": [{"name": "head", "patern": "x"}]}}, "Option 'patern' is not accepted"),
        ({"init_args": {"rules": {"head": 0.1}}}, "Given value: {'head': 0.1}"),
        ({"init_args": {"rules": "defualt"}}, "'weaker_before_norm', 'transformer', 'rnn'."),
    ],
)
def test_a_complaint_of_jsonargparse_is_one_line(arguments: dict[str, object], end: str) -> None:
    text = complaint(**arguments)
    assert text.endswith(end), text
    assert "\n" not in text
    assert "Subtypes" not in text


@pytest.mark.parametrize("message", ["", "the following arguments are required: callbacks"])
def test_another_complaint_stays_as_it_is(message: str) -> None:
    assert in_short(message) == message
