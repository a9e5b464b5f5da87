"""Attention under every transform of torch.func and forward_ad, alone and nested: right, or refused; never wrong.

Right is what PyTorch makes of the reference under the same transform, in float64. Eager mode must be right everywhere
but in a reverse mode of a reverse mode, and that must raise. What torch.compile cannot do it must refuse.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import jvp_attention
from jvp_attention import reference
from tests.attention_cases import TOLERANCE

# both of linearize: it traces with tangents of uninitialised memory, whose products may overflow in the interpreter
pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr Node", "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


# Each takes an attention A, its dual D and tensors x; t is a second tangent.
TRANSFORMS: dict[str, Callable] = {
    "jvp": lambda A, D, x: func.jvp(A, x.qkv, x.tangents),
    "jvp of q": lambda A, D, x: func.jvp(lambda q: A(q, x.k, x.v), (x.q,), (x.dq,)),
    "jvp of v": lambda A, D, x: func.jvp(lambda v: A(x.q, x.k, v), (x.v,), (x.dv,)),
    "grad": lambda A, D, x: func.grad(lambda *qkv: A(*qkv).sin().sum(), (0, 1, 2))(*x.qkv),
    "grad of k": lambda A, D, x: func.grad(lambda k: A(x.q, k, x.v).sin().sum())(x.k),
    "vjp": lambda A, D, x: func.vjp(A, *x.qkv)[1](x.t),
    "vmap": lambda A, D, x: func.vmap(A)(*pairs(x)),
    "vmap of q": lambda A, D, x: func.vmap(A, (1, None, None), 2)(pairs(x)[0].movedim(0, 1), x.k, x.v),
    "vmap of vmap": lambda A, D, x: func.vmap(func.vmap(lambda q: A(q, x.k, x.v)))(pairs(x)[0][:, None]),
    "jacfwd": lambda A, D, x: func.jacfwd(lambda q: A(q, x.k, x.v).sum(2))(x.q),
    "jacrev": lambda A, D, x: func.jacrev(lambda q: A(q, x.k, x.v).sum(2))(x.q),
    "jvp of grad of jvp": lambda A, D, x: func.jvp(
        func.grad(lambda q: func.jvp(lambda r: A(r, x.k, x.v), (q,), (x.dq,))[1].sin().sum()), (x.q,), (x.t,)
    ),
    "older jacfwd": lambda A, D, x: jacobian(lambda *y: A(*y), x.qkv, vectorize=True, strategy="forward-mode"),
    "older jacrev": lambda A, D, x: jacobian(lambda *y: A(*y), x.qkv, vectorize=True),
    "hessian": lambda A, D, x: func.hessian(lambda q: A(q, x.k, x.v).sin().sum())(x.q),
    "jacrev of jacfwd": lambda A, D, x: func.jacrev(func.jacfwd(lambda q: A(q, x.k, x.v).sin().sum()))(x.q),
    "jacfwd of jacfwd": lambda A, D, x: func.jacfwd(func.jacfwd(lambda q: A(q, x.k, x.v).sin().sum()))(x.q),
    "jvp of jvp": lambda A, D, x: func.jvp(lambda q: func.jvp(lambda r: A(r, x.k, x.v), (q,), (x.dq,)), (x.q,), (x.t,)),
    "jvp of jvp, k of q": lambda A, D, x: func.jvp(
        lambda k: func.jvp(lambda q: A(q, k, x.v), (x.q,), (x.dq,)), (x.k,), (x.dk,)
    ),
    "jvp of jvp, its tangent": lambda A, D, x: func.jvp(
        lambda dq: func.jvp(lambda q: A(q, x.k, x.v), (x.q,), (dq,)), (x.dq,), (x.t,)
    ),
    "jvp of jvp, a constant inside": lambda A, D, x: func.jvp(
        lambda k: func.jvp(lambda s: s * A(x.q, k, x.v), (x.q,), (x.dq,)), (x.k,), (x.dk,)
    ),
    "jvp of grad": lambda A, D, x: func.jvp(func.grad(lambda q: A(q, x.k, x.v).sin().sum()), (x.q,), (x.dq,)),
    "jvp of grad, k of q": lambda A, D, x: func.jvp(
        lambda k: func.grad(lambda q: A(q, k, x.v).sin().sum())(x.q), (x.k,), (x.dk,)
    ),
    "jvp of vjp": lambda A, D, x: func.jvp(lambda q: func.vjp(A, q, x.k, x.v)[1](x.t), (x.q,), (x.dq,)),
    "grad of jvp": lambda A, D, x: func.grad(
        lambda q: func.jvp(lambda k: A(q, k, x.v), (x.k,), (x.dk,))[1].sin().sum()
    )(x.q),
    "grad of jvp, its tangent": lambda A, D, x: func.grad(
        lambda dq: func.jvp(lambda q: A(q, x.k, x.v), (x.q,), (dq,))[1].sin().sum()
    )(x.dq),
    "grad of grad": lambda A, D, x: func.grad(lambda k: func.grad(lambda q: A(q, k, x.v).sin().sum())(x.q).sin().sum())(
        x.k
    ),
    "jvp of vmap": lambda A, D, x: func.jvp(
        func.vmap(A), tuple(y[None] for y in x.qkv), tuple(y[None] for y in x.tangents)
    ),
    "vmap of jvp": lambda A, D, x: func.vmap(lambda dq: func.jvp(lambda q: A(q, x.k, x.v), (x.q,), (dq,)))(pairs(x)[0]),
    "vmap of grad": lambda A, D, x: func.vmap(func.grad(lambda q: A(q, x.k, x.v).sin().sum()))(pairs(x)[0]),
    "vmap of grad of jvp": lambda A, D, x: func.vmap(
        func.grad(lambda q: func.jvp(lambda k: A(q, k, x.v), (x.k,), (x.dk,))[1].sin().sum())
    )(pairs(x)[0]),
    "grad of vmap": lambda A, D, x: func.grad(lambda q: func.vmap(A)(q, x.k[None], x.v[None]).sin().sum())(x.q[None]),
    "linearize": lambda A, D, x: func.linearize(A, *x.qkv)[1](*x.tangents),
    "dual_level": lambda A, D, x: under_dual_level(lambda q: A(q, x.k, x.v), x.q, x.dq),
    "dual_level around dual": lambda A, D, x: under_dual_level(lambda dk: D(*x.qkv, x.dq, dk, x.dv)[1], x.dk, x.k),
    "dual": lambda A, D, x: D(*x.qkv, *x.tangents),
    "jvp of dual, a tangent": lambda A, D, x: func.jvp(lambda dq: D(*x.qkv, dq, x.dk, x.dv)[1], (x.dq,), (x.t,)),
    "jvp of dual, q": lambda A, D, x: func.jvp(lambda q: D(q, x.k, x.v, *x.tangents), (x.q,), (x.t,)),
    "jvp of dual, v": lambda A, D, x: func.jvp(lambda v: D(x.q, x.k, v, *x.tangents), (x.v,), (x.dk,)),
    "grad of dual": lambda A, D, x: func.grad(lambda *y: D(*y)[1].sin().sum(), tuple(range(6)))(*x.qkv, *x.tangents),
    "vmap of dual": lambda A, D, x: func.vmap(lambda dq: D(*x.qkv, dq, x.dk, x.dv))(pairs(x)[0]),
    "jacrev of dual": lambda A, D, x: func.jacrev(lambda dq: D(*x.qkv, dq, x.dk, x.dv)[1].sum(2))(x.dq),
}
LONG = {"hessian", "jvp of grad of jvp", "jacrev of jacfwd", "linearize", "vmap of grad of jvp"}  # in the interpreter
REFUSED = {"grad of grad"}  # reverse mode of a reverse mode
COMPILES = {"jvp", "jvp of q", "jvp of v", "grad", "vjp", "vmap", "dual", "dual_level", "grad of dual"}
COMPILES |= {"jvp of dual, a tangent"}  # which was silently zero


def pairs(x: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """Inputs and tangents stacked, for vmap to take apart."""
    return tuple(torch.stack([y, dy]) for y, dy in zip(x.qkv, x.tangents, strict=True))


def under_dual_level(function: Callable, x: torch.Tensor, dx: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx))))


def problem(
    dtype: torch.dtype, device: str = "cpu", heads: int = 2, groups: int = 2, d: int = 4, batch: int = 1
) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, 3, d), (batch, groups, 5, d), (batch, groups, 5, d)] * 2 + [(batch, heads, 3, d)]
    exact = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    q, k, v, dq, dk, dv, t = (y.to(device, dtype) for y in exact)
    return SimpleNamespace(q=q, k=k, v=v, dq=dq, dk=dk, dv=dv, t=t, qkv=(q, k, v), tangents=(dq, dk, dv))


def leaves(results) -> list[torch.Tensor]:
    return [y.detach().double().cpu() for y in torch.utils._pytree.tree_leaves(results)]


def check(call: Callable, exact: list[torch.Tensor], tolerance: float) -> None:
    found = leaves(call())
    assert len(found) == len(exact)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.fixture(autouse=True)
def _level_zero() -> Iterator[None]:
    """Leave the levels that a failed compilation leaves behind."""
    yield
    if torch._C._functorch.peek_interpreter_stack() is not None:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
    if forward_ad._current_level >= 0 or not _level_is_free():
        torch._C._exit_dual_level(level=0)
        forward_ad._current_level = -1


def _level_is_free() -> bool:
    try:
        torch._C._exit_dual_level(level=torch._C._enter_dual_level())
    except RuntimeError:
        return False
    return True


def hidden(name: str) -> dict:
    """Every option at once, or none."""
    if name == "none":
        return {}
    mask = torch.ones(1, 2, 3, 5, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[0, 1, 2, :] = False  # one query sees nothing
    return {"causal": True, "scale": 0.7, "lengths": torch.tensor([4, 2]), "mask": mask}


def of_both(options: dict, which) -> tuple[Callable, Callable]:
    return partial(which.attention, **options), partial(which.dual_attention, **options)


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_plain_pytorch_is_right_or_refuses(name, options):
    """In float64, on the CPU, no kernel runs."""
    given = hidden(options)
    x = problem(torch.float64, groups=1, batch=2) if given else problem(torch.float64)
    call = partial(TRANSFORMS[name], *of_both(given, jvp_attention), x)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match="no double backward"):
            call()
        return
    check(call, leaves(TRANSFORMS[name](*of_both(given, reference), x)), 1e-10)


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LONG else ()) for x in TRANSFORMS])
def test_the_kernels_are_right_or_refuse(device, small_tiles, name):
    small_tiles(16, 16)
    x = problem(torch.float32, device, heads=1, groups=1, d=2)
    call = partial(TRANSFORMS[name], jvp_attention.attention, jvp_attention.dual_attention, x)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match="no double backward"):
            call()
        return
    exact = TRANSFORMS[name](
        reference.attention, reference.dual_attention, problem(torch.float64, heads=1, groups=1, d=2)
    )
    check(call, leaves(exact), 2 * TOLERANCE[torch.float32])


@pytest.mark.compiles
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.slow
def test_compiled_code_is_right_or_refuses(name):
    """Through the same dispatcher as the kernels, so what runs in the end does not matter."""
    x = problem(torch.float64)
    exact = leaves(TRANSFORMS[name](reference.attention, reference.dual_attention, x))
    torch._dynamo.reset()
    call = torch.compile(
        lambda: TRANSFORMS[name](jvp_attention.attention, jvp_attention.dual_attention, x),
        backend="aot_eager",
        fullgraph=True,
    )
    try:
        found = call()
    except Exception:  # Dynamo's, AOTAutograd's or our own
        assert name not in COMPILES
        return
    check(lambda: found, exact, 1e-10)


@pytest.mark.compiles
@pytest.mark.slow
def test_a_compiled_jvp_where_inputs_are_views_of_one_tensor():
    """Attention's is right; PyTorch fails where the function views them again."""
    x = torch.randn(6, 1, 2, 5, 8).unbind()

    def dual(function, *x):
        return func.jvp(function, x[:3], x[3:])

    compiled = torch.compile(dual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(jvp_attention.attention, *x), dual(jvp_attention.attention, *x))
    with pytest.raises(RuntimeError, match="tangent have the same layout"):
        compiled(lambda q, k, v: q @ k.mT @ v, *x)
