"""Mistakes that people make with the library: each is refused, or warned of, with what to do instead."""

import pytest
import torch
from torch import Tensor, nn

from tests.networks import PointData, Waves, some_times
from tvm_ref import EMA, PID, TVM, Condition, FlowMap, FlowMatching, MeanFlow, drop_labels, sample
from tvm_ref.time_samplers import Times

X0, X1 = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T, S = some_times(5)
TIMES = Times(T, S, S)
LABEL = torch.arange(5)
SCALED = FlowMap(Waves(), scaled=True)


class Layer(nn.Module):
    """F = layer(x s) for some layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        y: Tensor = self.layer(x * s[:, None])
        return y


class Unconditional(nn.Module):
    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x


def loss(model: FlowMap, **options) -> Tensor:
    return TVM(model)(X0, X1, TIMES, **options).total


MISTAKES = {  # what is done: how, which error, what it says
    "the average as target": (lambda m: loss(m, target=EMA(m, 0.9)), AttributeError, "pass ema.module"),
    "sampling from the average": (lambda m: sample(EMA(m, 0.9), X1), TypeError, "sample from its .module"),
    "sampling from a network": (lambda m: sample(m.network, X1), TypeError, "wrap it"),
    "a flow map of an average": (lambda m: FlowMap(EMA(m, 0.9)), TypeError, "got EMA"),
    "a flow map of a flow map": (lambda m: FlowMap(m), TypeError, "got FlowMap"),
    "TVM of a network": (lambda m: TVM(m.network), TypeError, r"wrap the network: FlowMap\(network\)"),
    "labels as condition": (lambda m: loss(m, condition=LABEL), TypeError, r"Condition\(label, beta\).*got Tensor"),
    "beta as a number": (lambda m: loss(m, condition=Condition(LABEL, 0.5)), TypeError, "must be tensors.*got float"),
    "times as numbers": (lambda m: m.jump(X1, 1.0, 0.0), TypeError, "must be tensors.*got float"),
    "times as a pair": (lambda m: TVM(m)(X0, X1, (T, S)), TypeError, r"must be Times\(t, s, s_prime\).*got tuple"),
    "times as a pair, of flow matching": (lambda m: FlowMatching(m)(X0, X1, (T, S)), TypeError, "must be Times"),
    "times as a pair, of PID": (lambda m: PID(m)(X0, X1, (T, S)), TypeError, "must be Times"),
    "times as a triple, of MeanFlow": (lambda m: MeanFlow(m)(X0, X1, (T, S, S)), TypeError, "must be Times"),
    "images as bytes": (lambda m: TVM(m)(X0.byte(), X1, TIMES), TypeError, r"uint8; scale images to \[-1, 1\]"),
    "guidance forgotten in sampling": (
        lambda m: sample(SCALED, X1),
        ValueError,
        "scaled flow map.*needs a condition",
    ),
    "labels as floats": (
        lambda m: loss(m, condition=Condition(LABEL.double(), X0[:, 0])),
        TypeError,
        "labels must be whole numbers",
    ),
    "labels one-hot": (lambda m: loss(m, condition=Condition(X0.long(), T)), ValueError, r"of shape \[5\]"),
    "labels from 1": (
        lambda m: drop_labels(Condition(LABEL + 1, X0[:, 0]), 4),
        ValueError,
        "labels must lie in 0 to 3, or be the null label 4; got 1 to 5",
    ),
    "noise before the model": (lambda m: sample(X1, m), TypeError, "the model comes first"),
    "labels to drop without beta": (lambda m: drop_labels(LABEL, 3), TypeError, r"takes Condition\(label, beta\)"),
    "one step as a number with a point": (
        lambda m: sample(m, X1, 1.0),
        TypeError,
        "number of steps, as 1, or a grid",
    ),
    "classes forgotten": (lambda m: TVM(m, null_label=3)(X0, X1, TIMES), ValueError, "null_label needs a condition"),
    "backward of the terms": (lambda m: TVM(m)(X0, X1, TIMES).backward(), TypeError, r"terms\.total\.mean\(\)\.backw"),
    "a network of x alone": (
        lambda m: FlowMap(nn.Sequential()),
        TypeError,
        r"\(x, t, s, condition\); Sequential\.f",
    ),
    "a network without condition": (lambda m: FlowMap(Unconditional()), TypeError, r"takes \(x.*, t.*, s.*\)"),
    "another output shape": (lambda m: loss(FlowMap(Layer(nn.Linear(4, 1).double()))), ValueError, "the shape of x"),
    "batch norm": (lambda m: loss(FlowMap(Layer(nn.BatchNorm1d(4).double()))), RuntimeError, "GroupNorm or RMSNorm"),
}


@pytest.mark.bad_shapes
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_what_to_do(name):
    make, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        make(FlowMap(Waves()))


def test_a_network_may_take_more_than_it_is_called_with():
    class Willing(nn.Module):
        def forward(self, x: Tensor, *arguments: object, scale: float = 1.0, **options: object) -> Tensor:
            return x * scale

    assert FlowMap(Willing()).jump(X1, T, S).shape == X1.shape


def test_data_far_out_and_beta_that_may_be_w_are_warned_of():
    with pytest.warns(UserWarning, match="data reach beyond 100, .* scale them"):  # images as bytes, in floats
        TVM(FlowMap(Waves()))(250 * torch.ones_like(X0), X1, TIMES)
    for wrong in (torch.inf, torch.nan):
        with pytest.warns(UserWarning, match="data hold NaN or infinite"):
            TVM(FlowMap(Waves()))(torch.full_like(X0, wrong), X1, TIMES)
    with pytest.warns(UserWarning, match="was w meant"):
        FlowMap(Waves()).velocity(X1, T, Condition(LABEL, torch.full((5,), 2.0, dtype=torch.float64)))


def test_a_network_that_does_not_read_s_is_warned_of_once():
    model = FlowMap(PointData(torch.zeros(4, dtype=torch.float64)))
    for _ in range(4):  # a DiT's modulation is zero at first, and depends on s from the third step on
        loss(model)  # a warning is an error in all tests
    with pytest.warns(UserWarning, match="does not depend on s"):
        loss(model)
    silent = Waves()
    silent.a.data, silent.b.data, silent.c.data = 3 * (torch.zeros((), dtype=torch.float64),)
    for _ in range(6):
        loss(model)
        loss(FlowMap(Waves()))
        loss(FlowMap(silent))  # an output of zeros tells nothing: many networks begin so
