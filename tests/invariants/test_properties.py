"""What must hold for any module, rules, optimizer, learning-rate scheduler, schedule and order of trainings."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import tempfile
from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Any

import jsonargparse
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from lightning_l2 import DecayRule, L2NormMonitor, WeightDecay, WeightDecayScheduler, schedules
from lightning_l2.decay.by_rules import RuleDecay
from lightning_l2.decay.scheduled import ScheduledDecay
from lightning_l2.metrics import l2_penalty
from lightning_l2.param_groups.decay_groups import decay_groups
from lightning_l2.schedules import Schedule
from tests.helpers import Net, assert_same_weights, batches, layout, make_trainer, weights
from tests.schedules.every import CLOSED_FORMS

PHASES = (Phase.explicit, Phase.generate)


def examples(count: int) -> Callable[[Any], Any]:
    return settings(max_examples=count, phases=PHASES)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 3),
    "no bias": lambda: nn.Linear(3, 3, bias=False),
    "conv": lambda: nn.Conv2d(2, 2, 1),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "layer norm": lambda: nn.LayerNorm(3),
    "group norm": lambda: nn.GroupNorm(1, 2),
    "embedding": lambda: nn.Embedding(4, 3),
    "lstm": lambda: nn.LSTM(2, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "bare": lambda: nn.ParameterList([torch.ones(()), torch.ones(2), torch.ones(2, 2, 2)]),
}
MODULES = st.recursive(
    st.sampled_from(sorted(LAYERS)), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6
)


def build(plan: Any) -> nn.Module:
    return LAYERS[plan]() if isinstance(plan, str) else nn.Sequential(*map(build, plan))


def tie(model: nn.Module) -> None:
    square = [module for module in model.modules() if type(module) is nn.Linear and module.weight.shape == (3, 3)]
    if len(square) > 1:
        square[-1].weight = square[0].weight


CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "pattern": st.sampled_from([r"\.bias$", "weight", "^0", "_l0", r"1\.", "original1", "in_proj"]),
        "modules": st.sampled_from([[], ["Linear"], ["Embedding", "LSTM"], [nn.LayerNorm], ["torch.nn.Conv2d"]]),
        "max_ndim": st.integers(0, 3),
    },
)
VALUES = st.one_of(
    st.just({}),
    st.builds(lambda value: {"multiplier": value}, st.floats(0.0, 10.0)),
    st.builds(lambda value: {"weight_decay": value}, st.floats(0.0, 1.0)),
)


@st.composite
def rule_lists(draw: Any) -> list[DecayRule]:
    drawn = draw(st.lists(st.tuples(CONDITIONS, VALUES), max_size=4))
    last = draw(VALUES)
    rules = [DecayRule(f"r{i}", optional=True, **where, **value) for i, (where, value) in enumerate(drawn)]
    return [*rules, DecayRule("rest", **last)]


def first_match(model: nn.Module, rules: list[DecayRule]) -> dict[int, DecayRule]:
    """Read the rules as their documentation says: in order, all conditions, under any name of a tied parameter."""
    places: dict[int, list[tuple[str, nn.Module, nn.Parameter]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((f"{path}.{name}".lstrip("."), module, parameter))

    def holds(rule: DecayRule, name: str, owner: nn.Module, parameter: nn.Parameter) -> bool:
        ancestors = {base.__name__: base for base in type(owner).__mro__}
        kinds = [kind if isinstance(kind, type) else ancestors.get(kind.rpartition(".")[2]) for kind in rule.modules]
        return (
            (rule.pattern is None or bool(re.search(rule.pattern, name)))
            and (not kinds or any(kind is not None and isinstance(owner, kind) for kind in kinds))
            and (rule.max_ndim is None or parameter.ndim <= rule.max_ndim)
        )

    return {
        key: next(rule for rule in rules if any(holds(rule, *place) for place in found))
        for key, found in places.items()
    }


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.2),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True, betas=(0.5, 0.6)),
    "NAdam": lambda groups: torch.optim.NAdam(groups, decoupled_weight_decay=True, weight_decay=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, weight_decay=0.1),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}
SCHEDULERS: dict[str, Callable[[Optimizer, int], Any]] = {
    "none": lambda o, n: None,
    "lambda": lambda o, n: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "lambdas": lambda o, n: lr_scheduler.LambdaLR(o, [lambda step, i=i: 0.9 ** (step * i) for i in range(n)]),
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=3),
    "restarts": lambda o, n: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "one cycle": lambda o, n: lr_scheduler.OneCycleLR(o, [0.1 + i for i in range(n)], 9, cycle_momentum=False),
    "cyclic": lambda o, n: lr_scheduler.CyclicLR(
        o, [0.01] * n, [0.1 + i for i in range(n)], step_size_up=2, cycle_momentum=False
    ),
    "plateau": lambda o, n: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.001 * i for i in range(n)]),
    "sequence": lambda o, n: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
    "chain": lambda o, n: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.StepLR(o, 1)], optimizer=o
    ),
}


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(1e-4, 1.0),
        "weight_decay": st.floats(0.0, 1.0),
        "name": st.uuids().map(str),
        "mine": st.just("x"),
    },
)


Training = tuple[nn.Module, Optimizer, Any]


@st.composite
def trainings(draw: Any) -> Callable[[], Training]:
    """Return how to make any module, an optimizer of any groups of its parameters, and a scheduler of that."""
    plan, tied = draw(MODULES), draw(st.booleans())
    frozen = draw(st.sets(st.integers(1, 12), max_size=3))
    cuts = draw(st.sets(st.integers(1, 8), max_size=3))
    options = draw(st.lists(OPTIONS, min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    optimizer, scheduler = draw(st.sampled_from(sorted(OPTIMIZERS))), draw(st.sampled_from(sorted(SCHEDULERS)))

    def make() -> Training:
        torch.manual_seed(0)
        model = build(plan)
        if tied:
            tie(model)
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index not in frozen)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        edges = [0, *sorted(cut for cut in cuts if cut < len(trainable)), len(trainable)]
        groups = [
            {"params": trainable[start:end], **own}
            for start, end, own in zip(edges[:-1], edges[1:], options, strict=False)
        ]
        made = OPTIMIZERS[optimizer](groups)
        return model, made, SCHEDULERS[scheduler](made, len(groups))

    return make


def advance(model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach().cos() if parameter.requires_grad else None
    optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


def state_of(scheduler: Any) -> Any:
    """Return everything a scheduler remembers, as text, nested ones too, the optimizer and functions aside."""
    own = {key: value for key, value in vars(scheduler).items() if key != "optimizer"} if scheduler else {}
    nested = list(map(state_of, own.pop("_schedulers", ())))
    return nested, {
        key: repr(value) for key, value in own.items() if not callable(value) and " at 0x" not in repr(value)
    }


def lambda_by_hand(rule: DecayRule, own: float) -> float:
    """Return what the documentation says of a rule's lambda, given that of the group."""
    if rule.weight_decay is not None:
        return rule.weight_decay
    return own * (1.0 if rule.multiplier is None else rule.multiplier)


