"""Triton kernels of the adaptive-threshold spike code; `spike_encode.py` holds the definition.

One program codes R whole rows, held as a tile [R, P] with P a power of two. Decisions keep the reference's bits: sums
are folded in halves, divisions and roots are correctly rounded, and fusion of products into sums is switched off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import contiguous
from spikelm.kernels.triton_tools import IS_INTERPRETED, next_power_of_two

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_HUGE = tl.constexpr(torch.finfo(torch.float32).max)
_HUGE_FP16 = tl.constexpr(torch.finfo(torch.float16).max)
_HUGE_BF16 = tl.constexpr(torch.finfo(torch.bfloat16).max)


@triton.jit
def _round_to(v, DTYPE: tl.constexpr):
    """float32 v in DTYPE, rounded to nearest even; the interpreter alone would cut bfloat16 off."""
    if IS_INTERPRETED and tl.bfloat16 == DTYPE:
        bits = v.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        v = (bits & -65536).to(tl.float32, bitcast=True)
    return v.to(DTYPE)


@triton.jit
def _fold(v, R: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr):
    """Sums [R] of the rows of v [R, P]: the second half is added to the first until one number is left."""
    for i in tl.static_range(LEVELS):
        v = tl.sum(tl.reshape(v, (R, 2, P >> (i + 1))), axis=1)
    return tl.reshape(v, (R,))


@triton.jit
def _round_even(v):
    """Nearest integer, ties to even: adding 2^23 leaves no fraction bits."""
    size = tl.abs(v)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(v < 0.0, -whole, whole)


@triton.jit
def _saturate(v, limit):
    """v clipped to [-limit, limit]; NaN stays NaN."""
    v = tl.maximum(v, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _level(size, k, magnitude, C, STORED: tl.constexpr, R: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr):
    """Mean magnitude and threshold, [R] each, of rows with magnitudes size [R, P], zero behind C."""
    if STORED:
        m = tl.load(magnitude) + tl.zeros((R,), dtype=tl.float32)
    else:
        m = tl.div_rn(_fold(size, R, P, LEVELS), C * 1.0)
    threshold = tl.div_rn(m, tl.load(k))
    threshold = tl.maximum(threshold, _TINY, propagate_nan=tl.PropagateNan.ALL)
    return m, tl.minimum(threshold, _HUGE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _counts(v, o_c, m_c, m, threshold, zone, ZONE: tl.constexpr):
    """Unclipped counts of v [R, C] from `_level`'s results [R]; o_c [C] are the channels."""
    size = tl.abs(v)
    counts = _round_even(tl.div_rn(v, threshold[:, None]))
    if ZONE == 1:
        counts = tl.where(size < tl.load(zone) * m[:, None], 0.0, counts)
    elif ZONE == 2:
        b_zone = tl.load(zone + o_c, mask=m_c, other=0.0)[None, :]
        counts = tl.where(size < b_zone * m[:, None], 0.0, counts)
    return counts


