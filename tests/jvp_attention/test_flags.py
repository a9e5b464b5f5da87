"""Tangents that are not there and gradients that nobody wants cost nothing; masks and groups of heads."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from jvp_attention.shapes import Given
from tests.attention_cases import Case

NAMES = ("gq", "gk", "gv", "gdq", "gdk", "gdv")
ALL = (True,) * 6


def reference(q, k, v, dq, dk, dv, scale, visible):
    """Value and tangent in plain PyTorch, for visible [B, H, N, M] of bool. What is absent is zero."""
    group = q.shape[1] // k.shape[1]
    k, v, dk, dv = (x if x is None else x.repeat_interleave(group, 1) for x in (k, v, dk, dv))
    s = (q @ k.mT * scale).masked_fill(~visible, -1e30)
    p = s.softmax(-1) * visible
    t = torch.zeros_like(s)
    if dq is not None:
        t = t + dq @ k.mT * scale
    if dk is not None:
        t = t + q @ dk.mT * scale
    do = (p * (t - (p * t).sum(-1, keepdim=True))) @ v
    return p @ v, do if dv is None else do + p @ dv


def exact(tensors, tangents, gradients, scale, visible) -> list[Tensor | None]:
    """[o, do, gq, ..., gdv] in float64; None for the gradient of a tangent that is absent."""
    *inputs, go, gdo = (x.double().cpu() for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    given = inputs[:3] + [x if there else None for x, there in zip(inputs[3:], tangents, strict=True)]
    o, do = reference(*given, scale, visible)
    loss = sum((x * g).sum() for x, g, there in zip((o, do), (go, gdo), gradients, strict=True) if there)
    variables = [x for x in given if x is not None]
    found = dict(zip(map(id, variables), torch.autograd.grad(loss, variables, allow_unused=True), strict=True))
    return [o.detach(), do.detach(), *(None if x is None else found[id(x)] for x in given)]


def found(tensors, tangents, gradients, scale, *, wanted=ALL, mask=None, causal=False, lengths=None, keep=True):
    """The same of the kernels."""
    from jvp_attention import launch

    *_, go, gdo = tensors
    go, gdo = (x if there else None for x, there in zip((go, gdo), gradients, strict=True))
    given = a_problem(tensors, tangents, scale, lengths, mask, causal)
    results = launch.run(launch.forward_calls(given, keep))
    return [results.o, results.do, *launch.run(launch.backward_calls(given, results, go, gdo, wanted))]


def a_problem(tensors, tangents=(True,) * 3, scale=1.0, lengths=None, mask=None, causal=False) -> Given:
    """The problem without those tangents that are not there."""
    q, k, v, *dx = tensors[:6]
    dx = (x if there else None for x, there in zip(dx, tangents, strict=True))
    return Given(q, k, v, *dx, lengths, mask, scale, causal)


def near(found: list[Tensor | None], exact: list[Tensor | None], wanted=ALL) -> None:
    size = max(float(x.abs().max()) for x in exact if x is not None)
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        if i >= 2 and (b is None or not wanted[i - 2]):
            assert a is None
            continue
        b = torch.zeros_like(a, dtype=torch.float64) if b is None else b
        assert float((a.double().cpu() - b).norm()) <= 1e-5 * max(float(b.norm()), 0.1 * size * b.numel() ** 0.5)


SLOW = pytest.mark.slow
TANGENTS = [x for x in itertools.product([True, False], repeat=3) if any(x)]


@pytest.mark.parametrize("tangents", TANGENTS)
@pytest.mark.parametrize(("gradients", "split"), [((True, True), False), pytest.param((False, True), True, marks=SLOW)])
def test_tangents_that_are_absent(guarded, device, small_tiles, tangents, gradients, split):
    small_tiles(16, 32, split=split)
    case = Case((1, 1, 20, 37, 16), device=device)
    visible = torch.ones(1, 1, 20, 37, dtype=torch.bool)
    results = found(case.tensors, tangents, gradients, -0.3)
    near(results, exact(case.tensors, tangents, gradients, -0.3, visible))


WANTED = [ALL] + [tuple(i == j for j in range(6)) for i in range(6)]
WANTED += [(True, False, False) * 2, (False, True, True) * 2, (True, True, True, False, False, False)]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: " ".join(n for n, x in zip(NAMES, w, strict=True) if x))
def test_gradients_that_are_not_wanted(guarded, device, small_tiles, wanted):
    small_tiles(16, 16, split=wanted[1])
    case = Case((1, 1, 20, 18, 16), device=device)
    visible = torch.ones(1, 1, 20, 18, dtype=torch.bool)
    results = found(case.tensors, (True,) * 3, (True, True), 0.25, wanted=wanted)
    near(results, exact(case.tensors, (True,) * 3, (True, True), 0.25, visible), wanted)


def test_no_residues_without_gradients(device):
    """Where no gradient is wanted nothing is kept of what rounding took."""
    from jvp_attention import launch

    given = a_problem(Case((1, 1, 4, 5, 16), torch.float16, device=device).tensors, scale=0.25)
    results, fewer = (launch.run(launch.forward_calls(given, keep)) for keep in (True, False))
    assert results.o_residual.numel() == results.do_residual.numel() == results.o.numel()
    assert fewer.o_residual.numel() == fewer.do_residual.numel() == 0
    for name in ("o", "do", "lse", "mu"):
        assert torch.equal(getattr(results, name), getattr(fewer, name))


def dots(monkeypatch, work) -> dict[str, int]:
    """Matmuls per launch, counted while the interpreter runs one tile with another."""
    from triton.runtime import interpreter

    from jvp_attention import launch

    count, per_call = [0], {}
    original, multiply = launch.Call.launch, interpreter.InterpreterBuilder.create_dot

    def counted(self, *arguments):
        count[0] += 1
        return multiply(self, *arguments)

    def launched(self, tiles):
        before = count[0]
        original(self, tiles)
        per_call[self.name] = count[0] - before

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(launch.Call, "launch", launched)
    launch.run(work)
    return per_call


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
def test_matmuls_of_the_forward(device, small_tiles, monkeypatch, tangents, matmuls):
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    small_tiles(16, 16)
    from jvp_attention import launch

    given = a_problem(Case((1, 1, 16, 16, 16)).tensors, tangents)
    assert dots(monkeypatch, launch.forward_calls(given)) == {"forward_dual": matmuls}


@pytest.mark.parametrize(("tangents", "gradients", "wanted", "matmuls"), BACKWARD_MATMULS)
def test_matmuls_of_the_backward(device, small_tiles, monkeypatch, tangents, gradients, wanted, matmuls):
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    small_tiles(16, 16)
    from jvp_attention import launch

    *tensors, go, gdo = Case((1, 1, 16, 16, 16)).tensors
    given = a_problem(tensors, tangents)
    results = launch.run(launch.forward_calls(given))
    work = launch.backward_calls(given, results, go if gradients[0] else None, gdo, [bool(w) for w in wanted])
    assert sum(dots(monkeypatch, work).values()) == matmuls


SHARED = [(True, False), (False, True)]  # by batch elements, by heads


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
    ("kind", "shared", "split"),
    [
        ("rows", (False, True), True),
        pytest.param("rows", (True, False), False, marks=SLOW),
        *(pytest.param(kind, shared, shared[1], marks=SLOW) for kind in ("drawn", "blocks") for shared in SHARED),
    ],
    ids=str,
)
def test_masks(guarded, device, small_tiles, kind, shared, split):
    """[B or 1, H or 1, N, M]: pairs that are hidden have no part; a query that sees nothing gives zero."""
    small_tiles(16, 16, split=split)
    b, h, n, m = 2, 2, 33, 18
    case = Case((b, h, n, m, 16), device=device)
    mask = a_mask(kind, *(1 if s else size for s, size in zip(shared, (b, h), strict=True)), n, m)
    results = found(case.tensors, (True,) * 3, (True, True), 0.25, mask=mask.to(device))
    near(results, exact(case.tensors, (True,) * 3, (True, True), 0.25, mask.expand(b, h, n, m)))


@pytest.mark.slow
def test_masks_with_lengths_and_causal_and_any_strides(guarded, device, small_tiles):
    small_tiles(16, 32)
    b, h, n, m = 2, 2, 40, 35
    case = Case((b, h, n, m, 16), device=device)
    mask = a_mask("drawn", 1, 1, m, n).mT.expand(b, h, n, m)
    lengths = torch.tensor([7, 35])
    visible = mask & torch.ones(n, m, dtype=torch.bool).tril() & (torch.arange(m) < lengths[:, None])[:, None, None]
    options = {"mask": mask.to(device), "causal": True, "lengths": lengths.to(device)}
    results = found(case.tensors, (True,) * 3, (True, True), 0.25, **options)
    near(results, exact(case.tensors, (True,) * 3, (True, True), 0.25, visible))


def test_tiles_that_see_nothing_are_passed_over(device, small_tiles, monkeypatch):
    """Of 3 x 3 tiles the 3 on the diagonal are multiplied."""
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    small_tiles(16, 16)
    from jvp_attention import launch

    *tensors, go, gdo = Case((1, 1, 48, 48, 16)).tensors
    given = a_problem(tensors, mask=a_mask("blocks", 1, 1, 48, 48))
    forward = launch.forward_calls(given)
    assert dots(monkeypatch, forward) == {"forward_dual": 3 * 6}
    work = launch.backward_calls(given, forward[1], go, gdo)
    assert dots(monkeypatch, work) == {"query_dual": 3 * 9, "key_dual": 3 * 12}


@pytest.mark.parametrize(
    ("group", "causal"), [(2, True), *(pytest.param(*x, marks=SLOW) for x in ((2, False), (3, True), (3, False)))]
)
def test_groups_of_heads_share_keys(guarded, device, small_tiles, group, causal):
    """Heads h of q meet head h // group of k and v, whose gradients are sums over the group."""
    small_tiles(16, 16, split=causal)
    b = group - 1
    queries = Case((b, 2 * group, 20, 24, 16), device=device).tensors
    keys = Case((b, 2, 20, 24, 16), device=device, seed=1).tensors
    tensors = [keys[i] if i in (1, 2, 4, 5) else queries[i] for i in range(8)]
    visible = torch.ones(20, 24, dtype=torch.bool)
    visible = (visible.tril() if causal else visible).expand(b, 2 * group, 20, 24)
    lengths = torch.tensor([24] * b, device=device)
    results = found(tensors, (True,) * 3, (True, True), 0.25, causal=causal, lengths=lengths)
    near(results, exact(tensors, (True,) * 3, (True, True), 0.25, visible))


@pytest.mark.slow
def test_negative_and_zero_scales_with_hidden_keys(device, small_tiles):
    """Zero times the infinity of a hidden key would be NaN."""
    small_tiles(16, 16)
    case = Case((1, 1, 20, 20, 16), device=device)
    visible = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    for scale in (0.0, -1.0, math.pi):
        results = found(case.tensors, (True,) * 3, (True, True), scale, causal=True)
        near(results, exact(case.tensors, (True,) * 3, (True, True), scale, visible))
