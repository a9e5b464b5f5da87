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
from tests.attention_cases import TOLERANCE, Case

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
    found = torch.autograd.grad((o * do).sum(), (q, dq))
    o, do = torch.func.jvp(reference.attention, (q, k, v), (dq, dk, dv))
    assert_near(found, [x.double().cpu() for x in torch.autograd.grad((o * do).sum(), (q, dq))])
    assert launches == [*DUAL_FORWARD, "query_dual"]
    launches.clear()
    torch.autograd.grad(jvp_attention.attention(q, k, v).sum(), q)
    assert launches == [*FORWARD, "query"]


def test_a_value_whose_tangent_alone_has_a_gradient_has_none(case):
    q, k, v, dq, *_ = case.tensors
    o, do = torch.func.jvp(lambda q: jvp_attention.attention(q, k, v), (q,), (dq.clone().requires_grad_(),))
    assert not o.requires_grad
    assert do.requires_grad


def test_without_a_gradient_no_residues_are_written(device, monkeypatch):
    """What rounding takes is kept for a backward alone."""
    from jvp_attention import launch

    kept, original = [], launch.forward_calls

    def forward_calls(given, keep):
        kept.append(keep)
        return original(given, keep)

    monkeypatch.setattr(launch, "forward_calls", forward_calls)
    x = Case((1, 1, 5, 6, 16), torch.float16, device=device).tensors[:6]
    for requires_grad in (False, True):
        given = [y.clone().requires_grad_(requires_grad) for y in x]
        torch.func.jvp(jvp_attention.attention, tuple(given[:3]), tuple(given[3:]))
    assert kept == [False, True]


def test_wide_heads_take_three_launches_backward(launches, device):
    Case((1, 1, 9, 12, 128), device=device).check(jvp_attention.attention)
    assert launches == [*DUAL_FORWARD, "query_dual", "key_dual_k", "key_dual_v"]


def test_results_lie_so_that_joining_heads_is_free(case):
    q, k, v, dq, dk, dv, *_ = case.tensors
    for x in torch.func.jvp(jvp_attention.attention, (q, k, v), (dq, dk, dv)):
        assert x.transpose(1, 2).flatten(2).data_ptr() == x.data_ptr()


def test_inputs_are_not_copied_where_channels_lie_side_by_side(device):
    from jvp_attention import launch

    qkv = torch.randn(2, 9, 3, 4, 16, device=device)  # as a linear layer makes them: [B, N, 3, H, D]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    calls, _ = launch.forward_calls(Given(q, k, v, q, k, v, None, None, 1.0, False))
    assert [calls[0].arguments[name][0].data_ptr() for name in "qkv"] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.compiles
@pytest.mark.parametrize("stopped", [False, True], ids=["whole", "stopped-tangent"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.slow
def test_lengths_compile_without_a_break(launches, device, stopped, causal):
    """Value, tangent and gradients are those of eager mode, and so are the launches."""
    case = Case((3, 2, 9, 40, 16), lengths=[0, 17, 40], device=device)
    lengths = torch.tensor(case.lengths, device=device)

    def loss(q, k, v, dq, dk, dv, lengths):
        of_lengths = partial(jvp_attention.attention, causal=causal, lengths=lengths)
        o, do = torch.func.jvp(of_lengths, (q, k, v), (dq, dk, dv))
        return (o.sin() * (do.detach() if stopped else do)).sum() + of_lengths(q, k, v).sum()

    results = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in case.tensors[:6]]
        value = call(*inputs, lengths)
        found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        results.append(([value.detach(), *found], sorted(launches)))
        launches.clear()
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert all(x.isfinite().all() for x in results[0][0])


def written_out_norm(x: torch.Tensor) -> torch.Tensor:
    """A layer norm for the reference: the gradient of PyTorch's own through a JVP is wrong."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class Block(nn.Module):
    """Pre-norm self-attention and a small MLP, with the attention and the norm that it is given."""

    def __init__(self, attention, norm=None, width: int = 32, heads: int = 2):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = norm or nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x))


def transformer(attention, device: str, dtype: torch.dtype = torch.float32, norm=None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(attention, norm), Block(attention, norm)).to(device, dtype)


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
    """The parameters' gradients of two blocks, by the reference in float64, of functions that PyTorch gets right."""
    net = transformer(reference.attention, "cpu", torch.float64, written_out_norm)
    return gradients(net, loss(net, *data("cpu", torch.float64), contextlib.nullcontext))


def test_the_reference_sees_pytorchs_layer_norm(exact):
    """It once had that norm on its own side, too."""
    net = transformer(reference.attention, "cpu", torch.float64)
    assert_near(gradients(net, loss(net, *data("cpu", torch.float64))), exact, 1e-9)
    plain = gradients(net, loss(net, *data("cpu", torch.float64), contextlib.nullcontext))
    with pytest.raises(AssertionError):
        assert_near(plain, exact, 0.01)


@pytest.mark.slow
def test_two_blocks_under_a_jvp_have_the_references_gradients(launches, device, exact):
    net = transformer(jvp_attention.attention, device)
    assert_near(gradients(net, loss(net, *data(device))), exact)
    assert launches == DUAL_FORWARD * 2 + DUAL_BACKWARD * 2


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_the_whole_loss_compiles_without_a_break(launches, device, exact, backend):
    """And the compiled code launches no more than eager mode does."""
    net = transformer(jvp_attention.attention, device)
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=False)
    assert_near(gradients(net, compiled(net, *data(device))), exact)
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


