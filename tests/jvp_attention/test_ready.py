"""jvp_ready: values, tangents and all gradients against float64 differences of PyTorch's values."""

import contextlib
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from jvp_attention import attention, jvp_ready
from tests.differences import assert_right, double


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


SDPA = F.scaled_dot_product_attention
INDUCTOR = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="2.11's gave wrong gradients for a convolution before an attention"
)
LOWER = torch.ones(5, 5, dtype=torch.bool).tril()
FUNCTIONS = {  # function, shapes of its inputs
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), [(3, 8), (8,), (8,)]),
    "layer_norm-two-axes": (lambda x, w: F.layer_norm(x, (4, 2), w), [(3, 4, 2), (4, 2)]),
    "layer_norm-builtin": (lambda x: torch.layer_norm(x, (8,), None, None, 1e-3, False), [(3, 8)]),
    "group_norm-turned": (lambda x, w, b: F.group_norm(x.movedim(-1, 1), 2, w, b), [(2, 3, 4), (4,), (4,)]),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [(2, 3, 4, 4), (3,), (3,)]),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(6, 3, 4), (3,), (3,)]),
    "batch_norm-evaluated": (lambda x, w: F.batch_norm(x, x.new_ones(3), x.new_ones(3), w), [(6, 3), (3,)]),
    "solve": (lambda A, B: torch.linalg.solve(A + 8 * torch.eye(4), B), [(4, 4), (4, 2)]),
    "solve-vector": (lambda A, B: torch.linalg.solve(A + 8 * torch.eye(4), B), [(4, 4), (4,)]),
    "solve-batch-of-vectors": (lambda A, B: torch.linalg.solve(A + 8 * torch.eye(4), B), [(2, 4, 4), (2, 4)]),
    "solve-right": (lambda A, B: torch.linalg.solve(A + 8 * torch.eye(4), B, left=False), [(4, 4), (2, 4)]),
    "tensorsolve": (
        lambda A, B: torch.linalg.tensorsolve((A + 8 * torch.eye(4)).view(2, 2, 1, 4), B),
        [(4, 4), (2, 2)],
    ),
    "tensorsolve-dims": (
        lambda A, B: torch.linalg.tensorsolve((A + 8 * torch.eye(4)).view(4, 2, 2).movedim(0, 1), B, dims=(0, 2)),
        [(4, 4), (4,)],
    ),
    "det": (torch.linalg.det, [(2, 3, 3)]),
    "slogdet": (lambda A: torch.slogdet(A).logabsdet + A.slogdet().sign, [(2, 3, 3)]),
    "gelu": (lambda x, y: F.gelu(x, approximate="tanh") * F.gelu(3 * y), [(3, 8), (3, 8)]),
    "softmax": (lambda x, y: torch.softmax(x, dim=-1) * y.softmax(0) + F.softmax(input=x * y, dim=1), [(3, 8), (3, 8)]),
    "glu": (F.glu, [(3, 8)]),
    "hardsigmoid": (F.hardsigmoid, [(3, 8)]),
    "hardsigmoid-inplace": (lambda x: (y := 2 * x) * F.hardsigmoid(y, inplace=True), [(3, 8)]),
    "logdet": (lambda A: torch.logdet(A @ A.mT) + (A @ A.mT).logdet(), [(3, 3)]),
    "keywords": (
        lambda x, w: torch.layer_norm(input=x, normalized_shape=(4,), cudnn_enable=False) + x.matmul(other=w),
        [(4, 4), (4, 4)],
    ),
    "keywords-products": (
        lambda x, w: torch.matmul(other=w, input=x) + torch.mm(x, mat2=w) * torch.det(input=w),
        [(3, 3), (3, 3)],
    ),
    "linear": (F.linear, [(3, 2, 4), (5, 4), (5,)]),
    "conv1d": (partial(F.conv1d, padding="same", dilation=2), [(2, 3, 8), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, weight=w, bias=b, stride=2, groups=2), [(2, 4, 5, 5), (6, 2, 3, 3), (6,)]),
    "conv3d": (F.conv3d, [(1, 2, 3, 4, 3), (3, 2, 2, 2, 2)]),
    "conv_transpose1d": (partial(F.conv_transpose1d, stride=2, output_padding=1), [(2, 3, 4), (3, 2, 3), (2,)]),
    "conv_transpose2d": (F.conv_transpose2d, [(1, 2, 3, 3), (2, 2, 2, 2), (2,)]),
    "conv_transpose3d": (F.conv_transpose3d, [(1, 2, 2, 2, 2), (2, 2, 2, 2, 2)]),
    "matmul": (lambda a, b: a @ b, [(3, 4), (4, 2)]),
    "attention": (SDPA, [(2, 2, 5, 4)] * 3),
    "attention-causal": (partial(SDPA, is_causal=True, scale=0.3), [(2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)]),
    "attention-mask": (lambda q, k, v: SDPA(q, k, v, attn_mask=LOWER), [(2, 2, 5, 4)] * 3),
    "attention-padding": (lambda q, k, v: SDPA(q, k, v, attn_mask=LOWER[2, None, None]), [(1, 2, 5, 4)] * 3),
    "attention-blind-query": (lambda q, k, v: SDPA(q, k, v, attn_mask=LOWER.flip(0) & LOWER), [(1, 2, 5, 4)] * 3),
    "attention-bias": (SDPA, [(2, 2, 5, 4)] * 3 + [(2, 5, 5)]),
    "attention-grouped": (partial(SDPA, enable_gqa=True), [(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)]),
    "attention-other-values": (SDPA, [(2, 5, 4), (2, 6, 4), (2, 6, 3)]),
    "attention-shared-keys": (SDPA, [(2, 3, 5, 4), (1, 3, 6, 4), (1, 3, 6, 4)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_right_whichever_inputs_have_tangents(name):
    function, shapes = FUNCTIONS[name]
    inputs = [randn(*shape) for shape in shapes]
    assert_right(function, inputs, mode=jvp_ready)
    assert_right(function, inputs, tuple(range(len(inputs))), mode=jvp_ready)
    if len(inputs) > 1:
        assert_right(function, inputs, (1,), mode=jvp_ready)


@pytest.mark.parametrize(
    "name", ["layer_norm", "instance_norm", "batch_norm", "solve", "tensorsolve", "det", "slogdet"]
)
def test_differences_see_what_pytorch_gets_wrong(name):
    """When PyTorch's own rule is right, the mode need not answer any more."""
    function, shapes = FUNCTIONS[name]
    with pytest.raises(AssertionError, match="variable"):
        assert_right(function, [randn(*shape) for shape in shapes], mode=torch.enable_grad)


class Everything(nn.Module):
    """A network of what the mode answers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).mT)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.out(F.layer_norm(y, (8,))).mT


@pytest.fixture
def network() -> nn.Module:
    return double(Everything())


def gradients(network: nn.Module, x: torch.Tensor, dx: torch.Tensor, compiled: str | None = None) -> list[torch.Tensor]:
    def loss(x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        with jvp_ready():
            y, dy = torch.func.jvp(network, (x,), (dx,))
        return (y.sin() * dy).sum()

    call = torch.compile(loss, backend=compiled, fullgraph=True) if compiled else loss
    return list(torch.autograd.grad(call(x, dx), list(network.parameters())))


def test_softmax_in_a_dual_level():
    """PyTorch's fails in this backward: its forward-mode rule writes in place (pytorch 162350)."""
    x, dx = (randn(3, 8).requires_grad_() for _ in range(2))
    found = []
    for transform in ("dual_level", "jvp"):
        with jvp_ready(), contextlib.ExitStack() as stack:
            if transform == "jvp":
                y, dy = torch.func.jvp(partial(torch.softmax, dim=-1), (x,), (dx,))
            else:
                stack.enter_context(forward_ad.dual_level())
                y, dy = forward_ad.unpack_dual(torch.softmax(forward_ad.make_dual(x, dx), -1))
        found.append(torch.autograd.grad((y.sin() * dy).sum(), (x, dx)))
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.compiles
@INDUCTOR
def test_compiled_softmax_of_bfloat16_has_finite_gradients():
    """Of 49 keys, on a CPU, they were NaN: the maximum was that of numbers that had not been rounded."""
    tensors = [randn(4, 49, 32).bfloat16().requires_grad_() for _ in range(4)]

    def loss(q, k, dq, dk):
        with jvp_ready():
            p, dp = torch.func.jvp(lambda q, k: torch.softmax(q @ k.mT / 6, -1), (q, k), (dq, dk))
        return (p.float().square() + dp.float().square()).mean()

    exact = torch.autograd.grad(loss(*(x.double() for x in tensors)), tensors)
    for x, y in zip(torch.autograd.grad(torch.compile(loss)(*tensors), tensors), exact, strict=True):
        assert (x - y).norm() < 0.05 * y.norm()


def test_a_network_is_right(network):
    assert_right(network, [randn(2, 4, 6)], parameters=list(network.parameters()), mode=jvp_ready)


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, INDUCTOR])])
def test_compiled_in_one_graph_it_is_the_same(network, backend):
    x, dx = randn(2, 4, 6), randn(2, 4, 6)
    torch.testing.assert_close(gradients(network, x, dx, backend), gradients(network, x, dx))


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:Dynamo d", "ignore:The .grad attribute")
def test_a_compiled_network_inside_the_jvp_sees_the_mode(network):
    x, dx = randn(2, 4, 6), randn(2, 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, x, dx), gradients(network, x, dx))


