"""Mistakes that people make with the library: each is refused, or warned of, with what to do instead."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import PointData, Waves, some_times
from tests.objectives.samples import setup
from tvm_ref import EMA, PID, TVM, Condition, EulerStep, FlowMap, FlowMatching, MeanFlow, checks, drop_labels, sample
from tvm_ref.network_check import check_network
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.time_samplers import Times

X0, X1 = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T, S = some_times(5)
TIMES = Times(T, S, S)
LABEL = torch.arange(5)
HALF = torch.full((5,), 0.5, dtype=torch.float64)
IMAGES = torch.randn(2, 5, 8, 8, 3, dtype=torch.float64)
SCALED = FlowMap(Waves(), scaled=True)


class Layer(nn.Module):
    """F = layer(x s) for some layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        y: Tensor = self.layer(x * s[:, None])
        return y


class Convolution(nn.Module):
    """F of images [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Classes(nn.Module):
    """F of classes 0 to C - 1, and C for no class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes + 1, 4)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        return x + self.embed(condition.label)


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
        lambda m: drop_labels(Condition(LABEL + 1, HALF), 4),
        ValueError,
        "labels must lie in 0 to 3, or be the null label 4; got 1 to 5",
    ),
    "labels from 1, as many as classes": (
        lambda m: drop_labels(Condition(LABEL + 1, HALF), 5),
        ValueError,
        "label 5 means no class and needs beta = 1; classes are 0 to 4",
    ),
    "labels from 1, in a loss": (
        lambda m: TVM(m, null_label=5)(X0, X1, TIMES, Condition(LABEL + 1, HALF)),
        ValueError,
        "label 5 means no class",
    ),
    "labels below 0": (
        lambda m: TVM(m, null_label=5)(X0, X1, TIMES, Condition(LABEL - 1, HALF)),
        ValueError,
        "got -1 to 3",
    ),
    "more classes than an embedding has": (
        lambda m: sample(FlowMap(Classes(3)), X1, 1, Condition(LABEL, HALF)),
        IndexError,
        r"C for no class: the embedding needs C \+ 1 rows",
    ),
    "labels as a column": (
        lambda m: drop_labels(Condition(LABEL[:, None], HALF), 5),
        ValueError,
        r"\[5\].* got \[5, 1\]",
    ),
    "labels of numpy": (lambda m: drop_labels(Condition(LABEL.numpy(), HALF), 5), TypeError, "got ndarray"),
    "labels as truths": (lambda m: loss(m, condition=Condition(LABEL > 1, HALF)), TypeError, "whole numbers.*bool"),
    "beta as a number, to drop": (lambda m: drop_labels(Condition(LABEL, 0.5), 5), TypeError, "must be tensors.*float"),
    "data of numpy": (lambda m: TVM(m)(X0.numpy(), X1, TIMES), TypeError, "data and noise must be tensors.*ndarray"),
    "a shape as noise": (lambda m: sample(m, (5, 4)), TypeError, "noise must be a tensor.*got tuple"),
    "steps as a tensor": (lambda m: sample(m, X1, torch.tensor(4)), TypeError, "number of steps.*not 4"),
    "steps of numpy": (lambda m: sample(m, X1, np.int64(2)), TypeError, "number of steps, an int,.*got int64"),
    "Euler's steps of a network": (lambda m: sample(EulerStep(m.network), X1), TypeError, "wrap it"),
    "a network as target": (lambda m: loss(m, target=m.network), TypeError, "target must be a flow map.*got Waves"),
    "mean of the terms": (lambda m: TVM(m)(X0, X1, TIMES).mean(), AttributeError, r"no 'mean'.*terms\.total\.mean"),
    "a check with labels": (lambda m: check_network(m.network, X0, LABEL), TypeError, r"Condition\(label, beta\)"),
    "a check of numpy": (lambda m: check_network(m.network, X0.numpy()), TypeError, "x must be a tensor.*ndarray"),
    "float64 data, float32 weights": (
        lambda m: loss(FlowMap(Layer(nn.Linear(4, 4)))),
        RuntimeError,
        r"data\.float\(\)",
    ),
    "bfloat16 weights": (lambda m: loss(FlowMap(Layer(nn.Linear(4, 4).bfloat16()))), RuntimeError, r"torch\.autocast"),
    "float32 convolutions": (
        lambda m: sample(FlowMap(Convolution()), IMAGES[0].permute(0, 3, 1, 2)),
        RuntimeError,
        "same dtype",
    ),
    "channels last": (
        lambda m: sample(FlowMap(Convolution().double()), IMAGES[0]),
        RuntimeError,
        r"permute\(0, 3, 1, 2\)",
    ),
    "noise before the model": (lambda m: sample(X1, m), TypeError, "the model comes first"),
    "labels to drop without beta": (lambda m: drop_labels(LABEL, 3), TypeError, r"Condition\(label, beta\)"),
    "one step as a number with a point": (
        lambda m: sample(m, X1, 1.0),
        TypeError,
        "number of steps, an int, or a grid",
    ),
    "classes forgotten": (lambda m: TVM(m, null_label=3)(X0, X1, TIMES), ValueError, "null_label needs a condition"),
    "backward of the terms": (
        lambda m: TVM(m)(X0, X1, TIMES).backward(),
        AttributeError,
        r"terms\.total\.mean\(\)\.backw",
    ),
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
    with pytest.warns(UserWarning, match="did you pass w as beta"):
        FlowMap(Waves()).velocity(X1, T, Condition(LABEL, torch.full((5,), 2.0, dtype=torch.float64)))


