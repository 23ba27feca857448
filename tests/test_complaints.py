"""What jsonargparse complains about, in short: of its real messages, and of some that it may have."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_l2.complaints import in_short
from lightning_l2.trainer.callback import Callback

SCHEDULER, SCHEDULE = "lightning_l2.WeightDecayScheduler", "lightning_l2.schedules.CosineSchedule"


def complaint(*entries: Any) -> str:
    """Return what a LightningCLI would say of these callbacks, in short."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    with pytest.raises(Exception) as error:  # noqa: PT011
        parser.instantiate(parser.parse_object({"callbacks": list(entries)}))
    return in_short(str(error.value))


def entry(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def decay(**arguments: Any) -> dict[str, Any]:
    return entry("lightning_l2.WeightDecay", weight_decay=0.1, **arguments)


@pytest.mark.parametrize(
    ("wrong", "begin", "end"),
    [
        (
            entry("lightning_l2.WeigthDecay"),
            "`callbacks`: there is no class 'lightning_l2.WeigthDecay'. ",
            "Did you mean 'lightning_l2.WeightDecay'?",
        ),
        (
            entry("lightning_l2.nowhere.WeightDecay"),
            "`callbacks`: there is no class 'lightning_l2.nowhere.WeightDecay'. ",
            "Did you mean 'lightning_l2.WeightDecay'?",
        ),
        (
            entry("nowhere.WeightDecay"),
            "`callbacks`: there is no class 'nowhere.WeightDecay'. ",
            "No module named 'nowhere'.",
        ),
        (
            entry(SCHEDULER, schedule=entry("lightning_l2.CosineSchedule", start=1.0, end=2.0)),
            f"`callbacks`: {SCHEDULER}: `schedule`: there is no class 'lightning_l2.CosineSchedule'. ",
            f"Did you mean '{SCHEDULE}'?",
        ),
        (
            decay(weight_deccay=0.1),
            "`callbacks`: lightning_l2.WeightDecay has no 'weight_deccay'. Did you mean 'weight_decay'? ",
            "peak_lr.",
        ),
        (
            decay(rules=[{"name": "head", "patern": "^head"}]),
            "`callbacks`: lightning_l2.WeightDecay: `rules`: lightning_l2.DecayRule has no 'patern'. ",
            "towards.",
        ),
        (
            decay(rules=[{"pattern": "^head"}]),
            "`callbacks`: lightning_l2.WeightDecay: `rules`: lightning_l2.DecayRule: ",
            "required: name.",
        ),
        (
            decay(rules={"head": 0.1}),
            "`callbacks`: lightning_l2.WeightDecay: expected `rules` to be str | list[DecayRule | str], ",
            "got {'head': 0.1}.",
        ),
        (
            entry("lightning_l2.WeightDecay", weight_decay="strong"),
            "`callbacks`: lightning_l2.WeightDecay: expected `weight_decay` to be float | Conversion | None, ",
            "got 'strong'.",
        ),
        (
            decay(apply="adamw"),
            "`callbacks`: lightning_l2.WeightDecay: expected `apply` to be one of 'optimizer', 'coupled', ",
            "got 'adamw'.",
        ),
        (
            entry(SCHEDULER, schedule=entry("torch.optim.SGD", lr=0.1)),
            f"`callbacks`: {SCHEDULER}: `schedule`: torch.optim.SGD is no Schedule; ",
            "torch.optim.SGD is no FeedbackSchedule.",
        ),
        (
            {"class_path": "lightning_l2.WeightDecay", "weight_decay": 0.1},
            "`callbacks`: ",
            "the arguments of a class stand under `init_args`, beside its class_path.",
        ),
        (
            {"lightning_l2.WeightDecay": {"weight_decay": 0.1}},
            "`callbacks`: ",
            "The arguments of a class stand under `init_args`, beside its class_path.",
        ),
        (
            entry(SCHEDULER, schedule={"class_path": SCHEDULE, "start": 1.0, "end": 2.0}),
            f"`callbacks`: {SCHEDULER}: `schedule`: ",
            "he arguments of a class stand under `init_args`, beside its class_path.",
        ),
        (decay(rules="defualt"), "There is no preset 'defualt'. Did you mean 'default'?", "."),
        (decay(rules=[{"name": "a", "pattern": "*.b"}]), "Expected `pattern` of rule 'a' to be", r"is '\\.b$'."),
        (
            entry(SCHEDULER, schedule=entry(SCHEDULE, start=-1.0, end=2.0)),
            "Expected `start` to be finite and at least 0, ",
            "got -1.0.",
        ),
    ],
)
def test_one_sentence_says_what_is_wrong_where(wrong: Any, begin: str, end: str) -> None:
    text = complaint(wrong)
    assert text.startswith(begin), text
    assert text.endswith(end), text
    assert "\n" not in text


OF_A_FILE_OR_A_VALUE = """Parser key "weight_decay":

  - Expected a path but strong either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'float'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'float'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: strong
"""


def test_a_value_that_might_be_the_path_of_a_file() -> None:
    assert in_short(OF_A_FILE_OR_A_VALUE) == "Expected `weight_decay` to be float | None, got 'strong'."


@pytest.mark.parametrize(
    "message",
    [
        "",
        "the following arguments are required: callbacks",
        "Does not validate against any of the Union subtypes\nbut in another form",
    ],
)
def test_other_messages_stay_as_they_are(message: str) -> None:
    assert in_short(message) == message


def test_long_values_are_cut() -> None:
    text = complaint(decay(rules={f"rule_{number}": 0.1 for number in range(100)}))
    assert len(text) < 250
    assert "'rule_0': 0.1" in text