@examples(60)
@given(trainings(), rule_lists())
def test_every_parameter_is_in_one_part_of_its_group_with_its_lambda(
    make: Callable[[], Training], rules: list[DecayRule]
) -> None:
    model, optimizer, _ = make()
    wanted = first_match(model, rules)
    before = layout(optimizer, model)
    RuleDecay(model, [optimizer], rules=rules)
    children = list(decay_groups(optimizer).groups)
    assert layout(optimizer, model) == before
    assert len({child.name for child in children}) == len(children)
    for parent in optimizer.param_groups:
        mine = [child for child in children if child.parent is parent]
        assert mine == children[: len(mine)]
        del children[: len(mine)]
        assert sorted(place for child in mine for place in child.indices) == list(range(len(parent["params"])))
        firsts = [child.indices[0] for child in mine]
        assert firsts == sorted(firsts)
        for child in mine:
            assert child.indices == sorted(child.indices)
            assert [id(parent["params"][place]) for place in child.indices] == list(map(id, child.params))
            for parameter in child.params:
                rule = wanted[id(parameter)]
                assert child.rule == rule.name
                assert child.weight_decay == lambda_by_hand(rule, parent["weight_decay"])
        assert len({(child.rule, child.weight_decay) for child in mine}) == len(mine)
    assert not children


