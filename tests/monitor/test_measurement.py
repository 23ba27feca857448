"""What is read of a step: every kind of reading, mixed dtypes, and parameters on several devices."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_l2.monitor.layers import watch
from lightning_l2.monitor.measurement import WEIGHTS, Measurement, Reading
from lightning_l2.monitor.quantities import GRADIENTS, MOVES, PRODUCTS


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_second_optimizer(device: str, has_gradient: bool) -> None:
    """Fake CUDA tensors have no data: a measurement gets exactly as far as its one transfer to the host."""
    with FakeTensorMode():
        model = nn.ParameterList([torch.empty(2, 2, device="cuda:0"), torch.empty(2, 2, device=device)])
        for parameter in model if has_gradient else model[:1]:
            parameter.grad = torch.empty_like(parameter)
        optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model]
        measurement = Measurement(0, watch(model, optimizers), optimizers, [GRADIENTS])
        measurement.read_weights()
        for number, optimizer in enumerate(optimizers):
            measurement.read_gradients(number, optimizer)
        with pytest.raises(DataDependentOutputException):
            measurement.fetch()


def test_every_kind_of_reading() -> None:
    model = nn.ParameterDict({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0, 2.0]])})
    optimizers = [
        torch.optim.SGD([parameter], lr=0.5, weight_decay=0.1 * i) for i, parameter in enumerate(model.values())
    ]
    largest = Reading("weights", lambda parameters: torch.stack([p.detach().abs().max() for p in parameters]))
    rows = Reading("wholes", lambda weight: weight.sum(0) if weight.ndim == 2 else None, tuple)
    kinds = Reading("groups", lambda optimizer, part: (type(optimizer).__name__, part.weight_decay))
    readings = [largest, rows, GRADIENTS, MOVES, PRODUCTS, kinds]
    measurement = Measurement(7, watch(model, optimizers), optimizers, readings)
    measurement.read_weights()
    model["b"].grad = torch.tensor([[2.0, 0.0]])
    for number, optimizer in enumerate(optimizers):
        measurement.read_gradients(number, optimizer)
        optimizer.step()
    measurement.read_moves()
    measurement.read_loss(torch.tensor(0.25))
    step = measurement.fetch()
    # b moved by 0.5 (2 + 0.1, 0.2) to (-0.05, 1.9), a had no gradient
    assert step.values[WEIGHTS] == pytest.approx({0: 25.0, 1: 5.0})
    assert step.values[largest] == {0: 4.0, 1: 2.0}
    assert step.values[rows] == {1: (1.0, 2.0)}
    assert step.values[GRADIENTS] == {1: 4.0}
    assert step.values[MOVES] == pytest.approx({0: 0.0, 1: 1.05**2 + 0.1**2})
    assert step.values[PRODUCTS] == pytest.approx({0: 0.0, 1: 1.05 * -0.05 + 0.1 * 1.9})
    assert step.groups[kinds] == [("SGD", 0.0), ("SGD", 0.1)]
    assert step.owners(kinds) == {0: ("SGD", 0.0), 1: ("SGD", 0.1)}
    assert step.layers(largest) == {"a": 4.0, "b": 2.0, "total": 6.0}
    assert step.loss == 0.25
    assert step.has([rows, kinds])
    assert not step.has([WEIGHTS, Reading("start", len)])


@pytest.mark.parametrize("size", [6, 20_000])
def test_weights_of_one_shape_and_several_dtypes(size: int) -> None:
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    model = nn.ParameterList([torch.randn(size).to(dtype) for dtype in dtypes])
    optimizer = torch.optim.SGD(model, lr=0.1)
    before = [parameter.detach().double().clone() for parameter in model]
    measurement = Measurement(0, watch(model, [optimizer]), [optimizer], [MOVES, PRODUCTS])
    measurement.read_weights()
    for parameter in model:
        parameter.grad = torch.randn(size).to(parameter.dtype)
    optimizer.step()
    measurement.read_moves()
    step = measurement.fetch()
    for index, (old, parameter) in enumerate(zip(before, model, strict=True)):
        new = parameter.detach().double()
        scale = (old - new).norm().item() * new.norm().item()
        assert step.values[MOVES][index] == pytest.approx((old - new).square().sum().item(), rel=1e-6)
        assert step.values[PRODUCTS][index] == pytest.approx(((old - new) * new).sum().item(), abs=1e-6 * scale)
