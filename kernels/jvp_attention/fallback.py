"""Plain PyTorch in place of the kernels, on any device and in any dtype.

Without tangents PyTorch's own fused attention answers. With tangents the kernels' formulas are written out, in chunks
of queries: only a chunk's rows of the N x M matrices are held at a time, so memory grows with N and M, not with their
product. Half precision is computed in float32. A tangent or gradient that is absent is zeros expanded from one row.

What is written out changes nothing in place and computes what it needs from the inputs, not from what a forward left,
so that PyTorch can differentiate it: that is how derivatives are found that the kernels do not know.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from jvp_attention.layout import Results, nothing, number_type, rows_in_order, zero_rows
from jvp_attention.reference import hidden_keys, one_per_query_head, to_length
from jvp_attention.shapes import Given

CHUNK = 2**18  # elements of each of a chunk's matrices, over all batch elements and heads, so that they fit a cache
FEWEST_ROWS = 32  # of a chunk: matmuls of fewer are slow
LOG2_E = math.log2(math.e)


def forward(given: Given, keep: bool) -> Results:
    """Compute attention, and its derivative if there is a tangent."""
    given = trim(given)
    return written_out(given, keep) if given.has_tangent else _pytorchs_attention(given)


def backward(given: Given, results: Results, go: Tensor | None, gdo: Tensor | None, wanted: list[bool]) -> list[Tensor]:
    """Compute the wanted ones among the gradients of q, k, v, dq, dk, dv from those of o and do."""
    if gdo is None and go is not None and _tells_lse(given.q):  # the tangents have no part in o
        found = _pytorchs_gradients(trim(given), results, go)
    else:
        found = _gradients(trim(given), go, gdo, wanted)
    return _like_inputs(found, given, wanted)


def trim(given: Given) -> Given:
    """Leave out the keys beyond the greatest length, where to read that does not wait for a GPU."""
    if given.lengths is None or given.lengths.device.type != "cpu" or not given.lengths.numel():
        return given
    visible = slice(0, min(max(int(given.lengths.max()), 1), given.k.shape[2]))
    return given._replace(
        k=given.k[:, :, visible],
        v=given.v[:, :, visible],
        dk=None if given.dk is None else given.dk[:, :, visible],
        dv=None if given.dv is None else given.dv[:, :, visible],
        mask=None if given.mask is None else given.mask[..., visible],
    )


# Ordinary attention: PyTorch's own. On a CPU that is the operator below scaled_dot_product_attention, since only that
# returns the lse that its backward takes; elsewhere gradients are written out.


class _Plain(NamedTuple):
    """Arguments of scaled_dot_product_attention, and which queries see no key (their results are made zero)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # 0 or -inf; 0 for queries that see no key, lest NaN results
    blind: Tensor | None
    scale: float  # positive, as the sign of another is multiplied into q
    factor: float  # of q


def _plain(given: Given) -> _Plain:
    factor, scale = (1.0, given.scale) if given.scale > 0 else (given.scale, 1.0)
    q = rows_in_order(given.q if given.scale > 0 else given.scale * given.q)
    k, v = (rows_in_order(one_per_query_head(to_length(x, given.lengths), q)) for x in (given.k, given.v))
    rows = torch.arange(q.shape[2], device=q.device)
    hidden = hidden_keys(rows, k.shape[2], False, given.lengths, given.mask)
    if hidden is None:
        return _Plain(q, k, v, None, None, scale, factor)
    causal = given.causal and given.mask is not None  # with lengths alone a query that sees any key sees the first
    causally = hidden_keys(rows, k.shape[2], causal, given.lengths, given.mask)
    blind = (hidden if causally is None else causally).all(-1, keepdim=True)
    hidden = hidden & ~blind
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    return _Plain(q, k, v, bias, blind, scale, factor)


def _tells_lse(q: Tensor) -> bool:
    """Return whether PyTorch's attention runs by the operator that returns lse, which its backward takes."""
    return q.device.type == "cpu" and q.numel() > 0