def groups_of_an_expert(
    model: nn.Module, optimizer: Optimizer, rules: list[DecayRule]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Split groups by hand by rule and lambda; return each part with the group that it is of."""
    wanted, found = first_match(model, rules), []
    for parent in optimizer.param_groups:
        parts: dict[tuple[str, float], list[nn.Parameter]] = {}
        for parameter in parent["params"]:
            rule = wanted[id(parameter)]
            parts.setdefault((rule.name, lambda_by_hand(rule, parent["weight_decay"])), []).append(parameter)
        found += [({"params": part, "weight_decay": value}, parent) for (_, value), part in parts.items()]
    return found


@examples(60)
@given(trainings(), rule_lists(), st.integers(1, 5))
def test_it_trains_as_an_experts_groups_and_nobody_can_tell(
    make: Callable[[], Training], rules: list[DecayRule], steps: int
) -> None:
    (model, optimizer, scheduler), (twin, twin_optimizer, twin_scheduler) = make(), make()
    expert, plain, _ = make()
    by_hand = groups_of_an_expert(expert, plain, rules)
    defaults = {key: value for key, value in plain.defaults.items() if key not in ("lr", "weight_decay")}
    experts = type(plain)([{**parent, **own} for own, parent in by_hand], lr=0.1, **as_arguments(plain, defaults))
    RuleDecay(model, [optimizer], rules=rules)
    for _ in range(steps):
        parents = {id(parent): now for parent, now in zip(plain.param_groups, optimizer.param_groups, strict=True)}
        for group, (_, parent) in zip(experts.param_groups, by_hand, strict=True):
            now = parents[id(parent)]
            group.update({key: now[key] for key in now.keys() - {"params", "param_names", "weight_decay"}})
        advance(expert, experts, None)
        advance(model, optimizer, scheduler)
        advance(twin, twin_optimizer, twin_scheduler)
        assert_same_weights(model, expert)
        assert layout(optimizer, model) == layout(twin_optimizer, twin)
        assert [list(g) for g in optimizer.param_groups] == [list(g) for g in twin_optimizer.param_groups]
        assert state_of(scheduler) == state_of(twin_scheduler)


def as_arguments(optimizer: Optimizer, defaults: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(type(optimizer)).parameters
    return {key: value for key, value in defaults.items() if key in names}


@examples(30)
@given(trainings(), rule_lists())
def test_the_penalty_is_the_sum_over_the_parameters(make: Callable[[], Training], rules: list[DecayRule]) -> None:
    model, optimizer, _ = make()
    expected = math.fsum(
        own["weight_decay"] / 2 * parameter.detach().double().square().sum().item()
        for own, _ in groups_of_an_expert(model, optimizer, rules)
        for parameter in own["params"]
    )
    RuleDecay(model, [optimizer], rules=rules)
    assert float(l2_penalty(optimizer)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


MULTIPLIER = st.floats(0.0, 100.0)
POSITIVE = st.floats(1e-3, 100.0)
PERCENT = st.integers(5, 95).map(lambda percent: percent / 100)
CONTINUOUS = st.recursive(
    st.one_of(
        st.builds(schedules.ConstantSchedule, MULTIPLIER),
        st.builds(schedules.LinearSchedule, MULTIPLIER, MULTIPLIER),
        st.builds(schedules.CosineSchedule, MULTIPLIER, MULTIPLIER),
        st.builds(schedules.ExponentialSchedule, POSITIVE, POSITIVE),
        st.builds(schedules.PolynomialSchedule, MULTIPLIER, MULTIPLIER, st.floats(0.5, 5.0)),
        st.builds(schedules.InverseSquareRootSchedule, MULTIPLIER, st.floats(0.01, 10.0)),
        st.builds(schedules.CyclicSchedule, MULTIPLIER, MULTIPLIER, cycles=st.integers(1, 5), rise=PERCENT),
        st.builds(schedules.OneCycleSchedule, MULTIPLIER, MULTIPLIER, MULTIPLIER, rise=PERCENT),
        st.lists(PERCENT, min_size=1, max_size=4, unique=True).flatmap(
            lambda places: st.builds(
                lambda heights: schedules.PiecewiseSchedule(list(zip(sorted(places), heights, strict=True))),
                st.lists(MULTIPLIER, min_size=len(places), max_size=len(places)),
            )
        ),
    ),
    lambda then: st.builds(schedules.WarmupSchedule, PERCENT, then, start=st.floats(0.0, 1.0)),
    max_leaves=3,
)
ANY = st.recursive(
    st.one_of(
        CONTINUOUS,
        st.sampled_from([schedule for schedule, _ in CLOSED_FORMS]),
        st.builds(lambda at, factor: schedules.StepSchedule([at], [factor]), PERCENT, MULTIPLIER),
        st.builds(
            schedules.CosineRestartsSchedule, MULTIPLIER, MULTIPLIER, cycles=st.integers(1, 5), growth=st.floats(0.2, 5)
        ),
    ),
    lambda part: st.builds(lambda parts, at: schedules.SequenceSchedule(parts, [at]), st.tuples(part, part), PERCENT),
    max_leaves=4,
)
GRID = [index / 100 for index in range(101)]


def extremes(schedule: Any) -> tuple[float, float]:
    """Return what a schedule lies between, from its own numbers."""
    match schedule:
        case schedules.SequenceSchedule():
            parts = list(map(extremes, schedule.schedules))
            return min(low for low, _ in parts), max(high for _, high in parts)
        case schedules.WarmupSchedule():
            low, high = extremes(schedule.then)
            return min(low, low * schedule.start), high
        case schedules.StepSchedule():
            ends = list(accumulate([schedule.start, *schedule.factors], mul))
        case schedules.PiecewiseSchedule():
            ends = [value for _, value in schedule.points]
        case schedules.InverseSquareRootSchedule():
            ends = [0.0, schedule.start]
        case _:
            ends = [getattr(schedule, name) for name in ("value", "start", "peak", "end") if hasattr(schedule, name)]
    return min(ends), max(ends)


@examples(80)
@given(ANY)
def test_a_schedule_stays_within_its_values_and_leaves_exempt_groups_at_0(schedule: Schedule) -> None:
    low, high = extremes(schedule)
    groups = [{"params": [torch.zeros(1)], "weight_decay": 0.0}, {"params": [torch.zeros(1)], "weight_decay": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduled = ScheduledDecay(schedule, [optimizer], length=len(GRID))
    for step, progress in enumerate(GRID):
        value = schedule(progress)
        assert type(value) is float
        assert low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
        scheduled.set(step)
        exempt, decayed = (group.weight_decay for group in decay_groups(optimizer).groups)
        assert math.copysign(1.0, exempt) == 1.0
        assert exempt == 0.0
        assert decayed == 0.25 * value


@examples(60)
@given(CONTINUOUS)
def test_a_schedule_without_steps_never_jumps(schedule: Schedule) -> None:
    for progress in GRID:
        before, after = schedule(max(progress - 1e-9, 0.0)), schedule(min(progress + 1e-9, 1.0))
        assert abs(after - before) <= 0.02


def as_yaml(value: Any) -> Any:
    """Write a schedule as a user does."""
    if isinstance(value, Schedule):
        names = [name for name in vars(value)]
        return {
            "class_path": f"lightning_l2.schedules.{type(value).__name__}",
            "init_args": {name: as_yaml(getattr(value, name)) for name in names},
        }
    return [as_yaml(entry) for entry in value] if isinstance(value, tuple) else value


@examples(12)
@given(ANY)
def test_a_schedule_survives_pickle_and_yaml(schedule: Schedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    once = parser.parse_object({"schedule": as_yaml(schedule)})
    again = parser.parse_string(parser.dump(once))
    for parsed in (once, again):
        assert parser.instantiate(parsed).schedule == schedule


ALIKE = {
    # lambda of every parameter is the optimizer's own, whatever the groups
    "absent": None,
    "one rule": [DecayRule("all")],
    "two rules": [DecayRule("thin", max_ndim=1), DecayRule("rest", multiplier=1.0)],
    "a group each": [
        DecayRule("body", pattern=r"^body\.0"),
        DecayRule("norm", modules=("LayerNorm",)),
        DecayRule("bias", pattern="bias", weight_decay=0.1),
        DecayRule("rest"),
    ],
}


@pytest.mark.filterwarnings("ignore:.* parameters that the default exempts decay by")
@examples(7)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(ALIKE)), st.booleans()), min_size=2, max_size=4),
    st.sampled_from(["AdamW", "SGD", "NAdam"]),
    st.sampled_from(["lambda", "one cycle", "sequence", "restarts"]),
)
def test_no_state_is_lost_over_any_order_of_fits_resumes_and_rules(
    stages: list[tuple[str, bool]], optimizer: str, scheduler: str
) -> None:
    def model() -> Net:
        torch.manual_seed(0)
        return Net(lambda groups: reset_decay(OPTIMIZERS[optimizer](groups)), lambda o: SCHEDULERS[scheduler](o, 1))

    reference = model()
    make_trainer(max_epochs=len(stages)).fit(reference, epoch_of_two())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        for epoch, (rules, scheduled) in enumerate(stages, start=1):
            callbacks: list[Any] = [L2NormMonitor()] if scheduled else []
            if ALIKE[rules] is not None:
                callbacks.append(WeightDecay(rules=ALIKE[rules], summary=False))
            if scheduled:
                callbacks.append(WeightDecayScheduler(schedules.ConstantSchedule(1.0), total_steps=3))
            resumed = model()
            trainer = make_trainer(callbacks, max_epochs=epoch)
            trainer.fit(resumed, epoch_of_two(), ckpt_path=checkpoint)
            checkpoint = f"{folder}/{epoch}.ckpt"
            trainer.save_checkpoint(checkpoint)
            groups = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
            assert len(groups) == 1
            assert not {"rule", "name", "initial_weight_decay", "weight_decay_multiplier"} & set(groups[0])
    assert_same_weights(resumed, weights(reference))


def epoch_of_two() -> Any:
    return batches(2)


def reset_decay(optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    return optimizer
