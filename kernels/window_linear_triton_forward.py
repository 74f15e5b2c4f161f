"""Triton kernels of windowed softmax and linear attention, forward; `window_linear_triton.py` launches them.

Parts (sequences, documents) are cut into tiles of BT tokens. With reach = ceil((window - 1) / BT), a tile of queries
meets the tiles of keys from `reach` before it to itself: within them a key at distance < window has a softmax weight,
one further back, in the first two of them, a linear weight. Everything before them is in the sums in front of the first
of them, which one program per state has found by going through the tiles in turn.
"""

import triton
import triton.language as tl

from spikelm.kernels.triton_tools import autotune, dot

CONFIGS = [triton.Config({}, num_warps=4, num_stages=1), triton.Config({}, num_warps=8, num_stages=1)]


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
def scores_of(b_q, b_k, o_t, o_j, window, DT: tl.constexpr, PRECISION: tl.constexpr):
    """q @ k^T [BT, BT], -inf outside the window; a query behind the end still has itself in it."""
    o_back = o_t[:, None] - o_j[None, :]
    b_s = dot(b_q.to(DT), tl.trans(b_k.to(DT)), PRECISION)
    return tl.where((o_back >= 0) & (o_back < window), b_s, float("-inf"))


@triton.jit
def locate(parts, bounds, offsets, i_c, BT: tl.constexpr):
    """Of a tile: the first tile of its part, its number there, the part's first token, end, and number of tiles."""
    i_p = tl.load(parts + i_c)
    i_0, i_end = tl.load(offsets + i_p), tl.load(offsets + i_p + 1)
    return i_0, (i_c - i_0).to(tl.int32), tl.load(bounds + i_p), tl.load(bounds + i_p + 1), (i_end - i_0).to(tl.int32)