def _pytorchs_attention(given: Given) -> Results:
    x, causal = _plain(given), given.causal
    if _tells_lse(x.q):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            x.q, x.k, x.v, is_causal=causal, attn_mask=x.bias, scale=x.scale
        )
    else:
        bias = x.bias
        if causal and bias is not None:  # of which scaled_dot_product_attention takes one
            later = torch.ones(x.q.shape[2], x.k.shape[2], dtype=torch.bool, device=x.q.device).triu(1)
            bias, causal = bias.masked_fill(later, float("-inf")), False
        o = scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias, is_causal=causal, scale=x.scale)
        lse = x.q.new_zeros(x.q.shape[:3], dtype=number_type(x.q))  # which nothing reads
    return Results.plain(o if x.blind is None else o.masked_fill(x.blind, 0), (lse * LOG2_E).contiguous())


def _pytorchs_gradients(given: Given, results: Results, go: Tensor) -> list[Tensor | None]:
    x = _plain(given)
    go = go if x.blind is None else go.masked_fill(x.blind, 0)
    gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(rows_in_order(go), x.q, x.k, x.v, results.o, results.lse / LOG2_E, 0.0, given.causal),
        attn_mask=x.bias,
        scale=x.scale,
    )
    return [x.factor * gq, gk, gv, None, None, None]


# Written out


