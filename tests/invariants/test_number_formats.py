"""Decay in real Trainers in each number format: what is left, what is told, and what a resumed run goes on with."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_l2 import DecayRule, WeightDecay
from tests.helpers import MakeOptimizer, Net, assert_same_weights, batches, fp16, make_trainer, plain, weights

ROUNDINGS = ["accumulate", "stochastic"]
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Still(pl.LightningModule):
    """Random weights under a loss whose gradient is exactly 0."""

    def __init__(self, optimizer: MakeOptimizer, size: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(size, size, generator=generator))
        self.bias = nn.Parameter(torch.ones(size))
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight * 0.0).sum() + (self.bias * 0.0).sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    @property
    def norm(self) -> float:
        return float(self.weight.detach().double().norm())


def left_of(decay: WeightDecay, make: MakeOptimizer, steps: int, **options: Any) -> float:
    model = Still(make)
    model.to({"bf16-true": torch.bfloat16}.get(options.get("precision"), torch.float32))
    start = model.norm
    make_trainer([decay], **options).fit(model, batches(steps))
    assert torch.equal(model.bias.detach().double(), torch.ones(32, dtype=torch.float64))
    return model.norm / start


# eps of 1e-8 is 0 in fp16
WAYS: dict[str, tuple[MakeOptimizer, dict[str, Any]]] = {
    "optimizer": (partial(AdamW, lr=1e-3, eps=1e-4), {"apply": "optimizer", "weight_decay": 1.0}),
    "decoupled": (partial(SGD, lr=1e-3), {"apply": "decoupled", "weight_decay": 1.0}),
    "independent": (partial(SGD, lr=1e-2), {"apply": "independent", "weight_decay": 1e-3}),
    "cautious": (partial(Adam, lr=1e-3, eps=1e-4), {"apply": "cautious", "weight_decay": 1.0}),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16-true": {"precision": "bf16-true"},
    "16-true": {"plugins": HalfPrecision("16-true")},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "32-true": {"precision": "32-true"},
}


@pytest.mark.parametrize(
    ("way", "rounding"),
    [(way, rounding) for way in WAYS for rounding in ROUNDINGS if (way, rounding) != ("cautious", "accumulate")],
)
def test_the_closed_form_in_bf16(way: str, rounding: Any) -> None:
    """0.999^150 = 0.86 of the weights; to the nearest, all of them are left."""
    make, options = WAYS[way]
    decay = WeightDecay(**options, rounding=rounding, summary=False)
    assert left_of(decay, make, 150, precision="bf16-true") == pytest.approx(0.999**150, rel=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_closed_form_in_each_precision(precision: str, rounding: Any) -> None:
    make, options = WAYS["optimizer"]
    decay = WeightDecay(**options, rounding=rounding, summary=False)
    assert left_of(decay, make, 150, **PRECISIONS[precision]) == pytest.approx(0.999**150, rel=0.05)


def test_to_the_nearest_all_is_left_in_bf16_and_it_is_told() -> None:
    make, options = WAYS["optimizer"]
    decay = WeightDecay(**options, summary=False)
    with pytest.warns(UserWarning, match=r"'decay' is lost: .* 1 - 0\.001 rounds to 1 in bfloat16.*'accumulate'"):
        assert left_of(decay, make, 50, precision="bf16-true") == 1.0


@pytest.mark.filterwarnings("ignore:Weight decay of group")
def test_to_the_nearest_lambda_changes_no_training_in_bf16() -> None:
    """While an fp32 training with bf16 arithmetic feels it."""

    def train(weight_decay: float, precision: Any) -> Net:
        torch.manual_seed(0)
        model = Net(partial(AdamW, lr=1e-3))
        callbacks = [WeightDecay(weight_decay, summary=False)]
        make_trainer(callbacks, precision=precision).fit(model, batches(40))
        return model

    without = train(0.0, "bf16-true")
    for weight_decay in (0.1, 1.0):
        assert_same_weights(train(weight_decay, "bf16-true"), without)
    assert not torch.equal(train(1.0, "bf16-mixed").head.weight, train(0.0, "bf16-mixed").head.weight)


class SaveAt(pl.Callback):
    def __init__(self, paths: dict[int, Path]) -> None:
        self.paths = paths

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.paths:
            trainer.save_checkpoint(self.paths[trainer.global_step])


def state_in(path: Path) -> Any:
    return plain(torch.load(path, weights_only=True)["callbacks"]["WeightDecay"])


def train(rounding: Any, paths: dict[int, Path], ckpt_path: Path | None = None, **options: Any) -> Net:
    """40 steps with gradients and a schedule of the learning rate; s is at most 6e-3."""
    torch.manual_seed(0)
    model = Net(partial(AdamW, lr=1e-2), partial(CosineAnnealingLR, T_max=60))
    rules = [DecayRule("head", pattern=r"^head\.weight", multiplier=2.0), "default"]
    decay = WeightDecay(0.3, rounding=rounding, rules=rules, summary=False)
    trainer = make_trainer([decay, SaveAt(paths)], max_epochs=2, **{"precision": "bf16-true", **options})
    trainer.fit(model, batches(20), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("half", [20, 27])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_resumed_run_goes_on_bit_for_bit(rounding: str, half: int, tmp_path: Path) -> None:
    """2n steps, and n steps, a checkpoint, and n steps: the weights, and what the callback goes on with."""
    middle, end, resumed_end = (tmp_path / f"{name}.ckpt" for name in ("middle", "end", "resumed"))
    whole = train(rounding, {half: middle, 40: end})
    torch.manual_seed(123)
    resumed = train(rounding, {40: resumed_end}, middle)
    assert_same_weights(resumed, whole)
    assert state_in(resumed_end) == state_in(end)
    assert state_in(middle)["rounding"] != state_in(end)["rounding"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_without_what_is_saved_a_resumed_run_would_differ(rounding: str, tmp_path: Path) -> None:
    middle, other = tmp_path / "middle.ckpt", tmp_path / "other.ckpt"
    whole = train(rounding, {27: middle})
    checkpoint = torch.load(middle, weights_only=True)
    del checkpoint["callbacks"]["WeightDecay"]["rounding"]
    torch.save(checkpoint, other)
    resumed = train(rounding, {}, other)
    assert any(not torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_what_is_saved_up_is_what_the_steps_since_the_last_taking_had(tmp_path: Path) -> None:
    """At s = 4e-3, S = 1 - 0.996^t reaches 2^-6 with the fourth step; after the sixth it has that of two."""
    path = tmp_path / "six.ckpt"
    decay = WeightDecay(0.4, rounding="accumulate", summary=False)
    trainer = make_trainer([decay, SaveAt({6: path})], precision="bf16-true")
    trainer.fit(Still(partial(AdamW, lr=1e-2)), batches(6))
    (saved,) = state_in(path)["rounding"]["accumulate"]
    assert sorted(saved.values()) == pytest.approx([0.0, 1 - 0.996**2])


@pytest.mark.filterwarnings("ignore:Weight decay of group")
def test_a_checkpoint_of_one_rounding_begins_another_one(tmp_path: Path) -> None:
    """What was saved up in another way is no use."""
    for first, second in (("accumulate", "stochastic"), ("stochastic", "accumulate"), ("nearest", "accumulate")):
        path = tmp_path / f"{first}-{second}.ckpt"
        end = tmp_path / "end.ckpt"
        train(first, {20: path})
        train(second, {40: end}, path)
        assert list(state_in(end)["rounding"]) == [second]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_random_numbers_of_a_training_are_its_own(rounding: str) -> None:
    """Neither are the global ones touched, nor do they say anything; `seed_everything` does."""
    states: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            states.append(torch.get_rng_state())

        on_train_batch_end = on_train_batch_start

    def run(seed: int, global_seed: int) -> dict[str, Tensor]:
        pl.seed_everything(seed, verbose=False)
        torch.manual_seed(global_seed)
        model = Still(partial(AdamW, lr=1e-3))
        decay = WeightDecay(1.0, rounding=rounding, summary=False)
        states.clear()
        make_trainer([decay, Watch()], precision="bf16-true").fit(model, batches(10))
        for before, after in zip(states[::2], states[1::2], strict=True):
            assert torch.equal(before, after)
        return weights(model)

    first = run(1, 5)
    assert_same_weights(run(1, 6), first)
    assert torch.equal(run(2, 5)["weight"], first["weight"]) is (rounding == "accumulate")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_that_fp16_skips_takes_nothing(rounding: Any) -> None:
    """A scale of 2^17 makes gradients infinite in fp16; half of it after each such step."""

    class Large(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.weight.half() * 1.0).sum()

    def norms(**scaler: Any) -> float:
        model = Large(partial(AdamW, lr=1e-2, eps=1e10))
        start = model.norm
        decay = WeightDecay(1.0, rounding=rounding, summary=False)
        make_trainer([decay], plugins=[fp16(**scaler)]).fit(model, batches(8))
        return model.norm / start

    assert norms(init_scale=1.0) == pytest.approx(0.99**8, rel=1e-5)
    # the sum of 1024 elements has the gradient of the scale in each: 2^17, 2^16 are above 65504
    assert norms(init_scale=2.0**17) == pytest.approx(0.99**6, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"apply": "coupled", "rounding": "accumulate"}, None),
        ({"apply": "coupled", "rounding": "stochastic"}, None),
        ({"apply": "cautious", "rounding": "accumulate"}, None),
        ({"rounding": "up"}, None),
        ({"rounding": "accumulate"}, partial(SGD, lr=0.1)),
        ({"rounding": "stochastic"}, partial(Adam, lr=0.1)),
    ],
    ids=str,
)
def test_what_does_not_go_with_rounding(options: dict[str, Any], make: MakeOptimizer | None) -> None:
    """At once where the callback can know it, and else before the first step."""

    def begin() -> None:
        decay = WeightDecay(0.1, **options)
        assert make is not None
        left_of(decay, make, 1)

    with pytest.raises(ValueError, match=f"rounding='{options['rounding']}'"):
        begin()


def test_the_table_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """s = 0.1 * 0.05 = 1/200, of 40 steps; 0.995^40 = 0.818."""
    model = Still(partial(AdamW, lr=0.1))
    make_trainer([WeightDecay(0.05)], max_epochs=4).fit(model, batches(10))
    printed = capsys.readouterr().out
    assert printed.count("timescale (of training)") == 1
    (row,) = [line for line in printed.splitlines() if re.search(r"\bdecay\b.*\bweight\b", line) and "200" in line]
    for cell in ("0.05", "200 steps (500 %)", ">= 0.818", "1,024"):
        assert cell in row
    assert re.search(r"\bleft\b", printed)


def test_the_table_says_nothing_of_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer([WeightDecay(0.05)]).fit(Still(partial(Adam, lr=0.1)), batches(2))
    printed = capsys.readouterr().out
    assert "weight decay" in printed
    assert "timescale" not in printed
    assert not re.search(r"\bleft\b", printed)


@pytest.mark.filterwarnings("ignore:Weight decay of group")
def test_the_table_marks_what_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer([WeightDecay(0.1)], precision="bf16-true").fit(Still(partial(AdamW, lr=1e-3)), batches(2))
    assert "lost in bfloat16" in capsys.readouterr().out


def test_names_are_whole_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    name = "a_layer_whose_name_takes_more_room_than_a_terminal_has_" * 3

    class Named(Still):
        def __init__(self) -> None:
            super().__init__(partial(AdamW, lr=0.1))
            self.register_parameter(name, nn.Parameter(torch.ones(3, 3)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (getattr(self, name) * 0.0).sum()

    make_trainer([WeightDecay(0.1)]).fit(Named(), batches(2))
    assert name in capsys.readouterr().out


def test_it_says_at_the_end_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        make_trainer([WeightDecay(0.2)]).fit(Still(partial(AdamW, lr=0.1)), batches(30))
    (text,) = [record.getMessage() for record in caplog.records if "has left of the weights" in record.getMessage()]
    assert f"{0.98**30:.3g} of 'decay'" in text
    assert "no_decay" not in text


def test_it_remarks_that_lambda_is_too_small_to_act(caplog: pytest.LogCaptureFixture) -> None:
    """s T = 1e-3 * 0.01 * 20 = 2e-4 = 0.02 %; over the training acts a lambda of 0.01 / 2e-4 = 50."""
    with caplog.at_level("INFO"):
        make_trainer([WeightDecay(0.01)]).fit(Still(partial(AdamW, lr=1e-3)), batches(20))
    (text,) = [record.getMessage() for record in caplog.records if "over the whole" in record.getMessage()]
    for part in ("'decay'", "0.02 %", "lambda of 50"):
        assert part in text
