"""Triton kernels of the delta rule, backward; `delta_rule_triton.py` launches them. Method and scores as in the forward
file; gradients of the log gates as in `gla_triton_backward.py`, sums of terms that all belong to the gate.
"""

import triton
import triton.language as tl

from spikelm.kernels.delta_rule_triton_forward import TIME_CONFIGS, WIDE_CONFIGS, grow_before, load_decays
from spikelm.kernels.gla_triton_forward import CONFIGS, load_gates, load_rows, meet, store_rows
from spikelm.kernels.triton_tools import autotune, dot


@autotune(TIME_CONFIGS, key=["K", "V"])
@triton.jit
def delta_states_backward_kernel(
    scores, decayed, keep, do, du, dv, dh, dlast, dfirst, scale, bounds, offsets, tokens, heads,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the states at the end of every chunk, dh [chunks, heads, K, V], of v, of what T acts on, du, and of
    the first state of a sequence.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // heads, i_nh % heads
    o_k = tl.arange(0, BS)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    o_kv = o_k[:, None] * V + o_v[None, :]
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_i = tl.arange(0, BT)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    i_c, i_end = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
    n_chunks = (i_end - i_c).to(tl.int32)
    size, size_k = tokens * heads * BT, tokens * heads * K

    b_dh = tl.load(dlast + i_nh * K * V + o_kv, mask=m_kv, other=0.0)  # [BS, BV]
    for i_back in range(0, n_chunks):
        i = n_chunks - 1 - i_back
        i_ch = (i_c + i) * heads + i_h
        tl.store(dh + i_ch * K * V + o_kv, b_dh.to(dh.dtype.element_ty), mask=m_kv)
        o_t = t_0 + i * BT + o_i
        m_t = o_t < t_end
        b_do = (load_rows(do, o_t, m_t, heads, i_h, o_v, V) * scale).to(DT)  # [BT, BV]
        b_qb = tl.trans(load_rows(scores + size, o_t, m_t, heads, i_h, o_i, BT).to(DT))  # [BT, BT]
        b_b = load_rows(decayed + size_k, o_t, m_t, heads, i_h, o_k, K).to(DT)  # [BT, BS]
        b_du = dot(b_qb, b_do, PRECISION) + dot(b_b, b_dh.to(DT), PRECISION)
        b_inverse = tl.trans(load_rows(scores, o_t, m_t, heads, i_h, o_i, BT))
        b_through = dot(b_inverse, b_du, PRECISION)
        store_rows(du, b_through, o_t, m_t, heads, i_h, o_v, V)
        if M == 1:
            b_dv = b_through
        else:
            b_written = tl.trans(load_rows(scores + 2 * size, o_t, m_t, heads, i_h, o_i, BT).to(DT))
            b_qk = tl.trans(load_rows(scores + 3 * size, o_t, m_t, heads, i_h, o_i, BT).to(DT))
            b_k = load_rows(decayed + 3 * size_k, o_t, m_t, heads, i_h, o_k, K).to(DT)
            b_dv = dot(b_qk, b_do, PRECISION) + dot(b_k, b_dh.to(DT), PRECISION)
            b_dv += dot(b_written, b_du.to(DT), PRECISION)
        store_rows(dv, b_dv, o_t, m_t, heads, i_h, o_v, V)
        b_keep = tl.load(keep + i_ch * K + o_k, mask=o_k < K, other=0.0)
        b_q = tl.trans(load_rows(decayed + 2 * size_k, o_t, m_t, heads, i_h, o_k, K).to(DT))
        b_read = tl.trans(load_rows(decayed, o_t, m_t, heads, i_h, o_k, K).to(DT))
        b_dh = b_dh * b_keep[:, None] + dot(b_q, b_do, PRECISION) + dot(b_read, b_du.to(DT), PRECISION)
    tl.store(dfirst + i_nh * K * V + o_kv, b_dh, mask=m_kv)


@autotune(CONFIGS, key=["V"])
@triton.jit
def delta_scores_backward_kernel(
    v, u, do, du, dscores, scale, chunks, tokens, heads,
    V: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores a with b, q with b, a with k, q with k: [4, tokens, heads, BT]."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)

    b_ab, b_qb = tl.zeros((BT, BT), dtype=tl.float32), tl.zeros((BT, BT), dtype=tl.float32)
    b_ak, b_qk = tl.zeros((BT, BT), dtype=tl.float32), tl.zeros((BT, BT), dtype=tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_u = tl.trans(load_rows(u, o_t, m_t, heads, i_h, o_v, V).to(DT))  # [BV, BT]
        b_do = (load_rows(do, o_t, m_t, heads, i_h, o_v, V) * scale).to(DT)  # [BT, BV]
        b_du = load_rows(du, o_t, m_t, heads, i_h, o_v, V).to(DT)
        b_ab += dot(b_du, b_u, PRECISION)
        b_qb += dot(b_do, b_u, PRECISION)
        if M == 2:
            b_v = tl.trans(load_rows(v, o_t, m_t, heads, i_h, o_v, V).to(DT))
            b_ak += dot(b_du, b_v, PRECISION)
            b_qk += dot(b_do, b_v, PRECISION)
    m_before, m_until = o_i[:, None] > o_i[None, :], o_i[:, None] >= o_i[None, :]
    size = tokens * heads * BT
    store_rows(dscores, tl.where(m_before, b_ab, 0.0), o_t, m_t, heads, i_h, o_i, BT)
    store_rows(dscores + size, tl.where(m_until, b_qb, 0.0), o_t, m_t, heads, i_h, o_i, BT)
    if M == 2:
        store_rows(dscores + 2 * size, tl.where(m_before, b_ak, 0.0), o_t, m_t, heads, i_h, o_i, BT)
        store_rows(dscores + 3 * size, tl.where(m_until, b_qk, 0.0), o_t, m_t, heads, i_h, o_i, BT)


@triton.jit
def crossed_before(o_i, size):
    """[BT, BT] of 0 and 1: whether gate t is a factor of the decay between row i and the middle of its pair of blocks
    of `size` rows: from the middle to before i in a right block (t < i), after i to the middle in a left one (t > i).
    """
    o_b = o_i // size
    m_side = tl.where((o_b % 2 == 1)[None, :], o_i[:, None] < o_i[None, :], o_i[:, None] > o_i[None, :])
    return ((o_b[:, None] == o_b[None, :]) & m_side).to(tl.float32)


@triton.jit
def through_states(
    v, u, do, du, h, dh, o_t, m_t, o_k, heads, i_h,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What reaches decayed q, a, k and b, [BT, BK], through the states at the chunk's ends, and their product, [BK]."""
    b_q, b_a = tl.zeros((BT, BK), dtype=tl.float32), tl.zeros((BT, BK), dtype=tl.float32)
    b_k, b_b = tl.zeros((BT, BK), dtype=tl.float32), tl.zeros((BT, BK), dtype=tl.float32)
    b_both = tl.zeros((BK,), dtype=tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_h = load_rows(h, o_k, o_k < K, 1, 0, o_v, V)  # [BK, BV]
        b_dh = load_rows(dh, o_k, o_k < K, 1, 0, o_v, V)
        b_both += tl.sum(b_h * b_dh, 1)
        b_h, b_dh = tl.trans(b_h.to(DT)), tl.trans(b_dh.to(DT))
        b_q += dot(load_rows(do, o_t, m_t, heads, i_h, o_v, V).to(DT), b_h, PRECISION)
        b_a += dot(load_rows(du, o_t, m_t, heads, i_h, o_v, V).to(DT), b_h, PRECISION)
        b_b += dot(load_rows(u, o_t, m_t, heads, i_h, o_v, V).to(DT), b_dh, PRECISION)
        if M == 2:
            b_k += dot(load_rows(v, o_t, m_t, heads, i_h, o_v, V).to(DT), b_dh, PRECISION)
    return b_q, b_a, b_k, b_b, b_both


@autotune(WIDE_CONFIGS, key=["K", "V"])
@triton.jit
def delta_keys_backward_kernel(
    q, k, v, g, a, b, u, do, du, dscores, h, dh, dq, dk, dg, da, db, scale, chunks, tokens, heads,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, M: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, a, b and of the log gates, each channel by itself: dg [tokens, heads, K]."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    n = tl.load(chunks + 2 * i_c + 1)
    m_t = o_i < n
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    size = tokens * heads * BT
    b_past, b_future, b_keep = load_decays(g, o_t, o_i, n, heads, i_h, o_k, K, W, FLOOR)
    b_own = tl.exp(load_gates(g, o_t, m_t, heads, i_h, o_k, K, W, FLOOR))
    b_q, b_a = load_rows(q, o_t, m_t, heads, i_h, o_k, K) * b_own, load_rows(a, o_t, m_t, heads, i_h, o_k, K)
    b_k, b_b = load_rows(k, o_t, m_t, heads, i_h, o_k, K), load_rows(b, o_t, m_t, heads, i_h, o_k, K)

    h, dh = h + i_ch * K * V, dh + i_ch * K * V
    b_dq, b_da, b_dk, b_db, b_both = through_states(
        v, u, do, du, h, dh, o_t, m_t, o_k, heads, i_h, K, V, M, PRECISION, DT, BT, BK, BV
    )
    b_dq, b_da, b_dk, b_db = b_dq * b_past * scale, b_da * b_past, b_dk * b_future, b_db * b_future
    m_before = (o_i[:, None] > o_i[None, :]).to(tl.float32)
    b_dg = dot(m_before, b_k * b_dk + b_b * b_db, PRECISION) + (b_both * b_keep)[None, :]
    b_dg += dot(tl.trans(m_before), b_q * b_dq + b_a * b_da, PRECISION)
    b_past, b_future = tl.full((BT, BK), 1.0, dtype=tl.float32), tl.full((BT, BK), 1.0, dtype=tl.float32)
    for level in range(LEVELS):
        m_pair = meet(o_i, 1 << level)
        b_ab = tl.where(m_pair, load_rows(dscores, o_t, m_t, heads, i_h, o_i, BT), 0.0).to(DT)
        b_qb = tl.where(m_pair, load_rows(dscores + size, o_t, m_t, heads, i_h, o_i, BT), 0.0).to(DT)
        b_ap, b_qp, b_bf = (b_a * b_past).to(DT), (b_q * b_past).to(DT), (b_b * b_future).to(DT)
        b_xa, b_xq = dot(b_ab, b_bf, PRECISION), dot(b_qb, b_bf, PRECISION)
        b_yb = dot(tl.trans(b_ab), b_ap, PRECISION) + dot(tl.trans(b_qb), b_qp, PRECISION)
        if M == 2:
            b_ak = tl.where(m_pair, load_rows(dscores + 2 * size, o_t, m_t, heads, i_h, o_i, BT), 0.0).to(DT)
            b_qk = tl.where(m_pair, load_rows(dscores + 3 * size, o_t, m_t, heads, i_h, o_i, BT), 0.0).to(DT)
            b_kf = (b_k * b_future).to(DT)
            b_xa += dot(b_ak, b_kf, PRECISION)
            b_xq += dot(b_qk, b_kf, PRECISION)
            b_yk = dot(tl.trans(b_ak), b_ap, PRECISION) + dot(tl.trans(b_qk), b_qp, PRECISION)
            b_yk *= b_future
            b_dk += b_yk
        b_xa, b_xq, b_yb = b_xa * b_past, b_xq * b_past, b_yb * b_future
        b_da, b_dq, b_db = b_da + b_xa, b_dq + b_xq, b_db + b_yb
        b_terms = b_a * b_xa + b_q * b_xq + b_b * b_yb
        if M == 2:
            b_terms += b_k * b_yk
        b_dg += dot(crossed_before(o_i, 1 << level), b_terms, PRECISION)
        b_past, b_future = grow_before(b_past, b_future, b_own, o_i, 1 << level)
    # q has its own decay as a factor, but meets the token's own writes without it.
    b_dg += b_q * b_dq
    m_own = o_i[:, None] == o_i[None, :]
    b_qb = tl.sum(tl.where(m_own, load_rows(dscores + size, o_t, m_t, heads, i_h, o_i, BT), 0.0), 1)[:, None]
    b_q = load_rows(q, o_t, m_t, heads, i_h, o_k, K)
    b_dq, b_db = b_dq * b_own + b_qb * b_b, b_db + b_qb * b_q
    if M == 2:
        b_qk = tl.sum(tl.where(m_own, load_rows(dscores + 3 * size, o_t, m_t, heads, i_h, o_i, BT), 0.0), 1)[:, None]
        b_dq += b_qk * b_k
        store_rows(dk, b_dk + b_qk * b_q, o_t, m_t, heads, i_h, o_k, K)
    store_rows(dq, b_dq, o_t, m_t, heads, i_h, o_k, K)
    store_rows(da, b_da, o_t, m_t, heads, i_h, o_k, K)
    store_rows(db, b_db, o_t, m_t, heads, i_h, o_k, K)
    store_rows(dg, b_dg, o_t, m_t, heads, i_h, o_k, K)
