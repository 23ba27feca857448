"""The metrics against float64 arithmetic, and the habits of torchmetrics."""

import copy
import math
import pickle
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.aggregation import RunningMean
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.wrappers import Running

from lightning_l2.metrics import L2Norm, L2Penalty, l2_norm, l2_penalty
from tests.processes import forked, replicated_metrics

STATISTICS: dict[str, Any] = {
    "last": lambda values: values[-1],
    "mean": statistics.fmean,
    "min": min,
    "max": max,
    "std": statistics.pstdev,
}


def model(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return net


def norm(net: nn.Module) -> float:
    return math.sqrt(sum(p.detach().double().square().sum().item() for p in net.parameters()))


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [net[0].weight], "weight_decay": 0.3}, {"params": [net[2].weight]}]
    return torch.optim.SGD([*groups, {"params": [net[0].bias], "weight_decay": 0.0}], lr=0.1, weight_decay=0.05)


def penalty(net: nn.Module) -> float:
    squares = [net[i].weight.detach().double().square().sum().item() for i in (0, 2)]
    return 0.3 / 2 * squares[0] + 0.05 / 2 * squares[1]


SCALES = [1.0, 3.0, 0.5, 2.0, 2.001]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("way", ["update", "forward"])
def test_norm_statistics(statistic: Any, way: str) -> None:
    metric = L2Norm(statistic)
    for scale in SCALES:
        seen = getattr(metric, way)(model(scale))
        if way == "forward":
            assert seen.item() == pytest.approx(0.0 if statistic == "std" else norm(model(scale)), rel=1e-6, abs=1e-6)
    expected = STATISTICS[statistic]([norm(model(scale)) for scale in SCALES])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    assert metric.update_called
    assert metric.update_count == len(SCALES)
    metric.reset()
    assert not metric.update_called
    metric.update(model(7.0))
    assert metric.compute().item() == pytest.approx(0.0 if statistic == "std" else norm(model(7.0)), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_penalty_statistics(statistic: Any) -> None:
    metric = L2Penalty(statistic)
    for scale in SCALES:
        metric(optimizer(model(scale)).param_groups)
    expected = STATISTICS[statistic]([penalty(model(scale)) for scale in SCALES])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_an_optimizer_stands_for_its_groups() -> None:
    metric = L2Penalty()
    metric.update(optimizer(model()))
    assert metric.compute().item() == pytest.approx(penalty(model()), rel=1e-6)


def test_a_group_without_lambda_has_no_penalty() -> None:
    groups = [{"params": [torch.tensor([3.0, 4.0])], "weight_decay": 0.1}, {"params": [torch.ones(2)]}]
    assert l2_penalty(groups).item() == pytest.approx(0.1 / 2 * 25)


def test_lambda_of_the_moment_counts() -> None:
    net = model()
    groups = optimizer(net).param_groups
    metric = L2Penalty("last")
    metric.update(groups)
    for group in groups:
        group["weight_decay"] *= 2
    metric.update(groups)
    assert metric.compute().item() == pytest.approx(2 * penalty(net), rel=1e-6)


def large_norms(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(1e8, 1.0, 1000)


@pytest.mark.parametrize("way", ["update", "forward"])
def test_the_standard_deviation_of_large_norms_does_not_cancel(way: str) -> None:
    """The sum of squares of these would be 1e19, of which float64 knows the multiples of 2048."""
    metric = L2Norm("std")
    for value in large_norms():
        getattr(metric, way)(torch.tensor([value], dtype=torch.float64))
    assert metric.compute().item() == pytest.approx(np.std(large_norms()), rel=1e-6)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nan_counts_unless_told_otherwise(statistic: Any) -> None:
    values = [math.nan, 3.0, math.nan, 1.0, math.nan]
    counted, ignored = L2Norm(statistic), L2Norm(statistic, nan_strategy="ignore")
    for value in values:
        for metric in (counted, ignored):
            metric(torch.tensor([value]))
    assert math.isnan(counted.compute())
    assert ignored.compute().item() == STATISTICS[statistic]([3.0, 1.0])
    with pytest.raises(RuntimeError, match="nan"):
        L2Norm(statistic, nan_strategy="error").update(torch.tensor([math.nan]))


@pytest.mark.parametrize("kind", ["module", "mapping", "list", "generator", "tensor"])
def test_inputs(kind: str) -> None:
    net = model()
    given: Any = {
        "module": net,
        "mapping": dict(net.named_parameters()),
        "list": list(net.parameters()),
        "generator": net.parameters(),
        "tensor": torch.cat([p.detach().flatten() for p in net.parameters()]),
    }[kind]
    assert l2_norm(given).item() == pytest.approx(norm(net), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    metric = L2Norm()
    metric.update(net)
    assert metric.compute().item() == pytest.approx(norm(net), rel=1e-6)
    assert l2_penalty(optimizer(net).param_groups).item() == pytest.approx(penalty(net), rel=1e-6)


def test_a_module_cast_to_half_keeps_the_metrics_precision() -> None:
    holder = nn.ModuleDict({"metric": L2Norm()}).half()
    holder["metric"].update(model(1e4))
    assert holder["metric"].compute().item() == pytest.approx(norm(model(1e4)), rel=1e-6)


def test_a_device_without_float64() -> None:
    """Such as Apple's: moving a float64 tensor there raises TypeError."""
    metric = L2Norm()

    def move(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("no float64 here")
        return tensor

    metric._apply(move)
    metric.update(model())
    assert metric.compute().dtype == torch.float32
    assert metric.compute().item() == pytest.approx(norm(model()), rel=1e-6)


def test_another_dtype_of_the_statistic() -> None:
    metric = L2Norm().set_dtype(torch.float32)
    metric.update(model())
    assert metric.compute().dtype == torch.float32


METRICS = [L2Norm, L2Penalty]


def updated(metric: Any, scale: float = 2.0) -> Any:
    metric.update(model(scale) if isinstance(metric, L2Norm) else optimizer(model(scale)).param_groups)
    return metric


@pytest.mark.parametrize("metric_class", METRICS)
def test_pickle_copy_and_state_dict(metric_class: type[Metric]) -> None:
    metric = updated(metric_class())
    for other in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert other.compute() == metric.compute()
        assert updated(other, 4.0).compute() != metric.compute()
    metric.persistent(True)
    restored = metric_class()
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert restored.compute() == metric.compute()
    assert updated(restored, 4.0).compute() == updated(metric, 4.0).compute()


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_seen(metric_class: Any) -> None:
    for statistic in STATISTICS:
        assert math.isnan(metric_class(statistic).compute())


def test_norms_that_overflowed_are_not_taken_for_nothing() -> None:
    for statistic in ("min", "max"):
        metric = L2Norm(statistic)
        metric.update(torch.tensor([math.inf]))
        assert metric.compute().item() == math.inf


@pytest.mark.parametrize("metric_class", METRICS)
def test_unknown_statistic(metric_class: Any) -> None:
    message = "Expected `statistic` to be 'last', 'mean', 'min', 'max' or 'std', got 'median'."
    with pytest.raises(ValueError, match=message):
        metric_class("median")


def test_in_a_collection() -> None:
    """Beside a classification metric, each fed by the arguments it knows; zero weights would make states equal."""
    collection = MetricCollection(
        {
            "accuracy": BinaryAccuracy(),
            "mean": L2Norm("mean"),
            "max": L2Norm("max"),
            "penalty": L2Penalty("last"),
        }
    )
    for scale in (0.0, 1.0, 3.0):
        net = model(scale)
        collection.update(
            preds=torch.tensor([0.9, 0.1]),
            target=torch.tensor([1, 1]),
            parameters=net,
            param_groups=optimizer(net).param_groups,
        )
    found = {name: value.item() for name, value in collection.compute().items()}
    expected = [0.5, (1 + 3) / 3 * norm(model()), 3 * norm(model()), 9 * penalty(model())]
    assert [found[name] for name in ("accuracy", "mean", "max", "penalty")] == pytest.approx(expected, rel=1e-6)


def test_arithmetic_with_other_metrics() -> None:
    total = updated(L2Norm()) + 1.0
    assert total.compute().item() == pytest.approx(norm(model(2.0)) + 1, rel=1e-6)
    other = MeanMetric()
    other.update(3.0)
    assert (updated(L2Norm()) * other).compute().item() == pytest.approx(3 * norm(model(2.0)), rel=1e-6)


def test_logged_by_a_module(tmp_path: Path) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1, bias=False)
            self.metric = L2Norm("max")
            self.seen: list[float] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            with torch.no_grad():
                self.layer.weight.copy_(torch.tensor([[3.0, 4.0]]) / (index + 1))
            self.metric(self.layer)
            self.log("norm", self.metric, on_step=True, on_epoch=True)
            return self.layer(batch).sum()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(self.trainer.callback_metrics["norm_step"].item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(torch.zeros(3, 2), batch_size=1))
    assert module.seen == pytest.approx([5.0, 2.5, 5 / 3])
    assert trainer.callback_metrics["norm_epoch"].item() == pytest.approx(5.0)
    assert not module.metric.update_called


def test_a_window_needs_the_function_and_is_refused_for_the_metric() -> None:
    with pytest.raises(ValueError, match="full_state_update"):
        Running(L2Norm(), window=2)
    window = RunningMean(window=2)
    for scale in SCALES:
        window.update(l2_norm(model(scale)))
    assert window.compute().item() == pytest.approx(norm(model()) * 2.0005, rel=1e-6)


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("several", [False, True])
def test_plot(metric_class: Any, several: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    metric = metric_class()
    values = [metric(model(s) if metric_class is L2Norm else optimizer(model(s)).param_groups) for s in (1.0, 2.0)]
    figure, axes = metric.plot(values if several else None)
    lines = [line.get_ydata() for line in axes.get_lines()]
    assert any(len(line) == (2 if several else 1) for line in lines)
    assert axes.get_ylim()[0] <= 0
    matplotlib.pyplot.close(figure)


def test_two_processes_that_hold_the_same_weights(tmp_path: Path) -> None:
    forked.ranks(replicated_metrics.work, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (value, expected) in found.items():
            assert value == pytest.approx(expected, rel=1e-6), name


def test_pieces_of_fsdp1_are_refused_where_nothing_tells_the_others() -> None:
    pieces = nn.Linear(2, 1, bias=False)
    pieces.weight._fsdp_flattened = True
    message = "FSDP1 has cut the parameters into pieces"
    for parameters in (pieces.weight, [pieces.weight], {"weight": pieces.weight}, pieces):
        with pytest.raises(ValueError, match=rf"{message}.*Give the outermost module"):
            l2_norm(parameters)
    with pytest.raises(ValueError, match=rf"{message}.*Use L2NormMonitor"):
        l2_penalty([{"params": [pieces.weight], "weight_decay": 0.1}])
