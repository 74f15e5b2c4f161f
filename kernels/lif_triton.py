"""Triton kernels of the leaky integrate-and-fire unit; `lif.py` holds the equations.

One program owns a block of channels of one sequence and walks over its tokens with the state in registers: time is
serial (a reset cannot be scanned), everything else is parallel. The backward kernel walks back over the membranes (and
with an astrocyte traces and calcium levels) that the forward kernel kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import contiguous

# Loads of the next tokens run ahead of the recurrence; they do not depend on it.
_STAGES = 4
_HARD, _SOFT = tl.constexpr(1), tl.constexpr(2)
_RESET = {"none": 0, "hard": 1, "soft": 2}
_SURROGATE = {"atan": 0, "sigmoid": 1, "triangle": 2, "rectangle": 3}


@triton.jit
def _tanh(v):
    e = tl.exp(-2.0 * tl.abs(v))
    size = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(v < 0.0, -size, size)


@triton.jit
def _slope(z, width, SURROGATE: tl.constexpr):
    """Surrogate gradient at distance z from the threshold: peak 1 / width, area 1."""
    u = z / width
    if SURROGATE == 0:
        u = 3.141592653589793 * u
        peak = 1.0 / (1.0 + u * u)
    elif SURROGATE == 1:
        e = tl.exp(-4.0 * tl.abs(u))
        peak = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif SURROGATE == 2:
        peak = tl.maximum(1.0 - tl.abs(u), 0.0)
    else:
        peak = tl.where(tl.abs(u) <= 0.5, 1.0, 0.0)
    return peak / width


@triton.jit
def _span(cu_seqlens, i_n, T, PACKED: tl.constexpr):
    """First token (over the whole batch) and number of tokens of sequence i_n."""
    if PACKED:
        begin = tl.load(cu_seqlens + i_n).to(tl.int64)
        return begin, tl.load(cu_seqlens + i_n + 1).to(tl.int64) - begin
    return i_n * T, i_n * 0 + T


@triton.jit
def lif_forward_kernel(
    x, params, state, cu_seqlens, fresh, spikes, final, history, T, D, BT,
    RESET: tl.constexpr, UNIT_GAIN: tl.constexpr, ASTRO: tl.constexpr, PACKED: tl.constexpr,
    FRESH: tl.constexpr, SAVE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Spikes [BT, D], final state [N, S, D] and history [S, BT, D] of x [BT, D]."""
    n_blocks = tl.cdiv(D, BLOCK)
    i_n = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    decay = tl.load(params + o_d, mask=m_d, other=0.0)
    threshold = tl.load(params + D + o_d, mask=m_d, other=0.0)
    # An int64 product: the planes of a long history lie further apart than int32 reaches.
    plane = (i_n * 0 + BT) * D
    S: tl.constexpr = 3 if ASTRO else 1
    p_state = state + i_n * S * D + o_d
    v = tl.load(p_state, mask=m_d, other=0.0)
    level = threshold
    if ASTRO:
        trace_decay = tl.load(params + 2 * D + o_d, mask=m_d, other=0.0)
        calcium_decay = tl.load(params + 3 * D + o_d, mask=m_d, other=0.0)
        sensitivity = tl.load(params + 4 * D + o_d, mask=m_d, other=0.0)
        threshold_gain = tl.load(params + 5 * D + o_d, mask=m_d, other=0.0)
        input_gain = tl.load(params + 6 * D + o_d, mask=m_d, other=0.0)
        a = tl.load(p_state + D, mask=m_d, other=0.0)
        c = tl.load(p_state + 2 * D, mask=m_d, other=0.0)
    begin, count = _span(cu_seqlens, i_n, T, PACKED)
    for t in tl.range(0, count, num_stages=STAGES):
        o_t = (begin + t) * D + o_d
        drive = tl.load(x + o_t, mask=m_d, other=0.0).to(tl.float32)
        if FRESH:
            kept = tl.load(fresh + begin + t) == 0
            v = tl.where(kept, v, 0.0)
        if ASTRO:
            if FRESH:
                a = tl.where(kept, a, 0.0)
                c = tl.where(kept, c, 0.0)
            c = calcium_decay * c + (1.0 - calcium_decay) * a
            g = _tanh(sensitivity * c)
            level = threshold + threshold_gain * g
            drive = drive * (1.0 + input_gain * g)
            if SAVE:
                tl.store(history + plane + o_t, a, mask=m_d)
                tl.store(history + 2 * plane + o_t, c, mask=m_d)
        if UNIT_GAIN:
            drive = drive * (1.0 - decay)
        h = decay * v + drive
        s = h >= level
        if SAVE:
            tl.store(history + o_t, h, mask=m_d)
        tl.store(spikes + o_t, s.to(tl.float32).to(spikes.dtype.element_ty), mask=m_d)
        v = h
        if RESET == _HARD:
            v = tl.where(s, 0.0, h)
        elif RESET == _SOFT:
            v = tl.where(s, h - level, h)
        if ASTRO:
            a = trace_decay * a + tl.where(s, 1.0 - trace_decay, 0.0)
    p_final = final + i_n * S * D + o_d
    tl.store(p_final, v, mask=m_d)
    if ASTRO:
        tl.store(p_final + D, a, mask=m_d)
        tl.store(p_final + 2 * D, c, mask=m_d)


