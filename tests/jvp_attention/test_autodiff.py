"""The kernels inside PyTorch's derivatives: what is launched, what is kept, what is right and what is refused."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import jvp_attention
from jvp_attention import reference
from jvp_attention.shapes import Given
from tests.attention_cases import Case, SelfAttention

FORWARD = ["forward"]
BACKWARD = ["query", "key"]
DUAL_FORWARD = ["forward_dual"]
DUAL_BACKWARD = ["query_dual", "key_dual"]


@pytest.fixture
def case(device) -> Case:
    return Case((2, 2, 9, 12, 16), device=device)


def test_a_plain_call_launches_plain_kernels_only(launches, case):
    q, k, v = (x.clone().requires_grad_() for x in case.tensors[:3])
    jvp_attention.attention(q, k, v).sum().backward()
    assert launches == FORWARD + BACKWARD


def test_a_plain_call_keeps_no_more_than_ordinary_attention(case):
    q, k, v = (x.clone().requires_grad_() for x in case.tensors[:3])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = jvp_attention.attention(q, k, v)
    assert sum(x.numel() for x in kept) == q.numel() + k.numel() + v.numel() + o.numel() + o[..., 0].numel()


@pytest.mark.parametrize("which", [(True, True, True), (True, False, False), (False, True, False), (False, True, True)])
@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ((True, True), DUAL_FORWARD + DUAL_BACKWARD),
        ((False, True), DUAL_FORWARD + DUAL_BACKWARD),
        ((True, False), DUAL_FORWARD + BACKWARD),
        ((False, False), DUAL_FORWARD),
    ],
)
def test_a_jvp_is_one_launch_and_its_gradient_one_set(launches, device, which, gradients, expected):
    case = Case((1, 2, 9, 12, 16), tangents=which, gradients=gradients, device=device)
    case.check(jvp_attention.attention)
    assert launches == expected


@pytest.mark.slow
def test_gradients_are_computed_for_what_asks_for_them(launches, case):
    """Frozen keys and values have no gradient, and the keys' side is not launched."""
    q, k, v, dq, dk, dv, *_ = case.tensors
    q, dq = (x.clone().requires_grad_() for x in (q, dq))
    o, do = torch.func.jvp(jvp_attention.attention, (q, k, v), (dq, dk, dv))
    torch.autograd.grad((o * do).sum(), (q, dq))
    torch.autograd.grad(jvp_attention.attention(q, k, v).sum(), q)
    assert launches == [*DUAL_FORWARD, "query_dual", *FORWARD, "query"]


def test_a_value_whose_tangent_alone_has_a_gradient_has_none(case):
    q, k, v, dq, *_ = case.tensors
    o, do = torch.func.jvp(lambda q: jvp_attention.attention(q, k, v), (q,), (dq.clone().requires_grad_(),))
    assert not o.requires_grad
    assert do.requires_grad


def test_wide_heads_take_three_launches_backward(launches, device):
    Case((1, 1, 9, 12, 128), device=device).check(jvp_attention.attention)
    assert launches == [*DUAL_FORWARD, "query_dual", "key_dual_k", "key_dual_v"]


def test_results_lie_so_that_joining_heads_is_free(case):
    q, k, v, dq, dk, dv, *_ = case.tensors
    for x in torch.func.jvp(jvp_attention.attention, (q, k, v), (dq, dk, dv)):
        assert x.transpose(1, 2).flatten(2).data_ptr() == x.data_ptr()