@triton.jit
def _code(
    v, o_c, m_c, k, zone, magnitude, C, ZONE: tl.constexpr, STORED: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Unclipped counts [R, P] and threshold [R, 1] of rows v [R, P]; `_fold`'s order needs zeros where not m_c."""
    m, threshold = _level(tl.abs(v), k, magnitude, C, STORED, R, P, LEVELS)
    return _counts(v, o_c, m_c, m, threshold, zone, ZONE), threshold[:, None]


@triton.jit
def encode_kernel(
    x, weight, k, zone, magnitude, counts, thresholds, rows, C, eps, max_count,
    NORM: tl.constexpr, ZONE: tl.constexpr, STORED: tl.constexpr, CLIP: tl.constexpr, VALUES: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Counts and thresholds of R rows, or with VALUES their products in the dtype of x (into `counts`).

    NORM: 0 none, 1 RMSNorm, 2 also times weight, 3 also times (weight + 1). ZONE: 0 none, 1 shared, 2 per channel.
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    o_c = tl.arange(0, P)
    m_c = o_c < C
    mask = (o_r < rows)[:, None] & m_c[None, :]
    o_x = o_r[:, None] * C + o_c[None, :]
    # [R, P]
    v = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
    if NORM > 0:
        mean = tl.div_rn(_fold(v * v, R, P, LEVELS), C * 1.0)
        v = v * tl.div_rn(tl.full((R,), 1.0, dtype=tl.float32), tl.sqrt_rn(mean + eps))[:, None]
        if NORM < 3:
            v = _round_to(v, x.dtype.element_ty).to(tl.float32)
        if NORM > 1:
            w = tl.load(weight + o_c, mask=m_c, other=0.0)
            if NORM == 3:
                v = v * (1.0 + w)[None, :]
            else:
                v = v * _round_to(w, x.dtype.element_ty).to(tl.float32)[None, :]
        v = _round_to(v, x.dtype.element_ty).to(tl.float32)
    s, threshold = _code(v, o_c, m_c, k, zone, magnitude, C, ZONE, STORED, R, P, LEVELS)
    if CLIP:
        s = _saturate(s, max_count)
    if VALUES:
        s = s * threshold
        if x.dtype.element_ty == tl.float16:
            s = _saturate(s, _HUGE_FP16)
        elif x.dtype.element_ty == tl.bfloat16:
            s = _saturate(s, _HUGE_BF16)
        tl.store(counts + o_x, _round_to(s, x.dtype.element_ty), mask=mask)
    else:
        tl.store(counts + o_x, s, mask=mask)
        tl.store(thresholds + o_r[:, None], threshold, mask=(o_r < rows)[:, None])


@triton.jit
def quantize_backward_kernel(
    dy, x, k, zone, magnitude, dx, dm, rows, C, max_count,
    ZONE: tl.constexpr, STORED: tl.constexpr, CLIP: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """dx = dy, zero where clipped; every row's term of dm = sum dy * (s - x / V) / k, s alone where clipped."""
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    o_c = tl.arange(0, P)
    m_c = o_c < C
    mask = (o_r < rows)[:, None] & m_c[None, :]
    o_x = o_r[:, None] * C + o_c[None, :]
    # [R, P]
    v = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + o_x, mask=mask, other=0.0).to(tl.float32)
    s, threshold = _code(v, o_c, m_c, k, zone, magnitude, C, ZONE, STORED, R, P, LEVELS)
    slope = s - tl.div_rn(v, threshold)
    passed = grad
    if CLIP:
        clipped = tl.abs(s) > max_count
        slope = tl.where(clipped, _saturate(s, max_count), slope)
        passed = tl.where(clipped, 0.0, grad)
    tl.store(dx + o_x, _round_to(passed, x.dtype.element_ty), mask=mask)
    tl.store(dm + o_r, tl.sum(grad * slope, axis=1) / tl.load(k), mask=o_r < rows)


def _tile(x: Tensor) -> tuple[int, tuple, dict]:
    """Rows of x, the grid, and the tile's constants and launch options."""
    channels = x.shape[-1]
    rows, width = x.numel() // channels, next_power_of_two(channels, 2)
    group = max(1, 1024 // width)
    options = {
        "R": group,
        "P": width,
        "LEVELS": width.bit_length() - 1,
        "num_warps": 4 if width <= 4096 else 8 if width <= 16384 else 16,
        # A product fused into a sum rounds once instead of twice and would flip counts.
        "enable_fp_fusion": False,
    }
    return rows, (triton.cdiv(rows, group),), options


def _constants(k: Tensor, dead_zone: Tensor | None, magnitude: Tensor | None, max_count: int | None):
    wide = tuple(None if t is None else t.to(torch.float32) for t in (k, dead_zone, magnitude))
    zone = 0 if dead_zone is None else 1 if dead_zone.numel() == 1 else 2
    flags = {"ZONE": zone, "STORED": magnitude is not None, "CLIP": max_count is not None}
    return contiguous(*wide), float(max_count or 0), flags


def encode_triton(
    x: Tensor,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
    *,
    norm: int = 0,
    weight: Tensor | None = None,
    eps: float = 0.0,
    values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch `encode_kernel`: counts [..., C] and thresholds [..., 1], or with `values` x_hat and an unused tensor."""
    (x, weight), (params, limit, flags) = contiguous(x, weight), _constants(k, dead_zone, magnitude, max_count)
    out = torch.empty_like(x, dtype=x.dtype if values else torch.float32)
    thresholds = x.new_empty((0,) if values else (*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        rows, grid, options = _tile(x)
        weight = None if weight is None else weight.to(torch.float32)
        encode_kernel[grid](
            x, weight, *params, out, thresholds, rows, x.shape[-1], eps, limit,
            NORM=norm, VALUES=values, **flags, **options,
        )  # fmt: skip
    return out, thresholds


def quantize_backward_triton(
    dy: Tensor,
    x: Tensor,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
) -> tuple[Tensor, Tensor]:
    """Launch `quantize_backward_kernel`: dx [..., C] and the rows' terms of dm [..., 1]."""
    (dy, x), (params, limit, flags) = contiguous(dy, x), _constants(k, dead_zone, magnitude, max_count)
    dx, dm = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        rows, grid, options = _tile(x)
        quantize_backward_kernel[grid](dy, x, *params, dx, dm, rows, x.shape[-1], limit, **flags, **options)
    return dx, dm
