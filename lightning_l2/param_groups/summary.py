"""What was decided about weight decay, as data, as a table and as a file."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_l2.param_groups.outlook import Outlook, outlook_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from os import PathLike

    from torch import Tensor

    from lightning_l2.param_groups.decay_groups import DecayGroups


@dataclass(frozen=True)
class GroupSummary:
    """One parameter group.

    Args:
        group: Its unique name.
        rule: The rule that made it.
        weight_decay: Its base lambda, before any schedule.
        tensors: How many parameters it has, as tensors.
        parameters: How many numbers they hold, over all processes that share them.
        names: The qualified names of its parameters.
        outlook: What decay will do to it.
    """

    group: str
    rule: str
    weight_decay: float
    tensors: int
    parameters: int
    names: tuple[str, ...]
    outlook: Outlook | None = field(default=None, compare=False)


def summarize(found: Iterable[DecayGroups], steps: int | None = None) -> list[GroupSummary]:
    """Describe the parts of optimizers' groups.

    Args:
        found: The parts of each optimizer's groups.
        steps: How many steps the training has, None where nobody knows.

    >>> import torch
    >>> from lightning_l2.param_groups.decay_groups import decay_groups
    >>> optimizer = torch.optim.AdamW([torch.ones(2, 3)], weight_decay=0.1)
    >>> [(group.group, group.weight_decay, group.parameters) for group in summarize([decay_groups(optimizer)])]
    [('group0', 0.1, 6)]
    """
    return [
        GroupSummary(
            group=group.name,
            rule=group.rule,
            weight_decay=float(group.base),
            tensors=len(group.params),
            parameters=sum(map(_size, group.params)),
            names=tuple(decision.name for decision in group.decisions),
            outlook=outlook_of(one, group, steps),
        )
        for one in found
        for group in one.groups
    ]


def _size(parameter: Tensor) -> int:
    """Return the number of elements of a parameter, before sharding."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def table(summary: Sequence[GroupSummary], *, per_parameter: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a summary, one row a group or a parameter."""
    if per_parameter:
        rows = [[name, row.group, f"{row.weight_decay:g}"] for row in summary for name in row.names]
        return ["parameter", "group", "weight decay"], rows
    columns: list[tuple[str, list[str]]] = [
        ("group", [row.group for row in summary]),
        ("weight decay", [f"{row.weight_decay:g}" if row.outlook is None else row.outlook.course for row in summary]),
        ("timescale (of training)", ["" if row.outlook is None else row.outlook.duration for row in summary]),
        ("left", ["" if row.outlook is None else row.outlook.remainder for row in summary]),
        ("tensors", [f"{row.tensors:,}" for row in summary]),
        ("parameters", [f"{row.parameters:,}" for row in summary]),
        ("for example", [_examples(row.names) for row in summary]),
    ]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    return [title for title, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]


def _examples(names: Sequence[str], count: int = 2) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, by rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print(plain_table(header, rows))
        return
    from rich.console import Console
    from rich.table import Table

    rich_table = Table(*header, title="Weight decay", title_justify="left")
    for column, cell in zip(rich_table.columns, rows[0] if rows else [], strict=False):
        column.justify = "right" if cell.replace(",", "").replace(".", "").isdigit() else "left"
        column.no_wrap = True
    # names of parameters may take several lines, but only where there is a terminal that ends
    rich_table.columns[-1].no_wrap, rich_table.columns[-1].overflow = False, "fold"
    for row in rows:
        rich_table.add_row(*row)
    console = Console()
    # a file has no edge
    (console if console.is_terminal else Console(width=10_000)).print(rich_table)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text.

    >>> print(plain_table(["group", "weight decay"], [["decay", "0.1"]]))
    group | weight decay
    ------+-------------
    decay | 0.1
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows)
    ]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def write_csv(path: str | PathLike[str], summary: Sequence[GroupSummary]) -> None:
    """Write one row a parameter, to compare between runs; a missing directory is made."""
    header, rows = table(summary, per_parameter=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
