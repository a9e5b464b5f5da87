"""Attention and its Jacobian-vector product in plain PyTorch: the specification of the kernels, and their stand-in.

Any dtype, any device, any derivative that PyTorch can form: torch.func.jvp, vmap, double backward. N x M matrices are
held in memory.
"""

import torch
from torch import Tensor

from jvp_attention.shapes import Keys, Lengths, Queries, default_scale


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Lengths | None = None,
) -> Queries:
    """softmax(scale q k^T) v [B, H, N, D]; scale is 1/sqrt(D) unless given; causal: query i sees keys 0 to i.

    With lengths queries of batch element b see keys 0 to lengths[b]-1 at most; those that see none give zero.
    """
    k, v = (_to_length(x, lengths) for x in (k, v))
    return _probabilities(q, k, default_scale(q, scale), causal, lengths) @ v


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
) -> tuple[Queries, Queries]:
    """Attention and its derivative along the tangents dq, dk, dv, written out: o and do, both [B, H, N, D].

    With P = softmax(scale q k^T) and T = scale (dq k^T + q dk^T), o = P v and
    do = (P * (T - mu)) v + P dv, where mu is the row sum of P * T (arXiv 2511.19797, appendix C, equations 75 to 87).
    """
    scale = default_scale(q, scale)
    k, v, dk, dv = (_to_length(x, lengths) for x in (k, v, dk, dv))
    p = _probabilities(q, k, scale, causal, lengths)  # [B, H, N, M]
    t = (dq @ k.mT + q @ dk.mT) * scale
    mu = (p * t).sum(-1, keepdim=True)
    return p @ v, (p * (t - mu)) @ v + p @ dv


def _to_length(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows of keys or values x [B, H, M, D], from lengths[b] on zeros: not even NaN has an influence there."""
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]  # [B, M]
    return x.masked_fill(beyond[:, None, :, None], 0)


def _probabilities(q: Tensor, k: Tensor, scale: float, causal: bool, lengths: Tensor | None) -> Tensor:
    """softmax(scale q k^T) [B, H, N, M] over the keys that are seen; with a length of 0 that is key 0, made zero."""
    logits = (q @ k.mT) * scale
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, float("-inf"))
    if lengths is not None:
        beyond = torch.arange(k.shape[2], device=q.device) >= lengths.clamp(min=1)[:, None]  # [B, M]
        logits = logits.masked_fill(beyond[:, None, None], float("-inf"))
    return logits.softmax(-1)