class _Problem(NamedTuple):
    """Inputs and tangents, zeros if absent, in float32 at least and with as many heads of keys as of queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    scale: float
    causal: bool

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Cut the queries into chunks, each with the keys that are visible to any of them."""
        (b, h, n, _), m = self.q.shape, self.k.shape[2]
        size = max(FEWEST_ROWS, CHUNK // max(1, b * h * m))
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield slice(start, stop), slice(0, min(stop, m) if self.causal else m)


def written_out(given: Given, keep: bool) -> Results:
    """Compute attention and its derivative, formula by formula."""
    x = _problem(given)
    parts = []
    for rows, keys in x.chunks():
        p, u, lse, mu = _weights(x, rows, keys)
        v, dv = x.v[:, :, keys], x.dv[:, :, keys]
        parts.append((p @ v, (p * u) @ v + p @ dv, lse * LOG2_E, mu))  # o; do = (P * (T - mu)) v + P dv
    o, do, lse, mu = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    dtype = given.q.dtype
    if not given.has_tangent:
        return Results.plain(o.to(dtype), lse)
    rounded = keep and dtype.itemsize < 4
    o_residual, do_residual = ((y - y.to(dtype)).to(dtype) if rounded else nothing(given.q) for y in (o, do))
    mu = mu if given.logits_have_tangent else nothing(lse)
    return Results(o.to(dtype), do.to(dtype), o_residual, do_residual, lse, mu)


def gradients_written_out(given: Given, *others: Any) -> list[Tensor]:
    """Compute what `backward` does, formula by formula, from its arguments."""
    *_, go, gdo, wanted = others
    return _like_inputs(_gradients(given, go, gdo, wanted), given, wanted)


def _gradients(given: Given, go: Tensor | None, gdo: Tensor | None, wanted: list[bool]) -> list[Tensor | None]:
    x = _problem(given)
    upstream = [zero_rows(x.q) if g is None else g.to(x.q.dtype) for g in (go, gdo)]
    of_queries: list[list[Tensor | None]] = []
    of_keys: list[Tensor | None] = [None] * 4
    for rows, keys in x.chunks():
        a, b = (g[:, :, rows] for g in upstream)
        gq, gk, gv, gdq, gdk, gdv = _gradients_of_chunk(x, rows, keys, a, b, wanted)
        of_queries.append([gq, gdq])  # rows of this chunk only, while to the keys all chunks add
        of_keys = [_add(total, part, x.k) for total, part in zip(of_keys, (gk, gv, gdk, gdv), strict=True)]
    gq, gdq = (None if parts[0] is None else torch.cat(parts, 2) for parts in zip(*of_queries, strict=True))
    gk, gv, gdk, gdv = of_keys
    return [gq, gk, gv, gdq, gdk, gdv]


def _add(total: Tensor | None, part: Tensor | None, k: Tensor) -> Tensor | None:
    """Add a chunk's gradient of the first keys to the total; both are None where they are not wanted."""
    if part is None:
        return None
    part = pad(part, (0, 0, 0, k.shape[2] - part.shape[2]))
    return part if total is None else total + part


def _gradients_of_chunk(
    x: _Problem, rows: slice, keys: slice, go: Tensor, gdo: Tensor, wanted: list[bool]
) -> list[Tensor | None]:
    """Compute what some queries' rows of go and gdo add to the gradients of q, k, v, dq, dk, dv."""
    q, dq, k, dk, v, dv = x.q[:, :, rows], x.dq[:, :, rows], *(y[:, :, keys] for y in (x.k, x.dk, x.v, x.dv))
    p, u, *_ = _weights(x, rows, keys)
    a = go @ v.mT + gdo @ dv.mT  # A, the gradient of P at a fixed T
    c = gdo @ v.mT  # C, the gradient of P * U
    gt = p * (c - (p * c).sum(-1, keepdim=True))  # of T
    gs = gt * u + p * (a - (p * (a + u * c)).sum(-1, keepdim=True))  # of S
    formulas = (
        lambda: x.scale * (gs @ k + gt @ dk),
        lambda: x.scale * (gs.mT @ q + gt.mT @ dq),
        lambda: p.mT @ go + (p * u).mT @ gdo,
        lambda: x.scale * (gt @ k),
        lambda: x.scale * (gt.mT @ q),
        lambda: p.mT @ gdo,
    )
    return [formula() if want else None for formula, want in zip(formulas, wanted, strict=True)]


def _weights(x: _Problem, rows: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute P and U = T - mu [B, H, n, m], lse and mu [B, H, n] of some queries."""
    q, dq = x.scale * x.q[:, :, rows], x.scale * x.dq[:, :, rows]
    k, dk = x.k[:, :, keys], x.dk[:, :, keys]
    s = q @ k.mT
    indices = torch.arange(rows.start, rows.stop, device=q.device)
    mask = None if x.mask is None else x.mask[..., keys]
    hidden = hidden_keys(indices, k.shape[2], x.causal, x.lengths, mask)
    if hidden is not None:
        blind = hidden.all(-1, keepdim=True)
        s = s.masked_fill(hidden & ~blind, float("-inf"))
    p = s.softmax(-1)
    lse = s.amax(-1) - p.amax(-1).log()
    if hidden is not None:
        p = p.masked_fill(blind, 0)
    t = dq @ k.mT + q @ dk.mT
    mu = (p * t).sum(-1, keepdim=True)
    return p, t - mu, lse, mu.squeeze(-1)


def _problem(given: Given) -> _Problem:
    dtype, lengths = number_type(given.q), given.lengths
    q, k, v = given.q.to(dtype), given.k, given.v
    dq, dk, dv = (zero_rows(x) if dx is None else dx for x, dx in ((q, given.dq), (k, given.dk), (v, given.dv)))
    k, v, dk, dv = (one_per_query_head(to_length(x, lengths), q).to(dtype) for x in (k, v, dk, dv))
    return _Problem(q, k, v, dq.to(dtype), dk, dv, lengths, given.mask, given.scale, given.causal)


def _like_inputs(gradients: list[Tensor | None], given: Given, wanted: list[bool]) -> list[Tensor]:
    """Return gradients in the shape and dtype of their inputs; `nothing` for those that are not wanted."""
    return [
        _like_input(g, x) if want and g is not None else torch.zeros_like(x) if want else nothing(x)
        for g, x, want in zip(gradients, (given.q, given.k, given.v) * 2, wanted, strict=True)
    ]


def _like_input(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[1] != x.shape[1]:  # heads that share keys add to their gradient
        gradient = gradient.unflatten(1, (x.shape[1], -1)).sum(2)
    return pad(gradient, (0, 0, 0, x.shape[2] - gradient.shape[2])).to(x.dtype)
