"""Tables of what was decided."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.param_groups.summary import GroupSummary, plain_table, print_table, summarize, table, write_csv
from tests.param_groups.others import in_force

ROWS = [
    GroupSummary("decay", "decay", 0.25, 3, 1500, ("a.weight", "b.weight", "c.weight")),
    GroupSummary("no_decay", "no_decay", 0.0, 1, 3, ("a.bias",)),
]


def test_of_groups_that_rules_split() -> None:
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    in_force(optimizer, {layer.weight: 0.25, layer.bias: 0.0})
    assert summarize([decay_groups(optimizer)]) == [
        GroupSummary("at 0.25", "at 0.25", 0.25, 1, 6, ("p0",)),
        GroupSummary("at 0", "at 0", 0.0, 1, 3, ("p1",)),
    ]
    decay_groups(optimizer).multiply(3.0)
    assert summarize([decay_groups(optimizer)])[0].weight_decay == 0.25, "before any schedule"


def test_a_parameter_that_zero_has_cut_counts_whole() -> None:
    piece = nn.Parameter(torch.zeros(2))
    piece.ds_numel = 10
    optimizer = torch.optim.SGD([piece], lr=0.1)
    assert summarize([decay_groups(optimizer)])[0].parameters == 10


def test_rows_by_group_and_by_parameter() -> None:
    assert table(ROWS) == (
        ["group", "weight decay", "tensors", "parameters", "for example"],
        [["decay", "0.25", "3", "1,500", "a.weight, b.weight, ..."], ["no_decay", "0", "1", "3", "a.bias"]],
    )
    assert table(ROWS, per_parameter=True) == (
        ["parameter", "group", "weight decay"],
        [[name, "decay", "0.25"] for name in ("a.weight", "b.weight", "c.weight")] + [["a.bias", "no_decay", "0"]],
    )


def test_plain_text() -> None:
    assert plain_table(["a", "long"], [["longer", "1"], ["x", ""]]) == (
        "a      | long\n-------+-----\nlonger | 1\nx      |"
    )
    assert plain_table(["a"], []) == "a\n-"


@pytest.mark.parametrize("has_rich", [True, False])
def test_printed(has_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not has_rich:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    print_table(*table(ROWS))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("weight decay", "0.25", "1,500", "no_decay", "a.bias"))
    print_table(["empty"], [])


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "decay.csv"
    write_csv(path, ROWS)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows[0] == {"parameter": "a.weight", "group": "decay", "weight decay": "0.25"}
    assert len(rows) == 4
