"""Attention and its Jacobian-vector product in plain PyTorch: the specification of the kernels, and their stand-in.

Any dtype, any device, any derivative that PyTorch can form: torch.func.jvp, vmap, double backward. N x M matrices are
held in memory.
"""

import torch
from torch import Tensor

from jvp_attention.shapes import Keys, Queries, default_scale


def attention(q: Queries, k: Keys, v: Keys, *, scale: float | None = None, causal: bool = False) -> Queries:
    """softmax(scale q k^T) v [B, H, N, D]; scale is 1/sqrt(D) unless given; causal: query i sees keys 0 to i."""
    return _probabilities(q, k, default_scale(q, scale), causal) @ v


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
) -> tuple[Queries, Queries]:
    """Attention and its derivative along the tangents dq, dk, dv, written out: o and do, both [B, H, N, D].

    With P = softmax(scale q k^T) and T = scale (dq k^T + q dk^T), o = P v and
    do = (P * (T - mu)) v + P dv, where mu is the row sum of P * T.
    """
    scale = default_scale(q, scale)
    p = _probabilities(q, k, scale, causal)  # [B, H, N, M]
    t = (dq @ k.mT + q @ dk.mT) * scale
    mu = (p * t).sum(-1, keepdim=True)
    return p @ v, (p * (t - mu)) @ v + p @ dv


def _probabilities(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T) [B, H, N, M]."""
    logits = (q @ k.mT) * scale
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(-1)