def test_modes_nest(network):
    x, dx = randn(2, 4, 6), randn(2, 4, 6)
    exact = gradients(network, x, dx)
    with jvp_ready(), jvp_ready():
        torch.testing.assert_close(gradients(network, x, dx), exact)


def test_a_mode_is_its_threads_own(network):
    """Another thread has PyTorch's own functions, and its own mode."""
    x, dx = randn(2, 4, 6), randn(2, 4, 6)
    exact, found = gradients(network, x, dx), []

    def elsewhere() -> None:
        with pytest.raises(NotImplementedError, match="scaled_dot_product"):
            torch.func.jvp(network, (x,), (dx,))
        found.extend(gradients(network, x, dx))

    with jvp_ready():
        thread = threading.Thread(target=elsewhere, daemon=True)
        thread.start()
        thread.join(timeout=60)
    torch.testing.assert_close(found, exact)


def test_without_a_tangent_nothing_changes(network):
    x = randn(2, 4, 6).requires_grad_()
    plain = network(x)
    exact = torch.autograd.grad(plain.sum(), [x, *network.parameters()])
    with jvp_ready():
        value = network(x)
        found = torch.autograd.grad(value.sum(), [x, *network.parameters()])
    assert torch.equal(value, plain)
    assert all(map(torch.equal, found, exact))


