"""Attention and its Jacobian-vector product in plain PyTorch: the specification of the kernels.

Any dtype, any device, any derivative that PyTorch can form: torch.func.jvp, vmap, double backward. N x M matrices are
held in memory.
"""

import functools

import torch
from torch import Tensor

from jvp_attention.shapes import Keys, Lengths, Mask, Queries, default_scale


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Lengths | None = None,
    mask: Mask | None = None,
) -> Queries:
    """Compute softmax(scale q k^T) v [B, H, N, D]; scale is 1/sqrt(D) unless given; causal: query i sees keys 0 to i.

    With lengths queries of batch element b see keys 0 to lengths[b]-1 at most, with a mask those where it is true;
    queries that see no key give zero. Where k and v have G < H heads, each serves H/G heads of q in a row.
    """
    k, v = (one_per_query_head(to_length(x, lengths), q) for x in (k, v))
    return _probabilities(q, k, default_scale(q, scale), causal, lengths, mask) @ v


def dual_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    dq: Queries,
    dk: Keys,
    dv: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Lengths | None = None,
    mask: Mask | None = None,
) -> tuple[Queries, Queries]:
    """Compute attention and its derivative along dq, dk, dv, written out: o and do, both [B, H, N, D].

    With P = softmax(scale q k^T) and T = scale (dq k^T + q dk^T), o = P v and
    do = (P * (T - mu)) v + P dv, where mu is the row sum of P * T (arXiv 2511.19797, appendix C, equations 75 to 87).
    """
    scale = default_scale(q, scale)
    k, v, dk, dv = (one_per_query_head(to_length(x, lengths), q) for x in (k, v, dk, dv))
    p = _probabilities(q, k, scale, causal, lengths, mask)  # [B, H, N, M]
    # the logits' tangent, by the product rule; the softmax turns it into P * (T - mu), whose rows sum to zero
    t = (dq @ k.mT + q @ dk.mT) * scale
    mu = (p * t).sum(-1, keepdim=True)
    return p @ v, (p * (t - mu)) @ v + p @ dv


def to_length(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Make rows of keys or values x [B, G, M, D] zero from lengths[b] on: not even NaN has an influence there."""
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]  # [B, M]
    return x.masked_fill(beyond[:, None, :, None], 0)


def one_per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of x [B, G, M, D] so that there are as many as of q [B, H, N, D]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def hidden_keys(rows: Tensor, keys: int, causal: bool, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return which keys the queries with the indices `rows` [n] do not see, [B or 1, H or 1, n or 1, M], or None."""
    at = torch.arange(keys, device=rows.device)
    hidden = []
    if causal:
        hidden.append((at > rows[:, None])[None, None])
    if lengths is not None:
        hidden.append((at >= lengths[:, None])[:, None, None])
    if mask is not None:
        hidden.append(~mask.index_select(2, rows))
    return functools.reduce(torch.logical_or, hidden) if hidden else None


def softmax_of_visible(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """Return the softmax over the keys that are visible; zeros for a query that sees none."""
    if hidden is None:
        return logits.softmax(-1)
    # a row of only -inf would give NaN, so such rows are left as they are and set to zero afterwards
    blind = hidden.all(-1, keepdim=True)
    return logits.masked_fill(hidden & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0)


def _probabilities(
    q: Tensor, k: Tensor, scale: float, causal: bool, lengths: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Compute softmax(scale q k^T) [B, H, N, M] over the visible keys."""
    rows = torch.arange(q.shape[2], device=q.device)
    return softmax_of_visible((q @ k.mT) * scale, hidden_keys(rows, k.shape[2], causal, lengths, mask))
