"""The backward kernels: gradients of q, k, v, and with tangents dq, dk, dv theirs too.

Given the gradients go of o and gdo of do, with U = T - mu and row sums from what the forward left,
    c = row sum of gdo * o;  r = row sum of go * o + gdo * do
a tile of S, P and T is computed again and
    A = go v^T + gdo dv^T;  gT = P * (gdo v^T - c);  gS = gT * U + P * (A - r)
    gq = scale (gS k + gT dk);  gk = scale (gS^T q + gT^T dq);  gv = P^T go + (P * U)^T gdo
    gdq = scale gT k;           gdk = scale gT^T q;             gdv = P^T gdo
Products of matrices per tile, plain and with tangents: queries' side 3 and 9; keys' side 4 and 12, or 9 for gk, gdk
and 6 for gv, gdv when these are two launches.
"""

import triton
import triton.language as tl

from jvp_attention.rows import LOG2_E, keys_seen, load_numbers, load_rows, place, row_sum, store_numbers, store_rows


@triton.jit
def row_sum_kernel(
    go,
    gdo,
    o,
    do,
    o_low,
    do_low,
    c,
    r,
    heads,
    N,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of strides
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The sums c and r [B H, N], o and do taken with what rounding took. Grid: tiles of queries x heads x batch."""
    start, b, h, head = place(N, heads, QUERIES)
    value = load_rows(o, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
    g_value = load_rows(go, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
    if o_low is not None:
        value += load_rows(o_low, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
    r_sums = row_sum(g_value * value)
    if gdo is not None:
        tangent = load_rows(do, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
        g_tangent = load_rows(gdo, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
        if o_low is not None:
            tangent += load_rows(do_low, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
        r_sums += row_sum(g_tangent * tangent)
        store_numbers(c, row_sum(g_tangent * value), head, start, N, QUERIES)
    store_numbers(r, r_sums, head, start, N, QUERIES)


@triton.heuristics({"WHOLE_KEYS": lambda a: a["M"] % a["KEYS"] == 0 and a["lengths"] is None})
@triton.jit
def query_kernel(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    go,
    gdo,
    lse,
    mu,
    c,
    r,
    gq,
    gdq,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one tile of queries, over all keys. Grid: tiles of queries x heads x batch.

    Without tangents dq, dk, dv, gdo, mu, c, gdq are None; lengths, if not None, hide keys from lengths[b] on.
    """
    start, b, h, head = place(N, heads, QUERIES)
    dtype = q[0].dtype.element_ty
    rows = start + tl.arange(0, QUERIES)
    q_tile = load_rows(q, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    go_tile = load_rows(go, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    lse_rows = load_numbers(lse, head, start, N, QUERIES)[:, None]
    r_rows = load_numbers(r, head, start, N, QUERIES)[:, None]
    sum_q = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)
    if dq is not None:
        dq_tile = load_rows(dq, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
        gdo_tile = load_rows(gdo, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
        mu_rows = load_numbers(mu, head, start, N, QUERIES)[:, None]
        c_rows = load_numbers(c, head, start, N, QUERIES)[:, None]
        sum_dq = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)
    seen = keys_seen(lengths, b, M)
    end = tl.minimum(seen, start + QUERIES) if CAUSAL else seen
    for at in range(0, end, KEYS):
        k_tile = load_rows(k, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        v_tile = load_rows(v, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2_E)
        keys = at + tl.arange(0, KEYS)
        if CAUSAL:
            s = tl.where(keys[None, :] <= rows[:, None], s, float("-inf"))
        if not WHOLE_KEYS:
            s = tl.where((keys < seen)[None, :], s, float("-inf"))
        p = tl.exp2(s - lse_rows)
        a = tl.dot(go_tile, tl.trans(v_tile), input_precision=PRECISION)
        if dq is not None:
            dk_tile = load_rows(dk, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
            dv_tile = load_rows(dv, b, h, at, seen, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
            a = tl.dot(gdo_tile, tl.trans(dv_tile), a, input_precision=PRECISION)
            t = tl.dot(dq_tile, tl.trans(k_tile), input_precision=PRECISION)
            t = tl.dot(q_tile, tl.trans(dk_tile), t, input_precision=PRECISION)
            gt = p * (tl.dot(gdo_tile, tl.trans(v_tile), input_precision=PRECISION) - c_rows)
            gs = gt * (t * scale - mu_rows) + p * (a - r_rows)
            sum_q = tl.dot(gt.to(dtype), dk_tile, sum_q, input_precision=PRECISION)
            sum_dq = tl.dot(gt.to(dtype), k_tile, sum_dq, input_precision=PRECISION)
        else:
            gs = p * (a - r_rows)
        sum_q = tl.dot(gs.to(dtype), k_tile, sum_q, input_precision=PRECISION)
    store_rows(gq, sum_q * scale, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
    if dq is not None:
        store_rows(gdq, sum_dq * scale, b, h, start, N, D, UNIT, QUERIES, CHANNELS)


@triton.heuristics({"WHOLE_QUERIES": lambda a: a["N"] % a["QUERIES"] == 0})
@triton.jit
def key_kernel(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    go,
    gdo,
    lse,
    mu,
    c,
    r,
    gk,
    gv,
    gdk,
    gdv,
    lengths,
    scale,
    heads,
    N,
    M,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # of strides
    CAUSAL: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,  # N is a multiple of QUERIES
    PRECISION: tl.constexpr,  # of float32 products; in 16 bits there is one way
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one tile of keys and values, over all queries. Grid: tiles of keys x heads x batch.

    Without tangents dq, dk, dv, gdo, mu, c, gdk, gdv are None. Where gk and gdk, or gv and gdv, are None the others
    are computed.

    Works on transposed tiles [KEYS, QUERIES], made as k q^T: transposing the result of a product to use it in another
    has been miscompiled for Hopper. Queries beyond the end read as zeros, so go, gdo, c and r are zero there and they
    add nothing. lengths, if not None, hide keys from lengths[b] on,
    whose gradients are zero.
    """
    start, b, h, head = place(M, heads, KEYS)
    dtype = q[0].dtype.element_ty
    keys = start + tl.arange(0, KEYS)
    seen = keys_seen(lengths, b, M)
    k_tile = load_rows(k, b, h, start, seen, D, UNIT, KEYS, CHANNELS, False)
    if dq is not None:
        dk_tile = load_rows(dk, b, h, start, seen, D, UNIT, KEYS, CHANNELS, False)
    if gk is not None:
        v_tile = load_rows(v, b, h, start, seen, D, UNIT, KEYS, CHANNELS, False)
        sum_k = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
        if dq is not None:
            dv_tile = load_rows(dv, b, h, start, seen, D, UNIT, KEYS, CHANNELS, False)
            sum_dk = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
    if gv is not None:
        sum_v = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
        if dq is not None:
            sum_dv = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
    begin = start // QUERIES * QUERIES if CAUSAL else 0
    end = N
    if lengths is not None:
        end = tl.where(start < seen, N, 0)
    for at in range(begin, end, QUERIES):
        q_tile = load_rows(q, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
        go_tile = load_rows(go, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2_E)
        if CAUSAL:
            rows = at + tl.arange(0, QUERIES)
            s = tl.where(keys[:, None] <= rows[None, :], s, float("-inf"))
        if lengths is not None:
            s = tl.where((keys < seen)[:, None], s, float("-inf"))
        p = tl.exp2(s - load_numbers(lse, head, at, N, QUERIES)[None, :])
        if dq is not None:
            dq_tile = load_rows(dq, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
            gdo_tile = load_rows(gdo, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
            t = tl.dot(k_tile, tl.trans(dq_tile), input_precision=PRECISION)
            t = tl.dot(dk_tile, tl.trans(q_tile), t, input_precision=PRECISION)
            u = t * scale - load_numbers(mu, head, at, N, QUERIES)[None, :]
        if gv is not None:
            sum_v = tl.dot(p.to(dtype), go_tile, sum_v, input_precision=PRECISION)
            if dq is not None:
                sum_v = tl.dot((p * u).to(dtype), gdo_tile, sum_v, input_precision=PRECISION)
                sum_dv = tl.dot(p.to(dtype), gdo_tile, sum_dv, input_precision=PRECISION)
        if gk is not None:
            a = tl.dot(v_tile, tl.trans(go_tile), input_precision=PRECISION)
            if dq is not None:
                a = tl.dot(dv_tile, tl.trans(gdo_tile), a, input_precision=PRECISION)
            gs = p * (a - load_numbers(r, head, at, N, QUERIES)[None, :])
            if dq is not None:
                gt = tl.dot(v_tile, tl.trans(gdo_tile), input_precision=PRECISION)
                gt = p * (gt - load_numbers(c, head, at, N, QUERIES)[None, :])
                gs += gt * u
                sum_k = tl.dot(gt.to(dtype), dq_tile, sum_k, input_precision=PRECISION)
                sum_dk = tl.dot(gt.to(dtype), q_tile, sum_dk, input_precision=PRECISION)
            sum_k = tl.dot(gs.to(dtype), q_tile, sum_k, input_precision=PRECISION)
    if gk is not None:
        store_rows(gk, sum_k * scale, b, h, start, M, D, UNIT, KEYS, CHANNELS)
        if dq is not None:
            store_rows(gdk, sum_dk * scale, b, h, start, M, D, UNIT, KEYS, CHANNELS)
    if gv is not None:
        store_rows(gv, sum_v, b, h, start, M, D, UNIT, KEYS, CHANNELS)
        if dq is not None:
            store_rows(gdv, sum_dv, b, h, start, M, D, UNIT, KEYS, CHANNELS)
