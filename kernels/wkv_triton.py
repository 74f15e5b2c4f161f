"""WKV as Triton kernels: one program per sequence and tile of channels walks through time, the state in registers.

The exponent of the state is held as base + age * w, where `age` counts the decays since its largest term came: adding w
token by token would round at every token, and with a weak decay all errors have the same sign.

The forward kernel keeps the state in front of every chunk. The backward kernel goes from chunk to chunk towards the
past: it walks through a chunk to find the states in front of its tokens, which pass through a scratch tensor (registers
cannot be indexed), and then back over it. dw and du are summed per sequence, then over sequences, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import chunk_table
from spikelm.kernels.triton_tools import autotune, next_power_of_two
from spikelm.kernels.wkv_reference import EMPTY
from spikelm.kernels.wkv_torch import CHUNK, PADDING, RESET, slots

CONFIGS = [triton.Config({}, num_warps=1), triton.Config({}, num_warps=2)]
NOTHING = tl.constexpr(EMPTY)
M_PADDING, M_RESET = tl.constexpr(PADDING), tl.constexpr(RESET)


@triton.jit
def absorb(p, q, base, age, w, exponent, to_p, to_q):
    """The sums (p, q) e^(base + age w) after one decay, plus (to_p, to_q) e^exponent."""
    faded = base + (age + 1.0) * w
    top = tl.maximum(faded, exponent)
    old = tl.exp(faded - top)
    new = tl.exp(exponent - top)
    larger = exponent > faded
    base = tl.where(larger, exponent, base)
    return old * p + new * to_p, old * q + new * to_q, base, tl.where(larger, 0.0, age + 1.0)


@triton.jit
def clear(p, q, base, age, fresh):
    """The sums, emptied where `fresh`."""
    return tl.where(fresh, 0.0, p), tl.where(fresh, 0.0, q), tl.where(fresh, NOTHING, base), tl.where(fresh, 0.0, age)


@triton.jit
def choose(kept, p0, q0, base0, age0, p1, q1, base1, age1):
    """The first sums where `kept`, else the second."""
    return tl.where(kept, p0, p1), tl.where(kept, q0, q1), tl.where(kept, base0, base1), tl.where(kept, age0, age1)


@autotune(CONFIGS, key=["C"])
@triton.jit
def wkv_forward_kernel(
    k, v, w, u, first, bounds, marks, y, last, checkpoints,
    C: tl.constexpr, L: tl.constexpr, MARKED: tl.constexpr, SAVE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [tokens, C], states at the end [N, 3, C] and in front of chunks of L tokens [slots, 3, C]."""
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_u = tl.load(u + o_c, mask=m_c, other=0.0).to(tl.float32)
    p_first = first + i_n * 3 * C + o_c
    p = tl.load(p_first, mask=m_c, other=0.0)
    q = tl.load(p_first + C, mask=m_c, other=0.0)
    base = tl.load(p_first + 2 * C, mask=m_c, other=0.0)
    age = tl.zeros((BC,), dtype=tl.float32)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    p_save = checkpoints + (t_0 // L + i_n) * 3 * C + o_c
    for i in range(0, (t_end - t_0).to(tl.int32)):
        if SAVE:
            m_save = m_c & (i % L == 0)
            tl.store(p_save, p, mask=m_save)
            tl.store(p_save + C, q, mask=m_save)
            tl.store(p_save + 2 * C, base + age * b_w, mask=m_save)
            p_save += tl.where(i % L == 0, 3 * C, 0)
        o_tc = (t_0 + i) * C + o_c
        b_k = tl.load(k + o_tc, mask=m_c, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_tc, mask=m_c, other=0.0).to(tl.float32)
        if MARKED:
            mark = tl.load(marks + t_0 + i)
            real = (mark & M_PADDING) == 0
            p, q, base, age = clear(p, q, base, age, (mark & M_RESET) != 0)
        exponent = base + age * b_w
        top = tl.maximum(exponent, b_u + b_k)
        old = tl.exp(exponent - top)
        new = tl.exp(b_u + b_k - top)
        b_y = (old * p + new * b_v) / (old * q + new)
        p1, q1, base1, age1 = absorb(p, q, base, age, b_w, b_k, b_v, 1.0)
        if MARKED:
            b_y = tl.where(real, b_y, 0.0)
            p1, q1, base1, age1 = choose(real, p1, q1, base1, age1, p, q, base, age)
        p, q, base, age = p1, q1, base1, age1
        tl.store(y + o_tc, b_y.to(y.dtype.element_ty), mask=m_c)
    p_last = last + i_n * 3 * C + o_c
    tl.store(p_last, p, mask=m_c)
    tl.store(p_last + C, q, mask=m_c)
    tl.store(p_last + 2 * C, base + age * b_w, mask=m_c)


@triton.jit
def states_of_chunk(
    k, v, marks, p_save, scratch, b_w, t_chunk, n_t, o_c, m_c,
    C: tl.constexpr, MARKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the states in front of n_t tokens to scratch [L, 3, C], after resets, from that in front of the chunk."""
    p = tl.load(p_save, mask=m_c, other=0.0)
    q = tl.load(p_save + C, mask=m_c, other=0.0)
    base = tl.load(p_save + 2 * C, mask=m_c, other=0.0)
    age = tl.zeros((BC,), dtype=tl.float32)
    for i in range(0, n_t):
        o_tc = (t_chunk + i) * C + o_c
        b_k = tl.load(k + o_tc, mask=m_c, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_tc, mask=m_c, other=0.0).to(tl.float32)
        if MARKED:
            mark = tl.load(marks + t_chunk + i)
            p, q, base, age = clear(p, q, base, age, (mark & M_RESET) != 0)
        p_state = scratch + i * 3 * C + o_c
        tl.store(p_state, p, mask=m_c)
        tl.store(p_state + C, q, mask=m_c)
        tl.store(p_state + 2 * C, base + age * b_w, mask=m_c)
        p1, q1, base1, age1 = absorb(p, q, base, age, b_w, b_k, b_v, 1.0)
        if MARKED:
            p1, q1, base1, age1 = choose((mark & M_PADDING) == 0, p1, q1, base1, age1, p, q, base, age)
        p, q, base, age = p1, q1, base1, age1


@triton.jit
def token_gradients(dy, k, v, o_tc, m_c, p, q, exponent, gp, gq, reach, b_w, b_u):
    """Gradients of k, v, u, w at one token, and what it adds to the gradients of the state: e^-top (r, -r y).

    The sums in front of the token are (p, q) e^exponent, the gradients of those behind it (gp, gq) e^reach.
    """
    b_k = tl.load(k + o_tc, mask=m_c, other=0.0).to(tl.float32)
    b_v = tl.load(v + o_tc, mask=m_c, other=0.0).to(tl.float32)
    b_g = tl.load(dy + o_tc, mask=m_c, other=0.0).to(tl.float32)
    top = tl.maximum(exponent, b_u + b_k)
    old = tl.exp(exponent - top)
    new = tl.exp(b_u + b_k - top)
    below = old * q + new
    b_y = (old * p + new * b_v) / below
    r = b_g / below
    du = r * new * (b_v - b_y)
    later = tl.exp(b_k + reach)
    dv = r * new + later * gp
    dk = du + later * (b_v * gp + gq)
    dw = tl.exp(exponent + b_w + reach) * (p * gp + q * gq)
    return dk, dv, dw, du, -top, r, -r * b_y


@autotune(CONFIGS, key=["C"])
@triton.jit
def wkv_backward_kernel(
    dy, dlast, k, v, w, u, last, checkpoints, bounds, marks, scratch, dk, dv, dw, du, dfirst,
    C: tl.constexpr, L: tl.constexpr, MARKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dk, dv [tokens, C], dw, du [N, C] of every sequence, dfirst [N, 3, C]; scratch [N, L, 3, C]."""
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_u = tl.load(u + o_c, mask=m_c, other=0.0).to(tl.float32)
    o_s = i_n * 3 * C + o_c
    # Gradients of numerator and denominator are (gp, gq) e^(base + age w).
    gp = tl.load(dlast + o_s, mask=m_c, other=0.0).to(tl.float32)
    gq = tl.load(dlast + o_s + C, mask=m_c, other=0.0).to(tl.float32)
    first_exponent = tl.load(last + o_s + 2 * C, mask=m_c, other=0.0)
    base = -first_exponent
    age = tl.zeros((BC,), dtype=tl.float32)
    b_dw = tl.zeros((BC,), dtype=tl.float32)
    b_du = tl.zeros((BC,), dtype=tl.float32)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    scratch += i_n * L * 3 * C
    n_chunks = tl.cdiv(t_end - t_0, L).to(tl.int32)
    for j in range(0, n_chunks):
        i_chunk = n_chunks - 1 - j
        t_chunk = t_0 + i_chunk * L
        n_t = tl.minimum(t_end - t_chunk, L).to(tl.int32)
        p_save = checkpoints + (t_0 // L + i_n + i_chunk) * 3 * C + o_c
        first_exponent = tl.load(p_save + 2 * C, mask=m_c, other=0.0)
        tl.debug_barrier()  # what the last chunk read from scratch has been read
        states_of_chunk(k, v, marks, p_save, scratch, b_w, t_chunk, n_t, o_c, m_c, C, MARKED, BC)
        tl.debug_barrier()  # what is read from scratch has been written
        for i in range(0, n_t):
            t = n_t - 1 - i
            o_tc = (t_chunk + t) * C + o_c
            p_state = scratch + t * 3 * C + o_c
            p = tl.load(p_state, mask=m_c, other=0.0)
            q = tl.load(p_state + C, mask=m_c, other=0.0)
            exponent = tl.load(p_state + 2 * C, mask=m_c, other=0.0)
            b_dk, b_dv, t_dw, t_du, new, to_p, to_q = token_gradients(
                dy, k, v, o_tc, m_c, p, q, exponent, gp, gq, base + age * b_w, b_w, b_u
            )
            gp1, gq1, base1, age1 = absorb(gp, gq, base, age, b_w, new, to_p, to_q)
            if MARKED:
                mark = tl.load(marks + t_chunk + t)
                real = (mark & M_PADDING) == 0
                b_dk, b_dv = tl.where(real, b_dk, 0.0), tl.where(real, b_dv, 0.0)
                t_dw, t_du = tl.where(real, t_dw, 0.0), tl.where(real, t_du, 0.0)
                gp1, gq1, base1, age1 = choose(real, gp1, gq1, base1, age1, gp, gq, base, age)
                gp1, gq1, base1, age1 = clear(gp1, gq1, base1, age1, (mark & M_RESET) != 0)
            gp, gq, base, age = gp1, gq1, base1, age1
            b_dw += t_dw
            b_du += t_du
            tl.store(dk + o_tc, b_dk.to(dk.dtype.element_ty), mask=m_c)
            tl.store(dv + o_tc, b_dv.to(dv.dtype.element_ty), mask=m_c)
    scale = tl.exp(base + age * b_w + first_exponent)
    tl.store(dfirst + o_s, gp * scale, mask=m_c)
    tl.store(dfirst + o_s + C, gq * scale, mask=m_c)
    tl.store(dfirst + o_s + 2 * C, tl.zeros((BC,), dtype=tl.float32), mask=m_c)
    tl.store(dw + i_n * C + o_c, b_dw, mask=m_c)
    tl.store(du + i_n * C + o_c, b_du, mask=m_c)


def forward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    marks: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, C], final states [N, 3, C], states in front of chunks [slots, 3, C]; arguments checked, contiguous."""
    first, y = state.float(), torch.empty_like(v)
    last = torch.empty_like(first)
    # Not every slot is used, and what is saved should hold no accidental numbers.
    checkpoints = first.new_zeros(slots(k, state) if save else 0, *state.shape[1:])
    tensors = k, v, w, u, first, _bounds(k, cu_seqlens), marks, y, last, checkpoints
    if first.numel():
        wkv_forward_kernel[_grid(first)](*tensors, SAVE=save, **_constants(k, marks))
    return y, last, checkpoints


def backward(
    dy: Tensor,
    dfinal: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    final: Tensor,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    marks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial states."""
    dk, dv, dfirst = torch.empty_like(k), torch.empty_like(v), torch.empty_like(final)
    dw, du = (torch.empty_like(final[:, 0]) for _ in range(2))
    scratch = final.new_empty(final.shape[0], CHUNK, *final.shape[1:])
    tensors = dy, dfinal, k, v, w, u, final, checkpoints, _bounds(k, cu_seqlens), marks, scratch, dk, dv, dw, du, dfirst
    if final.numel():
        wkv_backward_kernel[_grid(final)](*tensors, **_constants(k, marks))
    return dk, dv, dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dfirst


def _bounds(k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return chunk_table(cu_seqlens, k.shape[0], k.shape[1], max(1, k.shape[1]), k.device, "wkv")[1]


def _constants(k: Tensor, marks: Tensor | None) -> dict:
    return {"C": k.shape[2], "L": CHUNK, "MARKED": marks is not None, "BC": min(64, next_power_of_two(k.shape[2]))}


def _grid(state: Tensor) -> tuple[int, int]:
    return state.shape[0], triton.cdiv(state.shape[2], min(64, next_power_of_two(state.shape[2])))
