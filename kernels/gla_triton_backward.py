"""Triton kernels of gated linear attention, backward; `gla_triton.py` launches them. Method as in the forward file.

The gradient of a log gate is a sum over the pairs (i, j) whose decay it is a factor of. A decay from a bound through
row i gives its term to the gates from the bound to i, a decay after row j to a bound to the gates behind j: products
with matrices of zeros and ones, and sums of terms that all belong to the gate, free of cancellation.
"""

import triton
import triton.language as tl

from spikelm.kernels.gla_triton_forward import (
    CONFIGS,
    grow,
    load_gates,
    load_rows,
    meet,
    store_rows,
)
from spikelm.kernels.triton_tools import autotune, dot

# The gradient of the keys holds many tiles at once and would spill with wider ones or fewer warps.
NARROW_CONFIGS = [triton.Config({"BK": BK}, num_warps=8) for BK in (16, 32)]


@autotune(CONFIGS, key=["K", "V"])
@triton.jit
def gla_states_backward_kernel(
    q, g, do, dh, dlast, dfirst, scale, bounds, offsets, heads, shared,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the states at the end of every chunk: dh [chunks, shared, K, V], and of the first of a sequence."""
    i_ns = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_ns // shared, i_ns % shared
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    o_kv = o_k[:, None] * V + o_v[None, :]
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_i = tl.arange(0, BT)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    i_c, i_end = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)
    n_chunks = (i_end - i_c).to(tl.int32)

    b_dh = tl.load(dlast + i_ns * K * V + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
    for i_back in range(0, n_chunks):
        i = n_chunks - 1 - i_back
        tl.store(dh + ((i_c + i) * shared + i_s) * K * V + o_kv, b_dh.to(dh.dtype.element_ty), mask=m_kv)
        o_t = t_0 + i * BT + o_i
        m_t = o_t < t_end
        b_g = load_gates(g, o_t, m_t, shared, i_s, o_k, K, W, FLOOR)
        b_past = tl.exp(tl.cumsum(b_g, 0))
        b_dh = b_dh * tl.exp(tl.sum(b_g, 0))[:, None]
        for i_g in range(0, heads // shared):
            i_h = i_s * (heads // shared) + i_g
            b_q = load_rows(q, o_t, m_t, heads, i_h, o_k, K) * b_past  # [BT, BK]
            b_do = load_rows(do, o_t, m_t, heads, i_h, o_v, V) * scale  # [BT, BV]
            b_dh += dot(tl.trans(b_q.to(DT)), b_do.to(DT), PRECISION)
    tl.store(dfirst + i_ns * K * V + o_kv, b_dh, mask=m_kv)


@autotune(CONFIGS, key=["V"])
@triton.jit
def gla_scores_backward_kernel(
    v, do, da, scale, chunks, heads, shared,
    V: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores: da [tokens, heads, BT] = scale * do @ v^T within each chunk, zero for j > i."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    i_s = i_h // (heads // shared)
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)

    b_da = tl.zeros((BT, BT), dtype=tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_v = load_rows(v, o_t, m_t, shared, i_s, o_v, V)  # [BT, BV]
        b_do = load_rows(do, o_t, m_t, heads, i_h, o_v, V)
        b_da += dot(b_do.to(DT), tl.trans(b_v.to(DT)), PRECISION)
    b_da = tl.where(o_i[:, None] >= o_i[None, :], b_da * scale, 0.0)
    store_rows(da, b_da, o_t, m_t, heads, i_h, o_i, BT)


@autotune(CONFIGS, key=["K", "V"])
@triton.jit
def gla_values_backward_kernel(
    k, g, a, do, dh, dv, scale, chunks, heads, shared,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv = scores^T @ do over the group + (k decayed to the chunk's end) @ dstate."""
    i_cs = tl.program_id(0).to(tl.int64)
    i_c, i_s = i_cs // shared, i_cs % shared
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)
    m_next = o_i + 1 < tl.load(chunks + 2 * i_c + 1)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)

    b_dv = tl.zeros((BT, BV), dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(k, o_t, m_t, shared, i_s, o_k, K)  # [BT, BK]
        b_next = load_gates(g, o_t + 1, m_next, shared, i_s, o_k, K, W, FLOOR)
        b_dh = load_rows(dh + i_cs * K * V, o_k, o_k < K, 1, 0, o_v, V)  # [BK, BV]
        b_dv += dot((b_k * tl.exp(tl.cumsum(b_next, 0, reverse=True))).to(DT), b_dh.to(DT), PRECISION)
    for i_g in range(0, heads // shared):
        i_h = i_s * (heads // shared) + i_g
        b_a = load_rows(a, o_t, m_t, heads, i_h, o_i, BT)  # [BT, BT]
        b_do = load_rows(do, o_t, m_t, heads, i_h, o_v, V) * scale  # [BT, BV]
        b_dv += dot(tl.trans(b_a.to(DT)), b_do.to(DT), PRECISION)
    store_rows(dv, b_dv, o_t, m_t, shared, i_s, o_v, V)


@triton.jit
def crossed(o_i, size):
    """[BT, BT] of 0 and 1: whether gate t is a factor of the decay between row i and the middle of its pair of blocks
    of `size` rows: from the middle through i in a right block (t <= i), after i to the middle in a left one (t > i).
    """
    o_b = o_i // size
    m_side = tl.where((o_b % 2 == 1)[None, :], o_i[:, None] <= o_i[None, :], o_i[:, None] > o_i[None, :])
    return ((o_b[:, None] == o_b[None, :]) & m_side).to(tl.float32)


@autotune(NARROW_CONFIGS, key=["K", "V"])
@triton.jit
def gla_keys_backward_kernel(
    q, k, v, g, do, da, h, dh, dq, dk, dg, scale, chunks, heads, shared,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and of the log gates, each channel by itself: dg [tokens, shared, K]."""
    i_cs = tl.program_id(0).to(tl.int64)
    i_c, i_s = i_cs // shared, i_cs % shared
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)
    m_next = o_i + 1 < tl.load(chunks + 2 * i_c + 1)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    b_k = load_rows(k, o_t, m_t, shared, i_s, o_k, K)  # [BT, BK]
    b_g = load_gates(g, o_t, m_t, shared, i_s, o_k, K, W, FLOOR)
    b_next = load_gates(g, o_t + 1, m_next, shared, i_s, o_k, K, W, FLOOR)

    b_dk = tl.zeros((BT, BK), dtype=tl.float32)
    b_through = tl.zeros((BK,), dtype=tl.float32)
    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_h = load_rows(h + i_cs * K * V, o_k, o_k < K, 1, 0, o_v, V)  # [BK, BV]
        b_dh = load_rows(dh + i_cs * K * V, o_k, o_k < K, 1, 0, o_v, V)
        b_v = load_rows(v, o_t, m_t, shared, i_s, o_v, V)  # [BT, BV]
        b_dk += dot(b_v.to(DT), tl.trans(b_dh.to(DT)), PRECISION)
        b_through += tl.sum(b_h * b_dh, 1)
    b_dk *= tl.exp(tl.cumsum(b_next, 0, reverse=True))
    m_before = (o_i[:, None] > o_i[None, :]).to(tl.float32)
    b_dg = dot(m_before, b_k * b_dk, PRECISION) + (b_through * tl.exp(tl.sum(b_g, 0)))[None, :]

    for i_g in range(0, heads // shared):
        i_h = i_s * (heads // shared) + i_g
        b_dq = tl.zeros((BT, BK), dtype=tl.float32)
        for i_v in range(0, tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            b_h = load_rows(h + i_cs * K * V, o_k, o_k < K, 1, 0, o_v, V)  # [BK, BV]
            b_do = load_rows(do, o_t, m_t, heads, i_h, o_v, V)  # [BT, BV]
            b_dq += dot(b_do.to(DT), tl.trans(b_h.to(DT)), PRECISION)
        b_q = load_rows(q, o_t, m_t, heads, i_h, o_k, K)  # [BT, BK]
        b_dq *= scale * tl.exp(tl.cumsum(b_g, 0))
        b_dg += tl.cumsum(b_q * b_dq, 0, reverse=True)
        b_da = load_rows(da, o_t, m_t, heads, i_h, o_i, BT)  # [BT, BT]
        b_self = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_da, 0.0), 1)[:, None]
        b_dq += b_self * b_k
        b_dk += b_self * b_q
        b_past, b_future = tl.exp(b_g), tl.full((BT, BK), 1.0, dtype=tl.float32)
        for level in range(LEVELS):
            b_pairs = tl.where(meet(o_i, 1 << level), b_da, 0.0).to(DT)
            b_x = dot(b_pairs, (b_k * b_future).to(DT), PRECISION) * b_past
            b_y = dot(tl.trans(b_pairs), (b_q * b_past).to(DT), PRECISION) * b_future
            b_dq += b_x
            b_dk += b_y
            # b_x is zero in left blocks, b_y in right ones.
            b_dg += dot(crossed(o_i, 1 << level), b_q * b_x + b_k * b_y, PRECISION)
            b_past, b_future = grow(b_past, b_future, o_i, 1 << level)
        store_rows(dq, b_dq, o_t, m_t, heads, i_h, o_k, K)
    store_rows(dk, b_dk, o_t, m_t, shared, i_s, o_k, K)
    store_rows(dg, b_dg, o_t, m_t, shared, i_s, o_k, K)
