"""Each logged quantity against numbers worked out by hand, and what adding one takes."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2.monitor import NormOptions, NormTracker, quantities
from lightning_l2.monitor.measurement import Reading
from lightning_l2.monitor.quantities import QUANTITIES, Quantity, wanted

BIG: dict[str, Any] = {"rms": True, "gradients": True, "updates": True, "rotation": True, "initial_ratio": True}


class Tiny(nn.Module):
    """A weight of length 5 before a normalisation, of which 1 is to be learned, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.norm = nn.LayerNorm(1, bias=False)
        self.layer.weight.data = torch.tensor([[3.0, 4.0]])


def observed(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> dict[str, float]:
    tracker = NormTracker(NormOptions(**options), {name: 4.0 for name, _ in model.named_parameters()})
    tracker.begin(0, model, [optimizer], None, 0)
    optimizer.step()
    return tracker.observe().metrics


def test_every_number() -> None:
    model = Tiny()
    groups = [{"params": [model.layer.weight], "name": "body"}, {"params": [model.norm.weight], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.5, weight_decay=0.2)
    model.layer.weight.grad = torch.tensor([[7.4, 5.2]])  # w' = w - 0.5 (g + 0.2 w) = (-1, 1)
    found = observed(model, optimizer, **BIG)
    angle = math.acos((-3 + 4) / (5 * math.sqrt(2)))
    expected = {
        "l2_norm/layer": 5.0,
        "l2_norm/norm": 1.0,
        "l2_norm/total": math.sqrt(26),
        "l2_penalty/body": 0.1 * 25,
        "l2_penalty/group1": 0.0,
        "l2_penalty/total": 0.1 * 25,
        "weight_decay/body": 0.2,
        "weight_decay/group1": 0.0,
        "weight_decay_left/body": 1 - 0.5 * 0.2,
        "weight_decay_left/group1": 1.0,
        "l2_rms/layer": 5 / math.sqrt(2),
        "l2_rms/norm": 1.0,
        "l2_rms/total": math.sqrt(26 / 3),
        "norm_ratio/layer": 2.5,
        "norm_ratio/norm": 0.5,
        "norm_ratio/total": math.sqrt(26 / 8),
        "grad_norm/layer": math.hypot(7.4, 5.2),
        "grad_norm/total": math.hypot(7.4, 5.2),
        "update_norm/layer": 5.0,
        "update_norm/norm": 0.0,
        "update_norm/total": 5.0,
        "update_rms/layer": 5 / math.sqrt(2),
        "update_rms/norm": 0.0,
        "update_rms/total": 5 / math.sqrt(3),
        "update_ratio/layer": 1.0,
        "update_ratio/norm": 0.0,
        "update_ratio/total": 5 / math.sqrt(26),
        "angular_update/layer": angle,
        "angular_update/norm": 0.0,
        "angular_update/total": math.acos((1 + 1) / math.sqrt(26 * 3)),
        "angular_equilibrium/layer": math.sqrt(2 * 0.5 * 0.2),
        "angular_equilibrium/total": math.sqrt(2 * 0.5 * 0.2 * 25 / 26),
        "effective_lr/layer": 0.5 / 25,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_spectra() -> None:
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = observed(model, torch.optim.SGD(model.parameters(), lr=0.1), spectra=1)
    assert {key: value for key, value in found.items() if key.split("/")[0] not in ("l2_norm", "l2_penalty")} == (
        pytest.approx(
            {"spectral_norm/weight": 4.0, "stable_rank/weight": 25 / 16, "condition_number/weight": 4 / 3}
            | {"weight_decay/group0": 0.0, "weight_decay_left/group0": 1.0},
            rel=1e-5,
        )
    )


def test_numbers_that_can_not_be_divided_by_are_left_out() -> None:
    empty = nn.ParameterList([torch.zeros(0, 2)])
    model = nn.ModuleDict({"zero": nn.Linear(2, 2), "empty": empty, "full": nn.Linear(2, 2)})
    for parameter in model["zero"].parameters():
        nn.init.zeros_(parameter)
    found = observed(
        model, torch.optim.SGD(model.parameters(), lr=0.1), updates=True, rms=True, rotation=True, spectra=1
    )
    assert found["l2_rms/zero"] == found["spectral_norm/zero.weight"] == 0.0
    layers = {
        key: {one.split("/")[1] for one in found if one.startswith(f"{key}/")} for key in ("l2_rms", "update_ratio")
    }
    assert layers == {"l2_rms": {"zero", "full", "total"}, "update_ratio": {"full", "total"}}
    assert "stable_rank/zero.weight" not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_that_overflow_are_no_error(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.0)
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.finfo(dtype).max / 4)
        parameter.grad = torch.full_like(parameter, -torch.finfo(dtype).max)
    found = observed(model, optimizer, **BIG, spectra=1, histograms=1)
    assert found["l2_penalty/total"] == 0.0
    assert math.isnan(found["angular_update/total"]) or found["angular_update/total"] < 1e-3


def test_what_options_ask_for() -> None:
    def keys(order: int | None, **options: Any) -> list[str]:
        return [quantity.key for quantity in wanted(NormOptions(**options), order)]

    plain = ["l2_penalty", "weight_decay", "weight_decay_left", "l2_norm"]
    assert keys(None) == keys(3) == plain
    assert keys(0, rms=True) == [*plain, "l2_rms"]
    assert keys(0, rms=True, updates=True) == [*plain, "l2_rms", "update_norm", "update_rms", "update_ratio"]
    assert keys(4, histograms=2) == keys(4, histograms=1) == [*plain, "weights"]
    assert keys(3, histograms=2) == keys(None, histograms=1) == plain
    assert len({quantity.key for quantity in QUANTITIES}) == len(QUANTITIES)


def test_a_new_quantity_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one with a reading of its own."""
    largest = Reading("wholes", lambda weight: weight.abs().max(), max)

    def maxima(step: Any, of: Reading) -> dict[str, float]:
        return {step.watched.names[index]: value for index, value in step.values[of].items()}

    monkeypatch.setattr(quantities, "QUANTITIES", (*QUANTITIES, Quantity("largest", maxima, (largest,), ("rms",))))
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = observed(model, optimizer, rms=True)
    assert (found["largest/layer.weight"], found["largest/norm.weight"]) == (4.0, 1.0)
    assert not any(key.startswith("largest") for key in observed(model, optimizer))
