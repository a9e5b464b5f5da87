"""The forward kernel: attention and, if inputs have tangents, its Jacobian-vector product in the same pass.

With the equation numbers of the paper (arXiv 2511.19797, appendix C; its alpha is `scale` here, its dots are d), the
elementwise product *, and queries as rows:

    S = scale q k^T; P = softmax(S); o = P v                       (75)
    T = scale (dq k^T + q dk^T); mu = row sum of P * T             (79)
    do = (P * (T - mu)) v + P dv = (P * T) v + P dv - mu o         the derivative of (75), with N = T - mu of (78)

The softmax is online: P has a factor that depends on the largest logit so far, and all sums over keys are rescaled when
that grows. Matmuls per tile of keys: 2, 6 with all tangents, 5 with two, 4 with dq or dk only, 3 with dv only.
"""

import triton
import triton.language as tl

from jvp_attention.rows import (
    LOG2_E,
    keep_up_to,
    load_mask,
    load_rows,
    partial_sums,
    row_max,
    row_sum,
    store_numbers,
    store_rows,
    tile_of_program,
    visible_keys,
    visible_tiles,
)


@triton.heuristics({"WHOLE_KEYS": lambda a: a["M"] % a["KEYS"] == 0 and a["lengths"] is None and a["mask"] is None})
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
    o_residual,
    do_residual,
    lse,
    mu,
    lengths,
    mask,
    tiles,
    scale,
    heads,
    N,
    M,
    GROUP: tl.constexpr,  # heads of q that share one of k and v
    D: tl.constexpr,
    UNIT: tl.constexpr,  # unit of strides, in elements (see rows.py)
    CAUSAL: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,  # all keys of every tile are visible: M is a multiple of KEYS, no lengths, no mask
    PRECISION: tl.constexpr,  # how float32 matmuls are computed; no effect on 16-bit ones
    QUERIES: tl.constexpr,  # queries per tile
    KEYS: tl.constexpr,  # keys per tile
    CHANNELS: tl.constexpr,  # D rounded up to a size that a tile may have
):
    """Attend from one tile of queries to all keys. Grid: tiles of queries x heads x batch.

    q, dq and the outputs o, do [B, H, N, D] and k, v, dk, dv [B, H / GROUP, M, D] come with strides (see rows.py).
    Tangents that are None are zero; do is None without any, mu without dq and dk. o_residual and do_residual, if not
    None, receive the rounding residuals of o and do. lse, log2 of the sum of exp(S) over keys, and mu are float32
    [B, H, N], for the backward. lengths [B], if not None, hides keys from lengths[b] on. mask [B, H, N, M], if not
    None, hides the pairs where it is zero, and tiles lists the tiles of keys that it leaves. A negative scale comes
    with q and dq negated (see launch.py), so only its size counts here.
    """
    DUAL: tl.constexpr = do is not None
    HAS_T: tl.constexpr = mu is not None
    start, b, h, head = tile_of_program(N, heads, QUERIES, CAUSAL)
    h_k = h // GROUP
    dtype = q[0].dtype.element_ty
    ROUNDED: tl.constexpr = dtype.primitive_bitwidth == 16
    rows = start + tl.arange(0, QUERIES)
    size = tl.abs(scale)
    factor = tl.maximum(size * LOG2_E, 1e-30)  # not 0, because 0 times the -inf of a hidden key is NaN
    q_tile = load_rows(q, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)  # q k^T so far
    total = tl.full([QUERIES, 8], 0.0, tl.float32)  # sum of P, in eight partial sums
    sum_pv = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)
    if DUAL:
        sum_do = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)  # (P * T) v + P dv
    if HAS_T:
        sum_pt = tl.full([QUERIES, 8], 0.0, tl.float32)  # mu (79), for the backward
        if ROUNDED:
            sum_rounded = tl.full([QUERIES, 8], 0.0, tl.float32)  # the same of P * T rounded to 16 bits, for do
            ones = tl.full([KEYS, 8], 1.0, dtype)
        else:
            origin = tl.full([QUERIES], 0.0, tl.float32)  # the sums are those of T - origin
    if dq is not None:
        dq_tile = load_rows(dq, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    visible = visible_keys(lengths, b, M)
    count = ((tl.minimum(visible, start + QUERIES) if CAUSAL else visible) + KEYS - 1) // KEYS
    if mask is not None:
        listed = visible_tiles(tiles, b, h, start, QUERIES)
        count = tl.load(listed)
    # T is computed before the exponential; in the other order the compiler spills 5 KB of registers before sm_90
    for i in range(0, count):
        at = i * KEYS  # first key of the tile
        if mask is not None:
            at = tl.load(listed + 1 + i) * KEYS
        k_tile = load_rows(k, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # S / scale (75)
        keys = at + tl.arange(0, KEYS)
        if CAUSAL:
            s = keep_up_to(s, keys[None, :], rows[:, None], at + KEYS > start + 1)
        if not WHOLE_KEYS:
            s = keep_up_to(s, keys[None, :], visible - 1, at + KEYS > visible)
        if mask is not None:
            s = tl.where(load_mask(mask, b, h, start, N, at, M, QUERIES, KEYS), s, float("-inf"))
        if HAS_T:
            t = tl.full([QUERIES, KEYS], 0.0, tl.float32)  # T / scale (79)
            if dq is not None:
                t = tl.dot(dq_tile, tl.trans(k_tile), t, input_precision=PRECISION)
            if dk is not None:
                dk_tile = load_rows(dk, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
                t = tl.dot(q_tile, tl.trans(dk_tile), t, input_precision=PRECISION)
        before = largest
        largest = tl.maximum(before, row_max(s))
        shift = tl.where(largest == float("-inf"), 0.0, largest * factor)  # -inf: no key visible so far
        p = tl.exp2(s * factor - shift[:, None])  # P up to a factor per row: not yet divided by its sum
        shrink = tl.exp2(before * factor - shift)  # rescales the sums so far to the new maximum
        if HAS_T:
            t *= size
            if not ROUNDED:
                # do depends only on T - mu, so subtract the mu of the keys so far from T before summing, where large
                # terms would cancel. Not in 16 bits: it costs a sixth more arithmetic, and rounding P * T loses more
                weight = row_sum(total) * shrink + row_sum(p)
                step = row_sum(p * (t - origin[:, None])) / tl.maximum(weight, 0.5)  # 1 or more, once a key is visible
                sum_pt -= step[:, None] * total
                sum_do -= step[:, None] * sum_pv
                origin += step
                t -= origin[:, None]
        total = total * shrink[:, None] + partial_sums(p)
        v_tile = load_rows(v, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        if DUAL:
            sum_do = sum_do * shrink[:, None]
        if HAS_T:  # (P * T) v
            exact = p * t
            pt = exact.to(dtype)
            sum_pt = sum_pt * shrink[:, None] + partial_sums(exact)  # unrounded, so that T - mu cancels in the backward
            if ROUNDED:
                # rounded, so that (P * T) v - mu o cancels in do; a matmul, because that takes pt as it is
                sum_rounded = tl.dot(pt, ones, sum_rounded * shrink[:, None])
            sum_do = tl.dot(pt, v_tile, sum_do, input_precision=PRECISION)
        if dv is not None:  # P dv
            dv_tile = load_rows(dv, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
            sum_do = tl.dot(p.to(dtype), dv_tile, sum_do, input_precision=PRECISION)
        sum_pv = tl.dot(p.to(dtype), v_tile, sum_pv * shrink[:, None], input_precision=PRECISION)
    # all keys are summed: divide by the softmax's denominator, then subtract mu o
    shift = largest * factor
    total = row_sum(total)
    if HAS_T:
        sum_pt = row_sum(sum_pt)
    if lengths is not None or mask is not None:
        shift = tl.where(total == 0, 0.0, shift)
        total = tl.where(total == 0, 1.0, total)  # no key is visible: the sums are 0, so o and do are 0
    value = sum_pv / total[:, None]
    store_rows(o, value, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
    store_numbers(lse, shift + tl.log2(total), head, start, N, QUERIES)
    if o_residual is not None:
        rounded = value.to(dtype).to(tl.float32)
        store_rows(o_residual, value - rounded, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
    if DUAL:
        tangent = sum_do / total[:, None]  # (P * T) v + P dv
        if HAS_T:
            mean = row_max(sum_rounded) if ROUNDED else sum_pt  # the columns of sum_rounded are equal
            tangent -= (mean / total)[:, None] * value  # - mu o
            mu_rows = sum_pt / total
            if not ROUNDED:
                mu_rows += origin
            store_numbers(mu, mu_rows, head, start, N, QUERIES)
        store_rows(do, tangent, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
        if do_residual is not None:
            store_rows(
                do_residual, tangent - tangent.to(dtype).to(tl.float32), b, h, start, N, D, UNIT, QUERIES, CHANNELS
            )
