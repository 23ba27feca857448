"""Every misuse is an error before the first step that names what was wrong, what was given and the way out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import Optimizer

from lightning_l2 import (
    DecayRule,
    L2NormMonitor,
    L2Penalty,
    NormConstraint,
    WeightDecay,
    WeightDecayScheduler,
    assign_rules,
    weight_decay_in_force,
)
from lightning_l2.adaptive import AlphaDecay
from lightning_l2.schedules import LinearSchedule
from tests.helpers import Net, Rows, Shrinking, batches, data, layout, make_trainer, sgd

NAN, INF = float("nan"), float("inf")
RAMP = LinearSchedule(start=0.0, end=1.0)
Make = Callable[[], Any]

# What is built, and the parts its error must name.
BUILT: dict[str, tuple[Make, tuple[str, ...]]] = {
    "negative lambda": (lambda: WeightDecay(-0.1), ("weight_decay", "-0.1")),
    "nan lambda": (lambda: WeightDecay(NAN), ("weight_decay", "nan")),
    "infinite lambda": (lambda: WeightDecay(INF), ("weight_decay", "inf")),
    "text for lambda": (lambda: WeightDecay("strong"), ("weight_decay", "strong")),
    "list for lambda": (lambda: WeightDecay([0.1]), ("weight_decay", "0.1")),
    "unknown apply": (lambda: WeightDecay(0.1, apply="adamw"), ("apply", "adamw", "decoupled", "coupled")),
    "unknown on_resume": (lambda: WeightDecay(0.1, on_resume="both"), ("on_resume", "both", "config", "checkpoint")),
    "unknown preset": (lambda: WeightDecay(0.1, rules="defualt"), ("defualt", "default")),
    "rules of a wrong type": (lambda: WeightDecay(0.1, rules=[3]), ("rule", "DecayRule", "3")),
    "no rules": (lambda: WeightDecay(0.1, rules=[]), ("rule",)),
    "two rules of one name": (
        lambda: WeightDecay(0.1, rules=[DecayRule("a", pattern="x"), DecayRule("a")]),
        ("'a'", "ames"),
    ),
    "negative lambda of a rule": (lambda: DecayRule("a", weight_decay=-1.0), ("weight_decay", "-1")),
    "nan lambda of a rule": (lambda: DecayRule("a", weight_decay=NAN), ("weight_decay", "nan")),
    "negative multiplier": (lambda: DecayRule("a", multiplier=-2.0), ("multiplier", "-2")),
    "infinite multiplier": (lambda: DecayRule("a", multiplier=INF), ("multiplier", "inf")),
    "lambda and multiplier": (
        lambda: DecayRule("a", weight_decay=0.1, multiplier=2.0),
        ("weight_decay", "multiplier"),
    ),
    "broken pattern": (lambda: DecayRule("a", pattern="("), ("pattern", "(")),
    "negative max_ndim": (lambda: DecayRule("a", max_ndim=-1), ("max_ndim", "-1")),
    "rule without a name": (lambda: DecayRule(""), ("name",)),
    "unknown interval": (lambda: WeightDecayScheduler(RAMP, interval="batch"), ("interval", "batch", "step", "epoch")),
    "unknown values": (
        lambda: WeightDecayScheduler(RAMP, values="absolute"),
        ("values", "absolute", "multiplier", "weight_decay"),
    ),
    "zero total_steps": (lambda: WeightDecayScheduler(RAMP, total_steps=0), ("total_steps", "0")),
    "negative total_steps": (lambda: WeightDecayScheduler(RAMP, total_steps=-5), ("total_steps", "-5")),
    "no schedule": (lambda: WeightDecayScheduler(None), ("schedule", "None")),
    "number for a schedule": (lambda: WeightDecayScheduler(0.5), ("schedule", "0.5")),
    "unknown per": (lambda: L2NormMonitor(per="layer"), ("per", "layer", "module", "parameter")),
    "zero every_n_steps": (lambda: L2NormMonitor(every_n_steps=0), ("every_n_steps", "0")),
    "negative every_n_steps": (lambda: L2NormMonitor(every_n_steps=-1), ("every_n_steps", "-1")),
    "negative penalty": (lambda: L2Penalty(-0.1), ("weight_decay", "-0.1")),
    "nan penalty": (lambda: L2Penalty(NAN), ("weight_decay", "nan")),
    "no penalty": (lambda: L2Penalty(None), ("weight_decay", "None")),
    "negative bound": (lambda: NormConstraint(-1.0), ("bound", "-1")),
    "nan bound": (lambda: NormConstraint(NAN), ("bound", "nan")),
    "unknown method": (lambda: NormConstraint(1.0, method="clip"), ("method", "clip", "projection", "lagrangian")),
    "unknown constraint per": (lambda: NormConstraint(1.0, per="layer"), ("per", "layer", "parameter")),
    "text of a number": (lambda: WeightDecay("1e-2"), ("weight_decay", "'1e-2'", "Write the number 0.01")),
    "percent": (lambda: WeightDecay("5%"), ("weight_decay", "'5%'", "Write the number 0.05")),
    "a mapping of rules": (lambda: WeightDecay(0.1, rules={"head": 0.1}), ("rules", "'head'", "Write rules=[")),
    "a pair for a rule": (lambda: WeightDecay(0.1, rules=[("head", 0.1)]), ("rule", "'head'", "Write rules=[")),
    "a mapping without a name": (lambda: WeightDecay(rules=[{"pattern": "x"}]), ("rule", "`name`", "'x'")),
    "several patterns": (lambda: DecayRule("a", pattern=["b", "c"]), ("pattern", "['b', 'c']", "'^head|^neck'")),
    "a glob for a pattern": (lambda: DecayRule("a", pattern="*.bias"), ("pattern", "'*.bias'", r"'\\.bias$'")),
    "a glob for include": (lambda: L2NormMonitor(include="*.bias"), ("include", "'*.bias'", r"'\\.bias$'")),
    "a glob for exclude": (lambda: AlphaDecay(exclude="*.bias"), ("exclude", "'*.bias'", r"'\\.bias$'")),
    "a glob for groups": (lambda: WeightDecayScheduler(RAMP, groups="*a"), ("groups", "'*a'", "'a$'")),
    "an unknown alarm": (lambda: L2NormMonitor(alarms={"grow": 2.0}), ("alarms", "'grow'", "'growth'")),
    "text for an alarm": (lambda: L2NormMonitor(alarms={"growth": "2"}), ("growth", "'2'", "Write the number 2")),
    "text for a schedule": (lambda: WeightDecayScheduler("cosine"), ("schedule", "'cosine'", "CosineSchedule(")),
    "a class for a schedule": (
        lambda: WeightDecayScheduler(LinearSchedule),
        ("schedule", "LinearSchedule", "as"),
    ),
    "a function for a schedule": (lambda: WeightDecayScheduler(abs), ("schedule", "abs", "Derive one")),
    "a class for a module": (lambda: assign_rules(Net), ("model", "Net", "instance")),
    "a module for an optimizer": (lambda: weight_decay_in_force(Net()), ("optimizer", "Net", "trainer.optimizers")),
    "start_device without a start": (lambda: WeightDecay(0.1, start_device="cpu"), ("start_device='cpu'", "'start'")),
    "the same of a penalty": (lambda: L2Penalty(0.1, start_device="cpu"), ("start_device='cpu'", "'start'")),
    "a penalty by optimizer": (
        lambda: L2Penalty(0.1, rules=[DecayRule("m", optimizer="Muon"), "default"]),
        ("'m'", "L2Penalty", "optimizer='Muon'", "`pattern`"),
    ),
    "negative schedule": (lambda: LinearSchedule(start=-1.0, end=1.0), ("start", "-1")),
    "nan schedule": (lambda: LinearSchedule(start=0.0, end=NAN), ("end", "nan")),
}


@pytest.mark.parametrize("case", BUILT)
def test_at_construction(case: str) -> None:
    make, parts = BUILT[case]
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert len(text) > 20, text


class Steps(Shrinking):
    """Tells whether a step was taken."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(scheduler=scheduler)
        if optimizer is not None:
            self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("training started")


