"""Ordinary attention by PyTorch's own operators, where the kernels cannot run.

On a CPU this is the operator below scaled_dot_product_attention, the only one that returns the lse that its backward
takes; elsewhere gradients are written out.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from jvp_attention.layout import Results, number_type, rows_in_order
from jvp_attention.reference import hidden_keys, one_per_query_head, to_length
from jvp_attention.shapes import Given


class _Plain(NamedTuple):
    """Arguments of scaled_dot_product_attention, and which queries see no key (their results are made zero)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # 0 or -inf; 0 for queries that see no key, for which it would give NaN
    blind: Tensor | None
    scale: float  # positive: the sign of a negative one is multiplied into q
    factor: float  # of q


def _plain(given: Given) -> _Plain:
    factor, scale = (1.0, given.scale) if given.scale > 0 else (given.scale, 1.0)
    q = rows_in_order(given.q if given.scale > 0 else given.scale * given.q)
    k, v = (rows_in_order(one_per_query_head(to_length(x, given.lengths), q)) for x in (given.k, given.v))
    rows = torch.arange(q.shape[2], device=q.device)
    hidden = hidden_keys(rows, k.shape[2], False, given.lengths, given.mask)
    if hidden is None:
        return _Plain(q, k, v, None, None, scale, factor)
    causal = given.causal and given.mask is not None  # with only lengths, a query that sees any key sees the first
    causally = hidden_keys(rows, k.shape[2], causal, given.lengths, given.mask)
    blind = (hidden if causally is None else causally).all(-1, keepdim=True)
    hidden = hidden & ~blind
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    return _Plain(q, k, v, bias, blind, scale, factor)


def tells_lse(q: Tensor) -> bool:
    """Return whether PyTorch's attention runs by the operator that returns lse, which its backward takes."""
    return q.device.type == "cpu" and q.numel() > 0


def attention(given: Given) -> Results:
    """Compute attention, whatever tangents there are; its lse is natural."""
    x, causal = _plain(given), given.causal
    if tells_lse(x.q):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            x.q, x.k, x.v, is_causal=causal, attn_mask=x.bias, scale=x.scale
        )
    else:
        bias = x.bias
        if causal and bias is not None:  # scaled_dot_product_attention takes only one of them
            later = torch.ones(x.q.shape[2], x.k.shape[2], dtype=torch.bool, device=x.q.device).triu(1)
            bias, causal = bias.masked_fill(later, float("-inf")), False
        o = scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias, is_causal=causal, scale=x.scale)
        lse = x.q.new_zeros(x.q.shape[:3], dtype=number_type(x.q))  # nothing reads it
    return Results.plain(o if x.blind is None else o.masked_fill(x.blind, 0), lse.contiguous())


def gradients(given: Given, results: Results, go: Tensor) -> list[Tensor | None]:
    """Compute the gradients of q, k, v, and None for the tangents, from that of o, where `tells_lse`."""
    x = _plain(given)
    go = go if x.blind is None else go.masked_fill(x.blind, 0)
    gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(rows_in_order(go), x.q, x.k, x.v, results.o, results.lse, 0.0, given.causal),
        attn_mask=x.bias,
        scale=x.scale,
    )
    return [gq if x.factor == 1 else x.factor * gq, gk, gv, None, None, None]