def test_channels_that_look_last_are_warned_of_and_their_memory_format_does_not_matter():
    model = FlowMap(Waves())
    with pytest.warns(UserWarning, match=r"shape \[5, 8, 8, 3\].*permute\(0, 3, 1, 2\) puts channels first"):
        expected = TVM(model)(*IMAGES, TIMES).total
    first = [a.permute(0, 3, 1, 2) for a in IMAGES]
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(TVM(model)(*first, TIMES).total, expected)


def test_training_without_a_target_an_update_or_dropped_labels_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(checks, "LONG", 3)
    model = FlowMap(Waves())
    ema, condition = EMA(model, 0.9), Condition(LABEL, HALF)
    updated = EMA(model, 0.9)
    updated.update(model)
    dropped = Condition(LABEL.clone().index_fill_(0, LABEL[:1], 5), HALF.clone().index_fill_(0, LABEL[:1], 1))
    mistakes = {  # of guided training: condition, target
        r"drop_labels\(condition, 5\)": (condition, updated.module),
        r"no target was given.*target=ema\.module": (dropped, None),
        r"never updated: call ema\.update\(model\)": (dropped, ema.module),
    }
    for words, (condition, target) in mistakes.items():
        objective = TVM(model, null_label=5)
        for _ in range(2):
            objective(X0, X1, TIMES, condition, target)  # a warning is an error in all tests
        with pytest.warns(UserWarning, match=words) as warned:
            objective(X0, X1, TIMES, condition, target)
        assert len(warned) == 1
        objective(X0, X1, TIMES, condition, target)
    objective = TVM(model, null_label=5)
    for k in range(4):  # as it should be: some labels dropped in one of three steps, the target updated, or the model
        objective(X0, X1, TIMES, condition if k else dropped, updated.module if k < 3 else model)


@pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_missing_target_is_warned_of_only_where_it_would_be_used(kind, monkeypatch):
    monkeypatch.setattr(checks, "LONG", 1)
    model, target, x0, x1, times = setup()
    losses = [kind(model)(x0, x1, times, target=chosen).total for chosen in (model, target)]
    with warnings.catch_warnings(record=True, action="always") as warned:
        kind(model)(x0, x1, times)
    used = not torch.equal(*losses)
    assert bool(warned) == (used and kind.default_target_ema > 0)  # 0: the method's target is the model itself
    assert used or kind is FlowMatching or not kind.default_target_ema  # flow matching has it for guidance


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
