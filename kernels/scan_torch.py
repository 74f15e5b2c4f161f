"""The gated scan in plain torch: the fast CPU path, forward and backward.

Time is cut into chunks that advance together, one token of each at a time. A first pass finds what each chunk makes of
a zero state and the product of its gates; then the state is carried from chunk to chunk; a second pass goes through the
chunks again, from their true states, and writes the results. Both passes read the inputs where they lie, and what does
not fill a chunk follows token by token: about 3 sqrt(2 T) small steps in place of T. Only products and sums occur, so
a gate of 0 cuts exactly.

The backward pass walks the other way with y_t = a_t e_t, what the state before token t gets:

    e_t = dh_t + y_{t+1},    dx_t = e_t,    da_t = e_t h_{t-1},    y_t = a_t e_t.
"""

from itertools import pairwise
from math import isqrt

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype


def forward(x: Tensor, a: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """States of all tokens [B, T, D] and final states [N, D]; arguments as in `scan`, checked and contiguous."""
    finals = _copy_states(x, a, state, cu_seqlens)
    h = torch.empty(x.shape, dtype=finals.dtype, device=x.device)
    for rows, times in _sequences(x, cu_seqlens):
        inputs, gates = (t[:, times].to(finals.dtype) for t in (x, a))
        finals[rows] = _forward(inputs, gates, finals[rows], h[:, times])
    return h.to(x.dtype), finals


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
    assert like is not None  # one of the two is given
    starts = _copy_states(like, a, state, cu_seqlens)
    wide = starts.dtype
    dstates = torch.zeros_like(starts) if dfinal is None else dfinal.to(wide, copy=True)
    dh = torch.zeros_like(like) if dh is None else dh
    dx, da = (torch.empty(a.shape, dtype=wide, device=a.device) for _ in range(2))
    for rows, times in _sequences(like, cu_seqlens):
        gates, grads, start = a[:, times].to(wide), dh[:, times].to(wide), starts[rows]
        if h is None:
            assert x is not None
            states = torch.empty_like(gates)
            _forward(x[:, times].to(wide), gates, start, states)
        else:
            states = h[:, times]
        dstates[rows] = _backward(grads, gates, states, start, dstates[rows], dx[:, times], da[:, times])
    return dx.to(like.dtype), da.to(a.dtype), dstates


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


def _cut(steps: int, *tensors: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Views of [B, T, D] by token of the chunk, [B, chunks, D] each, and of the tokens behind the chunks, [B, D]."""
    whole = tensors[0].shape[1] // steps * steps
    chunks = list(zip(*(t[:, :whole].unflatten(1, (-1, steps)).unbind(2) for t in tensors)))
    return chunks, list(zip(*(t[:, whole:].unbind(1) for t in tensors)))


def _steps(length: int) -> int:
    return max(1, isqrt(length // 2))


def _forward(x: Tensor, a: Tensor, state: Tensor, h: Tensor) -> Tensor:
    """Fill h [B, T, D] from `state`; return the last state."""
    chunks, rest = _cut(_steps(x.shape[1]), x, a, h)
    end, product = chunks[0][0].clone(), chunks[0][1].clone()
    for x_t, a_t, _ in chunks[1:]:
        torch.addcmul(x_t, a_t, end, out=end)
        product.mul_(a_t)
    entries = torch.empty_like(end)
    for i in range(end.shape[1]):
        entries[:, i] = state
        state = torch.addcmul(end[:, i], product[:, i], state)
    before = entries
    for x_t, a_t, h_t in chunks:
        before = torch.addcmul(x_t, a_t, before, out=h_t)
    for x_t, a_t, h_t in rest:
        state = torch.addcmul(x_t, a_t, state, out=h_t)
    return state


def _backward(dh: Tensor, a: Tensor, h: Tensor, start: Tensor, dstate: Tensor, dx: Tensor, da: Tensor) -> Tensor:
    """Fill dx and da [B, T, D]; return the gradient of the state `start`."""
    steps = _steps(a.shape[1])
    chunks, rest = _cut(steps, dh, a, h, dx, da)
    last = chunks[-1][2]  # [B, chunks, D]: states at the ends of chunks
    for i in reversed(range(len(rest))):
        dh_t, a_t, _, dx_t, da_t = rest[i]
        torch.add(dh_t, dstate, out=dx_t)
        torch.mul(dx_t, rest[i - 1][2] if i else last[:, -1], out=da_t)
        dstate = a_t * dx_t

    end, product = torch.zeros_like(last), torch.ones_like(last)
    for dh_t, a_t, *_ in reversed(chunks):
        end.add_(dh_t).mul_(a_t)
        product.mul_(a_t)
    exits = torch.empty_like(end)
    for i in reversed(range(end.shape[1])):
        exits[:, i] = dstate
        dstate = torch.addcmul(end[:, i], product[:, i], dstate)
    entries = torch.cat([start.unsqueeze(1), last[:, :-1]], 1)
    for t in reversed(range(steps)):
        dh_t, a_t, _, dx_t, da_t = chunks[t]
        torch.add(dh_t, exits, out=dx_t)
        torch.mul(dx_t, chunks[t - 1][2] if t else entries, out=da_t)
        if t:
            torch.mul(a_t, dx_t, out=exits)
    return dstate