def test_autocast_has_the_dtypes_of_pytorch():
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GLU())
    x, dx = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain = network(x)
        with jvp_ready():
            y, dy = torch.func.jvp(network, (x,), (dx,))
    assert y.dtype == dy.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=0.02, atol=0.02)
    with jvp_ready():
        exact = torch.func.jvp(network, (x,), (dx,))[1]
    torch.testing.assert_close(dy.float(), exact, rtol=0.05, atol=0.05)


def test_under_vmap_and_grad_inside_the_jvp(network):
    """Which hide what has a tangent: vmap over samples, and a field that is a gradient."""

    def score(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: network.out(F.layer_norm(network.conv(x), (6,)).mT).sin().sum())(x)

    samples = torch.func.vmap(lambda x: network.norm(network.conv(x).mT))
    assert_right(samples, [randn(2, 4, 6)], mode=jvp_ready)
    assert_right(score, [randn(2, 4, 6)], mode=jvp_ready)


def test_a_jvp_of_a_jvp():
    """JVPs of functions, also where the inner tangent depends on the outer."""

    def inner(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: F.layer_norm(x, (8,)), (x,), (x.sin(),))[1]

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        d, c = x.sin() - x.sin().mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
        r = (c.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return r * (d - c * r * r * (c * d).mean(-1, keepdim=True))

    x, dx = randn(3, 8).requires_grad_(), randn(3, 8)
    results = []
    with jvp_ready():
        for f in (inner, by_hand):
            y, dy = torch.func.jvp(f, (x,), (dx,))
            results.append([y, dy, *torch.autograd.grad((y.sin() * dy).sum(), x)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8), nn.ConvTranspose2d(8, 8, 3)])
