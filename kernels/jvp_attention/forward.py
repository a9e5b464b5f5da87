"""The forward kernel: attention, and with tangents its Jacobian-vector product in the same pass.

S = scale q k^T; P = softmax(S); T = scale (dq k^T + q dk^T); mu = row sum of P * T
o = P v; do = (P * T) v + P dv - mu o

The softmax is taken online: P carries a factor that depends on the largest logit so far, and everything summed over
keys is rescaled when that grows. Products of matrices per tile: 2, with tangents 6.
"""

import triton
import triton.language as tl

from jvp_attention.rows import LOG2_E, keys_seen, load_rows, place, row_max, row_sum, store_numbers, store_rows


@triton.heuristics({"WHOLE_KEYS": lambda a: a["M"] % a["KEYS"] == 0 and a["lengths"] is None})
@triton.jit
def forward_kernel(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    o,
    do,
    o_low,
    do_low,
    lse,
    mu,
    lengths,
    scale,
    heads,
    N,
    M,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of strides
    CAUSAL: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,  # all keys of every tile are seen: M is a multiple of KEYS, no lengths
    PRECISION: tl.constexpr,  # of float32 products; in 16 bits there is one way
    QUERIES: tl.constexpr,  # per tile
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,  # D, or the next size that a tile may have
):
    """One tile of queries against all keys. Grid: tiles of queries x heads x batch.

    Without tangents dq, dk, dv, do, mu are None. o_low and do_low, if not None, take what o and do lose in rounding;
    lse is the logarithm to base 2 of the sum of exp(S). lengths, if not None, hide keys from lengths[b] on.
    """
    start, b, h, head = place(N, heads, QUERIES)
    dtype = q[0].dtype.element_ty
    rows = start + tl.arange(0, QUERIES)
    q_tile = load_rows(q, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.full([QUERIES], 0.0, tl.float32)
    sum_pv = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)
    if dq is not None:
        dq_tile = load_rows(dq, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
        sum_pt = tl.full([QUERIES], 0.0, tl.float32)  # for mu
        sum_rounded = tl.full([QUERIES], 0.0, tl.float32)  # for do
        sum_do = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)  # (P * T) v + P dv
    seen = keys_seen(lengths, b, M)
    end = tl.minimum(seen, start + QUERIES) if CAUSAL else seen
    for at in range(0, end, KEYS):
        k_tile = load_rows(k, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
        keys = at + tl.arange(0, KEYS)
        if CAUSAL:
            s = tl.where(keys[None, :] <= rows[:, None], s, float("-inf"))
        if not WHOLE_KEYS:
            s = tl.where((keys < seen)[None, :], s, float("-inf"))
        if dq is not None:
            dk_tile = load_rows(dk, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
            t = tl.dot(dq_tile, tl.trans(k_tile), input_precision=PRECISION)
            t = tl.dot(q_tile, tl.trans(dk_tile), t, input_precision=PRECISION)
        before = largest
        largest = tl.maximum(before, row_max(s))
        p = tl.exp2(s - largest[:, None])
        shrink = tl.exp2(before - largest)
        total = total * shrink + row_sum(p)
        v_tile = load_rows(v, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        if dq is not None:
            exact = p * (t * scale)
            pt = exact.to(dtype)
            sum_pt = sum_pt * shrink + row_sum(exact)  # so that T - mu cancels in the backward
            sum_rounded = sum_rounded * shrink + row_sum(pt.to(tl.float32))  # so that (P * T) v - mu o does here
            dv_tile = load_rows(dv, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
            sum_do = tl.dot(pt, v_tile, sum_do * shrink[:, None], input_precision=PRECISION)
            sum_do = tl.dot(p.to(dtype), dv_tile, sum_do, input_precision=PRECISION)
        sum_pv = tl.dot(p.to(dtype), v_tile, sum_pv * shrink[:, None], input_precision=PRECISION)
    if lengths is not None:
        total = tl.where(total == 0, 1.0, total)  # no key seen: all sums are zero, and so are the results
    value = sum_pv / total[:, None]
    store_rows(o, value, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
    store_numbers(lse, largest + tl.log2(total), head, start, N, QUERIES)
    if o_low is not None:
        store_rows(o_low, value - value.to(dtype).to(tl.float32), b, h, start, N, D, UNIT, QUERIES, CHANNELS)
    if dq is not None:
        tangent = sum_do / total[:, None] - (sum_rounded / total)[:, None] * value
        store_rows(do, tangent, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
        store_numbers(mu, sum_pt / total, head, start, N, QUERIES)
        if o_low is not None:
            store_rows(do_low, tangent - tangent.to(dtype).to(tl.float32), b, h, start, N, D, UNIT, QUERIES, CHANNELS)
