"""Tangents that are not there and gradients that nobody wants cost nothing; masks and groups of heads."""

import itertools

import pytest
import torch
from torch import Tensor

from jvp_attention import attention, reference
from jvp_attention.shapes import Given
from tests.attention_cases import Case, worst_error

NAMES = ("gq", "gk", "gv", "gdq", "gdk", "gdv")
ALL = (True,) * 6
SLOW = pytest.mark.slow


def a_problem(tensors, tangents=(True,) * 3, scale=0.25, *, lengths=None, mask=None, causal=False) -> Given:
    """The problem without those tangents that are not there."""
    q, k, v, *dx = tensors[:6]
    dx = (x if there else None for x, there in zip(dx, tangents, strict=True))
    return Given(q, k, v, *dx, lengths, mask, scale, causal)


@pytest.fixture
def check(launch, guarded, device):
    """Hold the kernels' o, do, gq, ..., gdv to the reference in float64, where each is wanted."""

    def of(tensors, tangents=(True,) * 3, gradients=(True, True), scale=0.25, *, wanted=ALL, **hidden) -> None:
        on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in hidden.items()}
        given = a_problem(tensors, tangents, scale, **on_device)
        go, gdo = (x if there else None for x, there in zip(tensors[6:], gradients, strict=True))
        results = launch.run(launch.forward_calls(given))
        found = [results.o, results.do, *launch.run(launch.backward_calls(given, results, go, gdo, wanted))]

        *inputs, go, gdo = (x.detach().double().cpu() for x in tensors)
        inputs = [x.requires_grad_() for x in inputs]
        absent = [torch.zeros_like(x) for x in inputs]
        dx = (x if there else zero for x, zero, there in zip(inputs[3:], absent[3:], tangents, strict=True))
        outputs = reference.dual_attention(*inputs[:3], *dx, scale=scale, **hidden)
        loss = sum((x * g).sum() for x, g, there in zip(outputs, (go, gdo), gradients, strict=True) if there)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        exact = [*(x.detach() for x in outputs), *gradients]
        there = [True, True, *(a and b for a, b in zip(wanted, (True, True, True, *tangents), strict=True))]
        assert [x is not None for x in found] == there
        assert (
            worst_error([x for x in found if x is not None], [e for e, t in zip(exact, there, strict=True) if t])
            <= 1e-5
        )

    return of


@pytest.mark.parametrize("tangents", [x for x in itertools.product([True, False], repeat=3) if any(x)])
@pytest.mark.parametrize(("gradients", "split"), [((True, True), False), pytest.param((False, True), True, marks=SLOW)])
def test_tangents_that_are_absent(check, device, small_tiles, tangents, gradients, split):
    small_tiles(16, 32, split=split)
    check(Case((1, 1, 20, 37, 16), device=device).tensors, tangents, gradients, -0.3)


WANTED = [ALL] + [tuple(i == j for j in range(6)) for i in range(6)]
WANTED += [(True, False, False) * 2, (False, True, True) * 2, (True, True, True, False, False, False)]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: " ".join(n for n, x in zip(NAMES, w, strict=True) if x))
def test_gradients_that_are_not_wanted(check, device, small_tiles, wanted):
    small_tiles(16, 16, split=wanted[1])
    check(Case((1, 1, 20, 18, 16), device=device).tensors, wanted=wanted)


def test_no_residuals_without_gradients(launch, monkeypatch, device):
    """Rounding residuals are kept only where a gradient is wanted, which attention finds out."""
    tensors = Case((1, 1, 4, 5, 16), torch.float16, device=device).tensors
    given = a_problem(tensors)
    results, fewer = (launch.run(launch.forward_calls(given, keep)) for keep in (True, False))
    assert results.o_residual.numel() == results.do_residual.numel() == results.o.numel()
    assert fewer.o_residual.numel() == fewer.do_residual.numel() == 0
    for name in ("o", "do", "lse", "mu"):
        assert torch.equal(getattr(results, name), getattr(fewer, name))
    kept, original = [], launch.forward_calls
    monkeypatch.setattr(launch, "forward_calls", lambda given, keep: kept.append(keep) or original(given, keep))
    for requires_grad in (False, True):
        x = [y.clone().requires_grad_(requires_grad) for y in tensors[:6]]
        torch.func.jvp(attention, tuple(x[:3]), tuple(x[3:]))
    assert kept == [False, True]


@pytest.fixture
def dots(launch, device, monkeypatch):
    """Run some launches in the interpreter and count the matmuls of each, of one tile with another."""
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    from triton.runtime import interpreter

    count, per_call = [0], {}
    original, multiply = launch.Call.launch, interpreter.InterpreterBuilder.create_dot

    def counted(self, *arguments):
        count[0] += 1
        return multiply(self, *arguments)

    def launched(self, tiles):
        before = count[0]
        original(self, tiles)
        per_call[self.name] = count[0] - before

    def of(work) -> dict[str, int]:
        per_call.clear()
        launch.run(work)
        return dict(per_call)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(launch.Call, "launch", launched)
    return of


