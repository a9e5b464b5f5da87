"""The backward kernels: gradients of q, k, v and, if there are tangents, of dq, dk, dv.

With the equation numbers of the paper (arXiv 2511.19797, appendix C); go and gdo are the gradients of o and do. The
paper takes the gradients through o from another backward; here one pass gives both. Its row sums (76) and (77) run
over pairs; here they follow from the forward's results, without a pass over pairs:

    c = row sum of gdo * o                              (76)
    r = row sum of go * o + gdo * do                    (77), and what ordinary attention subtracts

A tile of S, P and T is computed again (78, 79), and with U = T - mu (N of 78) and A = go v^T + gdo dv^T

    gT = P * (gdo v^T - c)                              the factor that (80) to (83) share
    gS = gT * U + P * (A - r)                           the factor of (84) and (85)
    gq = scale (gS k + gT dk)                           (85, 82)      gdq = scale gT k        (83)
    gk = scale (gS^T q + gT^T dq)                       (84, 80)      gdk = scale gT^T q      (81)
    gv = P^T go + (P * U)^T gdo                         (87)          gdv = P^T gdo           (86)

Matmuls per tile, plain and with tangents: queries' side 3 and 9; keys' side 4 and 12, or 9 for gk, gdk and 6 for gv,
gdv when these are two launches. Tangents that are zero and gradients that are not wanted are None, and their matmuls
are left out: without dq and dk, T, mu, gT and U are zero.
"""

import triton
import triton.language as tl

from jvp_attention.rows import (
    LOG2_E,
    keep_up_to,
    load_mask,
    load_numbers,
    load_rows,
    row_sum,
    store_numbers,
    store_rows,
    tile_of_program,
    visible_keys,
    visible_tiles,
)


