"""Triton kernels of the delta rule, forward; `delta_rule_triton.py` launches them.

The method is that of `delta_rule_torch.py`, chunks of BT tokens from the same table as `gla_triton_forward.py`. Scores
are kept as four matrices [BT, BT] of every chunk and head, [4, tokens, heads, BT]:

    0: T = (I - A_ab)^{-1}    1: q times b    2: T A_ak    3: q times k         all lower triangular

and four decayed inputs [4, tokens, heads, K], so that the kernels that go through time do little else than multiply:

    0: T a~    1: b~ (to the chunk's end)    2: q~ (from its start)    3: k~ (to its end)

Where one key serves both writes (b is None, M = 1) what belongs to k alone does not exist, and u stands for z = u + v.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla_triton_forward import CONFIGS, load_gates, load_rows, meet, store_rows
from spikelm.kernels.triton_tools import autotune, dot

# What goes through time holds whole columns of a state: prefetching more chunks would not fit in shared memory.
TIME_CONFIGS = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (4, 8)]
# Kernels with many tiles at once would spill with fewer warps.
WIDE_CONFIGS = [triton.Config({}, num_warps=8)]


@triton.jit
def grow_before(b_past, b_future, b_own, o_i, size):
    """`grow` of gated linear attention for a `b_past` that leaves out a row's own decay `b_own`."""
    m_right = o_i // size % 2 == 1
    o_end = tl.where(m_right, o_i // size * size, (o_i // size + 2) * size) - 1
    b_other = tl.gather(b_past * b_own, tl.broadcast_to(o_end[:, None], b_past.shape), 0)
    b_past = tl.where(m_right[:, None], b_past * b_other, b_past)
    return b_past, tl.where(m_right[:, None], b_future, b_future * b_other)


@triton.jit
def load_decays(g, o_t, o_i, n, heads, i_h, o_k, K: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr):
    """Decays in a chunk of n tokens: from its start to before a token, after a token to its end,
    [BT, BK] each, and over the whole chunk, [BK].
    """
    b_g = load_gates(g, o_t, o_i < n, heads, i_h, o_k, K, W, FLOOR)
    b_before = load_gates(g, o_t - 1, (o_i > 0) & (o_i < n), heads, i_h, o_k, K, W, FLOOR)
    b_next = load_gates(g, o_t + 1, o_i + 1 < n, heads, i_h, o_k, K, W, FLOOR)
    b_future = tl.exp(tl.cumsum(b_next, 0, reverse=True))
    return tl.exp(tl.cumsum(b_before, 0)), b_future, tl.exp(tl.sum(b_g, 0))


@autotune(WIDE_CONFIGS, key=["K"])
@triton.jit
def delta_scores_kernel(
    q, k, g, a, b, scores, chunks, tokens, heads,
    K: tl.constexpr, W: tl.constexpr, M: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Scores of rows (a, q) and columns (b, k) within chunks, and the inverse."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)
    m_own = o_i[:, None] == o_i[None, :]

    b_ab, b_qb = tl.zeros((BT, BT), dtype=tl.float32), tl.zeros((BT, BT), dtype=tl.float32)
    b_ak, b_qk = tl.zeros((BT, BT), dtype=tl.float32), tl.zeros((BT, BT), dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_a = load_rows(a, o_t, m_t, heads, i_h, o_k, K)  # [BT, BK]
        b_q = load_rows(q, o_t, m_t, heads, i_h, o_k, K)
        b_b = load_rows(b, o_t, m_t, heads, i_h, o_k, K)
        b_k = load_rows(k, o_t, m_t, heads, i_h, o_k, K)
        b_qb += tl.where(m_own, tl.sum(b_q * b_b, 1)[:, None], 0.0)
        b_qk += tl.where(m_own, tl.sum(b_q * b_k, 1)[:, None], 0.0)
        b_own = tl.exp(load_gates(g, o_t, m_t, heads, i_h, o_k, K, W, FLOOR))
        b_q *= b_own
        b_past, b_future = tl.full((BT, BK), 1.0, dtype=tl.float32), tl.full((BT, BK), 1.0, dtype=tl.float32)
        for level in range(LEVELS):
            m_pair = meet(o_i, 1 << level)
            b_ap, b_qp = (b_a * b_past).to(DT), (b_q * b_past).to(DT)
            b_bf = tl.trans((b_b * b_future).to(DT))
            b_ab += tl.where(m_pair, dot(b_ap, b_bf, PRECISION), 0.0)
            b_qb += tl.where(m_pair, dot(b_qp, b_bf, PRECISION), 0.0)
            if M == 2:
                b_kf = tl.trans((b_k * b_future).to(DT))
                b_ak += tl.where(m_pair, dot(b_ap, b_kf, PRECISION), 0.0)
                b_qk += tl.where(m_pair, dot(b_qp, b_kf, PRECISION), 0.0)
            b_past, b_future = grow_before(b_past, b_future, b_own, o_i, 1 << level)
    # The inverse of blocks on the diagonal grows to that of blocks twice as large: [[L, 0], [R A L, R]].
    b_inverse = m_own.to(tl.float32)
    for level in range(LEVELS):
        b_lower = tl.where(meet(o_i, 1 << level), b_ab, 0.0)
        b_inverse += dot(dot(b_inverse, b_lower, PRECISION), b_inverse, PRECISION)
    size = tokens * heads * BT
    store_rows(scores, b_inverse, o_t, m_t, heads, i_h, o_i, BT)
    store_rows(scores + size, b_qb, o_t, m_t, heads, i_h, o_i, BT)
    if M == 2:
        store_rows(scores + 2 * size, dot(b_inverse, b_ak, PRECISION), o_t, m_t, heads, i_h, o_i, BT)
        store_rows(scores + 3 * size, b_qk, o_t, m_t, heads, i_h, o_i, BT)


@autotune(CONFIGS, key=["K"])
@triton.jit
def delta_decayed_kernel(
    q, k, g, a, b, scores, decayed, keep, chunks, tokens, heads,
    K: tl.constexpr, W: tl.constexpr, M: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The decayed inputs, and keep [chunks, heads, K], the decay over a whole chunk."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    n = tl.load(chunks + 2 * i_c + 1)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    size = tokens * heads * K

    b_past, b_future, b_keep = load_decays(g, o_t, o_i, n, heads, i_h, o_k, K, W, FLOOR)
    b_inverse = load_rows(scores, o_t, o_i < n, heads, i_h, o_i, BT)  # [BT, BT]
    b_a = load_rows(a, o_t, o_i < n, heads, i_h, o_k, K) * b_past  # [BT, BK]
    store_rows(decayed, dot(b_inverse, b_a, PRECISION), o_t, o_i < n, heads, i_h, o_k, K)
    b_b = load_rows(b, o_t, o_i < n, heads, i_h, o_k, K) * b_future
    store_rows(decayed + size, b_b, o_t, o_i < n, heads, i_h, o_k, K)
    b_own = tl.exp(load_gates(g, o_t, o_i < n, heads, i_h, o_k, K, W, FLOOR))
    b_q = load_rows(q, o_t, o_i < n, heads, i_h, o_k, K) * b_own * b_past
    store_rows(decayed + 2 * size, b_q, o_t, o_i < n, heads, i_h, o_k, K)
    if M == 2:
        b_k = load_rows(k, o_t, o_i < n, heads, i_h, o_k, K) * b_future
        store_rows(decayed + 3 * size, b_k, o_t, o_i < n, heads, i_h, o_k, K)
    tl.store(keep + i_ch * K + o_k, b_keep, mask=o_k < K)


@autotune(TIME_CONFIGS, key=["K", "V"])
@triton.jit
def delta_states_kernel(
    v, scores, decayed, keep, u, h, first, last, bounds, offsets, tokens, heads,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """u [tokens, heads, V], states at the start of every chunk, h [chunks, heads, K, V], and the last of a sequence.

    A program holds all K channels of a state (BS >= K), for what `a` reads is a sum over them.
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
    size = tokens * heads * K

    b_h = tl.load(first + i_nh * K * V + o_kv, mask=m_kv, other=0.0)  # [BS, BV]
    for i in range(0, (i_end - i_c).to(tl.int32)):
        i_ch = (i_c + i) * heads + i_h
        tl.store(h + i_ch * K * V + o_kv, b_h.to(h.dtype.element_ty), mask=m_kv)
        o_t = t_0 + i * BT + o_i
        m_t = o_t < t_end
        b_v = load_rows(v, o_t, m_t, heads, i_h, o_v, V)  # [BT, BV]
        b_written = load_rows(scores + (2 * M - 2) * tokens * heads * BT, o_t, m_t, heads, i_h, o_i, BT)  # T or T A_ak
        b_read = load_rows(decayed, o_t, m_t, heads, i_h, o_k, K).to(DT)  # [BT, BS]
        b_u = dot(b_written, b_v, PRECISION) + dot(b_read, b_h.to(DT), PRECISION)
        store_rows(u, b_u, o_t, m_t, heads, i_h, o_v, V)
        b_keep = tl.load(keep + i_ch * K + o_k, mask=o_k < K, other=0.0)
        b_b = tl.trans(load_rows(decayed + size, o_t, m_t, heads, i_h, o_k, K).to(DT))
        b_h = b_h * b_keep[:, None] + dot(b_b, b_u.to(DT), PRECISION)
        if M == 2:
            b_k = tl.trans(load_rows(decayed + 3 * size, o_t, m_t, heads, i_h, o_k, K).to(DT))
            b_h += dot(b_k, b_v.to(DT), PRECISION)
    tl.store(last + i_nh * K * V + o_kv, b_h, mask=m_kv)


@autotune(CONFIGS, key=["K", "V"])
@triton.jit
def delta_output_kernel(
    v, u, scores, decayed, h, o, scale, chunks, tokens, heads,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o = scale * (scores of q with b @ u, and with k @ v, and q~ @ state)."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)

    b_qb = load_rows(scores + tokens * heads * BT, o_t, m_t, heads, i_h, o_i, BT)  # [BT, BT]
    b_u = load_rows(u, o_t, m_t, heads, i_h, o_v, V)  # [BT, BV]
    b_o = dot(b_qb.to(DT), b_u.to(DT), PRECISION)
    if M == 2:
        b_qk = load_rows(scores + 3 * tokens * heads * BT, o_t, m_t, heads, i_h, o_i, BT)
        b_v = load_rows(v, o_t, m_t, heads, i_h, o_v, V)
        b_o += dot(b_qk.to(DT), b_v.to(DT), PRECISION)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(decayed + 2 * tokens * heads * K, o_t, m_t, heads, i_h, o_k, K)  # [BT, BK]
        b_h = load_rows(h + i_ch * K * V, o_k, o_k < K, 1, 0, o_v, V)  # [BK, BV]
        b_o += dot(b_q.to(DT), b_h.to(DT), PRECISION)
    store_rows(o, b_o * scale, o_t, m_t, heads, i_h, o_v, V)