@triton.jit
def lif_backward_kernel(
    dspikes, dfinal, x, params, state, history, cu_seqlens, fresh, cut, dx, dparams, dstate, T, D, BT, width,
    RESET: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, UNIT_GAIN: tl.constexpr,
    ASTRO: tl.constexpr, PACKED: tl.constexpr, FRESH: tl.constexpr, CUT: tl.constexpr,
    STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [BT, D], dstate [N, S, D], and dparams [N, P, D] of every sequence, to be summed."""
    n_blocks = tl.cdiv(D, BLOCK)
    i_n = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    decay = tl.load(params + o_d, mask=m_d, other=0.0)
    threshold = tl.load(params + D + o_d, mask=m_d, other=0.0)
    gain = decay * 0.0 + 1.0
    if UNIT_GAIN:
        gain = 1.0 - decay
    S: tl.constexpr = 3 if ASTRO else 1
    P: tl.constexpr = 7 if ASTRO else 2
    o_s = i_n * S * D + o_d
    dv = tl.load(dfinal + o_s, mask=m_d, other=0.0)
    v_first = tl.load(state + o_s, mask=m_d, other=0.0)
    ddecay = tl.zeros((BLOCK,), dtype=tl.float32)
    dthreshold = tl.zeros((BLOCK,), dtype=tl.float32)
    level = threshold
    level_before = threshold
    plane = (i_n * 0 + BT) * D
    if ASTRO:
        trace_decay = tl.load(params + 2 * D + o_d, mask=m_d, other=0.0)
        calcium_decay = tl.load(params + 3 * D + o_d, mask=m_d, other=0.0)
        sensitivity = tl.load(params + 4 * D + o_d, mask=m_d, other=0.0)
        threshold_gain = tl.load(params + 5 * D + o_d, mask=m_d, other=0.0)
        input_gain = tl.load(params + 6 * D + o_d, mask=m_d, other=0.0)
        da = tl.load(dfinal + o_s + D, mask=m_d, other=0.0)
        dc = tl.load(dfinal + o_s + 2 * D, mask=m_d, other=0.0)
        c_first = tl.load(state + o_s + 2 * D, mask=m_d, other=0.0)
        dtrace_decay = tl.zeros((BLOCK,), dtype=tl.float32)
        dcalcium_decay = tl.zeros((BLOCK,), dtype=tl.float32)
        dsensitivity = tl.zeros((BLOCK,), dtype=tl.float32)
        dthreshold_gain = tl.zeros((BLOCK,), dtype=tl.float32)
        dinput_gain = tl.zeros((BLOCK,), dtype=tl.float32)
    begin, count = _span(cu_seqlens, i_n, T, PACKED)
    for i in tl.range(0, count, num_stages=STAGES):
        t = begin + count - 1 - i
        o_t = t * D + o_d
        first = t == begin
        m_before = o_d < tl.where(first, 0, D)
        ds = tl.load(dspikes + o_t, mask=m_d, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_t, mask=m_d, other=0.0).to(tl.float32)
        h = tl.load(history + o_t, mask=m_d, other=0.0)
        h_before = tl.load(history + o_t - D, mask=m_before, other=0.0)
        current = b_x
        if ASTRO:
            a = tl.load(history + plane + o_t, mask=m_d, other=0.0)
            c = tl.load(history + 2 * plane + o_t, mask=m_d, other=0.0)
            c_before = tl.load(history + 2 * plane + o_t - D, mask=m_before, other=0.0)
            g = _tanh(sensitivity * c)
            level = threshold + threshold_gain * g
            level_before = threshold + threshold_gain * _tanh(sensitivity * c_before)
            current = b_x * (1.0 + input_gain * g)
            ds += (1.0 - trace_decay) * da
        s = tl.where(h >= level, 1.0, 0.0)
        through = dv
        if RESET == _HARD:
            through = dv * (1.0 - s)
        if RESET == _HARD and not DETACH:
            ds -= dv * h
        elif RESET == _SOFT and not DETACH:
            ds -= dv * level
        q = ds * _slope(h - level, width, SURROGATE)
        dh = q + through
        dlevel = -q
        if RESET == _SOFT:
            dlevel -= s * dv
        ddrive = dh * gain
        if ASTRO:
            tl.store(dx + o_t, (ddrive * (1.0 + input_gain * g)).to(dx.dtype.element_ty), mask=m_d)
        else:
            tl.store(dx + o_t, ddrive.to(dx.dtype.element_ty), mask=m_d)

        # The state that the token found: what the reset left of the token before it, or the initial state.
        v = h_before
        if RESET == _HARD:
            v = tl.where(h_before >= level_before, 0.0, h_before)
        elif RESET == _SOFT:
            v = tl.where(h_before >= level_before, h_before - level_before, h_before)
        v = tl.where(first, v_first, v)
        if FRESH:
            kept = tl.load(fresh + t) == 0
            v = tl.where(kept, v, 0.0)
        if UNIT_GAIN:
            ddecay += dh * (v - current)
        else:
            ddecay += dh * v
        dthreshold += dlevel
        dv = decay * dh
        if ASTRO:
            c_before = tl.where(first, c_first, c_before)
            if FRESH:
                c_before = tl.where(kept, c_before, 0.0)
            dg = threshold_gain * dlevel + input_gain * b_x * ddrive
            bend = dg * (1.0 - g * g)
            dtrace_decay += da * (a - s)
            dsensitivity += bend * c
            dthreshold_gain += dlevel * g
            dinput_gain += ddrive * b_x * g
            dc += bend * sensitivity
            dcalcium_decay += dc * (c_before - a)
            da = trace_decay * da + (1.0 - calcium_decay) * dc
            dc = calcium_decay * dc
        if CUT:
            passed = tl.load(cut + t) == 0
            dv = tl.where(passed, dv, 0.0)
            if ASTRO:
                da = tl.where(passed, da, 0.0)
                dc = tl.where(passed, dc, 0.0)
    p_params = dparams + i_n * P * D + o_d
    tl.store(dstate + o_s, dv, mask=m_d)
    tl.store(p_params, ddecay, mask=m_d)
    tl.store(p_params + D, dthreshold, mask=m_d)
    if ASTRO:
        tl.store(dstate + o_s + D, da, mask=m_d)
        tl.store(dstate + o_s + 2 * D, dc, mask=m_d)
        tl.store(p_params + 2 * D, dtrace_decay, mask=m_d)
        tl.store(p_params + 3 * D, dcalcium_decay, mask=m_d)
        tl.store(p_params + 4 * D, dsensitivity, mask=m_d)
        tl.store(p_params + 5 * D, dthreshold_gain, mask=m_d)
        tl.store(p_params + 6 * D, dinput_gain, mask=m_d)


def _launch(x: Tensor, params: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple, dict]:
    """The grid, and what both kernels are told."""
    block = 64
    grid = (state.shape[0] * triton.cdiv(x.shape[2], block),)
    options = {
        "ASTRO": params.shape[0] > 2,
        "PACKED": cu_seqlens is not None,
        "STAGES": _STAGES,
        "BLOCK": block,
        "num_warps": 1,
        # A product fused into a sum rounds once instead of twice and would flip spikes.
        "enable_fp_fusion": False,
    }
    return grid, options


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.uint8).contiguous()


def lif_triton_forward(
    x: Tensor,
    params: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reset_mask: Tensor | None,
    reset: str,
    unit_gain: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `lif_forward_kernel`: spikes [B, T, D], final state [N, S, D], history [S, B * T, D] (or nothing)."""
    x, params, state, cu_seqlens = contiguous(x, params, state, cu_seqlens)
    spikes, final = torch.empty_like(x), torch.empty_like(state)
    tokens = x.shape[0] * x.shape[1]
    history = state.new_empty((state.shape[1], tokens, x.shape[2]) if save else (0,))
    grid, options = _launch(x, params, state, cu_seqlens)
    if grid[0]:
        lif_forward_kernel[grid](
            x, params, state, cu_seqlens, _bytes(reset_mask), spikes, final, history, x.shape[1], x.shape[2], tokens,
            RESET=_RESET[reset], UNIT_GAIN=unit_gain, FRESH=reset_mask is not None, SAVE=save, **options,
        )  # fmt: skip
    return spikes, final, history


def lif_triton_backward(
    dspikes: Tensor,
    dfinal: Tensor,
    x: Tensor,
    params: Tensor,
    state: Tensor,
    history: Tensor,
    cu_seqlens: Tensor | None,
    reset_mask: Tensor | None,
    cut: Tensor | None,
    reset: str,
    detach_reset: bool,
    surrogate: str,
    width: float,
    unit_gain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `lif_backward_kernel`: gradients of x [B, T, D], params [P, D], state [N, S, D]."""
    dspikes, dfinal, x, params, state, cu_seqlens = contiguous(dspikes, dfinal, x, params, state, cu_seqlens)
    dx, dstate = torch.empty_like(x), torch.empty_like(state)
    dparams = params.new_empty(state.shape[0], *params.shape)
    grid, options = _launch(x, params, state, cu_seqlens)
    if grid[0]:
        lif_backward_kernel[grid](
            dspikes, dfinal, x, params, state, history, cu_seqlens, _bytes(reset_mask), _bytes(cut),
            dx, dparams, dstate, x.shape[1], x.shape[2], x.shape[0] * x.shape[1], width,
            RESET=_RESET[reset], DETACH=detach_reset, SURROGATE=_SURROGATE[surrogate], UNIT_GAIN=unit_gain,
            FRESH=reset_mask is not None, CUT=cut is not None, **options,
        )  # fmt: skip
    return dx, dparams.sum(0), dstate
