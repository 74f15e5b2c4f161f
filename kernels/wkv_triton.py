"""WKV as Triton kernels: one program per sequence and tile of channels walks through time, the state in registers.

An exponent is held as base + age * w: where the largest term came from, and how many decays ago. The sum is never
taken: adding w token by token would round at every token, always to the same side, and two exponents near 60 would
have lost what their difference needs. Differences of bases come first, then those of ages times w.

The forward kernel keeps the state in front of every chunk. The backward kernel goes from chunk to chunk towards the
past: it walks through a chunk to find the states in front of its tokens, which pass through a scratch tensor (registers
cannot be indexed), and then back over it. dw and du are summed per sequence, then over sequences, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import chunk_table
from spikelm.kernels.triton_tools import next_power_of_two
from spikelm.kernels.wkv_reference import EMPTY
from spikelm.kernels.wkv_torch import CHUNK, PADDING, RESET, slots

# Loads of the next tokens run ahead of the recurrence; they do not depend on it.
STAGES = tl.constexpr(4)
NOTHING = tl.constexpr(EMPTY)
M_PADDING, M_RESET = tl.constexpr(PADDING), tl.constexpr(RESET)


@triton.jit
def weigh(difference):
    """Factors that bring two terms to the scale of the larger; `difference`: second exponent less the first."""
    return tl.exp(tl.minimum(-difference, 0.0)), tl.exp(tl.minimum(difference, 0.0))


@triton.jit
def absorb(p, q, base, age, w, new_base, new_age, to_p, to_q):
    """The sums (p, q) e^(base + age w) after one decay, plus (to_p, to_q) e^(new_base + new_age w)."""
    difference = (new_base - base) + (new_age - age - 1.0) * w
    old, new = weigh(difference)
    larger = difference > 0.0
    base = tl.where(larger, new_base, base)
    return old * p + new * to_p, old * q + new * to_q, base, tl.where(larger, new_age, age + 1.0)


@triton.jit
def clear(p, q, base, age, fresh):
    """The sums, emptied where `fresh`."""
    return tl.where(fresh, 0.0, p), tl.where(fresh, 0.0, q), tl.where(fresh, NOTHING, base), tl.where(fresh, 0.0, age)


@triton.jit
def choose(kept, p0, q0, base0, age0, p1, q1, base1, age1):
    """The first sums where `kept`, else the second."""
    return tl.where(kept, p0, p1), tl.where(kept, q0, q1), tl.where(kept, base0, base1), tl.where(kept, age0, age1)


@triton.jit
def load_state(pointer, mask, C: tl.constexpr):
    """Rows p, q, o of a state; o is its base."""
    p = tl.load(pointer, mask=mask, other=0.0)
    q = tl.load(pointer + C, mask=mask, other=0.0)
    return p, q, tl.load(pointer + 2 * C, mask=mask, other=0.0), tl.zeros_like(p)


@triton.jit
def store_state(pointer, mask, p, q, base, age, w, C: tl.constexpr):
    """Store rows p, q, o; what rounding takes from o is given to p and q."""
    o = base + age * w
    rest = tl.exp((base - o) + age * w)
    tl.store(pointer, p * rest, mask=mask)
    tl.store(pointer + C, q * rest, mask=mask)
    tl.store(pointer + 2 * C, o, mask=mask)


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
    p, q, base, age = load_state(first + i_n * 3 * C + o_c, m_c, C)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    n_chunks = tl.cdiv(t_end - t_0, L).to(tl.int32)
    for i_chunk in range(0, n_chunks):
        t_chunk = t_0 + i_chunk * L
        if SAVE:
            store_state(checkpoints + (t_0 // L + i_n + i_chunk) * 3 * C + o_c, m_c, p, q, base, age, b_w, C)
        for i in tl.range(0, tl.minimum(t_end - t_chunk, L).to(tl.int32), num_stages=STAGES):
            o_tc = (t_chunk + i) * C + o_c
            b_k = tl.load(k + o_tc, mask=m_c, other=0.0).to(tl.float32)
            b_v = tl.load(v + o_tc, mask=m_c, other=0.0).to(tl.float32)
            if MARKED:
                mark = tl.load(marks + t_chunk + i)
                real = (mark & M_PADDING) == 0
                p, q, base, age = clear(p, q, base, age, (mark & M_RESET) != 0)
            old, new = weigh((b_k - base) + b_u - age * b_w)
            b_y = (old * p + new * b_v) / (old * q + new)
            p1, q1, base1, age1 = absorb(p, q, base, age, b_w, b_k, 0.0, b_v, 1.0)
            if MARKED:
                b_y = tl.where(real, b_y, 0.0)
                p1, q1, base1, age1 = choose(real, p1, q1, base1, age1, p, q, base, age)
            p, q, base, age = p1, q1, base1, age1
            tl.store(y + o_tc, b_y.to(y.dtype.element_ty), mask=m_c)
    store_state(last + i_n * 3 * C + o_c, m_c, p, q, base, age, b_w, C)


@triton.jit
def states_of_chunk(k, v, marks, p_save, scratch, b_w, t_chunk, n_t, o_c, m_c, C: tl.constexpr, MARKED: tl.constexpr):
    """Write the states in front of n_t tokens, after resets, to scratch [L, 4, C]: p, q, base, age."""
    p, q, base, age = load_state(p_save, m_c, C)
    for i in tl.range(0, n_t, num_stages=STAGES):
        o_tc = (t_chunk + i) * C + o_c
        b_k = tl.load(k + o_tc, mask=m_c, other=0.0).to(tl.float32)
        b_v = tl.load(v + o_tc, mask=m_c, other=0.0).to(tl.float32)
        if MARKED:
            mark = tl.load(marks + t_chunk + i)
            p, q, base, age = clear(p, q, base, age, (mark & M_RESET) != 0)
        p_state = scratch + i * 4 * C + o_c
        tl.store(p_state, p, mask=m_c)
        tl.store(p_state + C, q, mask=m_c)
        tl.store(p_state + 2 * C, base, mask=m_c)
        tl.store(p_state + 3 * C, age, mask=m_c)
        p1, q1, base1, age1 = absorb(p, q, base, age, b_w, b_k, 0.0, b_v, 1.0)
        if MARKED:
            p1, q1, base1, age1 = choose((mark & M_PADDING) == 0, p1, q1, base1, age1, p, q, base, age)
        p, q, base, age = p1, q1, base1, age1


@triton.jit
def token_gradients(b_g, b_k, b_v, b_w, b_u, p, q, base, age, gp, gq, g_base, g_age):
    """Gradients of k, v, w, u at a token, then exponent and values of what it adds to the gradients of the state.

    (p, q) e^(base + age w) are the sums in front of the token, (gp, gq) e^(g_base + g_age w) the gradients behind it.
    """
    difference = (b_k - base) + b_u - age * b_w
    old, new = weigh(difference)
    below = old * q + new
    r = b_g / below
    # v - y: where a token outweighs its past, y is v but for a rounding error.
    du = r * new * (old * (q * b_v - p) / below)
    later = tl.exp((b_k + g_base) + g_age * b_w)
    dv = r * new + later * gp
    dk = du + later * (b_v * gp + gq)
    dw = tl.exp((base + g_base) + (age + g_age + 1.0) * b_w) * (p * gp + q * gq)
    # r counts e^-(u + k) if the token is the larger term, else e^-(base + age w).
    larger = difference > 0.0
    b_y = (old * p + new * b_v) / below
    r = tl.where(larger, r * tl.exp(-b_u), r)
    return dk, dv, dw, du, tl.where(larger, -b_k, -base), tl.where(larger, 0.0, -age), r, -r * b_y


@triton.jit
def wkv_backward_kernel(
    dy, dlast, k, v, w, u, last, checkpoints, bounds, marks, scratch, dk, dv, dw, du, dfirst,
    C: tl.constexpr, L: tl.constexpr, MARKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dk, dv [tokens, C], dw, du [N, C] of every sequence, dfirst [N, 3, C]; scratch [N, L, 4, C]."""
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_w = tl.load(w + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_u = tl.load(u + o_c, mask=m_c, other=0.0).to(tl.float32)
    o_s = i_n * 3 * C + o_c
    gp, gq, _, age = load_state(dlast + o_s, m_c, C)
    first_o = tl.load(last + o_s + 2 * C, mask=m_c, other=0.0)
    base = -first_o
    b_dw, b_du = tl.zeros_like(b_w), tl.zeros_like(b_w)
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    scratch += i_n * L * 4 * C
    n_chunks = tl.cdiv(t_end - t_0, L).to(tl.int32)
    for j in range(0, n_chunks):
        i_chunk = n_chunks - 1 - j
        t_chunk = t_0 + i_chunk * L
        n_t = tl.minimum(t_end - t_chunk, L).to(tl.int32)
        p_save = checkpoints + (t_0 // L + i_n + i_chunk) * 3 * C + o_c
        first_o = tl.load(p_save + 2 * C, mask=m_c, other=0.0)
        tl.debug_barrier()  # what the chunk before read from scratch has been read
        states_of_chunk(k, v, marks, p_save, scratch, b_w, t_chunk, n_t, o_c, m_c, C, MARKED)
        tl.debug_barrier()  # what is read from scratch has been written
        for i in tl.range(0, n_t, num_stages=STAGES):
            t = n_t - 1 - i
            o_tc = (t_chunk + t) * C + o_c
            b_g = tl.load(dy + o_tc, mask=m_c, other=0.0).to(tl.float32)
            b_k = tl.load(k + o_tc, mask=m_c, other=0.0).to(tl.float32)
            b_v = tl.load(v + o_tc, mask=m_c, other=0.0).to(tl.float32)
            s_p, s_q, s_base, _ = load_state(scratch + t * 4 * C + o_c, m_c, C)
            s_age = tl.load(scratch + (t * 4 + 3) * C + o_c, mask=m_c, other=0.0)
            b_dk, b_dv, t_dw, t_du, new_base, new_age, to_p, to_q = token_gradients(
                b_g, b_k, b_v, b_w, b_u, s_p, s_q, s_base, s_age, gp, gq, base, age
            )
            gp1, gq1, base1, age1 = absorb(gp, gq, base, age, b_w, new_base, new_age, to_p, to_q)
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
    scale = tl.exp((base + first_o) + age * b_w)
    tl.store(dfirst + o_s, gp * scale, mask=m_c)
    tl.store(dfirst + o_s + C, gq * scale, mask=m_c)
    tl.store(dfirst + o_s + 2 * C, tl.zeros_like(b_w), mask=m_c)
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
    grid, options = _launch(k, first, marks)
    if first.numel():
        wkv_forward_kernel[grid](*tensors, SAVE=save, **options)
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
    scratch = final.new_empty(final.shape[0], CHUNK, 4, final.shape[2])
    tensors = dy, dfinal, k, v, w, u, final, checkpoints, _bounds(k, cu_seqlens), marks, scratch, dk, dv, dw, du, dfirst
    grid, options = _launch(k, final, marks)
    if final.numel():
        wkv_backward_kernel[grid](*tensors, **options)
    return dk, dv, dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dfirst


def _bounds(k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return chunk_table(cu_seqlens, k.shape[0], k.shape[1], max(1, k.shape[1]), k.device, "wkv")[1]


def _launch(k: Tensor, state: Tensor, marks: Tensor | None) -> tuple[tuple[int, int], dict]:
    """The grid, and what both kernels are told."""
    # One warp, as time is serial and only many programs fill a GPU; a thread reads the 4 bytes of a token that an
    # asynchronous copy takes at least.
    block = min(128 // k.element_size(), next_power_of_two(k.shape[2]))
    options = {"C": k.shape[2], "L": CHUNK, "MARKED": marks is not None, "BC": block, "num_warps": 1}
    return (state.shape[0], triton.cdiv(k.shape[2], block)), options
