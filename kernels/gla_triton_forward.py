"""Triton kernels of gated linear attention, forward; `gla_triton.py` launches them.

The method is that of `gla_torch.py`: chunks of BT tokens, scores within a chunk by halving. Batch and time are one
axis of tokens, cut by a table of chunks (first token, number of tokens) that never cross a sequence. Log gates are
summed by scans, decays multiplied, and nothing is subtracted or divided: -inf, which a reset becomes, is safe.
"""

import triton
import triton.language as tl

from spikelm.kernels.triton_tools import autotune, dot

CONFIGS = [triton.Config({}, num_warps=4), triton.Config({}, num_warps=8)]


@triton.jit
def load_rows(x, o_t, m_t, heads, i_h, o_d, D: tl.constexpr):
    """Rows of one head of [tokens, heads, D], in float32; zero where masked."""
    p_x = x + (o_t[:, None] * heads + i_h) * D + o_d[None, :]
    return tl.load(p_x, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, b_x, o_t, m_t, heads, i_h, o_d, D: tl.constexpr):
    """The inverse of `load_rows`."""
    p_x = x + (o_t[:, None] * heads + i_h) * D + o_d[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def load_gates(g, o_t, m_t, heads, i_h, o_k, K: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr):
    """Log gates [BT, BK] of one head of [tokens, heads, W]; one gate for all channels if W is 1; -inf for a reset."""
    o_w = o_k if W > 1 else o_k * 0
    p_g = g + (o_t[:, None] * heads + i_h) * W + o_w[None, :]
    b_g = tl.load(p_g, mask=m_t[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)
    return tl.where(b_g < FLOOR, float("-inf"), b_g)


@triton.jit
def grow(b_past, b_future, o_i, size):
    """Double the blocks of `size` rows that `b_past` (decay from a block's start through a row) and `b_future` (decay
    after a row to the block's end) refer to: each row takes the whole decay of the other block of its pair.
    """
    m_right = o_i // size % 2 == 1
    o_end = tl.where(m_right, o_i // size * size, (o_i // size + 2) * size) - 1
    b_other = tl.gather(b_past, tl.broadcast_to(o_end[:, None], b_past.shape), 0)
    b_past = tl.where(m_right[:, None], b_past * b_other, b_past)
    return b_past, tl.where(m_right[:, None], b_future, b_future * b_other)


@triton.jit
def meet(o_i, size):
    """[BT, BT]: whether query i lies in the right and key j in the left block of one pair of blocks of `size` rows."""
    o_b = o_i // size
    return ((o_b % 2 == 1)[:, None]) & (o_b[:, None] == o_b[None, :] + 1)


@autotune(CONFIGS, key=["K", "V"])
@triton.jit
def gla_states_kernel(
    k, v, g, h, first, last, bounds, offsets, heads,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """States at the start of every chunk: h [chunks, heads, K, V], and the last one of each sequence."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // heads, i_nh % heads
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    o_kv = o_k[:, None] * V + o_v[None, :]
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_i = tl.arange(0, BT)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    i_c, i_end = tl.load(offsets + i_n), tl.load(offsets + i_n + 1)

    b_h = tl.load(first + i_nh * K * V + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
    for i in range(0, (i_end - i_c).to(tl.int32)):
        tl.store(h + ((i_c + i) * heads + i_h) * K * V + o_kv, b_h.to(h.dtype.element_ty), mask=m_kv)
        o_t = t_0 + i * BT + o_i
        m_t = o_t < t_end
        b_k = load_rows(k, o_t, m_t, heads, i_h, o_k, K)  # [BT, BK]
        b_v = load_rows(v, o_t, m_t, heads, i_h, o_v, V)  # [BT, BV]
        b_g = load_gates(g, o_t, m_t, heads, i_h, o_k, K, W, FLOOR)
        m_next = (o_t + 1 < t_end) & (o_i < BT - 1)
        b_next = load_gates(g, o_t + 1, m_next, heads, i_h, o_k, K, W, FLOOR)
        b_key = b_k * tl.exp(tl.cumsum(b_next, 0, reverse=True))
        b_h = b_h * tl.exp(tl.sum(b_g, 0))[:, None] + dot(tl.trans(b_key.to(DT)), b_v.to(DT), PRECISION)
    tl.store(last + i_nh * K * V + o_kv, b_h, mask=m_kv)


@autotune(CONFIGS, key=["K"])
@triton.jit
def gla_scores_kernel(
    q, k, g, a, chunks, heads, shared,
    K: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Scores within chunks: a [tokens, heads, BT], row i holding sum_c q[i, c] k[j, c] D[i, j, c] for j <= i."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    i_s = i_h // (heads // shared)
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)

    b_a = tl.zeros((BT, BT), dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(q, o_t, m_t, heads, i_h, o_k, K)  # [BT, BK]
        b_k = load_rows(k, o_t, m_t, shared, i_s, o_k, K)
        b_a += tl.where(o_i[:, None] == o_i[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        b_g = load_gates(g, o_t, m_t, shared, i_s, o_k, K, W, FLOOR)
        b_past, b_future = tl.exp(b_g), tl.full((BT, BK), 1.0, dtype=tl.float32)
        for level in range(LEVELS):
            b_s = dot((b_q * b_past).to(DT), tl.trans((b_k * b_future).to(DT)), PRECISION)
            b_a += tl.where(meet(o_i, 1 << level), b_s, 0.0)
            b_past, b_future = grow(b_past, b_future, o_i, 1 << level)
    store_rows(a, b_a, o_t, m_t, heads, i_h, o_i, BT)


@autotune(CONFIGS, key=["K", "V"])
@triton.jit
def gla_output_kernel(
    q, v, g, a, h, o, scale, chunks, heads, shared,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o = scale * (scores @ v + (q decayed from the chunk's start) @ state)."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    i_s = i_h // (heads // shared)
    o_i = tl.arange(0, BT)
    o_t = tl.load(chunks + 2 * i_c) + o_i
    m_t = o_i < tl.load(chunks + 2 * i_c + 1)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)

    b_a = load_rows(a, o_t, m_t, heads, i_h, o_i, BT)  # [BT, BT]
    b_v = load_rows(v, o_t, m_t, shared, i_s, o_v, V)  # [BT, BV]
    b_o = dot(b_a.to(DT), b_v.to(DT), PRECISION)
    for i_k in range(0, tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(q, o_t, m_t, heads, i_h, o_k, K)  # [BT, BK]
        b_g = load_gates(g, o_t, m_t, shared, i_s, o_k, K, W, FLOOR)
        b_h = load_rows(h + (i_c * shared + i_s) * K * V, o_k, o_k < K, 1, 0, o_v, V)  # [BK, BV]
        b_o += dot((b_q * tl.exp(tl.cumsum(b_g, 0))).to(DT), b_h.to(DT), PRECISION)
    store_rows(o, b_o * scale, o_t, m_t, heads, i_h, o_v, V)
