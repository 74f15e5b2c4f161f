"""The gated scan as Triton kernels: one program per sequence and tile of channels goes through time in blocks of BT.

Within a block `tl.associative_scan` composes the maps h -> a h + x; composing (a1, x1) and then (a2, x2) gives
(a1 a2, a2 x1 + x2). Products and sums only: a gate of 0 cuts exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import INTERPRETED, chunk_table
from spikelm.kernels.triton_tools import autotune, next_power_of_two

BLOCK = 16 if INTERPRETED else 64
CONFIGS = [triton.Config({}, num_warps=4), triton.Config({}, num_warps=2)]


@triton.jit
def compose(a1, x1, a2, x2):
    """The map (a1, x1), then (a2, x2)."""
    return a1 * a2, a2 * x1 + x2


@autotune(CONFIGS, key=["D"])
@triton.jit
def scan_kernel(x, a, h, first, last, bounds, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """h [tokens, D] from x, a [tokens, D]; first and last state [sequences, D]."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    b_state = tl.load(first + i_n * D + o_d, mask=m_d, other=0.0)  # [BD]
    for i in range(0, tl.cdiv(t_end - t_0, BT).to(tl.int32)):
        o_t = t_0 + i * BT + tl.arange(0, BT)
        o_td = o_t[:, None] * D + o_d[None, :]
        m_td = (o_t < t_end)[:, None] & m_d[None, :]
        b_x = tl.load(x + o_td, mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
        b_a = tl.load(a + o_td, mask=m_td, other=1.0).to(tl.float32)
        b_past, b_h = tl.associative_scan((b_a, b_x), 0, compose)
        b_h += b_past * b_state[None, :]
        tl.store(h + o_td, b_h.to(h.dtype.element_ty), mask=m_td)
        # Rows behind the end have gate 1 and input 0, so the last row of a block always holds the state.
        b_state = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], b_h, 0.0), 0)
    tl.store(last + i_n * D + o_d, b_state, mask=m_d)


@autotune(CONFIGS, key=["D"])
@triton.jit
def scan_backward_kernel(
    dh, a, h, first, dx, da, dlast, dfirst, bounds, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """dx, da [tokens, D] from dh and the states h [tokens, D]; gradients of first and last state [sequences, D]."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    t_0, t_end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    b_first = tl.load(first + i_n * D + o_d, mask=m_d, other=0.0)[None, :]
    b_grad = tl.load(dlast + i_n * D + o_d, mask=m_d, other=0.0)  # gradient of the state behind the block
    n_blocks = tl.cdiv(t_end - t_0, BT).to(tl.int32)
    for i in range(0, n_blocks):
        o_t = t_0 + (n_blocks - 1 - i) * BT + tl.arange(0, BT)
        o_td = o_t[:, None] * D + o_d[None, :]
        m_td = (o_t < t_end)[:, None] & m_d[None, :]
        b_dh = tl.load(dh + o_td, mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
        # Each row takes the gate of the row behind it; behind the block, `b_grad` has passed its gate already.
        m_inside = m_td & ((o_t + 1 < t_end) & (tl.arange(0, BT) < BT - 1))[:, None]
        b_a = tl.load(a + o_td + D, mask=m_inside, other=1.0).to(tl.float32)
        b_after, b_dx = tl.associative_scan((b_a, b_dh), 0, compose, reverse=True)
        b_dx += b_after * b_grad[None, :]
        m_before = m_td & (o_t > t_0)[:, None]
        b_h = tl.load(h + o_td - D, mask=m_before, other=0.0)
        b_h = tl.where((o_t == t_0)[:, None], b_first, b_h)
        tl.store(dx + o_td, b_dx.to(dx.dtype.element_ty), mask=m_td)
        tl.store(da + o_td, (b_dx * b_h).to(da.dtype.element_ty), mask=m_td)
        b_gate = tl.load(a + o_td, mask=m_td, other=1.0).to(tl.float32)
        b_grad = tl.sum(tl.where((tl.arange(0, BT) == 0)[:, None], b_dx * b_gate, 0.0), 0)
    tl.store(dfirst + i_n * D + o_d, b_grad, mask=m_d)


def forward(x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """States of all tokens [B, T, D] and final states [N, D]; arguments as in `scan`, checked and contiguous."""
    h = torch.empty_like(x)
    return h, _launch(x, a, state, cu_seqlens, h)[1]


def backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and the initial states, from the states h, or from x where h was rounded."""
    like = x if h is None else h
    if h is None:
        assert x is not None  # one of the two is given
        h = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        first, _, bounds = _launch(x, a, state, cu_seqlens, h)
    else:
        first, bounds = _ends(h, state, cu_seqlens)
    dx, da, dfirst = torch.empty_like(like), torch.empty_like(a), torch.empty_like(first)
    dlast = torch.zeros_like(first) if dfinal is None else dfinal
    dh = torch.zeros_like(like) if dh is None else dh
    tensors = (dh, a, h, first, dx, da, dlast, dfirst, bounds)
    scan_backward_kernel[_grid(first)](*tensors, **_constants(first))
    return dx, da, dfirst


def _ends(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """First states [N, D] and bounds of the sequences."""
    _, bounds, _ = chunk_table(cu_seqlens, x.shape[0], x.shape[1], max(1, x.shape[1]), x.device, "scan")
    shape = (len(bounds) - 1, x.shape[-1])
    first = torch.zeros(shape, dtype=torch.float32, device=x.device) if state is None else state.float()
    return first, bounds


def _launch(
    x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill h; return the first and last states and the bounds of the sequences."""
    first, bounds = _ends(x, state, cu_seqlens)
    last = torch.empty_like(first)
    scan_kernel[_grid(first)](x, a, h, first, last, bounds, **_constants(first))
    return first, last, bounds


def _constants(first: Tensor) -> dict:
    return {"D": first.shape[1], "BT": BLOCK, "BD": min(32, next_power_of_two(first.shape[1]))}


def _grid(first: Tensor) -> tuple[int, int]:
    return first.shape[0], triton.cdiv(first.shape[1], _constants(first)["BD"])
