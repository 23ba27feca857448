"""The tracker in a bare torch loop: when it measures, what it reads, and what is left of it."""

import pytest
import torch
from torch import nn

from lightning_l2.monitor import NormAlarms, NormOptions, NormTracker


def one_step(tracker: NormTracker, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tracker.begin(step, model, [optimizer], None, step)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_a_step_from_begin_to_observe() -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = NormTracker(NormOptions(gradients=True, updates=True), {})
    assert tracker.step is None
    tracker.begin(4, model, [optimizer], None, 4)
    assert (tracker.step, tracker.is_logged, tracker.has_updated) == (4, True, False)
    norm = model.weight.detach().double().norm().item()
    # totals that are known before the update
    assert tracker.peek() == pytest.approx({"l2_norm/total": norm, "l2_penalty/total": 0.0}, rel=1e-6)
    model.weight.grad = torch.full((1, 3), 2.0)
    optimizer.step()
    assert tracker.has_updated
    observed = tracker.observe()
    assert observed.step == 4
    # nobody told that gradients were complete, so they were read in the step
    assert observed.metrics["grad_norm/total"] == pytest.approx(2 * 3**0.5)
    assert observed.metrics["update_norm/total"] == pytest.approx(3**0.5)
    assert tracker.step is None
    tracker.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_that_is_not_logged_is_measured_for_its_totals_only() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = NormTracker(NormOptions(spectra=1, histograms=1), {})
    tracker.begin(0, model, [optimizer])
    assert not tracker.is_logged
    observed = tracker.observe()
    assert not observed.histograms
    assert not any(key.startswith("spectral") for key in observed.metrics)


def test_the_start_is_kept_by_name_and_a_peek_does_not_touch_it() -> None:
    model, initial = nn.Linear(2, 1, bias=False), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = NormTracker(NormOptions(initial_ratio=True), initial)
    square = model.weight.detach().double().square().sum().item()
    tracker.begin(0, model, [optimizer], None, 0)
    assert tracker.peek()["norm_ratio/total"] == 1.0
    assert initial == {}
    tracker.observe()
    assert initial == pytest.approx({"weight": square})
    one_step(tracker, model, optimizer, 1)
    tracker.observe()
    tracker.begin(2, model, [optimizer], None, 2)
    moved = model.weight.detach().double().norm().item()
    assert tracker.observe().metrics["norm_ratio/total"] == pytest.approx(moved / square**0.5)
    assert initial == pytest.approx({"weight": square})


def test_alarms_are_raised_once_and_losses_are_whole() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1.0)  # a penalty of 1
    for batches, expected in ((1, ["penalty"]), (2, [])):
        tracker = NormTracker(NormOptions(alarms=NormAlarms(penalty=1.0)), {})
        for kinds in (expected, []):
            one_step(tracker, model, optimizer, 0)
            tracker.take_loss(torch.tensor(0.75), batches)
            assert [alarm.kind for alarm in tracker.observe().alarms] == kinds


def test_a_model_without_parameters() -> None:
    tracker = NormTracker(NormOptions(), {})
    tracker.begin(0, nn.ReLU(), [])
    assert tracker.step is None