@triton.jit
def row_sums(
    go_tile,
    gdo_tile,
    o,
    do,
    o_residual,
    do_residual,
    b,
    h,
    start,
    N,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute the sums c and r [QUERIES] of a tile of queries, o and do with their rounding residuals."""
    value = load_rows(o, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
    if o_residual is not None:
        value += load_rows(o_residual, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
    r = tl.full([QUERIES], 0.0, tl.float32)
    c = tl.full([QUERIES], 0.0, tl.float32)
    if go_tile is not None:
        r += row_sum(go_tile.to(tl.float32) * value)
    if gdo_tile is not None:
        tangent = load_rows(do, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
        if do_residual is not None:
            tangent += load_rows(do_residual, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False).to(tl.float32)
        r += row_sum(gdo_tile.to(tl.float32) * tangent)
        c += row_sum(gdo_tile.to(tl.float32) * value)
    return c, r


@triton.jit
def row_sum_kernel(
    go,
    gdo,
    o,
    do,
    o_residual,
    do_residual,
    c,
    r,
    heads,
    N,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # unit of strides, in elements (see rows.py)
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute the sums c and r [B H, N] where no query_kernel runs. Grid: tiles of queries x heads x batch."""
    start, b, h, head = tile_of_program(N, heads, QUERIES, False)
    go_tile = None
    gdo_tile = None
    if go is not None:
        go_tile = load_rows(go, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    if gdo is not None:
        gdo_tile = load_rows(gdo, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    c_rows, r_rows = row_sums(
        go_tile, gdo_tile, o, do, o_residual, do_residual, b, h, start, N, D, UNIT, QUERIES, CHANNELS
    )
    store_numbers(r, r_rows, head, start, N, QUERIES)
    if c is not None:
        store_numbers(c, c_rows, head, start, N, QUERIES)


@triton.heuristics({"WHOLE_KEYS": lambda a: a["M"] % a["KEYS"] == 0 and a["lengths"] is None and a["mask"] is None})
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
    o,
    do,
    o_residual,
    do_residual,
    lse,
    mu,
    c,
    r,
    gq,
    gdq,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one tile of queries, over all keys, and its sums c and r. Grid: tiles of queries x heads x batch.

    dq, dk, dv, go, gdo are None where they are zero, gq and gdq where they are not wanted; mu without dq and dk, c
    without gdo too. lengths, mask and tiles are those of forward_kernel.
    """
    HAS_T: tl.constexpr = mu is not None  # T and gT are not zero
    start, b, h, head = tile_of_program(N, heads, QUERIES, CAUSAL)
    h_k = h // GROUP
    dtype = q[0].dtype.element_ty
    rows = start + tl.arange(0, QUERIES)
    size = tl.abs(scale)
    factor = tl.maximum(size * LOG2_E, 1e-30)
    q_tile = load_rows(q, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    go_tile = None
    gdo_tile = None
    if go is not None:
        go_tile = load_rows(go, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    if gdo is not None:
        gdo_tile = load_rows(gdo, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    c_rows, r_rows = row_sums(
        go_tile, gdo_tile, o, do, o_residual, do_residual, b, h, start, N, D, UNIT, QUERIES, CHANNELS
    )
    store_numbers(r, r_rows, head, start, N, QUERIES)
    lse_rows = load_numbers(lse, head, start, N, QUERIES)[:, None]
    if dq is not None and gq is not None:
        dq_tile = load_rows(dq, b, h, start, N, D, UNIT, QUERIES, CHANNELS, False)
    if gq is not None:
        sum_q = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)
    if HAS_T:
        store_numbers(c, c_rows, head, start, N, QUERIES)
        if gq is not None:
            mu_rows = load_numbers(mu, head, start, N, QUERIES)[:, None]
    if gdq is not None:
        sum_dq = tl.full([QUERIES, CHANNELS], 0.0, tl.float32)
    visible = visible_keys(lengths, b, M)
    count = ((tl.minimum(visible, start + QUERIES) if CAUSAL else visible) + KEYS - 1) // KEYS
    if mask is not None:
        listed = visible_tiles(tiles, b, h, start, QUERIES)
        count = tl.load(listed)
    for i in range(0, count):
        at = i * KEYS
        if mask is not None:
            at = tl.load(listed + 1 + i) * KEYS
        k_tile = load_rows(k, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        v_tile = load_rows(v, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        keys = at + tl.arange(0, KEYS)
        if CAUSAL:
            s = keep_up_to(s, keys[None, :], rows[:, None], at + KEYS > start + 1)
        if not WHOLE_KEYS:
            s = keep_up_to(s, keys[None, :], visible - 1, at + KEYS > visible)
        if mask is not None:
            s = tl.where(load_mask(mask, b, h, start, N, at, M, QUERIES, KEYS), s, float("-inf"))
        p = tl.exp2(s * factor - lse_rows)  # P (78)
        if gq is not None:
            a = tl.full([QUERIES, KEYS], 0.0, tl.float32)
            if go is not None:
                a = tl.dot(go_tile, tl.trans(v_tile), a, input_precision=PRECISION)
            if dv is not None:
                dv_tile = load_rows(dv, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
                a = tl.dot(gdo_tile, tl.trans(dv_tile), a, input_precision=PRECISION)
            gs = p * (a - r_rows[:, None])  # gS, without gT * U
            if HAS_T:  # T / scale (79)
                t = tl.full([QUERIES, KEYS], 0.0, tl.float32)
                if dq is not None:
                    t = tl.dot(dq_tile, tl.trans(k_tile), t, input_precision=PRECISION)
                if dk is not None:
                    dk_tile = load_rows(dk, b, h_k, at, visible, D, UNIT, KEYS, CHANNELS, WHOLE_KEYS)
                    t = tl.dot(q_tile, tl.trans(dk_tile), t, input_precision=PRECISION)
        if HAS_T:
            gt = p * (tl.dot(gdo_tile, tl.trans(v_tile), input_precision=PRECISION) - c_rows[:, None])  # gT
            if gq is not None:
                gs += gt * (t * size - mu_rows)  # gT * U
                if dk is not None:  # gq / scale (82)
                    sum_q = tl.dot(gt.to(dtype), dk_tile, sum_q, input_precision=PRECISION)
            if gdq is not None:
                sum_dq = tl.dot(gt.to(dtype), k_tile, sum_dq, input_precision=PRECISION)  # gdq / scale (83)
        if gq is not None:
            sum_q = tl.dot(gs.to(dtype), k_tile, sum_q, input_precision=PRECISION)  # gq / scale (85)
    if gq is not None:
        store_rows(gq, sum_q * scale, b, h, start, N, D, UNIT, QUERIES, CHANNELS)
    if gdq is not None:
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
    WHOLE_QUERIES: tl.constexpr,  # N is a multiple of QUERIES
    PRECISION: tl.constexpr,  # how float32 matmuls are computed; no effect on 16-bit ones
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one tile of keys and values, over all queries. Grid: tiles of keys x heads of k x batch.

    dq, dk, dv, go, gdo are None where they are zero, gk, gv, gdk, gdv where they are not wanted; mu and c without dq
    and dk, c and r also without gk and gdk.

    Works on transposed tiles [KEYS, QUERIES], made as k q^T: transposing the result of a matmul to use it in another
    has been miscompiled for Hopper. Queries beyond the end read as zeros, so go, gdo, c and r are zero there and they
    add nothing. lengths, if not None, hides keys from lengths[b] on, whose gradients are zero; mask hides the pairs
    (here [M, N]) where it is zero, and tiles lists the tiles of queries that it leaves.
    """
    HAS_T: tl.constexpr = mu is not None  # T and gT are not zero
    HAS_U: tl.constexpr = mu is not None and (gk is not None or gv is not None)
    start, b, h_k, _ = tile_of_program(M, heads // GROUP, KEYS, False)
    dtype = q[0].dtype.element_ty
    keys = start + tl.arange(0, KEYS)
    size = tl.abs(scale)
    factor = tl.maximum(size * LOG2_E, 1e-30)
    visible = visible_keys(lengths, b, M)
    k_tile = load_rows(k, b, h_k, start, visible, D, UNIT, KEYS, CHANNELS, False)
    if HAS_U and dk is not None:
        dk_tile = load_rows(dk, b, h_k, start, visible, D, UNIT, KEYS, CHANNELS, False)
    if gk is not None or gdk is not None:
        v_tile = load_rows(v, b, h_k, start, visible, D, UNIT, KEYS, CHANNELS, False)
    if gk is not None:
        sum_k = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
        if dv is not None:
            dv_tile = load_rows(dv, b, h_k, start, visible, D, UNIT, KEYS, CHANNELS, False)
    if gdk is not None:
        sum_dk = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
    if gv is not None:
        sum_v = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
    if gdv is not None:
        sum_dv = tl.full([KEYS, CHANNELS], 0.0, tl.float32)
    begin = start // QUERIES if CAUSAL else 0
    end = (N + QUERIES - 1) // QUERIES
    if lengths is not None:
        end = tl.where(start < visible, end, 0)
    for g in range(GROUP):
        h = h_k * GROUP + g
        head = b * heads + h
        if mask is not None:
            listed = visible_tiles(tiles, b, h, start, KEYS)
            begin = 0
            end = tl.load(listed)
        for i in range(begin, end):
            at = i * QUERIES
            if mask is not None:
                at = tl.load(listed + 1 + i) * QUERIES
            q_tile = load_rows(q, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            if CAUSAL:
                rows = at + tl.arange(0, QUERIES)
                s = keep_up_to(s, keys[:, None], rows[None, :], start + KEYS > at + 1)
            if lengths is not None:
                s = keep_up_to(s, keys[:, None], visible - 1, start + KEYS > visible)
            if mask is not None:
                s = tl.where(load_mask(mask, b, h, start, M, at, N, KEYS, QUERIES), s, float("-inf"))
            p = tl.exp2(s * factor - load_numbers(lse, head, at, N, QUERIES)[None, :])  # P (78), transposed
            if go is not None:
                go_tile = load_rows(go, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
            if gdo is not None:
                gdo_tile = load_rows(gdo, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
            if dq is not None and (HAS_U or gk is not None):
                dq_tile = load_rows(dq, b, h, at, N, D, UNIT, QUERIES, CHANNELS, WHOLE_QUERIES)
            if HAS_U:  # T / scale (79)
                t = tl.full([KEYS, QUERIES], 0.0, tl.float32)
                if dq is not None:
                    t = tl.dot(k_tile, tl.trans(dq_tile), t, input_precision=PRECISION)
                if dk is not None:
                    t = tl.dot(dk_tile, tl.trans(q_tile), t, input_precision=PRECISION)
                u = t * size - load_numbers(mu, head, at, N, QUERIES)[None, :]  # U = T - mu
            if gv is not None:  # ordinary attention's part, and (87)
                if go is not None:
                    sum_v = tl.dot(p.to(dtype), go_tile, sum_v, input_precision=PRECISION)
                if HAS_T:
                    sum_v = tl.dot((p * u).to(dtype), gdo_tile, sum_v, input_precision=PRECISION)
            if gdv is not None:
                sum_dv = tl.dot(p.to(dtype), gdo_tile, sum_dv, input_precision=PRECISION)  # gdv (86)
            if HAS_T and (gk is not None or gdk is not None):
                gt = tl.dot(v_tile, tl.trans(gdo_tile), input_precision=PRECISION)
                gt = p * (gt - load_numbers(c, head, at, N, QUERIES)[None, :])  # gT
                if gdk is not None:  # gdk / scale (81)
                    sum_dk = tl.dot(gt.to(dtype), q_tile, sum_dk, input_precision=PRECISION)
                if gk is not None and dq is not None:  # gk / scale (80)
                    sum_k = tl.dot(gt.to(dtype), dq_tile, sum_k, input_precision=PRECISION)
            if gk is not None:
                a = tl.full([KEYS, QUERIES], 0.0, tl.float32)
                if go is not None:
                    a = tl.dot(v_tile, tl.trans(go_tile), a, input_precision=PRECISION)
                if dv is not None:
                    a = tl.dot(dv_tile, tl.trans(gdo_tile), a, input_precision=PRECISION)
                gs = p * (a - load_numbers(r, head, at, N, QUERIES)[None, :])
                if HAS_T:
                    gs += gt * u  # gS
                sum_k = tl.dot(gs.to(dtype), q_tile, sum_k, input_precision=PRECISION)  # gk / scale (84)
    if gk is not None:
        store_rows(gk, sum_k * size, b, h_k, start, M, D, UNIT, KEYS, CHANNELS)
    if gdk is not None:
        store_rows(gdk, sum_dk * size, b, h_k, start, M, D, UNIT, KEYS, CHANNELS)
    if gv is not None:
        store_rows(gv, sum_v, b, h_k, start, M, D, UNIT, KEYS, CHANNELS)
    if gdv is not None:
        store_rows(gdv, sum_dv, b, h_k, start, M, D, UNIT, KEYS, CHANNELS)