def test_no_product_with_an_absent_tangent(layer):
    """Twice a plain forward, and six times with the backward, instead of three and eight."""
    shape = (4, 8, 8, 8) if isinstance(layer, nn.ConvTranspose2d) else (4, 8, 8)
    x, dx = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    with FlopCounterMode(display=False) as plain:
        layer(x)
    with FlopCounterMode(display=False) as counter, jvp_ready():
        y, dy = torch.func.jvp(layer, (x,), (dx,))
        assert counter.get_total_flops() == 2 * plain.get_total_flops()
        (y.square().sum() + dy.square().sum()).backward()
    assert counter.get_total_flops() == 6 * plain.get_total_flops()


@pytest.mark.parametrize("norm", [partial(F.batch_norm, training=True), F.instance_norm])
def test_running_statistics_are_refused(norm):
    """nn.BatchNorm1d fails before, as it counts its batches."""
    x, mean, variance = torch.randn(5, 4, 3), torch.zeros(4), torch.ones(4)
    with jvp_ready(), pytest.raises(NotImplementedError, match=r"updates its running statistics.*GroupNorm"):
        torch.func.jvp(lambda x: norm(x, mean, variance), (x,), (x,))


def test_dropout_inside_attention_keeps_its_fraction():
    """Values, and the tangent of the same draw."""
    q, k, v = (randn(1, 1, 4, 2) for _ in range(3))
    v = torch.ones_like(v)
    with jvp_ready():
        y, dy = torch.func.jvp(lambda v: SDPA(q, k.expand(-1, -1, -1, -1), v, dropout_p=0.5), (v,), (2 * v,))
    torch.testing.assert_close(dy, 2 * y)
    assert not torch.allclose(y, SDPA(q, k, v))


@pytest.mark.parametrize(
    ("function", "instead"),
    [
        (lambda A: torch.native_layer_norm(A, (3,), None, None, 1e-5)[0], "functional.layer_norm"),
        (lambda A: torch.native_batch_norm(A, None, None, None, None, True, 0.1, 1e-5)[0], "functional.batch_norm"),
        (lambda A: torch.batch_norm(A, None, None, None, None, True, 0.1, 1e-5, False), "functional.batch_norm"),
        (lambda A: torch.instance_norm(A[None], None, None, None, None, True, 0.1, 1e-5, False), "instance_norm"),
        (lambda A: torch.linalg.solve_ex(A, A.sin())[0], "linalg.solve"),
        (lambda A: torch.cholesky_inverse(torch.linalg.cholesky(A @ A.mT)), "cholesky_solve"),
        (lambda A: torch.linalg.householder_product(A, A[0]), "linalg.qr"),
    ],
)
def test_what_pytorch_gets_wrong_is_refused_where_something_else_can_be_called(function, instead):
    A = randn(3, 3)
    with pytest.raises(AssertionError):
        assert_right(function, [A], mode=torch.enable_grad)
    with pytest.raises(NotImplementedError, match=f"wrong under a differentiated JVP; use .*{instead}"):
        assert_right(function, [A], mode=jvp_ready)


