"""Plain PyTorch in place of the kernels, on any device and in any dtype.

Without tangents PyTorch's own fused attention is used (pytorchs.py). With tangents the kernels' formulas are written
out, in chunks of queries: only a chunk's rows of the N x M matrices are held at a time, so memory grows with N and M,
not with their product. Float16 is computed in float32. An absent tangent or gradient is one row of zeros,
expanded.

For bfloat16 inputs the logits are computed in float32. Other matmuls take and return 16 bits: in every other N x M
matrix only differences within a row matter, so a number near the row's mean is subtracted before rounding.

The written-out formulas use only the inputs, no results of the forward, and change nothing in place where PyTorch is
to differentiate them: they provide the derivatives that the kernels lack.
"""

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from jvp_attention import pytorchs
from jvp_attention.layout import Results, nothing, number_type, zero_rows
from jvp_attention.reference import hidden_keys, one_per_query_head, to_length
from jvp_attention.shapes import Given

CHUNK = 2**20  # elements of each of a chunk's matrices, so that they fit a cache
FEWEST_ROWS = 64  # per chunk: matmuls with fewer rows are slow


def forward(given: Given, keep: bool) -> Results:
    """Compute attention, and its derivative if there is a tangent."""
    given = trim(given)
    return _dual(_problem(given), given, keep) if given.has_tangent else pytorchs.attention(given)


def backward(given: Given, results: Results, go: Tensor | None, gdo: Tensor | None, wanted: list[bool]) -> list[Tensor]:
    """Compute the wanted ones among the gradients of q, k, v, dq, dk, dv from those of o and do."""
    trimmed = trim(given)
    if gdo is None and go is not None and pytorchs.tells_lse(given.q):  # o does not depend on the tangents
        if given.has_tangent:  # and the forward with tangents computed no lse
            results = pytorchs.attention(trimmed)
        found = pytorchs.gradients(trimmed, results, go)
    else:
        found = _gradients(_problem(trimmed, go, gdo), wanted)
    return _like_inputs(found, given, wanted)


def trim(given: Given) -> Given:
    """Leave out the keys beyond the greatest length, where reading it does not wait for a GPU."""
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


class _Problem(NamedTuple):
    """Inputs of the formulas: zeros for absent ones, as many heads of k as of q.

    In bfloat16 if the inputs are and PyTorch is not to differentiate, so that all matmuls except that of S have 16-bit
    operands; else in float32 or wider.
    """

    q: Tensor  # q and dq side by side [B, H, N, 2 D]
    k: Tensor  # dk, k: q, dq times their transpose is T / scale
    v: Tensor  # dv, v
    g: Tensor  # gdo, go: g times the transpose of v is A
    lengths: Tensor | None
    mask: Tensor | None
    visible: Tensor | None  # which keys are visible to any query [B or 1, H or 1, M, 1], where not all are
    scale: float
    causal: bool
    differentiated: bool

    def part(self, axis: int, at: slice) -> "_Problem":
        """Take some of the batch elements (axis 0) or of the heads (axis 1)."""
        index = (slice(None),) * axis + (at,)
        tensors = (x[index] for x in self[:4])
        lengths, options = self.lengths, self[7:]
        if lengths is not None and axis == 0:
            lengths = lengths[at]
        masks = (x if x is None or x.shape[axis] == 1 else x[index] for x in (self.mask, self.visible))
        return _Problem(*tensors, lengths, *masks, *options)  # type: ignore[arg-type, call-arg]

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype of sums."""
        return number_type(self.q)

    @property
    def channels(self) -> int:
        """Return D."""
        return self.k.shape[-1] // 2

    def rows(self) -> int:
        """Return how many queries a chunk has."""
        rows = CHUNK // self.k.shape[2] // (4 if self.causal else 1)  # small chunks skip more of the hidden keys
        return min(self.q.shape[2], max(FEWEST_ROWS, rows))

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Cut the queries into chunks, each with the keys that are visible to any of them."""
        (n, m), size = (self.q.shape[2], self.k.shape[2]), self.rows()
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield slice(start, stop), slice(0, min(stop, m) if self.causal else m)


