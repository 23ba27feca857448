"""Splitting groups leaves every learning-rate scheduler on the path it would have taken."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from lightning_l2.group_names import name_groups
from lightning_l2.param_groups import GroupKey, GroupSplit

STEPS = 12
ONE_GROUP = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 5),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 3), lrs.CosineAnnealingLR(o, 9)], [3]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, 1.0, 3), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.5),
}
TWO_GROUPS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5**step]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.8]),
    "CyclicLR": lambda o: lrs.CyclicLR(o, [0.01, 0.02], [0.1, 0.3], 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.5, 0.1], total_steps=STEPS + 1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, [0.01, 0.02], 5),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=[0.01, 0.001]),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 3), lrs.LambdaLR(o, [lambda s: 0.9**s, lambda s: 0.8**s])], [3]
    ),
}
CASES = [(make, 1) for make in ONE_GROUP.values()] + [(make, 2) for make in (ONE_GROUP | TWO_GROUPS).values()]
IDS = [f"{name}-1" for name in ONE_GROUP] + [f"{name}-2" for name in ONE_GROUP | TWO_GROUPS]


class TimmLike:
    """What timm's schedulers keep: no LRScheduler, one base value and one warm-up step a group."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.base_values = [group["lr"] for group in optimizer.param_groups]
        self.warmup_steps = [value / 3 for value in self.base_values]
        self.last = 0

    def step(self) -> None:
        self.last += 1
        values = zip(self.optimizer.param_groups, self.base_values, self.warmup_steps, strict=False)
        for group, base, step in values:
            group["lr"] = step * self.last if self.last < 3 else base / self.last

    def state_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "optimizer"}


def build(make, groups: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    options = [{"params": layer.parameters(), "lr": 0.1 / (index + 1)} for index, layer in enumerate(model)]
    optimizer = torch.optim.SGD(options if groups == 2 else model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    return model, optimizer, make(optimizer)


def split_by_ndim(optimizer, scheduler) -> GroupSplit:
    split = GroupSplit(optimizer, lambda: [scheduler])
    split.split_new(lambda p, group: GroupKey("decay", 0.2) if p.ndim > 1 else GroupKey("no_decay", 0.0))
    name_groups([split])
    return split


def trajectory(model, optimizer, scheduler, steps: int) -> list[dict[int, float]]:
    path = []
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    for _ in range(steps):
        path.append({order[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if isinstance(scheduler, lrs.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return path


@pytest.mark.filterwarnings("ignore:Please also save or load the state of the optimizer")
@pytest.mark.parametrize(("make", "groups"), [*CASES, (TimmLike, 1), (TimmLike, 2)], ids=[*IDS, "timm-1", "timm-2"])
def test_learning_rates_are_those_without_a_split(make, groups) -> None:
    plain = build(make, groups)
    expected = trajectory(*plain, STEPS)
    model, optimizer, scheduler = build(make, groups)
    split = split_by_ndim(optimizer, scheduler)
    assert len(optimizer.param_groups) == 2 * groups
    got = trajectory(model, optimizer, scheduler, STEPS // 2)
    split.merge()
    saved = copy.deepcopy({k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"})
    split.restore()
    got += trajectory(model, optimizer, scheduler, STEPS - STEPS // 2)
    assert got == expected
    half = build(make, groups)
    trajectory(*half, STEPS // 2)
    assert saved == {k: v for k, v in half[2].state_dict().items() if k != "lr_lambdas"}
    split.merge()
    for key, value in plain[1].state_dict()["param_groups"][0].items():
        assert optimizer.state_dict()["param_groups"][0][key] == value


class Floors(lrs.LRScheduler):
    def __init__(self, optimizer, name="floors"):
        setattr(self, name, [0.01 for _ in optimizer.param_groups])
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


def test_an_unknown_scheduler_with_a_list_is_refused_until_it_is_declared() -> None:
    _, optimizer, scheduler = build(Floors, 1)
    with pytest.raises(ValueError, match=r"Floors holds \['floors'\].*lr_scheduler_attributes=\{'floors': True\}"):
        split_by_ndim(optimizer, scheduler)
    assert len(optimizer.param_groups) == 1
    for declared, length in ((True, 2), (False, 1)):
        _, optimizer, scheduler = build(Floors, 1)
        split = GroupSplit(optimizer, lambda scheduler=scheduler: [scheduler], {"floors": declared})
        split.split_new(lambda p, group: GroupKey(str(p.ndim), 0.0))
        assert len(scheduler.floors) == length
        assert len(scheduler.base_lrs) == 2


def test_a_scheduler_of_another_optimizer_is_left_alone() -> None:
    _, optimizer, _ = build(ONE_GROUP["StepLR"], 1)
    _, _, other = build(ONE_GROUP["LambdaLR"], 1)
    split_by_ndim(optimizer, other)
    assert len(other.base_lrs) == 1
