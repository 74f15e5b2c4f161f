"""The gated scan in plain torch: the fast CPU path, forward and backward.

Time is cut into about sqrt(T) chunks. All chunks advance together, one token of each at a time, from a zero state; the
true state is then carried from chunk to chunk, and what it adds to every token, (product of gates so far) * state, is
added at once. That makes 2 sqrt(T) small steps of T. Only products and sums occur, so a gate of 0 cuts exactly.
"""

from itertools import pairwise
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype


def forward(x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """States of all tokens [B, T, D] and final states [N, D]; arguments as in `scan`, checked and contiguous."""
    h = torch.empty_like(x)
    finals = _copy_states(x, a, state, cu_seqlens)
    for rows, times in _sequences(x, cu_seqlens):
        states = _scan(x[:, times].to(finals.dtype), a[:, times].to(finals.dtype), finals[rows])
        h[:, times] = states
        finals[rows] = states[:, -1]
    return h, finals


def backward(
    dh: Tensor | None, dfinal: Tensor | None, x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and the initial states; the states are computed anew, in full precision."""
    dx, da = torch.empty_like(x), torch.empty_like(a)
    starts = _copy_states(x, a, state, cu_seqlens)
    dstates = torch.zeros_like(starts) if dfinal is None else dfinal.to(starts.dtype, copy=True)
    dh = torch.zeros_like(x) if dh is None else dh
    for rows, times in _sequences(x, cu_seqlens):
        gates, start = a[:, times].to(starts.dtype), starts[rows]
        states = _scan(x[:, times].to(starts.dtype), gates, start)
        # The scan towards the past pairs the gradient of h_t with the gate of t + 1, which the last token lacks.
        gates_after = torch.cat([gates[:, 1:], torch.ones_like(gates[:, :1])], 1).flip(1)
        grads = _scan(dh[:, times].to(starts.dtype).flip(1), gates_after, dstates[rows]).flip(1)
        dx[:, times] = grads
        da[:, times] = grads * torch.cat([start.unsqueeze(1), states[:, :-1]], 1)
        dstates[rows] = gates[:, 0] * grads[:, 0]
    return dx, da, dstates


def _copy_states(x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    wide = wide_dtype(x, a, state)
    if state is not None:
        return state.to(wide, copy=True)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(sequences, x.shape[-1], dtype=wide, device=x.device)


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """Rows of the state and span of time of every non-empty batch of sequences that is computed at once."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))] if x.shape[1] else []
    bounds = enumerate(pairwise(sequence_bounds("scan", cu_seqlens, x.shape[1])))
    return [(slice(n, n + 1), slice(begin, end)) for n, (begin, end) in bounds if end > begin]


def _scan(x: Tensor, a: Tensor, state: Tensor) -> Tensor:
    batch, length, width = x.shape
    steps = isqrt(length - 1) + 1
    pad = -length % steps
    x, a = (F.pad(t, (0, 0, 0, pad)) if pad else t for t in (x, a))
    h = x.reshape(batch, -1, steps, width).clone()
    past = a.reshape(batch, -1, steps, width).clone()
    for t in range(1, steps):
        h[:, :, t].addcmul_(past[:, :, t], h[:, :, t - 1])
        past[:, :, t].mul_(past[:, :, t - 1])
    carried = torch.empty_like(h[:, :, 0])
    for chunk in range(h.shape[1]):
        carried[:, chunk] = state
        state = torch.addcmul(h[:, chunk, -1], past[:, chunk, -1], state)
    h.addcmul_(past, carried.unsqueeze(2))
    return h.flatten(1, 2)[:, :length]