@pytest.mark.slow
def test_forward_ad_without_torch_func(launches, case):
    q, k, v, dq, dk, dv, *_ = (x.clone().requires_grad_() for x in case.tensors)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, dx) for x, dx in ((q, dq), (k, dk), (v, dv))]
        o, do = forward_ad.unpack_dual(jvp_attention.attention(*duals))
    found = torch.autograd.grad((o * do).sum(), (q, k, v, dq, dk, dv))
    o, do = torch.func.jvp(reference.attention, (q, k, v), (dq, dk, dv))
    assert_near(found, [x.double().cpu() for x in torch.autograd.grad((o * do).sum(), (q, k, v, dq, dk, dv))])
    assert launches == DUAL_FORWARD + DUAL_BACKWARD


@pytest.mark.slow
def test_tangents_by_hand_equal_the_jvp(case):
    q, k, v, dq, dk, dv, *_ = (x.clone().requires_grad_() for x in case.tensors)
    results = []
    for o, do in (
        jvp_attention.dual_attention(q, k, v, dq, dk, dv, scale=0.4, causal=True),
        torch.func.jvp(partial(jvp_attention.attention, scale=0.4, causal=True), (q, k, v), (dq, dk, dv)),
    ):
        results.append([o, do, *torch.autograd.grad((o * do).sum(), (q, k, v, dq, dk, dv))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    none = jvp_attention.dual_attention(q, k, v, None, dk, None)
    zeros = jvp_attention.dual_attention(q, k, v, torch.zeros_like(q), dk, torch.zeros_like(v))
    assert all(torch.equal(a, b) for a, b in zip(none, zeros, strict=True))


@pytest.mark.compiles
@pytest.mark.slow
def test_a_stopped_tangent_costs_a_plain_backward(launches, case):
    """As in MeanFlow's loss, inside torch.compile too."""
    q, k, v, dq, dk, dv, *_ = (x.clone().requires_grad_() for x in case.tensors)

    def stopped(*x):
        o, do = torch.func.jvp(jvp_attention.attention, x[:3], x[3:])
        return (o * do.detach()).sum()

    for call in (stopped, torch.compile(stopped, backend="aot_eager", fullgraph=True)):
        call(q, k, v, dq, dk, dv).backward()
        assert launches == DUAL_FORWARD + BACKWARD
        launches.clear()


def test_torch_func_grad_of_a_loss_with_a_jvp(case):
    q, k, v, dq, *_ = case.tensors

    def value(attention, q):
        o, do = torch.func.jvp(lambda q: attention(q, k, v), (q,), (dq,))
        return (o * do).sum()

    found = torch.func.grad(partial(value, jvp_attention.attention))(q)
    assert_near([found], [torch.func.grad(partial(value, reference.attention))(q).double().cpu()])


def test_without_gradients_nothing_is_kept(case):
    q, k, v, dq, dk, dv, *_ = case.tensors
    with torch.no_grad():
        o, do = torch.func.jvp(jvp_attention.attention, (q, k, v), (dq, dk, dv))
    assert not o.requires_grad
    assert not do.requires_grad


@pytest.mark.slow
def test_autocast_casts_the_inputs(launches, case):
    dtype = torch.float16
    q, k, v, dq, dk, dv, *_ = (x.clone().requires_grad_() for x in case.tensors)
    with torch.autocast(q.device.type, dtype):
        o, do = torch.func.jvp(jvp_attention.attention, (q, k, v), (dq, dk, dv))
        by_hand = jvp_attention.dual_attention(q, k, v, dq, dk, dv)
    assert o.dtype == do.dtype == dtype
    assert torch.equal(by_hand[1], do)
    exact = torch.func.jvp(reference.attention, (q, k, v), (dq, dk, dv))
    assert_near([o, do], [x.detach().double().cpu() for x in exact], TOLERANCE[dtype])
    assert launches == DUAL_FORWARD * 2
    (o.sum() + do.sum()).backward()
    assert q.grad.dtype == torch.float32


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
