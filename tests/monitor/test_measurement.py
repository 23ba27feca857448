"""What a step's measurements hold where parameters lie on several devices."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_l2.monitor.layers import watch
from lightning_l2.monitor.measurement import Measurement
from lightning_l2.monitor.quantities import GRADIENTS


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_second_optimizer(device: str, has_gradient: bool) -> None:
    """Fake CUDA tensors have no data: a reading gets exactly as far as its one transfer to the host."""
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