FORWARD_MATMULS = {(1, 1, 1): 6, (1, 0, 0): 4, (0, 1, 0): 4, (0, 0, 1): 3, (1, 1, 0): 5, (0, 1, 1): 5, (1, 0, 1): 5}
BACKWARD_MATMULS = [  # tangents, outputs' gradients, gradients wanted, matmuls
    ((1, 1, 1), (1, 1), (1, 1, 1, 1, 1, 1), 21),
    ((1, 1, 1), (0, 1), (1, 1, 1, 1, 1, 1), 18),
    ((1, 1, 1), (1, 1), (1, 0, 0, 1, 0, 0), 9),  # frozen keys and values
    ((1, 0, 0), (1, 1), (1, 0, 0, 1, 0, 0), 6),
    ((0, 0, 1), (1, 1), (1, 1, 1, 0, 0, 1), 10),  # the values' tangent alone
    ((1, 1, 1), (1, 1), (0, 0, 0, 1, 1, 1), 7),  # no T: gdq 3, gdk and gdv 4
    ((1, 1, 1), (1, 1), (0, 0, 0, 0, 0, 1), 2),
]


@pytest.mark.parametrize(("tangents", "matmuls"), FORWARD_MATMULS.items())
def test_matmuls_of_the_forward(launch, dots, small_tiles, tangents, matmuls):
    small_tiles(16, 16)
    given = a_problem(Case((1, 1, 16, 16, 16)).tensors, tangents)
    assert dots(launch.forward_calls(given)) == {"forward_dual": matmuls}


@pytest.mark.parametrize(("tangents", "gradients", "wanted", "matmuls"), BACKWARD_MATMULS)
def test_matmuls_of_the_backward(launch, dots, small_tiles, tangents, gradients, wanted, matmuls):
    small_tiles(16, 16)
    *tensors, go, gdo = Case((1, 1, 16, 16, 16)).tensors
    given = a_problem(tensors, tangents)
    results = launch.run(launch.forward_calls(given))
    work = launch.backward_calls(given, results, go if gradients[0] else None, gdo, [bool(w) for w in wanted])
    assert sum(dots(work).values()) == matmuls


def a_mask(kind: str, b: int, h: int, n: int, m: int) -> Tensor:
    """[b, h, n, m] of bool: drawn; with whole tiles hidden; with rows and columns that see nothing."""
    mask = torch.rand(b, h, n, m, generator=torch.Generator().manual_seed(3)) < 0.5
    if kind == "blocks":
        mask = torch.arange(n)[:, None] // 16 == torch.arange(m)[None, :] // 16
        mask = mask.expand(b, h, n, m).clone()
    if kind == "rows":
        mask[..., 3, :] = False
        mask[..., 16:32, :] = False
        mask[..., :, 5] = False
    return mask


@pytest.mark.parametrize(
    ("kind", "b", "h", "split"), [("rows", 2, 1, True), pytest.param("blocks", 1, 2, False, marks=SLOW)]
)
def test_masks(check, device, small_tiles, kind, b, h, split):
    """[B or 1, H or 1, N, M]: pairs that are hidden have no part; a query that sees nothing gives zero."""
    small_tiles(16, 16, split=split)
    check(Case((2, 2, 33, 18, 16), device=device).tensors, mask=a_mask(kind, b, h, 33, 18))


@pytest.mark.slow
def test_masks_with_lengths_and_causal_and_any_strides(check, device, small_tiles):
    small_tiles(16, 32)
    mask = a_mask("drawn", 1, 1, 35, 40).mT.expand(2, 2, 40, 35)
    check(Case((2, 2, 40, 35, 16), device=device).tensors, mask=mask, causal=True, lengths=torch.tensor([7, 35]))


def test_tiles_that_see_nothing_are_passed_over(launch, dots, small_tiles):
    """Only the 3 diagonal tiles of 3 x 3 are multiplied."""
    small_tiles(16, 16)
    *tensors, go, gdo = Case((1, 1, 48, 48, 16)).tensors
    given = a_problem(tensors, mask=a_mask("blocks", 1, 1, 48, 48))
    forward = launch.forward_calls(given)
    assert dots(forward) == {"forward_dual": 3 * 6}
    assert dots(launch.backward_calls(given, forward[1], go, gdo)) == {"query_dual": 3 * 9, "key_dual": 3 * 12}


@pytest.mark.parametrize(("group", "causal"), [(2, True), pytest.param(3, False, marks=SLOW)])
def test_groups_of_heads_share_keys(check, device, small_tiles, group, causal):
    """Heads h of q meet head h // group of k and v, whose gradients are sums over the group."""
    small_tiles(16, 16, split=causal)
    queries = Case((1, 2 * group, 20, 24, 16), device=device).tensors
    keys = Case((1, 2, 20, 24, 16), device=device, seed=1).tensors
    check([keys[i] if i in (1, 2, 4, 5) else queries[i] for i in range(8)], causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0])
def test_negative_and_zero_scales_with_hidden_keys(check, device, small_tiles, scale):
    """Zero times the infinity of a hidden key would be NaN."""
    small_tiles(16, 16)
    check(Case((1, 1, 20, 20, 16), device=device).tensors, scale=scale, causal=True)
