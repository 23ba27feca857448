"""Whom a constraint holds by its rules, and whom the sphere leaves out unless a rule asks."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_l2 import DecayRule
from lightning_l2.constraints.selection import names_of_constrained


class Language(nn.Module):
    """A head that may be tied to the embedding, and a frozen module of a loss behind it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.perceptual = nn.Linear(7, 7).requires_grad_(False)


def held(module: nn.Module, rules: Any = "default", *, hidden: bool = True) -> list[str]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [name for name in names_of_constrained(module, rules, None, [optimizer], hidden=hidden).values() if name]


BLOCK = ["block.0.weight", "block.2.weight"]
HEAD = DecayRule("head", pattern=r"^head")
TABLES = DecayRule("tables", modules="Embedding")


@pytest.mark.parametrize(
    ("tied", "rules", "expected"),
    [
        (False, "default", BLOCK),
        (True, "default", BLOCK),
        (False, "cnn", BLOCK),
        (False, [HEAD, "default"], [*BLOCK, "head.weight"]),
        (False, [TABLES, "default"], ["tokens.weight", *BLOCK]),
        (True, [TABLES, "default"], ["tokens.weight", *BLOCK]),
        (False, [DecayRule("all")], None),
    ],
)
def test_presets_leave_the_ends_out(tied: bool, rules: Any, expected: list[str] | None) -> None:
    module = Language(tied)
    expected = expected or [name for name, _ in module.named_parameters()]
    found = [name for name in held(module, rules) if not name.startswith("perceptual")]
    assert found == [name for name in expected if not name.startswith("perceptual")]


def test_a_ball_is_for_all_that_decays() -> None:
    assert held(Language(False), hidden=False) == ["tokens.weight", *BLOCK, "head.weight", "perceptual.weight"]


def test_the_last_matrix_counts_however_deep_it_is_and_parametrized() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    nn.utils.parametrizations.orthogonal(module[1][1])
    assert held(module) == ["0.weight", "1.0.weight"]


def test_nothing_left_is_an_error() -> None:
    module = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 2))
    message = r"exempt all 3 parameters .* On a sphere, '0\.weight', '1\.weight' need a rule of their own\. Give rules"
    with pytest.raises(MisconfigurationException, match=message):
        held(module)
    assert held(module, [DecayRule("last", pattern="^1.weight"), "default"]) == ["1.weight"]