def refused(model: pl.LightningModule, callbacks: list[pl.Callback], *parts: str, **options: Any) -> str:
    with pytest.raises(Exception, match=r"(?s).") as error:
        make_trainer(callbacks, **options).fit(model, batches(3))
    assert not isinstance(error.value, AssertionError | AttributeError | KeyError | IndexError), repr(error.value)
    text = str(error.value)
    assert all(part in text for part in parts), text
    return text


def rules(*own: DecayRule | str) -> list[pl.Callback]:
    return [WeightDecay(0.1, rules=list(own), summary=False)]


def test_a_rule_that_matches_nothing_names_the_closest_parameters() -> None:
    text = refused(Steps(), rules(DecayRule("top", pattern="^haed.weight$"), "default"), "top", "^haed.weight$")
    assert "head.weight" in text


def test_a_module_type_that_matches_nothing() -> None:
    text = refused(Steps(), rules(DecayRule("conv", modules=("Liner",)), "default"), "conv", "Liner")
    assert "Linear" in text


def test_a_parameter_that_no_rule_covers() -> None:
    refused(Steps(), rules(DecayRule("head", pattern="^head")), "body.0.weight")


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


# what has no elements that can be read, by what it is called
UNREADABLE: dict[str, tuple[str, Make]] = {
    "nested": ("nested", lambda: nested(torch.strided)),
    "jagged": ("nested", lambda: nested(torch.jagged)),
    "mkldnn": ("mkldnn", lambda: torch.ones(2, 2).to_mkldnn()),
    "quantized": ("quantized", lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)),
}
READERS: dict[str, Make] = {
    "monitor": lambda: L2NormMonitor(),
    "decay": lambda: WeightDecay(0.1),
    "penalty": lambda: L2Penalty(0.1),
    "constraint": lambda: NormConstraint(1.0),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["nested", "jagged", "mkldnn"])  # torch trains no quantized parameter
