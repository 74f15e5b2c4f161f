"""Triton kernels of windowed softmax and linear attention, backward; `window_linear_triton.py` launches them.

With dn = do / den and dd = -(do . o) / den, the weight of key j for query t has the gradient dw = x + dd, x = dn . v_j.
A score has ds = gamma p dw, p = exp(s - c). The maximum c has minus their sum over the window, which goes to the score
that is the maximum. Over gamma, that sum is what gamma gets; for gamma it is found as

    sum p dw = (sum l * sum p x - sum p * sum l x) / den,         l the linear weights, p those in the window,

free of the large terms that cancel, but for the maximum as it stands, so that the scores get nothing in all. The
queries' kernel writes the sums of its rows for those of the states and of the keys; the latter go through the tiles of
queries that meet theirs, in order.
"""

import triton
import triton.language as tl

from spikelm.kernels.triton_tools import autotune, dot
from spikelm.kernels.window_linear_triton_forward import CONFIGS, load_rows, locate, scores_of, store_rows

# Three sums of the width of a key stay in registers, and its tiles beside them.
WIDE_CONFIGS = [triton.Config({}, num_warps=8, num_stages=1)]


@triton.jit
def load_gradient(do, weight, o_t, m_t, heads, i_h, o_v, V: tl.constexpr, EPSILON: tl.constexpr):
    """do / den [BT, BV], c and den [BT]; all 0 behind the end."""
    b_c = tl.load(weight + 2 * (o_t * heads + i_h), mask=m_t, other=0.0)
    b_den = tl.load(weight + 2 * (o_t * heads + i_h) + 1, mask=m_t, other=0.0)
    b_dn = load_rows(do, o_t, m_t, heads, i_h, o_v, V) / tl.maximum(b_den, EPSILON)[:, None]
    return b_dn, b_c, b_den


