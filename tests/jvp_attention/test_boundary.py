"""Callers' arguments: masks that broadcast, mapped axes, mixed dtypes, autocast, precisions, tensors without data.

python -m pytest --slow tests/jvp_attention/test_boundary.py       # 120 drawn problems, each a seed
"""

import contextlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import jvp_attention
from jvp_attention import reference
from jvp_attention.shapes import Given
from tests.attention_cases import TOLERANCE, worst_error

B, H, N, M, D, V = 2, 2, 5, 6, 8, 3  # V: entries of a mapped axis


@pytest.fixture(params=["kernels", "plain"])
def both(request, device, small_tiles, monkeypatch) -> str:
    """The device, with the kernels and with plain PyTorch in their place."""
    small_tiles(16, 16)
    if request.param == "plain":
        monkeypatch.setattr("jvp_attention.operators.why_not", lambda given: "a test wants it so")
    return device


def inputs(*lead: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Q, k, v with leading axes."""
    return [torch.randn(*lead, B, H, rows, D, device=device, dtype=dtype) for rows in (N, M, M)]


def near(found: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    found, exact = found.detach(), exact.detach()
    assert float((found.double() - exact).norm()) <= tolerance * float(exact.norm())


def pytorchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("mapped", [False, True], ids=["shared", "mapped"])
@pytest.mark.parametrize("elements", [1, B])
def test_masks_of_one_batch_element_under_vmap(both, mapped, elements):
    """Once read out of bounds: folded into the batch, such a mask had V entries for V B queries."""
    qkv, mask = inputs(V, device=both), torch.rand(*[V] * mapped, elements, 1, N, M, device=both) > 0.4
    found = func.vmap(lambda q, k, v, m: jvp_attention.attention(q, k, v, mask=m), (0, 0, 0, 0 if mapped else None))
    exact = [reference.attention(*(x[i].double() for x in qkv), mask=mask[i] if mapped else mask) for i in range(V)]
    near(found(*qkv, mask), torch.stack(exact))


MORE_SHAPES = [(1, M), (H, N, M), (1, H, N, 1), (1, 1, 1, 1)]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("shape", [(N, M), (B, 1, 1, M), *(pytest.param(x, marks=SLOW) for x in MORE_SHAPES)], ids=str)
def test_masks_broadcast_as_pytorchs_do(both, shape):
    """Value, tangent and gradients; key padding [B, 1, 1, M] and [N, M] above all."""
    mask = torch.rand(shape, device=both) > 0.4
    mask.view(-1)[0] = True
    x = [y.requires_grad_() for y in (*inputs(device=both), *inputs(device=both))]
    results = []
    for which, dtype in ((jvp_attention, torch.float32), (reference, torch.float64)):
        whole = mask.expand(B, H, N, M) if which is reference else mask
        given = [y.to(dtype) for y in x]
        call = partial(which.attention, mask=whole)
        o, do = func.jvp(call, tuple(given[:3]), tuple(given[3:]))
        results.append([o, do, *torch.autograd.grad((o * do).sum(), x)])
    for found, exact in zip(*results, strict=True):
        near(found, exact.double())
    if mask.expand(B, H, N, M).any(-1).all():
        q, k, v = (y.detach() for y in x[:3])
        near(jvp_attention.attention(q, k, v, mask=mask), pytorchs(q, k, v, mask).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_before_dtypes_are_compared(both, dtype):
    """Q and k in float32, as norms and rotary embeddings leave them, v in 16 bits as from a linear layer."""
    q, k, v = (x.requires_grad_() for x in inputs(device=both))
    v = v.detach().to(dtype)
    with torch.autocast(q.device.type, dtype):
        o, do = func.jvp(jvp_attention.attention, (q, k, v), (q, k, v))
        by_hand = jvp_attention.dual_attention(q, k, v, q, None, v)
        assert jvp_attention.attention(q, k, v).dtype == pytorchs(q, k, v).dtype == o.dtype == do.dtype == dtype
    assert by_hand[1].dtype == dtype
    assert torch.autograd.grad(o.sum() + do.sum(), q)[0].dtype == torch.float32
    rounded = [x.to(dtype).double() for x in (q, k, v)]
    for found, exact in zip((o, do), reference.dual_attention(*rounded, *rounded), strict=True):
        near(found, exact, TOLERANCE[dtype])


def test_autocast_leaves_float64_alone(both):
    q, k, v = inputs(device=both, dtype=torch.float64)
    with torch.autocast(q.device.type, torch.bfloat16):
        found = jvp_attention.attention(q, k, v)
        assert found.dtype == pytorchs(q, k, v).dtype == torch.float64
        with pytest.raises(TypeError, match="inputs of one dtype"):
            jvp_attention.attention(q, k, v.float())
    near(found, reference.attention(q, k, v), 1e-12)


@contextlib.contextmanager
def precision(name: str, value: str) -> Any:
    """Set PyTorch's precision of float32 matmuls by its older or its newer setting."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if name == "older":
            torch.set_float32_matmul_precision(value)
        else:
            torch.backends.cuda.matmul.fp32_precision = value
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


SETTINGS = [
    ("older", "highest", "tf32x3"),
    ("older", "high", "tf32"),
    ("newer", "ieee", "tf32x3"),
    ("newer", "tf32", "tf32"),
]


@pytest.mark.parametrize(("name", "value", "expected"), SETTINGS)
def test_both_settings_of_the_precision_are_read(launch, device, name, value, expected):
    """The older getter raises once the newer setting has been used. Tiles that did not fit are remembered by it."""
    given = Given(*inputs(device=device), None, None, None, None, None, 1.0, False)
    with precision(name, value):
        (call,), _ = launch.forward_calls(given)
        half, _ = launch.forward_calls(Given(*(x.half() for x in given[:3]), *given[3:]))
    assert call.arguments["PRECISION"] == expected
    assert half[0].arguments["PRECISION"] == "tf32x3"  # has no part there
    assert expected in launch._kind(call)


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_tensors_without_data_have_results_of_the_right_layout(both, fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        given = [*inputs(device=both if fake else "meta"), *inputs(device=both if fake else "meta")]
        lengths = torch.tensor([3, 6], device=given[0].device)
        x = [y.requires_grad_() for y in given]
        found = [*func.jvp(lambda *y: jvp_attention.attention(*y, lengths=lengths), tuple(x[:3]), tuple(x[3:]))]
        found += [jvp_attention.attention(*x[:3]), *torch.autograd.grad(found[0].sum() + found[1].sum(), x)]
    real = [y.requires_grad_() for y in (*inputs(device=both), *inputs(device=both))]
    exact = [*func.jvp(jvp_attention.attention, tuple(real[:3]), tuple(real[3:]))]
    exact += [jvp_attention.attention(*real[:3]), *torch.autograd.grad(exact[0].sum() + exact[1].sum(), real)]
    for a, b in zip(found, exact, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_logits_of_minus_infinity_without_a_mask(both):
    """An additive mask in a channel of its own makes such logits: a first tile without a finite logit gave NaN."""
    q, k, v = torch.randn(3, 1, 1, 32, 8, device=both)
    q[..., 0], k[:, :, :20, 0] = 1, -math.inf
    near(jvp_attention.attention(q, k, v), reference.attention(*(x.double() for x in (q, k, v))))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore")
def test_an_eager_forward_has_a_compiled_backward():
    """Compiled autograd asks every Function for a key, which ours had not."""
    x = torch.randn(1, 2, N, D, requires_grad=True)
    (exact,) = torch.autograd.grad(jvp_attention.attention(x.square(), x, x).sum(), x)
    y = jvp_attention.attention(x.square(), x, x).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.backward()
    torch.testing.assert_close(x.grad, exact)


def of_shapes(*shapes):
    return lambda *_: [torch.zeros(shape) for shape in shapes]


REFUSED = [  # what is handed over for q, k, v; the error and what it says
    (lambda q, k, v: (None, k, v), TypeError, "q must be a tensor, got NoneType"),
    (lambda q, k, v: (q, k.numpy(), v), TypeError, "k must be a tensor, got ndarray"),
    (lambda q, k, v: (torch.nested.nested_tensor([q[0], q[0]]), k, v), TypeError, "q is a nested tensor; pad it"),
    (lambda q, k, v: (q, k.double(), v), TypeError, "inputs of one dtype .* torch.float32, torch.float64"),
    (lambda q, k, v: (q.long(), k.long(), v.long()), TypeError, "inputs of one dtype among"),
    (lambda q, k, v: [x.to(torch.float8_e4m3fn) for x in (q, k, v)], TypeError, "got torch.float8_e4m3fn"),
    (lambda q, k, v: (q, k.to("meta"), v), ValueError, "one device"),
    (of_shapes((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 6, 4)), ValueError, "k, v"),
    (of_shapes((1, 2, 3, 4), (1, 2, 5, 8), (1, 2, 5, 8)), ValueError, r"\[B, H, M, D\]"),
    (of_shapes((1, 4, 3, 4), (1, 3, 5, 4), (1, 3, 5, 4)), ValueError, r"\[B, H, M, D\]"),
    (of_shapes((2, 3, 4), (2, 3, 4), (2, 3, 4)), ValueError, r"\[B, H, N, D\]"),
    (of_shapes((1, 2, 0, 4), (1, 2, 5, 4), (1, 2, 5, 4)), ValueError, "empty"),
    (of_shapes((1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 4)), ValueError, "empty"),
    (of_shapes(*[(1, 1, 2, 257)] * 3), ValueError, "at most 256"),
]
REFUSED_OPTIONS = [
    ({"scale": math.nan}, ValueError, "scale must be finite, got"),  # a maximum drops NaN: the kernels made numbers
    ({"scale": math.inf}, ValueError, "scale must be finite, got"),
    ({"scale": torch.tensor(0.3)}, TypeError, r"attention\(scale \* q, k, v, scale=1.0\)"),  # its gradient was lost
    ({"lengths": torch.ones(2)}, TypeError, "int32 or int64, got torch.float32"),
    ({"lengths": [5, 5]}, TypeError, "int32 or int64, got list"),
    ({"lengths": torch.ones(3, dtype=torch.int32)}, ValueError, r"\[2\], got \[3\]"),
    ({"lengths": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"\[2\], got \[2, 1\]"),
    ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "device cpu, got meta"),
    ({"mask": torch.ones(N, M)}, TypeError, "mask must be a boolean tensor"),
    ({"mask": torch.ones(N, M, dtype=torch.bool, device="meta")}, ValueError, "device cpu, got meta"),
    *(
        ({"mask": torch.ones(shape, dtype=torch.bool)}, ValueError, r"mask must broadcast to \[2, 2, 5, 6\], got")
        for shape in ((M,), (N, N), (3, 1, N, M), (1, B, H, N, M))
    ),
]


@pytest.mark.bad_shapes
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [(change, {}, *rest) for change, *rest in REFUSED] + [(lambda *x: x, *row) for row in REFUSED_OPTIONS],
)
def test_what_does_not_fit_is_refused(change, options, error, message):
    given = change(*inputs())
    with pytest.raises(error, match=message):
        jvp_attention.attention(*given, **options)
    with pytest.raises(error, match=message):
        jvp_attention.dual_attention(*given, *given, **options)


@pytest.mark.bad_shapes
def test_tangents_that_do_not_fit_are_refused():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"its input's dtype torch.float32, got torch.float64"):
        jvp_attention.dual_attention(q, k, v, q.double(), k, v)
    with pytest.raises(ValueError, match="its input's shape"):
        jvp_attention.dual_attention(q, k, v, k, k, v)


def test_a_number_of_no_axes_changes_no_dtype(both):
    """PyTorch makes the tangent of such a number times a Python float one of float64 (pytorch 160513)."""
    q, k, v = inputs(device=both)
    t = torch.tensor(0.5, device=both)
    results = []
    for which, dtype in ((jvp_attention, torch.float32), (reference, torch.float64)):
        a, b, c = (x.to(dtype) for x in (q, k, v))
        results.append(func.jvp(lambda t, w=which, a=a, b=b, c=c: w.attention(2.0 * t * a, b, c), (t,), (t,)))
    assert results[0][1].dtype == torch.float32
    near(results[0][1], results[1][1].double())


def test_a_loss_of_value_and_tangent_in_a_dual_level(both):
    """PyTorch's softmax fails in this backward: its forward-mode rule writes in place (pytorch 162350)."""
    x = [y.requires_grad_() for y in (*inputs(device=both), *inputs(device=both))]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(y, dy) for y, dy in zip(x[:3], x[3:], strict=True)]
        o, do = forward_ad.unpack_dual(jvp_attention.attention(*duals))
    found = torch.autograd.grad((o * do).sum(), x)
    o, do = reference.dual_attention(*(y.double() for y in x))
    for a, b in zip(found, torch.autograd.grad((o * do).sum(), x), strict=True):
        near(a, b.double())


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_inside_a_jvp_and_without_tangents(both, backend):
    """A compiled network that is called inside an eager JVP (pytorch 187284), and its plain backward (180284).

    In the first Dynamo falls back to eager mode; with fullgraph=True it refuses.
    """
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: jvp_attention.attention(q.sin(), k, v), backend=backend)
    x = [y.requires_grad_() for y in inputs(device=both)]
    results = []
    for call in (compiled, lambda q, k, v: reference.attention(q.double().sin(), k.double(), v.double())):
        o, do = func.jvp(call, tuple(x), tuple(x))
        plain = call(*x)
        results.append([o, do, *torch.autograd.grad((o * do).sum(), x), *torch.autograd.grad(plain.sin().sum(), x)])
    for a, b in zip(*results, strict=True):
        near(a, b.double())


