"""The event-based GRU as Triton kernels: a program takes one head and a tile of segments through all their steps.

Forward, the weights of the head and the states of the tile stay on the chip, which holds heads of up to `WIDEST`
channels; wider ones take the torch path, with its launches per token. Backward, the products in front of the gates
come from one matrix product over all tokens, and the gradient of the weights is another; the kernel does what goes
token by token. Forward products are float32: events do not depend on the dtype of the weights. No sum is atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.egru_torch import Cell, Rows, previous
from spikelm.kernels.runtime import INTERPRETED
from spikelm.kernels.segments import Segments
from spikelm.kernels.triton_tools import dot, next_power_of_two

WIDEST = 64
# Backward, no event hangs on a product. Six products of bfloat16 parts are as good as one of float32; asked for float32
# itself, the compiler of Triton 3.9 breaks down on this kernel for cuda 90. The interpreter knows no such products.
CARRY = tl.constexpr("ieee" if INTERPRETED else "bf16x6")
TILE = 16  # segments of a program: the least that a matrix unit takes


@triton.jit
def sigmoid(x):
    """The logistic function."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Without overflow."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def load_block(p, o_row, m, BLOCK: tl.constexpr, D: tl.constexpr, o_d):
    """One of the three blocks of rows that begin at o_row [n, 1], in float32 [n, BD]."""
    return tl.load(p + o_row + BLOCK * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_mask(mask, keep, o_y, m):
    """Share of the new state: that of the mask, or a constant."""
    if mask is not None:
        b_m = tl.load(mask + o_y, mask=m, other=0.0).to(tl.float32)
    else:
        b_m = keep
    return b_m


@triton.jit
def egru_forward_kernel(
    a, weight, bias, threshold, first, mask, tokens, offsets, lengths, events, before, ends, segments, keep,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, EVNN: tl.constexpr,
):  # fmt: skip
    """Events and states before the reset [tokens, H]; states behind the segments [S, 2, H]."""
    i_h = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_state = (o_s < segments)[:, None] & m_d[None, :]
    o_state = o_s[:, None] * (2 * HEADS * D) + i_h * D + o_d[None, :]
    b_c = tl.load(first + o_state, mask=m_state, other=0.0)  # [BS, BD]
    b_y = tl.load(first + o_state + HEADS * D, mask=m_state, other=0.0)
    o_w = i_h * D * 3 * D + o_d[:, None] * (3 * D)
    m_w = m_d[:, None] & m_d[None, :]
    b_w1 = load_block(weight, o_w, m_w, 0, D, o_d)  # [BD, BD]
    b_w2 = load_block(weight, o_w, m_w, 1, D, o_d)
    b_w3 = load_block(weight, o_w, m_w, 2, D, o_d)
    b_threshold = tl.load(threshold + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if EVNN:
        b_d1 = tl.load(bias + i_h * 3 * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_d2 = tl.load(bias + i_h * 3 * D + D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_d3 = tl.load(bias + i_h * 3 * D + 2 * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_length = tl.load(lengths + o_s, mask=o_s < segments, other=0)
    for t in range(0, tl.max(b_length, 0).to(tl.int32)):
        m_s = t < b_length
        m = m_s[:, None] & m_d[None, :]
        b_token = tl.load(tokens + tl.load(offsets + t) + o_s, mask=m_s, other=0)[:, None]
        o_a = (b_token * HEADS + i_h) * (3 * D)
        o_y = (b_token * HEADS + i_h) * D + o_d[None, :]
        b_a1 = load_block(a, o_a, m, 0, D, o_d)  # [BS, BD]
        b_a2 = load_block(a, o_a, m, 1, D, o_d)
        b_a3 = load_block(a, o_a, m, 2, D, o_d)
        if EVNN:
            b_z = sigmoid(b_a1 + (dot(b_y, b_w1) + b_d1))
            b_r = sigmoid(b_a2 + (dot(b_y, b_w2) + b_d2))
            b_new = b_z * b_c + (1.0 - b_z) * tanh(b_a3 + b_r * (dot(b_y, b_w3) + b_d3))
        else:
            b_u = sigmoid(b_a1 + dot(b_y, b_w1))
            b_r = sigmoid(b_a2 + dot(b_y, b_w2))
            b_new = b_u * tanh(b_a3 + dot(b_r * b_y, b_w3)) + (1.0 - b_u) * b_c - b_y
        b_m = load_mask(mask, keep, o_y, m)
        b_p = (1.0 - b_m) * b_c + b_m * b_new
        b_fired = b_p > b_threshold
        b_event = tl.where(b_fired, b_p, 0.0)
        tl.store(before + o_y, b_p, mask=m)
        tl.store(events + o_y, b_event.to(events.dtype.element_ty), mask=m)
        b_y = tl.where(m, b_event, b_y)
        b_c = tl.where(m, b_p - tl.where(b_fired, b_threshold, 0.0) if EVNN else b_p, b_c)
    tl.store(ends + o_state, b_c, mask=m_state)
    tl.store(ends + o_state + HEADS * D, b_y, mask=m_state)


@triton.jit
def egru_backward_kernel(
    dy, dends, a, q, c, y, before, weight, threshold, mask, tokens, offsets, lengths, da, dfirst, dthreshold,
    segments, rows, keep, dampening, support,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, EVNN: tl.constexpr,
):  # fmt: skip
    """da [tokens, 3H]; q [heads, rows, 3D] becomes its own gradient; dfirst [S, 2, H]; dthreshold [tiles, H].

    c, y [heads, rows, D] are the states in front of each row, q the products that it meets.
    """
    i_h = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_state = (o_s < segments)[:, None] & m_d[None, :]
    o_state = o_s[:, None] * (2 * HEADS * D) + i_h * D + o_d[None, :]
    b_dc = tl.load(dends + o_state, mask=m_state, other=0.0)  # [BS, BD]
    b_carried = tl.load(dends + o_state + HEADS * D, mask=m_state, other=0.0)
    o_w = i_h * D * 3 * D + o_d[:, None] * (3 * D)
    m_w = m_d[:, None] & m_d[None, :]
    b_w1 = tl.trans(load_block(weight, o_w, m_w, 0, D, o_d))  # [BD, BD]
    b_w2 = tl.trans(load_block(weight, o_w, m_w, 1, D, o_d))
    b_w3 = tl.trans(load_block(weight, o_w, m_w, 2, D, o_d))
    b_threshold = tl.load(threshold + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dthreshold = tl.zeros((BS, BD), dtype=tl.float32)
    b_length = tl.load(lengths + o_s, mask=o_s < segments, other=0)
    steps = tl.max(b_length, 0).to(tl.int32)
    for i in range(0, steps):
        t = steps - 1 - i
        m_s = t < b_length
        m = m_s[:, None] & m_d[None, :]
        b_row = tl.load(offsets + t) + o_s
        b_token = tl.load(tokens + b_row, mask=m_s, other=0)[:, None]
        b_row = (i_h * rows + b_row)[:, None]
        o_a = (b_token * HEADS + i_h) * (3 * D)
        o_y = (b_token * HEADS + i_h) * D + o_d[None, :]
        o_q = b_row * (3 * D)
        b_r = sigmoid(load_block(a, o_a, m, 1, D, o_d) + load_block(q, o_q, m, 1, D, o_d))
        b_one = sigmoid(load_block(a, o_a, m, 0, D, o_d) + load_block(q, o_q, m, 0, D, o_d))  # z of EvNN, u else
        b_q3 = load_block(q, o_q, m, 2, D, o_d)
        b_new = tanh(load_block(a, o_a, m, 2, D, o_d) + (b_r * b_q3 if EVNN else b_q3))
        b_c = tl.load(c + b_row * D + o_d[None, :], mask=m, other=0.0)
        b_m = load_mask(mask, keep, o_y, m)

        b_y = b_carried
        if dy is not None:
            b_y += tl.load(dy + o_y, mask=m, other=0.0).to(tl.float32)
        b_p = tl.load(before + o_y, mask=m, other=0.0)
        b_fired = b_p > b_threshold
        b_slope = dampening * tl.maximum(1.0 - support * tl.abs(b_p - b_threshold), 0.0)
        b_event = b_slope * (b_p * b_y - b_threshold * b_dc if EVNN else b_p * b_y)
        b_dthreshold += tl.where(m, b_event + tl.where(b_fired, b_dc, 0.0) if EVNN else b_event, 0.0)
        b_dp = b_dc + tl.where(b_fired, b_y, 0.0) + b_event

        b_fresh = b_m * (1.0 - b_one if EVNN else b_one)
        b_dnew = b_dp * b_fresh * (1.0 - b_new * b_new)
        b_d1 = b_dp * b_m * (b_c - b_new if EVNN else b_new - b_c) * b_one * (1.0 - b_one)
        if EVNN:
            b_d3 = b_dnew * b_r
            b_d2 = b_d3 * b_q3 * (1.0 - b_r)
            b_next = dot(b_d3, b_w3, CARRY)
        else:
            b_d3 = b_dnew
            b_dseen = dot(b_d3, b_w3, CARRY)
            b_d2 = b_dseen * tl.load(y + b_row * D + o_d[None, :], mask=m, other=0.0) * b_r * (1.0 - b_r)
            b_next = b_r * b_dseen - b_m * b_dp
        b_next += dot(b_d1, b_w1, CARRY) + dot(b_d2, b_w2, CARRY)
        p_a, p_q = da + o_a + o_d[None, :], q + o_q + o_d[None, :]
        tl.store(p_a, b_d1.to(da.dtype.element_ty), mask=m)
        tl.store(p_a + D, b_d2.to(da.dtype.element_ty), mask=m)
        tl.store(p_a + 2 * D, b_dnew.to(da.dtype.element_ty), mask=m)
        tl.store(p_q, b_d1, mask=m)
        tl.store(p_q + D, b_d2, mask=m)
        tl.store(p_q + 2 * D, b_d3, mask=m)
        b_carried = tl.where(m, b_next, b_carried)
        b_dc = tl.where(m, b_dp * (1.0 - b_fresh), b_dc)
    tl.store(dfirst + o_state, b_dc, mask=m_state)
    tl.store(dfirst + o_state + HEADS * D, b_carried, mask=m_state)
    o_part = (tl.program_id(0).to(tl.int64) * HEADS + i_h) * D + o_d
    tl.store(dthreshold + o_part, -tl.sum(b_dthreshold, 0), mask=m_d)


def forward(
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    first: Tensor,
    mask: Tensor | None,
    segments: Segments,
    evnn: bool,
    keep: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `egru_torch.forward`."""
    shape = (*a.shape[:2], first.shape[2])
    events = segments.blank(shape, a.dtype, a.device)
    before = segments.blank(shape, first.dtype, a.device)
    ends = torch.empty_like(first)
    bias = torch.zeros(a.shape[2], device=a.device) if bias is None and evnn else bias
    tensors = a, weight, bias, threshold, first, _numbers(mask), *_steps(segments), events, before, ends
    if len(first):
        egru_forward_kernel[_grid(first, weight)](*tensors, len(first), keep, **_constants(weight, evnn))
    return events, ends, before


def backward(
    dy: Tensor | None,
    dends: Tensor,
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    first: Tensor,
    before: Tensor,
    mask: Tensor | None,
    segments: Segments,
    evnn: bool,
    keep: float,
    dampening: float,
    support: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `egru_torch.backward`."""
    heads, width = weight.shape[:2]
    cell, rows = Cell.of(weight.float(), bias, threshold, evnn), Rows(segments, heads)
    c, y = previous(cell, rows, before, first, 0, len(segments.tokens))
    q, seen = cell.products(rows.take(a, segments.tokens, torch.float32), y)
    da, dfirst = segments.blank(a.shape, a.dtype, a.device), torch.empty_like(first)
    grid = _grid(first, weight)
    dthreshold = torch.empty((grid[0], heads * width), dtype=torch.float32, device=a.device)
    tensors = (
        dy,
        dends,
        a,
        q,
        c,
        y,
        before,
        weight,
        threshold,
        _numbers(mask),
        *_steps(segments),
        da,
        dfirst,
        dthreshold,
    )
    if len(first):
        options = len(first), len(segments.tokens), keep, dampening, support
        egru_backward_kernel[grid](*tensors, *options, **_constants(weight, evnn))
    split = 3 * width if evnn else 2 * width
    dweight = torch.cat([y.mT @ q[..., :split], seen.mT @ q[..., split:]], 2)
    return da, dweight, dthreshold.sum(0), q.sum(1).flatten(), dfirst


def _numbers(mask: Tensor | None) -> Tensor | None:
    return mask.to(torch.uint8) if mask is not None and mask.dtype is torch.bool else mask


def _steps(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Rows' tokens, first rows of steps, lengths of segments."""
    offsets = torch.tensor([0, *segments.running]).cumsum(0).to(segments.tokens.device)
    return segments.tokens, offsets, segments.lengths


def _constants(weight: Tensor, evnn: bool) -> dict:
    heads, width = weight.shape[:2]
    warps = 8 if width > 32 else 4  # wide heads spill with 4
    return {"HEADS": heads, "D": width, "BD": next_power_of_two(width), "BS": TILE, "EVNN": evnn, "num_warps": warps}


def _grid(first: Tensor, weight: Tensor) -> tuple[int, int]:
    return triton.cdiv(len(first), TILE), weight.shape[0]
