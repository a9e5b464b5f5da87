"""Plain PyTorch in place of the kernels: the same four operations, in chunks of queries.

Only a chunk's rows of the N x M matrices are held at a time, so memory grows with N and M, not with their product.
Nothing is written in place, and a backward computes what it needs from the inputs rather than from what the forward
left, so PyTorch can differentiate these functions: that is how derivatives are found that the kernels do not know.
Half precision is computed in float32. The formulas are those of the README.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jvp_attention.reference import hidden_keys, one_per_query_head, softmax_of_seen, to_length

LARGEST_CHUNK = 2**22  # elements of a chunk's matrices over all batch elements and heads, unless one row has more
LOG2_E = math.log2(math.e)


class Problem(NamedTuple):
    """Inputs and tangents of attention, in float32 at least, as many heads of keys as of queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    scale: float
    causal: bool

    def chunks(self) -> Iterator[slice]:
        """Cut the queries into chunks."""
        (b, h, n, _), m = self.q.shape, self.k.shape[2]
        size = max(1, LARGEST_CHUNK // max(1, b * h * m))
        return (slice(at, min(at + size, n)) for at in range(0, n, size))

    def weights(self, rows: slice) -> "Weights":
        """Compute lse, P and, if q or k has a tangent, mu and U = T - mu of some queries."""
        q, dq = self.q[:, :, rows], some(self.dq, rows)
        indices = torch.arange(rows.start, rows.stop, device=q.device)
        hidden = hidden_keys(indices, self.k.shape[2], self.causal, self.lengths, self.mask)
        s = self.scale * (q @ self.k.mT)
        p = softmax_of_seen(s, hidden)
        lse = s if hidden is None else s.masked_fill(hidden, float("-inf"))
        t = total(None if dq is None else dq @ self.k.mT, None if self.dk is None else q @ self.dk.mT)
        if t is None:
            return Weights(lse.logsumexp(-1), p)
        t = self.scale * t
        mu = (p * t).sum(-1, keepdim=True)
        return Weights(lse.logsumexp(-1), p, mu.squeeze(-1), t - mu)


class Weights(NamedTuple):
    """What the softmax makes of one chunk of queries."""

    lse: Tensor  # [B, H, n]
    p: Tensor  # P [B, H, n, M]
    mu: Tensor | None = None  # row sums of P * T [B, H, n]
    u: Tensor | None = None  # U = T - mu, where T is the tangent of the logits


def some(x: Tensor | None, rows: slice) -> Tensor | None:
    """Take some rows of a tensor that may be absent."""
    return None if x is None else x[:, :, rows]


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two tensors of which either may be absent, and then is zero."""
    return b if a is None else a if b is None else a + b


def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Multiply two matrices of which either may be absent, and then is zero."""
    return None if a is None or b is None else a @ b


def times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Multiply two tensors element by element of which either may be absent, and then is zero."""
    return None if a is None or b is None else a * b


def transposed(a: Tensor | None) -> Tensor | None:
    """Transpose a matrix that may be absent."""
    return None if a is None else a.mT


def scaled(scale: float, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two tensors of which either may be absent, times a number."""
    found = total(a, b)
    return None if found is None else scale * found


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> Problem:
    """Gather the inputs, in the dtype that is computed in and with the keys' heads repeated."""
    dtype = torch.promote_types(q.dtype, torch.float32)

    def of_keys(x: Tensor) -> Tensor:
        return one_per_query_head(to_length(x, lengths), q).to(dtype)

    dq = None if dq is None else dq.to(dtype)
    dk, dv = (None if x is None else of_keys(x) for x in (dk, dv))
    return Problem(q.to(dtype), of_keys(k), of_keys(v), dq, dk, dv, lengths, mask, scale, causal)


def forward(given: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute o and do [B, H, N, D], lse to base 2 and mu [B, H, N]."""
    parts = []
    for rows in given.chunks():
        w = given.weights(rows)
        o = w.p @ given.v
        do = total(product(times(w.p, w.u), given.v), product(w.p, given.dv))
        mu = torch.zeros_like(w.lse) if w.mu is None else w.mu
        parts.append((o, torch.zeros_like(o) if do is None else do, (w.lse * LOG2_E).float(), mu.float()))
    o, do, lse, mu = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return o, do, lse, mu


def gradients(given: Problem, go: Tensor | None, gdo: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
    """Compute the wanted ones among the gradients of q, k, v, dq, dk, dv from those of o and do."""
    go, gdo = (None if g is None else g.to(given.q.dtype) for g in (go, gdo))
    of_queries: list[list[Tensor]] = []
    of_keys: list[Tensor | None] = [None] * 4
    for rows in given.chunks():
        found = _gradients_of_chunk(given, rows, some(go, rows), some(gdo, rows), wanted)
        of_queries.append([x for x in (found[0], found[3]) if x is not None])
        of_keys = [total(a, b) for a, b in zip(of_keys, (found[1], found[2], found[4], found[5]), strict=True)]
    joined = iter([torch.cat(x, 2) for x in zip(*of_queries, strict=True)])
    gk, gv, gdk, gdv = of_keys
    return [next(joined) if wanted[0] else None, gk, gv, next(joined) if wanted[3] else None, gdk, gdv]


def _gradients_of_chunk(
    given: Problem, rows: slice, go: Tensor | None, gdo: Tensor | None, wanted: list[bool]
) -> list[Tensor | None]:
    """Compute what some queries' rows of go and gdo add to the wanted gradients of q, k, v, dq, dk, dv."""
    q, dq = given.q[:, :, rows], some(given.dq, rows)
    w = given.weights(rows)
    a = total(product(go, given.v.mT), product(gdo, transposed(given.dv)))  # A
    gs = None if a is None else w.p * (a - (w.p * a).sum(-1, keepdim=True))
    gt = None
    if gdo is not None:
        c = gdo @ given.v.mT  # C
        gt = w.p * (c - (w.p * c).sum(-1, keepdim=True))
        if w.u is not None:
            gs = total(gs, gt * w.u - w.p * (w.p * w.u * c).sum(-1, keepdim=True))
    sides = (
        lambda: scaled(given.scale, product(gs, given.k), product(gt, given.dk)),
        lambda: scaled(given.scale, product(transposed(gs), q), product(transposed(gt), dq)),
        lambda: total(product(w.p.mT, go), product(transposed(times(w.p, w.u)), gdo)),
        lambda: scaled(given.scale, product(gt, given.k), None),
        lambda: scaled(given.scale, product(transposed(gt), q), None),
        lambda: product(w.p.mT, gdo),
    )
    return [side() if want else None for side, want in zip(sides, wanted, strict=True)]


def like_input(gradient: Tensor | None, x: Tensor) -> Tensor:
    """Return a gradient in the dtype and with the heads of the input x; zeros if it is absent."""
    if gradient is None:
        return torch.zeros_like(x)
    if gradient.shape[1] != x.shape[1]:
        gradient = gradient.unflatten(1, (x.shape[1], -1)).sum(2)
    return gradient.to(x.dtype)