@pytest.mark.gpu
def test_kernels_run_where_their_inputs_are():
    """On another card than the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = inputs(device="cuda:1")
    near(jvp_attention.attention(*x).cpu(), reference.attention(*(y.double().cpu() for y in x)))


def drawn(seed: int, device: str) -> tuple[float, float]:
    """The error of a drawn problem, and what is allowed."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(*things: Any) -> Any:
        return things[int(torch.randint(len(things), (), generator=generator))]

    b, h, n, m, d = one_of(1, 2), one_of(1, 2), one_of(1, 5, 17), one_of(1, 6, 18), one_of(1, 8)
    lowered, mixed, setting = one_of(None, None, torch.float16), one_of(False, True), one_of(*SETTINGS)[:2]
    dtype = one_of(torch.float32, torch.float16, torch.float64)
    mapped = one_of((), (True, True), (True, False), (False, True), (False, False))  # of q and of the mask, if at all
    shape = one_of(None, (n, m), (b, 1, 1, m), (1, 1, n, m), (b, h, n, m), (1, h, 1, m))

    def make(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v, dq = make(b, h, n, d), make(V, b, h, m, d), make(V, b, h, m, d), make(b, h, n, d)
    if mixed and lowered and dtype != torch.float64:
        v = v.to(lowered)
    vmaps = bool(mapped)
    q, dq = (torch.stack([x, -x, 2 * x]) if vmaps and mapped[0] else x for x in (q, dq))
    k, v = (k, v) if vmaps else (k[0], v[0])
    mask = None if shape is None else torch.rand(V, *shape, generator=generator).to(device) < 0.7
    if mask is not None and not (vmaps and mapped[1]):
        mask = mask[0]
    low = lowered or dtype if dtype != torch.float64 else dtype

    def value(which: Any, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and which is reference:
            mask = mask.expand(b, h, n, m)
        o, do = func.jvp(lambda q: which.attention(q, k, v, mask=mask), (q,), (dq,))
        return torch.cat([o, do])

    axes = (0 if vmaps and mapped[0] else None, 0, 0, 0 if vmaps and mapped[0] else None)
    axes += (0 if vmaps and mask is not None and mapped[1] else None,)
    results = []
    with precision(*setting):
        for which in (jvp_attention, reference):
            exactly = which is reference
            given = [x.to(low).double() if exactly else x for x in (q, k, v, dq)]
            given = [x.detach().requires_grad_() for x in given]
            call = func.vmap(lambda *x, w=which: value(w, *x), axes) if vmaps else lambda *x, w=which: value(w, *x)
            scope = torch.autocast(q.device.type, lowered) if lowered and not exactly else contextlib.nullcontext()
            with scope:
                o = call(*given, mask)
            results.append([o, *torch.autograd.grad(o.double().sin().sum(), given)])
    results = [[x.detach() for x in several] for several in results]
    return worst_error(*results), {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 6e-3}[low]


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 60))])
def test_drawn_problems(both, part):
    for seed in range(part, 120, 60):
        error, allowed = drawn(seed, both)
        assert error <= allowed, seed
