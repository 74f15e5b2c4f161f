"""Triton kernels of the event product: split over inputs, then summed, without atomics.

A program of the first kernel takes some columns of the weights and a run of blocks of inputs. It codes its inputs,
reads the rows of those that are not silent in the whole batch, widens them in registers, and writes its part of the
sums; the second kernel adds the parts in their order. What is launched depends on shapes alone and nothing waits for
the device, so a CUDA graph can hold both. Blocks of inputs never cross a group: counts times codes stay integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import contiguous
from spikelm.kernels.spike_encode_triton import _constants, _counts, _level, _saturate
from spikelm.kernels.triton_tools import next_power_of_two
from spikelm.kernels.weight_rows import LARGEST_CODE, Rows

_PROGRAMS = 512  # in flight: a few for each multiprocessor of a large GPU


@triton.jit
def _sum(v, w, limit, INTEGERS: tl.constexpr):
    """v [B, K] times w [K, N] as float32 [B, N]; integers in int32 if no count exceeds `limit`, else in float64."""
    if INTEGERS:
        beyond = tl.where(tl.abs(v) <= limit, 0, 1)  # NaN too
        if tl.sum(tl.sum(beyond, 1), 0) == 0:
            whole = v.to(tl.int32)[:, :, None] * w[None, :, :]
            total = tl.sum(whole, axis=1).to(tl.float32)
        else:
            exact = v.to(tl.float64)[:, :, None] * w.to(tl.float64)[None, :, :]
            total = tl.sum(exact, axis=1).to(tl.float32)
    else:
        total = tl.sum(v[:, :, None] * w.to(tl.float32)[None, :, :], axis=1)
    return total


@triton.jit
def event_sums_kernel(
    x, counts, thresholds, k, zone, magnitude, data, scales, parts,
    K, N, OUT, limit, max_count, group, per_group, per_program,
    CODED: tl.constexpr, ZONE: tl.constexpr, STORED: tl.constexpr, CLIP: tl.constexpr, COUNTED: tl.constexpr,
    DENSE: tl.constexpr, SCALED: tl.constexpr, HALVES: tl.constexpr,
    BATCH: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """parts [splits, BATCH, OUT] of x [BATCH, K] times data [K, N]; with HALVES a column of data holds two outputs.

    x holds values, or counts (COUNTED) with their thresholds [BATCH], or values to be CODED: then counts [BATCH, K] and
    thresholds are written.
    """
    i_n, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_b, o_n, o_k = tl.arange(0, B), i_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    m_b, m_n, m_high = o_b < BATCH, o_n < N, o_n + N < OUT
    level, threshold = tl.zeros((B,), dtype=tl.float32), tl.full((B,), 1.0, dtype=tl.float32)
    if CODED:
        o_p = tl.arange(0, P)
        for b in tl.static_range(BATCH):
            row = tl.load(x + b * K + o_p, mask=o_p < K, other=0.0).to(tl.float32)
            m, v_th = _level(tl.abs(row)[None, :], k, magnitude, K, STORED, 1, P, LEVELS)
            level, threshold = tl.where(o_b == b, m, level), tl.where(o_b == b, v_th, threshold)
        if (i_n == 0) & (i_s == 0):
            tl.store(thresholds + o_b, threshold, mask=m_b)
    elif COUNTED:
        threshold = tl.load(thresholds + o_b, mask=m_b, other=0.0)
    # [B, BN]
    low, high = tl.zeros((B, BN), dtype=tl.float32), tl.zeros((B, BN), dtype=tl.float32)
    first, blocks = tl.program_id(1) * per_program, tl.cdiv(K, group) * per_group
    for i in range(first, tl.minimum(first + per_program, blocks)):
        g = i // per_group
        inside = (i % per_group) * BK + o_k
        rows = g * group + inside
        m_k = (inside < group) & (rows < K)
        # [B, BK]
        o_x, m_x = o_b[:, None] * K + rows[None, :], m_b[:, None] & m_k[None, :]
        v = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        if CODED:
            v = _counts(v, rows, m_k, level, threshold, zone, ZONE)
            if CLIP:
                v = _saturate(v, max_count)
            v = tl.where(m_x, v, 0.0)
            if i_n == 0:
                tl.store(counts + o_x, v, mask=m_x)
        active = m_k
        if not DENSE:
            active = m_k & (tl.sum((v != 0.0).to(tl.int32), axis=0) > 0)
        # [BK, BN]
        w = tl.load(data + rows.to(tl.int64)[:, None] * N + o_n[None, :], mask=active[:, None] & m_n[None, :], other=0)
        o_scale = g.to(tl.int64) * OUT + o_n
        if HALVES:
            both = w.to(tl.int32)
            b_scale = tl.load(scales + o_scale + N, mask=m_high, other=0.0)
            high += b_scale[None, :] * _sum(v, ((both >> 4) ^ 8) - 8, limit, CODED or COUNTED)
            w = ((both & 15) ^ 8) - 8
        if SCALED:
            b_scale = tl.load(scales + o_scale, mask=m_n, other=0.0)
            low += b_scale[None, :] * _sum(v, w.to(tl.int32), limit, CODED or COUNTED)
        else:
            low += _sum(v, w, limit, False)
    p_parts = parts + (i_s * BATCH + o_b[:, None]) * OUT + o_n[None, :]
    tl.store(p_parts, low * threshold[:, None], mask=m_b[:, None] & m_n[None, :])
    if HALVES:
        tl.store(p_parts + N, high * threshold[:, None], mask=m_b[:, None] & m_high[None, :])


@triton.jit
def event_total_kernel(parts, bias, y, SPLITS, OUT, BIAS: tl.constexpr, S: tl.constexpr, BN: tl.constexpr):
    """y [BATCH, OUT]: the sum over parts [SPLITS, BATCH, OUT], and the bias; a program per row and BN outputs."""
    i_b, o_n, o_s = tl.program_id(1).to(tl.int64), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, S)
    m_n = o_n < OUT
    p_parts = parts + (o_s.to(tl.int64)[:, None] * tl.num_programs(1) + i_b) * OUT + o_n[None, :]
    # [S, BN]
    total = tl.sum(tl.load(p_parts, mask=(o_s < SPLITS)[:, None] & m_n[None, :], other=0.0), axis=0)
    if BIAS:
        total += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(y + i_b * OUT + o_n, total, mask=m_n)


def event_linear_triton(x: Tensor, threshold: Tensor | None, rows: Rows, bias: Tensor | None, dense: bool) -> Tensor:
    """x [B, in]: values, or counts with their threshold [B, 1] -> y [B, out] float32."""
    x, threshold = contiguous(x, None if threshold is None else threshold.float())
    flags = {"CODED": False, "COUNTED": threshold is not None, "ZONE": 0, "STORED": False, "CLIP": False}
    return _launch(x, None, threshold, rows, bias, dense, (None, None, None), 0.0, flags)


def spike_linear_triton(
    x: Tensor,
    rows: Rows,
    bias: Tensor | None,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, in] -> y [B, out], counts [B, in], threshold [B, 1], all float32."""
    (x,), (parameters, limit, flags) = contiguous(x), _constants(k, dead_zone, magnitude, max_count)
    counts = torch.empty_like(x, dtype=torch.float32)
    threshold = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    flags |= {"CODED": True, "COUNTED": False}
    return _launch(x, counts, threshold, rows, bias, dense, parameters, limit, flags), counts, threshold