def test_a_mask_beside_is_causal_is_refused():
    q = randn(1, 1, 5, 2)
    with jvp_ready(), pytest.raises(ValueError, match="not both"):
        torch.func.jvp(lambda q: SDPA(q, q, q, attn_mask=LOWER, is_causal=True), (q,), (q,))


class Checkpointed(nn.Module):
    def __init__(self, network: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.network, self.reentrant = network, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.network, x.sin(), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs")  # where the reference needs no gradient
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_the_jvp_is_right(network, reentrant):
    """The backward recomputes after the mode was left."""
    net = Checkpointed(network, reentrant)
    assert_right(net, [randn(2, 4, 6)], parameters=list(network.parameters()), mode=jvp_ready)


def test_a_checkpoint_of_a_jvp_recomputes_in_the_mode(network):
    """A checkpoint of a JVP, which itself meets no tangent."""

    def function(x: torch.Tensor) -> torch.Tensor:
        value, tangent = torch.autograd.forward_ad.unpack_dual(x.sin())
        y, dy = checkpoint(partial(torch.func.jvp, network), (value,), (tangent,), use_reentrant=False)
        return torch.autograd.forward_ad.make_dual(y, dy)

    x, dx = randn(2, 4, 6), randn(2, 4, 6)
    exact = gradients(Checkpointed(network), x, dx)
    with jvp_ready():
        y, dy = torch.func.jvp(function, (x,), (dx,))
    torch.testing.assert_close(list(torch.autograd.grad((y.sin() * dy).sum(), list(network.parameters()))), exact)


def test_checkpoint_recomputes(network):
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(Checkpointed(network), randn(2, 4, 6), randn(2, 4, 6))
    assert len(calls) == 2


def test_a_checkpoint_in_a_checkpoint(network):
    net = Checkpointed(nn.Sequential(network, Checkpointed(network)))
    assert_right(net, [randn(2, 4, 6)], parameters=list(network.parameters()), mode=jvp_ready)


@pytest.mark.compiles
def test_checkpoint_compiles(network):
    x, dx = randn(2, 4, 6), randn(2, 4, 6)
    net = Checkpointed(network)
    torch.testing.assert_close(gradients(net, x, dx, "aot_eager"), gradients(net, x, dx))


def test_checkpoint_with_results_and_arguments_of_all_kinds():
    def function(x, *, pair, power):
        return {"y": x * pair[0] ** power, "n": 3, "largest": x.argmax()}

    def call(x, c):
        result = checkpoint(function, x, pair=(c, None), power=2, use_reentrant=False, preserve_rng_state=False)
        return result["y"] * (1 + result["largest"])

    assert_right(call, [randn(3), randn(3)], (0, 1), mode=jvp_ready)
    assert_right(call, [randn(3), randn(3)], (1,), mode=jvp_ready)


def test_checkpoint_of_a_captured_tangent_is_refused():
    def function(x):
        return checkpoint(lambda a: a * x, x.sin(), use_reentrant=False)

    x = randn(3).requires_grad_()
    with jvp_ready(), pytest.raises(NotImplementedError, match="not among its arguments"):
        torch.func.jvp(function, (x,), (x.detach(),))


def test_checkpoint_outside_a_jvp_is_pytorchs(network):
    x = randn(2, 4, 6).requires_grad_()
    with jvp_ready():
        found = torch.autograd.grad(Checkpointed(network)(x).sum(), x)
    assert torch.equal(found[0], torch.autograd.grad(network(x.sin()).sum(), x)[0])


def test_attention_itself_is_called(monkeypatch, network):
    """The kernel's operator, and not attention written out, answers ordinary attention."""
    seen = []

    def spy(*args, **options):
        seen.append(options)
        return attention(*args, **options)

    monkeypatch.setattr("jvp_attention.rules.attention", spy)
    gradients(network, randn(2, 4, 6), randn(2, 4, 6))
    assert len(seen) == 1