@autotune(CONFIGS, key=["D", "F", "V"])
@triton.jit
def window_linear_queries_backward_kernel(
    q, k, v, fq, fk, gamma, h, hz, o, do, weight, peak, dq, dfq, rows, parts, bounds, offsets, scale, window, heads,
    shared, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq and dfq of one tile and head, and rows [tokens, heads, 3] = (dd, sum p dw, m)."""
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // heads, i_ch % heads
    i_s = i_h // (heads // shared)
    i_0, i, t_0, t_end, _n = locate(parts, bounds, offsets, i_c, BT)
    i_first = tl.maximum(i - tl.cdiv(window - 1, BT), 0)
    o_i, o_d, o_f, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BV)
    o_t = t_0 + i * BT + o_i
    m_t = o_t < t_end
    b_gamma = tl.load(gamma + i_h).to(tl.float32)
    b_dn, b_c, b_den = load_gradient(do, weight, o_t, m_t, heads, i_h, o_v, V, EPSILON)
    b_o = load_rows(o, o_t, m_t, heads, i_h, o_v, V)
    m_den = b_den >= EPSILON
    b_dd = tl.where(m_den, -tl.sum(b_dn * b_o, 1), 0.0)

    b_fq = load_rows(fq, o_t, m_t, heads, i_h, o_f, F)  # [BT, BF]
    i_hs = (i_0 + i_first) * shared + i_s
    b_h = load_rows(h + i_hs * F * V, o_f, o_f < F, 1, 0, o_v, V)  # [BF, BV]
    b_z = tl.load(hz + i_hs * F + o_f, mask=o_f < F, other=0.0)
    b_dfq = dot(b_dn.to(DT), tl.trans(b_h.to(DT)), PRECISION)
    b_past, b_dpast = tl.sum(b_fq * b_z[None, :], 1), tl.sum(b_fq * b_dfq, 1)
    b_dfq += b_dd[:, None] * b_z[None, :]
    for i_j in range(i_first, tl.minimum(i - tl.cdiv(window - 1, BT) + 2, i + 1)):
        o_j = t_0 + i_j * BT + o_i
        b_fk = load_rows(fk, o_j, o_j < t_end, shared, i_s, o_f, F)
        b_v = load_rows(v, o_j, o_j < t_end, shared, i_s, o_v, V)
        m_past = o_t[:, None] - o_j[None, :] >= window
        b_l = tl.where(m_past, dot(b_fq.to(DT), tl.trans(b_fk.to(DT)), PRECISION), 0.0)  # [BT, BT]
        b_x = dot(b_dn.to(DT), tl.trans(b_v.to(DT)), PRECISION)
        b_dfq += dot(tl.where(m_past, b_x + b_dd[:, None], 0.0).to(DT), b_fk.to(DT), PRECISION)
        b_past += tl.sum(b_l, 1)
        b_dpast += tl.sum(b_l * b_x, 1)
    store_rows(dfq, b_dfq, o_t, m_t, heads, i_h, o_f, F)

    b_q = load_rows(q, o_t, m_t, heads, i_h, o_d, D) * scale
    b_dq = tl.zeros((BT, BD), dtype=tl.float32)
    b_now = tl.zeros((BT,), dtype=tl.float32)
    b_dnow, b_dc = b_now, b_now
    for i_j in range(i_first, i + 1):
        o_j = t_0 + i_j * BT + o_i
        b_k = load_rows(k, o_j, o_j < t_end, shared, i_s, o_d, D)
        b_v = load_rows(v, o_j, o_j < t_end, shared, i_s, o_v, V)
        b_p = tl.exp(scores_of(b_q, b_k, o_t, o_j, window, DT, PRECISION) - b_c[:, None])
        b_x = dot(b_dn.to(DT), tl.trans(b_v.to(DT)), PRECISION)
        b_ds = b_p * (b_x + b_dd[:, None])
        b_dq += dot(b_ds.to(DT), b_k.to(DT), PRECISION)
        b_dc += tl.sum(b_ds, 1)
        b_now += tl.sum(b_p, 1)
        b_dnow += tl.sum(b_p * b_x, 1)
    b_m = tl.where(m_den, (b_past * b_dnow - b_now * b_dpast) / tl.maximum(b_den, EPSILON), b_dnow)
    o_th = o_t * heads + i_h
    tl.store(rows + 3 * o_th, b_dd, mask=m_t)
    tl.store(rows + 3 * o_th + 1, b_dc, mask=m_t)
    tl.store(rows + 3 * o_th + 2, b_m, mask=m_t)
    b_k = load_rows(k, o_t - tl.load(peak + o_th, mask=m_t, other=0), m_t, shared, i_s, o_d, D)
    store_rows(dq, (b_dq - b_dc[:, None] * b_k) * (b_gamma * scale), o_t, m_t, heads, i_h, o_d, D)


@autotune(CONFIGS, key=["F", "V"])
@triton.jit
def window_linear_states_backward_kernel(
    fq, do, weight, rows, dh, dhz, dlast, dlast_norm, dfirst, dfirst_norm, bounds, offsets, window, heads, shared,
    F: tl.constexpr, V: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr, DT: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums behind every tile, dh [tiles, shared, F, V] and dhz, and of those in front of the parts."""
    i_ps = tl.program_id(0).to(tl.int64)
    i_p, i_s = i_ps // shared, i_ps % shared
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    o_fv = o_f[:, None] * V + o_v[None, :]
    m_fv = (o_f < F)[:, None] & (o_v < V)[None, :]
    m_f = o_f < F * (1 - tl.program_id(2))
    t_0, t_end = tl.load(bounds + i_p), tl.load(bounds + i_p + 1)
    i_0, i_end = tl.load(offsets + i_p), tl.load(offsets + i_p + 1)
    n_tiles = (i_end - i_0).to(tl.int32)
    reach = tl.minimum(tl.cdiv(window - 1, BT), n_tiles)

    b_dh = tl.load(dlast + i_ps * F * V + o_fv, mask=m_fv, other=0.0)  # [BF, BV]
    b_dz = tl.load(dlast_norm + i_ps * F + o_f, mask=m_f, other=0.0)  # [BF]
    # Tile i reads the sums in front of tile i - reach; what stands behind the last tiles nobody reads.
    for i_back in range(0, n_tiles + reach):
        i = n_tiles + reach - 1 - i_back
        if i >= reach:
            i_cs = (i_0 + i - reach) * shared + i_s
            tl.store(dh + i_cs * F * V + o_fv, b_dh.to(dh.dtype.element_ty), mask=m_fv)
            tl.store(dhz + i_cs * F + o_f, b_dz, mask=m_f)
        o_t = t_0 + i * BT + tl.arange(0, BT)
        m_t = o_t < t_end
        for i_g in range(0, heads // shared):
            i_h = i_s * (heads // shared) + i_g
            b_fq = load_rows(fq, o_t, m_t, heads, i_h, o_f, F)  # [BT, BF]
            b_dn, _c, _den = load_gradient(do, weight, o_t, m_t, heads, i_h, o_v, V, EPSILON)
            b_dd = tl.load(rows + 3 * (o_t * heads + i_h), mask=m_t, other=0.0)
            b_dh += dot(tl.trans(b_fq.to(DT)), b_dn.to(DT), PRECISION)
            b_dz += tl.sum(b_fq * b_dd[:, None], 0)
    tl.store(dfirst + i_ps * F * V + o_fv, b_dh, mask=m_fv)
    tl.store(dfirst_norm + i_ps * F + o_f, b_dz, mask=m_f)


@autotune(WIDE_CONFIGS, key=["D", "F", "V"])
@triton.jit
def window_linear_keys_backward_kernel(
    q, k, v, fq, fk, gamma, do, weight, peak, rows, dh, dhz, dk, dv, dfk, parts, bounds, offsets, scale, window, heads,
    shared, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    DT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk, dv and dfk of one tile and key-value head."""
    i_cs = tl.program_id(0).to(tl.int64)
    i_c, i_s = i_cs // shared, i_cs % shared
    _i, i, t_0, t_end, n_tiles = locate(parts, bounds, offsets, i_c, BT)
    reach = tl.cdiv(window - 1, BT)
    o_i, o_d, o_f, o_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BV)
    o_j = t_0 + i * BT + o_i
    m_j = o_j < t_end
    b_k = load_rows(k, o_j, m_j, shared, i_s, o_d, D)  # [BT, BD]
    b_v = load_rows(v, o_j, m_j, shared, i_s, o_v, V)  # [BT, BV]

    # Through the sums; what is in the part's last window has entered none.
    m_left = o_j < t_end - window + 1
    b_fk = load_rows(fk, o_j, m_left, shared, i_s, o_f, F)  # [BT, BF]
    b_dh = load_rows(dh + i_cs * F * V, o_f, o_f < F, 1, 0, o_v, V)  # [BF, BV]
    b_dz = tl.load(dhz + i_cs * F + o_f, mask=o_f < F, other=0.0)
    b_dv = dot(b_fk.to(DT), b_dh.to(DT), PRECISION)
    b_dfk = dot(b_v.to(DT), tl.trans(b_dh.to(DT)), PRECISION) + b_dz[None, :]
    b_dfk = tl.where(m_left[:, None], b_dfk, 0.0)

    b_dk = tl.zeros((BT, BD), dtype=tl.float32)
    for i_g in range(0, heads // shared):
        i_h = i_s * (heads // shared) + i_g
        b_gamma = tl.load(gamma + i_h).to(tl.float32)
        for i_t in range(i, tl.minimum(i + reach + 1, n_tiles)):
            o_t = t_0 + i_t * BT + o_i
            m_t = o_t < t_end
            b_q = load_rows(q, o_t, m_t, heads, i_h, o_d, D) * scale
            b_dn, b_c, _den = load_gradient(do, weight, o_t, m_t, heads, i_h, o_v, V, EPSILON)
            o_th = o_t * heads + i_h
            b_dd = tl.load(rows + 3 * o_th, mask=m_t, other=0.0)
            b_dc = tl.load(rows + 3 * o_th + 1, mask=m_t, other=0.0)
            b_peak = o_t - tl.load(peak + o_th, mask=m_t, other=0)
            b_p = tl.exp(scores_of(b_q, b_k, o_t, o_j, window, DT, PRECISION) - b_c[:, None]) * b_gamma  # [t, j]
            b_ds = b_p * (dot(b_dn.to(DT), tl.trans(b_v.to(DT)), PRECISION) + b_dd[:, None])
            b_ds -= tl.where(b_peak[:, None] == o_j[None, :], b_dc[:, None] * b_gamma, 0.0)
            b_dk += dot(tl.trans(b_ds.to(DT)), b_q.to(DT), PRECISION)
            b_dv += dot(tl.trans(b_p.to(DT)), b_dn.to(DT), PRECISION)
        for i_t in range(tl.maximum(i, i + reach - 1), tl.minimum(i + reach + 1, n_tiles)):
            o_t = t_0 + i_t * BT + o_i
            m_t = o_t < t_end
            m_past = o_t[:, None] - o_j[None, :] >= window
            b_fq = load_rows(fq, o_t, m_t, heads, i_h, o_f, F)
            b_dn, _c, _den = load_gradient(do, weight, o_t, m_t, heads, i_h, o_v, V, EPSILON)
            b_dd = tl.load(rows + 3 * (o_t * heads + i_h), mask=m_t, other=0.0)
            b_l = tl.where(m_past, dot(b_fq.to(DT), tl.trans(b_fk.to(DT)), PRECISION), 0.0)
            b_dl = tl.where(m_past, dot(b_dn.to(DT), tl.trans(b_v.to(DT)), PRECISION) + b_dd[:, None], 0.0)
            b_dfk += dot(tl.trans(b_dl.to(DT)), b_fq.to(DT), PRECISION)
            b_dv += dot(tl.trans(b_l.to(DT)), b_dn.to(DT), PRECISION)
    store_rows(dk, b_dk, o_j, m_j, shared, i_s, o_d, D)
    store_rows(dv, b_dv, o_j, m_j, shared, i_s, o_v, V)
    store_rows(dfk, b_dfk, o_j, m_j, shared, i_s, o_f, F)