@autotune(CONFIGS, key=["F", "V"])
@triton.jit
def window_linear_states_kernel(
    v, fk, h, hz, first, first_norm, last, last_norm, bounds, offsets, window, shared,
    F: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Sums in front of every tile, h [tiles, shared, F, V] and hz [tiles, shared, F], and behind the parts.

    Tokens in the last window of a part enter none; what that spoils in front of the last tiles is never read.
    """
    i_ps = tl.program_id(0).to(tl.int64)
    i_p, i_s = i_ps // shared, i_ps % shared
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    o_fv = o_f[:, None] * V + o_v[None, :]
    m_fv = (o_f < F)[:, None] & (o_v < V)[None, :]
    m_f = o_f < F * (1 - tl.program_id(2))  # the first of the programs with the same channels writes their norms
    t_0, t_end = tl.load(bounds + i_p), tl.load(bounds + i_p + 1)
    i_0, i_end = tl.load(offsets + i_p), tl.load(offsets + i_p + 1)

    b_h = tl.load(first + i_ps * F * V + o_fv, mask=m_fv, other=0.0)  # [BF, BV]
    b_z = tl.load(first_norm + i_ps * F + o_f, mask=m_f, other=0.0)  # [BF]
    for i in range(0, (i_end - i_0).to(tl.int32)):
        i_cs = (i_0 + i) * shared + i_s
        tl.store(h + i_cs * F * V + o_fv, b_h.to(h.dtype.element_ty), mask=m_fv)
        tl.store(hz + i_cs * F + o_f, b_z, mask=m_f)
        o_t = t_0 + i * BT + tl.arange(0, BT)
        m_t = o_t < t_end - window + 1
        b_fk = load_rows(fk, o_t, m_t, shared, i_s, o_f, F)  # [BT, BF]
        b_v = load_rows(v, o_t, m_t, shared, i_s, o_v, V)  # [BT, BV]
        b_h += dot(tl.trans(b_fk.to(DT)), b_v.to(DT), PRECISION)
        b_z += tl.sum(b_fk, 0)
    tl.store(last + i_ps * F * V + o_fv, b_h, mask=m_fv)
    tl.store(last_norm + i_ps * F + o_f, b_z, mask=m_f)


@autotune(CONFIGS, key=["D", "F", "V"])
@triton.jit
def window_linear_output_kernel(
    q, k, v, fq, fk, gamma, h, hz, o, weight, peak, parts, bounds, offsets, scale, window, heads, shared,
    D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o of one tile and head, its weight (c, den) [tokens, heads, 2], and how far back the maximum c lies."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    i_s = i_h // (heads // shared)
    i_0, i, t_0, t_end, _n = locate(parts, bounds, offsets, i_c, BT)
    i_first = tl.maximum(i - tl.cdiv(window - 1, BT), 0)
    o_i, o_d, o_f, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BV)
    o_t = t_0 + i * BT + o_i
    m_t = o_t < t_end

    b_q = load_rows(q, o_t, m_t, heads, i_h, o_d, D) * scale  # [BT, BD]
    b_c = tl.full((BT,), float("-inf"), dtype=tl.float32)
    b_peak = tl.zeros((BT,), dtype=tl.int32)
    b_den = tl.zeros((BT,), dtype=tl.float32)
    b_o = tl.zeros((BT, BV), dtype=tl.float32)
    for i_j in range(i_first, i + 1):
        o_j = t_0 + i_j * BT + o_i
        b_k = load_rows(k, o_j, o_j < t_end, shared, i_s, o_d, D)
        b_v = load_rows(v, o_j, o_j < t_end, shared, i_s, o_v, V)
        b_s = scores_of(b_q, b_k, o_t, o_j, window, DT, PRECISION)  # [BT, BT]
        b_max = tl.max(b_s, 1)
        b_back = (i - i_j) * BT + o_i - tl.min(tl.where(b_s == b_max[:, None], o_i[None, :], BT), 1)
        b_peak = tl.where(b_max > b_c, b_back, b_peak)
        b_top = tl.maximum(b_c, b_max)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)  # rows whose window has not begun
        b_old = tl.exp(b_c - b_shift)
        b_p = tl.exp(b_s - b_shift[:, None])
        b_o = b_o * b_old[:, None] + dot(b_p.to(DT), b_v.to(DT), PRECISION)
        b_den = b_den * b_old + tl.sum(b_p, 1)
        b_c = b_top
    b_gamma = tl.load(gamma + i_h).to(tl.float32)
    b_o *= b_gamma
    b_den *= b_gamma

    b_fq = load_rows(fq, o_t, m_t, heads, i_h, o_f, F)  # [BT, BF]
    for i_j in range(i_first, tl.minimum(i - tl.cdiv(window - 1, BT) + 2, i + 1)):
        o_j = t_0 + i_j * BT + o_i
        b_fk = load_rows(fk, o_j, o_j < t_end, shared, i_s, o_f, F)
        b_v = load_rows(v, o_j, o_j < t_end, shared, i_s, o_v, V)
        b_l = dot(b_fq.to(DT), tl.trans(b_fk.to(DT)), PRECISION)
        b_l = tl.where(o_t[:, None] - o_j[None, :] >= window, b_l, 0.0)
        b_o += dot(b_l.to(DT), b_v.to(DT), PRECISION)
        b_den += tl.sum(b_l, 1)
    i_hs = (i_0 + i_first) * shared + i_s
    b_h = load_rows(h + i_hs * F * V, o_f, o_f < F, 1, 0, o_v, V)  # [BF, BV]
    b_z = tl.load(hz + i_hs * F + o_f, mask=o_f < F, other=0.0)
    b_o += dot(b_fq.to(DT), b_h.to(DT), PRECISION)
    b_den += tl.sum(b_fq * b_z[None, :], 1)
    store_rows(o, b_o / tl.maximum(b_den, EPSILON)[:, None], o_t, m_t, heads, i_h, o_v, V)
    o_th = o_t * heads + i_h
    tl.store(weight + 2 * o_th, b_c, mask=m_t)
    tl.store(weight + 2 * o_th + 1, b_den, mask=m_t)
    tl.store(peak + o_th, b_peak, mask=m_t)
