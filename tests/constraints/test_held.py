"""Which vectors a constraint holds, and what it remembers of them by name."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_l2.constraints import AugmentedLagrangian, InitialBound, WarmupBound
from tests.constraints.loops import attach, net, set_gradients


@pytest.mark.parametrize("per", ["parameter", "group"])
def test_memory_follows_parameters_through_changing_groups(per: Any) -> None:
    """Frozen parameters and late groups, as finetuning makes them; what is remembered belongs to the names."""
    first, second = net(), net()
    both = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    memory: dict[str, dict[str, float]] = {}
    attached = attach(optimizer, both, WarmupBound(2), per=per, memory=memory)
    set_gradients(both)
    for _ in range(3):
        optimizer.step()
    optimizer.add_param_group({"params": list(second.parameters())})
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    optimizer.step()
    attached.memorise()
    assert {name: values["steps"] for name, values in memory.items()} == {
        "0.0.weight": 3,
        "0.2.weight": 3,
        "1.0.weight": 1,
        "1.2.weight": 1,
    }
    for parameter in first.parameters():
        parameter.requires_grad_(True)
    optimizer.step()
    attached.memorise()
    assert [memory[f"{i}.0.weight"]["steps"] for i in (0, 1)] == [4, 2]


def test_memory_is_taken_up() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    memory = {"0.weight": {"reference": 0.25, "multiplier": 0.5}, "2.weight": {"reference": 100.0, "multiplier": 0.125}}
    attached = attach(optimizer, module, InitialBound(2.0), method=AugmentedLagrangian(1e-12), memory=memory)
    before = [p.detach().clone() for p in module.parameters()]
    set_gradients(module)
    optimizer.step()
    torch.testing.assert_close(module[0].weight.detach(), before[0] * 0.5)
    torch.testing.assert_close(module[2].weight.detach(), before[2] * 0.875)
    readout = attached.readout()
    assert readout is not None
    assert readout[0].tolist() == [0.5, 200.0]
    assert readout[2].tolist() == pytest.approx([0.5, 0.125])


def test_groups_are_labelled_by_name() -> None:
    module = net()
    groups = [{"params": module[0].parameters(), "name": "body"}, {"params": module[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    attached = attach(optimizer, module, 0.5, per="group")
    attached.prepare()
    assert attached.labels == ["body", "group1"]


def test_flattened_parameters_are_refused() -> None:
    """What FSDP1 makes: one parameter of several, or pieces without rows."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    shards: Any = {id(module[0].weight): object()}
    with pytest.raises(
        RuntimeError, match=r"flat pieces, which have no rows\. Use ModelParallelStrategy .* or per='pa"
    ):
        attach(optimizer, module, 1.0, per="row", shards=shards).prepare()
    flat: Any = module[0].weight
    flat._param_infos = []
    with pytest.raises(
        RuntimeError, match=r"^FSDP has flattened '0\.weight' and others .* use_orig_params=True, or Mod"
    ):
        attach(optimizer, module, 1.0).prepare()


@pytest.mark.parametrize("first", ["big", "small"])
def test_a_group_with_other_members_begins_anew_whatever_their_order(first: str) -> None:
    """A thawed layer is in its group's bound from then on, and a frozen one no longer."""
    module = nn.ModuleDict({"small": nn.Linear(3, 3, bias=False), "big": nn.Linear(3, 3, bias=False)})
    nn.init.constant_(module["small"].weight, 0.1)
    nn.init.constant_(module["big"].weight, 1.0)
    order = [module[name].weight for name in ("big", "small")[:: 1 if first == "big" else -1]]
    optimizer = torch.optim.SGD(order, lr=0.0)
    attached = attach(optimizer, module, InitialBound(1.0), per="group")
    bounds = []
    for is_frozen in (True, False, True):
        module["big"].weight.requires_grad_(not is_frozen)
        set_gradients(module)
        optimizer.step()
        readout = attached.readout()
        assert readout is not None
        bounds.append(readout[0].item())
    assert bounds == pytest.approx([0.3, (0.3**2 + 3.0**2) ** 0.5, 0.3], rel=1e-6)
    # nothing grew, so nothing moved
    assert torch.equal(module["big"].weight, torch.ones(3, 3))
    torch.testing.assert_close(module["small"].weight.detach(), torch.full((3, 3), 0.1), rtol=1e-6, atol=0)


def test_rows_remember_one_number_each() -> None:
    memory: dict[str, Any] = {}
    module = net()
    norms = module[0].weight.detach().double().norm(dim=1)
    attached = attach(torch.optim.SGD(module.parameters(), lr=0.1), module, InitialBound(), per="row", memory=memory)
    attached.prepare()
    assert memory["0.weight"]["reference"] == pytest.approx(norms.tolist(), rel=1e-6)
    remembered = [float(2 + index) for index in range(6)]
    memory["0.weight"]["reference"] = remembered
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    attached = attach(optimizer, module, InitialBound(0.1), per="row", memory=memory)
    with torch.no_grad():
        module[0].weight.mul_(100)
    set_gradients(module)
    optimizer.step()
    expected = [0.1 * value for value in remembered]
    assert module[0].weight.detach().double().norm(dim=1).tolist() == pytest.approx(expected, rel=3e-6)