def test_inputs_are_not_copied_where_channels_lie_side_by_side(launch, device):
    qkv = torch.randn(2, 9, 3, 4, 16, device=device)  # as a linear layer makes them: [B, N, 3, H, D]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    calls, _ = launch.forward_calls(Given(q, k, v, q, k, v, None, None, 1.0, False))
    assert [calls[0].arguments[name][0].data_ptr() for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.compiles
@pytest.mark.parametrize("stopped", [False, True], ids=["whole", "stopped-tangent"])
@pytest.mark.slow
def test_lengths_compile_without_a_break(launches, device, stopped):
    """Value, tangent and gradients are those of eager mode, and so are the launches; a stopped tangent spares some."""
    case = Case((3, 2, 9, 40, 16), lengths=[0, 17, 40], device=device)
    lengths = torch.tensor(case.lengths, device=device)

    def loss(q, k, v, dq, dk, dv, lengths):
        of_lengths = partial(jvp_attention.attention, causal=True, lengths=lengths)
        o, do = torch.func.jvp(of_lengths, (q, k, v), (dq, dk, dv))
        return (o.sin() * (do.detach() if stopped else do)).sum() + of_lengths(q, k, v).sum()

    results = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in case.tensors[:6]]
        value = call(*inputs, lengths)
        found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        results.append([value.detach(), *found])
        backward = BACKWARD if stopped else DUAL_BACKWARD
        assert sorted(launches) == sorted(DUAL_FORWARD + FORWARD + backward + BACKWARD)
        launches.clear()
    torch.testing.assert_close(*results)
    assert all(x.isfinite().all() for x in results[0])


def transformer(attention, device: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(SelfAttention(attention), SelfAttention(attention)).to(device, dtype)


def data(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, dx = torch.randn(2, 3, 10, 32)
    return x.to(device, dtype), dx.to(device, dtype)


def loss(net: nn.Module, x: torch.Tensor, dx: torch.Tensor, mode=jvp_attention.jvp_ready) -> torch.Tensor:
    with mode():
        y, dy = torch.func.jvp(net, (x,), (dx,))
    return (y.sin() * dy).sum()


def gradients(net: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def assert_near(found: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.detach().double().cpu(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.fixture
def exact() -> list[torch.Tensor]:
    """The parameters' gradients of two blocks, by the reference in float64."""
    net = transformer(reference.attention, "cpu", torch.float64)
    return gradients(net, loss(net, *data("cpu", torch.float64), contextlib.nullcontext))


@pytest.mark.compiles
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
@pytest.mark.slow
def test_two_blocks_have_the_references_gradients(launches, device, exact, backend):
    """The whole loss compiles without a break, and compiled code launches no more than eager mode does."""
    net = transformer(jvp_attention.attention, device)
    call = torch.compile(loss, backend=backend, fullgraph=True, dynamic=False) if backend else loss
    assert_near(gradients(net, call(net, *data(device))), exact)
    assert launches == DUAL_FORWARD * 2 + DUAL_BACKWARD * 2


def checkpointed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A checkpoint around the JVP of a block, not inside it: what one writes without jvp_ready."""
    value, tangent = forward_ad.unpack_dual(x)
    y, dy = checkpoint(partial(torch.func.jvp, block), (value,), (tangent,), use_reentrant=False)
    return forward_ad.make_dual(y, dy)


@pytest.mark.slow
def test_checkpointing_runs_the_forward_twice_and_changes_nothing(launches, device, exact):
    net = transformer(jvp_attention.attention, device)

    def forward(x):
        for block in net:
            x = checkpointed(block, x)
        return x

    with jvp_attention.jvp_ready():
        y, dy = torch.func.jvp(forward, *((a,) for a in data(device)))
    assert_near(gradients(net, (y.sin() * dy).sum()), exact)
    assert sorted(launches) == sorted(DUAL_FORWARD * 4 + DUAL_BACKWARD * 2)


def second(call):
    return lambda x: torch.autograd.grad(
        torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)[0].sin().sum(), x
    )


def jvp(function):
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("transform", [second, lambda f: second(jvp(f))], ids=["backward", "jvp-backward"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_double_backward_raises(case, transform, compiled):
    """Never a wrong number; for transforms of torch.func see test_transforms.py."""
    q, k, v = (x.clone().requires_grad_() for x in case.tensors[:3])
    call, message = transform(lambda q: jvp_attention.attention(q, k.detach(), v.detach())), "no double backward"
    if compiled:
        call, message = torch.compile(call, backend="aot_eager", fullgraph=True), None
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        call(q)