def _in_parts(x: _Problem, compute: Callable[[_Problem], list[Any]]) -> list[Any]:
    """Compute results [B, H, ...], or None, for as many batch elements or heads at a time as a chunk has space for."""
    batch, heads = x.q.shape[:2]
    axis, matrices = (0, heads) if batch > 1 else (1, 1)
    size = max(1, CHUNK // max(1, matrices * x.rows() * x.k.shape[2]))
    count = x.q.shape[axis]
    if count <= size:
        return compute(x)
    parts = [_in_parts(x.part(axis, slice(i, i + size)), compute) for i in range(0, count, size)]
    return [None if part[0] is None else torch.cat(part, axis) for part in zip(*parts, strict=True)]


def written_out(given: Given, keep: bool) -> Results:
    """Compute attention and its derivative so that PyTorch can differentiate both."""
    return _dual(_problem(given, differentiated=True), given, keep)


def _dual(x: _Problem, given: Given, keep: bool) -> Results:
    o, do = _in_parts(x, _value_and_tangent)
    dtype = given.q.dtype
    rounded = keep and dtype.itemsize < 4
    o_residual, do_residual = ((y - y.to(dtype)).to(dtype) if rounded else nothing(given.q) for y in (o, do))
    lse = o.new_zeros(o.shape[:3])  # nothing reads it, nor mu
    mu = torch.zeros_like(lse) if given.logits_have_tangent else nothing(lse)
    return Results(o.to(dtype), do.to(dtype), o_residual, do_residual, lse, mu)


def _value_and_tangent(x: _Problem) -> list[Tensor]:
    """Compute o = P v and do = (P * U) v + P dv."""
    parts = []
    centred_v = _less_mean(x, x.v[..., x.channels :])
    for rows, keys in x.chunks():
        p, t = _probabilities(x, rows, keys)
        p = p.to(x.q.dtype)
        do, o = (p @ x.v[:, :, keys]).to(x.wide).chunk(2, -1)
        parts.append((o, do + _softmax_vjp(x, p, t) @ centred_v[:, :, keys]))
    return [torch.cat(part, 2) for part in zip(*parts, strict=True)]


def gradients_written_out(given: Given, *others: Any) -> list[Tensor]:
    """Compute what `backward` does, from its arguments, so that PyTorch can differentiate it."""
    *_, go, gdo, wanted = others
    return _like_inputs(_gradients(_problem(given, go, gdo, differentiated=True), wanted), given, wanted)


def _gradients(x: _Problem, wanted: list[bool]) -> list[Tensor | None]:
    return _in_parts(x, partial(_gradients_of_part, wanted=wanted))


def _gradients_of_part(x: _Problem, wanted: list[bool]) -> list[Tensor | None]:
    of_queries: list[list[Tensor | None]] = []
    of_keys: list[Tensor | None] = [None] * 4
    centred_k = _less_mean(x, x.k).roll(x.channels, -1)  # k, dk
    for rows, keys in x.chunks():
        gq, gk, gv, gdq, gdk, gdv = _gradients_of_chunk(x, centred_k[:, :, keys], rows, keys, wanted)
        of_queries.append([gq, gdq])  # this chunk's rows; the keys' gradients are sums over all chunks
        of_keys = [_add(total, part, x.k) for total, part in zip(of_keys, (gk, gv, gdk, gdv), strict=True)]
    gq, gdq = (None if parts[0] is None else torch.cat(parts, 2) for parts in zip(*of_queries, strict=True))
    gk, gv, gdk, gdv = of_keys
    return [gq, gk, gv, gdq, gdk, gdv]


def _add(total: Tensor | None, part: Tensor | None, k: Tensor) -> Tensor | None:
    """Add a chunk's gradient of the first keys to the total; both are None where they are not wanted."""
    if part is None:
        return None
    part = _pad_keys(part, k.shape[2])
    return part if total is None else total + part


def _gradients_of_chunk(
    x: _Problem, centred_k: Tensor, rows: slice, keys: slice, wanted: list[bool]
) -> list[Tensor | None]:
    """Compute what some queries' rows of go and gdo add to the gradients of q, k, v, dq, dk, dv."""
    q, g, v, d = x.q[:, :, rows], x.g[:, :, rows], x.v[:, :, keys], x.channels
    p, t = _probabilities(x, rows, keys)
    pu, u = _centre(x, p, t.to(x.wide))
    a = _times_keys(x, g, v).to(x.wide)  # A = go v^T + gdo dv^T, the gradient of P at a fixed T
    c = _times_keys(x, g[..., :d], v[..., d:]).to(x.wide)  # C = gdo v^T, the gradient of P * U
    gt, c = _centre(x, p, c)  # of T
    gs = _softmax_vjp(x, p, torch.addcmul(a, c, u) if x.differentiated else a.addcmul_(c, u))  # of S

    p, pu, gt, gs = (y.to(q.dtype) for y in (p, pu, gt, gs))
    gq, gdq = _two_matmuls(operator.matmul, gs, gt, centred_k) if wanted[0] or wanted[3] else (None, None)
    gk, gdk = _two_matmuls(_transposed_matmul, gs, gt, q) if wanted[1] or wanted[4] else (None, None)
    gv, gdv = _two_matmuls(_transposed_matmul, pu, p, g) if wanted[2] or wanted[5] else (None, None)
    gq, gdq, gk, gdk = (None if y is None else x.scale * y for y in (gq, gdq, gk, gdk))
    return [y if want else None for y, want in zip((gq, gk, gv, gdq, gdk, gdv), wanted, strict=True)]


def _two_matmuls(matmul: Callable[[Tensor, Tensor], Tensor], m: Tensor, n: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
    """Compute M a + N b and N a, in float32 at least, for a and b side by side."""
    of_a, of_b = matmul(n, ab).to(number_type(ab)).chunk(2, -1)
    return matmul(m, ab.chunk(2, -1)[0]) + of_b, of_a


def _transposed_matmul(m: Tensor, a: Tensor) -> Tensor:
    """Compute M^T a, which as (a^T M)^T is faster on a CPU."""
    return (a.mT @ m).mT


def _less_mean(x: _Problem, keys: Tensor) -> Tensor:
    """Subtract the mean from keys or values that multiply rows of zero sum, where it would only add rounding errors."""
    return (keys - _mean(x, keys)).to(keys.dtype)


def _mean(x: _Problem, keys: Tensor) -> Tensor:
    """Compute the mean of the visible keys or values, in float32 or wider: [B, H, 1, ...]."""
    if x.visible is None:
        return keys.mean(2, keepdim=True, dtype=x.wide)
    visible = x.visible[:, :, : keys.shape[2]].to(x.wide)
    return (visible * keys).sum(2, keepdim=True) / visible.sum(2, keepdim=True).clamp(min=1)


def _times_keys(x: _Problem, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """Compute factor a b^T for keys or values b, in bfloat16 minus one number per row.

    A bfloat16 matmul rounds its result, so the part from b's mean is subtracted first. That changes nothing: each row's
    mean under P is subtracted later anyway. 8 bits suffice for the rest, as for P and the gradients.
    """
    if a.dtype != torch.bfloat16:
        return (factor * a) @ b.mT
    of_mean = (factor * a) @ _mean(x, b).mT.to(a.dtype)
    result = torch.baddbmm(of_mean.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1).mT, beta=-1, alpha=factor)
    return result.unflatten(0, a.shape[:2])


def _centre(x: _Problem, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute P * (Y - m) and Y - m for a new matrix Y, with m the row sums of P * Y."""
    mean = (p * y).sum(-1, keepdim=True)
    y = y - mean if x.differentiated else y.sub_(mean)
    return p * y, y


def _softmax_vjp(x: _Problem, p: Tensor, y: Tensor) -> Tensor:
    """Compute P * (Y - m) in one pass, for which PyTorch has no forward-mode rule."""
    return _centre(x, p, y)[0] if x.differentiated else torch._softmax_backward_data(y, p, -1, p.dtype)


def _probabilities(x: _Problem, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    """Compute P and T [B, H, n, m] of some queries."""
    q, k, d = x.q[:, :, rows], x.k[:, :, keys], x.channels
    s = (x.scale * q[..., :d].to(x.wide)) @ k[..., d:].to(x.wide).mT
    indices = torch.arange(rows.start, rows.stop, device=q.device)
    mask = None if x.mask is None else x.mask[..., keys]
    hidden = hidden_keys(indices, k.shape[2], x.causal, x.lengths, mask)
    if hidden is not None:
        blind = hidden.all(-1, keepdim=True)
        s = s.masked_fill(hidden & ~blind, float("-inf"))
    p = s.softmax(-1)
    if hidden is not None:
        p = p.masked_fill(blind, 0)
    return p, _times_keys(x, q, k, x.scale)


def _problem(
    given: Given, go: Tensor | None = None, gdo: Tensor | None = None, *, differentiated: bool = False
) -> _Problem:
    rounded = given.q.dtype == torch.bfloat16 and not differentiated
    dtype, lengths = given.q.dtype if rounded else number_type(given.q), given.lengths
    q, k, v = given.q.to(dtype), given.k, given.v
    dq, dk, dv = (zero_rows(x) if dx is None else dx for x, dx in ((q, given.dq), (k, given.dk), (v, given.dv)))
    k, v, dk, dv = (one_per_query_head(to_length(x, lengths), q).to(dtype) for x in (k, v, dk, dv))
    go, gdo = (zero_rows(q) if g is None else g.to(dtype) for g in (go, gdo))
    visible = None if given.mask is None else given.mask.any(2)[..., None]
    if lengths is not None:
        within = (torch.arange(k.shape[2], device=k.device) < lengths[:, None])[:, None, :, None]
        visible = within if visible is None else visible & within
    q, k, v, g = (torch.cat(pair, -1) for pair in ((q, dq.to(dtype)), (dk, k), (dv, v), (gdo, go)))
    return _Problem(q, k, v, g, lengths, given.mask, visible, given.scale, given.causal, differentiated)


def _like_inputs(gradients: list[Tensor | None], given: Given, wanted: list[bool]) -> list[Tensor]:
    """Return gradients in the shape and dtype of their inputs; `nothing` for those that are not wanted."""
    return [
        _like_input(g, x) if want and g is not None else torch.zeros_like(x) if want else nothing(x)
        for g, x, want in zip(gradients, (given.q, given.k, given.v) * 2, wanted, strict=True)
    ]


def _like_input(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[1] != x.shape[1]:  # heads that share keys sum their gradients
        gradient = gradient.unflatten(1, (x.shape[1], -1)).sum(2)
    return _pad_keys(gradient, x.shape[2]).to(x.dtype)


def _pad_keys(x: Tensor, count: int) -> Tensor:
    """Append rows of zeros up to a count; return x itself, not `pad`'s copy, if it has as many."""
    return x if x.shape[2] == count else pad(x, (0, 0, 0, count - x.shape[2]))
