"""A model, a target, a batch, and gradients sample by sample, for the tests of objectives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.networks import Waves, some_times
from tvm_ref.ema import EMA
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.time_samplers import Times

B = 16


def other_weights(model: FlowMap) -> FlowMap:
    """A frozen target whose weights differ from the model's."""
    target = EMA(model, 0).module
    with torch.no_grad():
        for p in target.parameters():
            p += 0.1
    return target


def setup(shape=(B, 2), seed=0, **options) -> tuple[FlowMap, FlowMap, Tensor, Tensor, Times]:
    """A model, a target of other weights, data, noise, and times."""
    model = FlowMap(Waves(), **options)
    x0, x1 = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    times = Times(*some_times(shape[0], seed), some_times(shape[0], seed + 1)[1])
    return model, other_weights(model), x0, x1, times


def guidance() -> tuple[Condition, Condition]:
    """Classes 0 to 2 with weights of guidance, and the condition without classes, of null label 3."""
    condition = Condition(torch.arange(B) % 3, torch.linspace(0.3, 1, B, dtype=torch.float64))
    return condition, Condition(torch.full((B,), 3), torch.ones(B, dtype=torch.float64))


def gradient(loss: Tensor, model: FlowMap) -> Tensor:
    """With respect to the three weights of Waves [3]."""
    return torch.stack(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def per_sample(terms: Tensor, model: FlowMap) -> Tensor:
    """The gradient of every sample's loss [B, 3]."""
    return torch.stack([gradient(a, model) for a in terms])


def assert_plain_gradient(loss: Callable[[], Tensor], model: FlowMap) -> None:
    """The gradient of a loss that stops none is that of its value, by central differences."""
    for p, actual in zip(model.parameters(), gradient(loss(), model), strict=True):
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                p += h
                values.append(float(loss()))
                p -= h
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(actual), rel=1e-6, abs=1e-9)
