"""Which parameters count where."""

import torch
from torch import nn

from lightning_l2.monitor import NormOptions, NormTracker
from lightning_l2.monitor.layers import frozen_squares, signature, watch


def test_a_parameter_in_two_groups_counts_in_both_penalties_and_one_layer() -> None:
    model = nn.Linear(2, 2)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.SGD([model.weight], lr=0.1)
    watched = watch(model, [first, second], per="group")
    assert watched.by_group({0: 4.0, 1: 1.0}) == [5.0, 4.0]
    assert watched.by_layer({0: 4.0, 1: 1.0}) == {"optimizer0/group0": 5.0, "total": 5.0}


def test_parameters_that_are_not_the_models_count_under_their_group() -> None:
    stranger = nn.Parameter(torch.zeros(1))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [*model.parameters(), stranger], "name": "all"}], lr=0.1)
    watched = watch(model, [optimizer], per="parameter")
    assert watched.names == ("weight", "bias", "all.2")
    assert watched.members == ((0, 1, 2),)


def test_parameters_without_an_optimizer_count_in_no_total() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    assert watch(model, [optimizer], per="group").layers == ("group0", None)
    assert watch(model, [optimizer], per="group").by_layer({0: 1.0, 1: 2.0}) == {"group0": 1.0, "total": 1.0}
    assert watch(model, [optimizer], per="parameter").by_layer({0: 1.0, 1: 2.0}) == {
        "weight": 1.0,
        "bias": 2.0,
        "total": 1.0,
    }
    assert watch(model, []).by_layer({0: 1.0, 1: 2.0})["total"] == 3.0
    # as ZeroRedundancyOptimizer, whose inner optimizer has this process's share only
    around = torch.optim.SGD(model.parameters(), lr=0.1)
    assert watch(model, [optimizer], holders=[around]).by_layer({0: 1.0, 1: 2.0})["total"] == 3.0


def test_lazy_parameters_are_left_out_until_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    assert watch(model, []).names == ("1.weight", "1.bias")
    model(torch.zeros(1, 2))
    assert len(watch(model, []).names) == 4


def test_normalised_weights() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    watched = watch(model, [])
    assert [n for n, is_normalised in zip(watched.names, watched.normalised, strict=True) if is_normalised] == [
        "0.weight"
    ]


def test_the_signature_changes_with_what_is_watched() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    parameters = list(model.parameters())
    before = signature(parameters, [optimizer])
    assert signature(parameters, [optimizer]) == before
    model[1].weight.requires_grad_(False)
    frozen = signature(parameters, [optimizer])
    optimizer.add_param_group({"params": list(model[1].parameters())})
    added = signature(parameters, [optimizer])
    assert len({before, frozen, added}) == 3


def test_a_tracker_sees_new_groups() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    tracker = NormTracker(NormOptions(), {})
    tracker.begin(0, model, [optimizer], None, 0)
    assert "l2_penalty/group1" not in tracker.observe().metrics
    optimizer.add_param_group({"params": [model.bias], "weight_decay": 0.5})
    tracker.begin(1, model, [optimizer], None, 1)
    expected = 0.25 * model.bias.item() ** 2
    assert abs(tracker.observe().metrics["l2_penalty/group1"] - expected) < 1e-9


def test_a_tracker_sees_lazy_parameters_once_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = NormTracker(NormOptions(), {})
    tracker.begin(0, model, [optimizer], None, 0)
    assert "l2_norm/0" not in tracker.observe().metrics
    model(torch.zeros(1, 2))
    tracker.begin(1, model, [optimizer], None, 1)
    assert {"l2_norm/0", "l2_norm/1"} <= set(tracker.observe().metrics)


def test_frozen_weights_that_nobody_can_read_have_no_norm() -> None:
    model = nn.ModuleDict({"frozen": nn.LayerNorm(4), "trained": nn.LayerNorm(4)})
    model["frozen"].requires_grad_(False)
    model["packed"] = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)])
    assert frozen_squares(model) == {"frozen.weight": 4.0, "frozen.bias": 0.0}