def test_a_parameter_whose_elements_cannot_be_read(kind: str, reader: str) -> None:
    (called, make), model = UNREADABLE[kind], Steps()
    model.odd = torch.nn.Parameter(make())
    refused(model, [READERS[reader]()], f"got 'odd', which is {called}. Freeze it, or train what its `", logger=Rows())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*:UserWarning")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", UNREADABLE)
def test_frozen_ones_and_buffers_are_left_alone(kind: str, reader: str) -> None:
    found = []
    for with_odd in (False, True):
        torch.manual_seed(0)
        model, rows = Net(partial(sgd, weight_decay=0.0)), Rows()
        if with_odd:
            model.odd = torch.nn.Parameter(UNREADABLE[kind][1](), requires_grad=False)
            model.register_buffer("odder", UNREADABLE[kind][1]())
        make_trainer([READERS[reader]()], logger=rows, log_every_n_steps=1).fit(model, data())
        found.append((rows.rows, model.head.weight.tolist()))
    assert found[0] == found[1]


def test_a_rule_that_others_shadow() -> None:
    refused(Steps(), rules(DecayRule("rest"), DecayRule("head", pattern="^head")), "head")


def test_rules_that_decay_what_the_defaults_exempt_are_told_in_one_warning() -> None:
    own = [DecayRule("head", pattern="^head"), DecayRule("lin", modules="Linear"), DecayRule("n", modules="LayerNorm")]
    with pytest.warns(UserWarning, match="exempt") as caught:
        make_trainer(rules(*own)).fit(Net(), data())
    assert [str(one.message) for one in caught if "exempt" in str(one.message)] == [
        "4 parameters that the default exempts decay by the rules 'lin' (1, such as 'body.0.bias'), "
        "'n' (2, such as 'body.1.weight'), 'head' (1, such as 'head.bias'). Put the preset 'exempt' before them, "
        "rules=['exempt', ...], to leave biases and normalisations alone."
    ]


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "SparseAdam"])
def test_optimizers_that_have_no_weight_decay(name: str) -> None:
    make = getattr(torch.optim, name)
    text = refused(Steps(lambda params: make(params, lr=0.1)), [WeightDecay(0.1, summary=False)], name)
    assert "apply" in text or "split" in text or "group" in text, text


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "SparseAdam"])
def test_a_schedule_for_optimizers_that_have_no_weight_decay(name: str) -> None:
    make = getattr(torch.optim, name)
    model = Steps(lambda params: make(params, lr=0.1))
    refused(model, [WeightDecayScheduler(RAMP)], "WeightDecayScheduler", "weight_decay")


def test_a_refused_fit_leaves_the_optimizer_alone() -> None:
    kept: list[Optimizer] = []
    before: list[Any] = []
    model = Steps()

    def make(params: Any) -> Optimizer:
        kept.append(torch.optim.SGD(params, lr=0.1))
        before.append(layout(kept[0], model))
        return kept[0]

    model.make_optimizer = make
    refused(model, rules(DecayRule("top", pattern="^haed.weight$"), "default"), "top")
    assert layout(kept[0], model) == before[0]


def test_two_callbacks_that_both_set_lambda() -> None:
    two = [WeightDecay(0.1, summary=False), WeightDecay(0.2, summary=False)]
    refused(Steps(), two, "WeightDecay")
    two_schedules: list[pl.Callback] = [WeightDecayScheduler(RAMP), WeightDecayScheduler(RAMP)]
    refused(Steps(), two_schedules, "WeightDecayScheduler")


def test_penalty_and_weight_decay_at_once_are_told() -> None:
    """Both shrink the weights; a person may want that, but not by accident."""
    with pytest.warns(UserWarning, match=r"(?s)L2Penalty.*head\.weight.*twice"):
        make_trainer([WeightDecay(0.1, summary=False), L2Penalty(0.1)]).fit(Net(), data())


@pytest.mark.parametrize("schedule", [lambda progress: -1.0, lambda progress: NAN])
def test_a_schedule_that_returns_what_no_lambda_can_be(schedule: Callable[[float], float]) -> None:
    from lightning_l2.schedules import Schedule

    class Wrong(Schedule):
        def __call__(self, progress: float) -> float:
            return schedule(progress)

    refused(Steps(), [WeightDecayScheduler(Wrong())], "Wrong")


def test_unknown_length() -> None:
    refused(Steps(), [WeightDecayScheduler(RAMP)], "total_steps", max_epochs=None, max_time="00:00:00:30")


def test_muon_and_vectors_is_torchs_own_error() -> None:
    """Not ours to hide: Muon itself refuses 1-D parameters, and its text stays."""
    with pytest.raises(ValueError, match="2D"):
        make_trainer([WeightDecay(0.1, summary=False)]).fit(Net(torch.optim.Muon), data())


def test_a_checkpoint_of_another_module(tmp_path: Path) -> None:
    """The error is Lightning's or torch's usual one, and the optimizer is left whole."""
    trainer = make_trainer([WeightDecay(0.1, summary=False)])
    trainer.fit(Net(), data())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(RuntimeError, match="state_dict"):
        make_trainer([WeightDecay(0.1, summary=False)]).fit(Shrinking(), data(), ckpt_path=tmp_path / "net.ckpt")