def _launch(
    x: Tensor,
    counts: Tensor | None,
    threshold: Tensor | None,
    rows: Rows,
    bias: Tensor | None,
    dense: bool,
    parameters: tuple[Tensor | None, ...],
    max_count: float,
    flags: dict[str, int | bool],
) -> Tensor:
    (batch, inputs), columns, outputs = x.shape, rows.data.shape[1], rows.outputs
    y = x.new_empty(batch, outputs, dtype=torch.float32)
    if not y.numel():
        return y
    size, halves = next_power_of_two(batch, 1), rows.format == "int4"
    tile = {"B": size, "BK": 32 if size < 8 else 16, "BN": 64 if halves else 128, "num_warps": 4 if size < 2 else 8}
    group = inputs if rows.scales is None else rows.group
    per_group, across = triton.cdiv(group, tile["BK"]), triton.cdiv(columns, tile["BN"])
    blocks = triton.cdiv(inputs, group) * per_group
    per_program = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // across)))
    splits = triton.cdiv(blocks, per_program)
    limit = float(2**31 // ((LARGEST_CODE.get(rows.format, 0) + 1) * tile["BK"]) - 1)
    width = next_power_of_two(inputs, 2) if flags["CODED"] else 2
    parts = x.new_empty(splits, batch, outputs, dtype=torch.float32)
    event_sums_kernel[(across, splits)](
        x, counts, threshold, *parameters, rows.data, rows.scales, parts,
        inputs, columns, outputs, limit, max_count, group, per_group, per_program,
        DENSE=dense, SCALED=rows.scales is not None, HALVES=halves, BATCH=batch,
        P=width, LEVELS=width.bit_length() - 1, **flags, **tile,
    )  # fmt: skip
    event_total_kernel[(triton.cdiv(outputs, 128), batch)](
        parts, bias, y, splits, outputs, BIAS=bias is not None, S=next_power_of_two(splits, 1), BN=128
    )
    return y
