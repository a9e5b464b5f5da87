"""Plain PyTorch in place of the kernels: right in every dtype and size of chunk, and linear in memory."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import jvp_attention
from jvp_attention import fallback, operators, pytorchs, reference
from tests.attention_cases import Case


def peak_memory(call) -> int:
    """Bytes at the peak of what PyTorch's allocator hands out during a call, and gives back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def value(attention, x):
    return attention(*x[:3])


def tangent(attention, x):
    return torch.func.jvp(attention, tuple(x[:3]), tuple(x[3:6]))


def gradients(attention, x):
    x = [y.detach().requires_grad_() for y in x]
    return torch.autograd.grad(tangent(attention, x), x[:6], x[6:])


@pytest.mark.parametrize("call", [value, tangent, gradients])
@pytest.mark.slow
def test_memory_grows_with_the_length_not_its_square(call, monkeypatch):
    """Four times as many queries and keys take four times the memory; the reference's sixteen times."""
    monkeypatch.setattr(fallback, "CHUNK", 2**12)
    short, long = ([torch.randn(1, 1, n, 8) for _ in range(8)] for n in (1024, 4096))
    ours, theirs = (
        [peak_memory(lambda a=a, x=x: call(a, x)) for x in (short, long)]
        for a in (jvp_attention.attention, reference.attention)
    )
    assert ours[1] < 4.5 * ours[0]
    assert theirs[1] > 12 * theirs[0]
    assert 8 * ours[1] < theirs[1]


@pytest.mark.parametrize("chunk", [1, 200, 2**22])
@pytest.mark.parametrize(
    "which", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("gradients", [(True, True), (True, False), (False, True)])
def test_any_chunk_gives_the_same(chunk, which, gradients, monkeypatch):
    """Chunks of one query, of a few, of all; with any of the tangents and gradients."""
    monkeypatch.setattr(fallback, "CHUNK", chunk)
    monkeypatch.setattr(fallback, "FEWEST_ROWS", 1)
    case = Case((2, 3, 6, 7, 4), torch.float64, True, 0.6, which, gradients, lengths=[5, 0])
    assert max(case.errors(case.results(jvp_attention.attention), cancelling=True)) < 1e-12


@pytest.mark.parametrize("scale", [0.6, 0.0, -0.6])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 0]], ids=str)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "elsewhere"])
def test_pytorchs_own_attention_answers_without_tangents(scale, causal, lengths, on_cpu, monkeypatch):
    """Which by itself makes NaN of a causal call with a scale of zero or less, and of a query that sees no key.

    Elsewhere than on a CPU its gradients are written out.
    """
    if not on_cpu:
        monkeypatch.setattr(pytorchs, "tells_lse", lambda q: False)
    case = Case((2, 3, 6, 7, 4), torch.float64, causal, scale, (False,) * 3, (True, False), lengths=lengths)
    assert max(case.errors(case.results(jvp_attention.attention), cancelling=True)) < 1e-12


def test_the_operator_is_left_out_where_nothing_is_differentiated():
    """It costs more time than a small attention."""

    def is_called(call) -> bool:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            call()
        return "jvp_attention::forward" in {e.key for e in recorded.key_averages()}

    x = list(torch.randn(6, 2, 1, 5, 8))
    variables = [y.clone().requires_grad_() for y in x]
    assert not is_called(lambda: value(jvp_attention.attention, x))
    assert not is_called(lambda: jvp_attention.dual_attention(*x))
    assert is_called(lambda: value(jvp_attention.attention, variables))
    assert is_called(lambda: tangent(jvp_attention.attention, x))
    assert is_called(lambda: torch.vmap(jvp_attention.attention)(*(y[None] for y in x[:3])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype):
    case = Case((2, 2, 40, 50, 16), dtype)
    case.check(jvp_attention.attention)
    assert all(x.dtype == dtype for x in case.results(jvp_attention.attention))


@pytest.mark.parametrize(("mean_k", "mean_v"), [(0, 0), (8, 0), (0, 8)])
@pytest.mark.parametrize("name", ["", "causal", "lengths", "mask"])
def test_bfloat16_loses_only_what_is_relative_to_the_mean(mean_k, mean_v, name):
    """Means of keys and values are no matter: plain attention in bfloat16 is off by up to 5e-2 here.

    Nor is what no query sees, such as zeros for padding.
    """
    x = Case((2, 2, 100, 120, 32), torch.bfloat16).tensors
    options = {
        "causal": True,
        "lengths": torch.tensor([20, 120]),
        "mask": (torch.arange(120) < 20).expand(1, 1, 100, 120),
    }
    options = {name: options[name]} if name else {}
    x[1], x[2] = x[1] + mean_k, x[2] + mean_v
    if name == "mask":
        x[1][:, :, 20:] = x[2][:, :, 20:] = 0
    ours, exactly = (partial(which.attention, **options) for which in (jvp_attention, reference))
    found, expected = ((*tangent(f, y), *gradients(f, y)) for f, y in ((ours, x), (exactly, [y.double() for y in x])))
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() < 5e-3 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_nothing_inside(dtype):
    """It casts the inputs of attention, not those of the matmuls in it, forward or backward."""
    x = list(torch.randn(8, 1, 2, 20, 8))
    rounded = [y.to(dtype) for y in x]
    expected = (*tangent(jvp_attention.attention, rounded), *gradients(jvp_attention.attention, rounded))
    with torch.autocast("cpu", dtype):
        given = [*x[:6], *rounded[6:]]
        found = (*tangent(jvp_attention.attention, given), *gradients(jvp_attention.attention, given))
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.slow
def test_results_lie_as_those_of_the_kernels():
    """Or torch.compile, which is told so, would read them wrongly."""
    x = [y.half().requires_grad_() for y in torch.randn(6, 2, 3, 5, 8)]
    torch.library.opcheck(operators.FORWARD, (*x, None, None, 0.3, False, True))
    detached = [y.detach() for y in x]
    results = operators.FORWARD(*detached, None, None, 0.3, False, True)
    wanted = [True, False, True, True, False, True]
    torch.library.opcheck(
        operators.BACKWARD, (*detached, None, None, 0.3, False, *results, results[0], results[1], wanted)
    )


@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 4), (2, 0, 3, 3, 4)], ids=["batch", "heads"])
def test_an_empty_batch_has_empty_results(shape):
    case = Case(shape, torch.float32)
    for found, exact in zip(case.results(jvp_attention.attention), case.results(reference.attention), strict=True):
        assert found.shape == exact.shape


class Exported(torch.nn.Module):
    """Attention's value, or its JVP, as torch.export takes them."""

    def __init__(self, which, jvp: bool):
        super().__init__()
        self.attention, self.jvp = which.attention, jvp

    def forward(self, *x):
        return torch.func.jvp(self.attention, x[:3], x[3:]) if self.jvp else self.attention(*x[:3])


@pytest.mark.compiles
@pytest.mark.parametrize("jvp", [False, True], ids=["value", "jvp"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.slow
def test_value_and_jvp_can_be_exported(strict, jvp):
    """torch.export keeps the operator in the graph. That of PyTorch 2.11 takes no JVP at all."""
    if jvp and torch.__version__ < (2, 12):
        pytest.skip("torch.export of PyTorch 2.11 takes no JVP")
    x = tuple(torch.randn(6, 1, 2, 5, 8))
    exported = torch.export.export(Exported(jvp_attention, jvp), x, strict=strict)
    assert "jvp_attention.forward.default" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*x), Exported(reference, jvp)(*x))
