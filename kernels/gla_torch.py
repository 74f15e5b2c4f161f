"""Gated linear attention in plain torch, chunk by chunk: the fast CPU path, forward and backward.

Time is cut into chunks of C tokens. Between chunks the state is carried one chunk at a time; within a chunk the scores
A[i, j] = sum_c q[i, c] k[j, c] D[i, j, c], with D the decay from token j to token i, are built by halving: for blocks
of s = 1, 2, 4, ... tokens, a query in the right block of a pair meets a key in the left one through their common bound,

    D[i, j] = (decay from the bound to i) * (decay from j to the bound),

so each level is one batch of matrix products. The two factors are products of single decays a = exp(g) and grow from
level to level by multiplication alone: nothing is divided or subtracted, so no gate overflows, a decay of 0 cuts
exactly, and a reset costs no precision elsewhere. The same holds for the gradient of g, a sum over the pairs that a
gate lies between: each level adds what its pairs contribute, and terms on two sides of a reset never meet.

Below, tensors are laid out [chunks, N, Hk, C, ...]; queries carry their group behind time, [..., C, G, K]. The gates
have width W: K, or 1 where all channels of a head share a gate.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from spikelm.kernels.runtime import sequence_bounds, wide_dtype
from torch import Tensor

CHUNK = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [N, Hk, K, V]; arguments as in `gla`, checked."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    finals = _states(q, k, v, g, state, cu_seqlens)
    for rows, times in _sequences(q, cu_seqlens):
        tokens = _chunks(q[:, times], k[:, times], v[:, times], g[:, times], finals.dtype, floor)
        out[:, times], finals[rows] = _forward(*tokens, finals[rows], scale, out[:, times])
    return out, finals


def backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and of the initial state. Everything inside a chunk is computed anew."""
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, g))
    starts = _states(q, k, v, g, state, cu_seqlens)
    do = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device) if do is None else do
    dstates = torch.zeros_like(starts) if dfinal is None else dfinal.to(starts.dtype, copy=True)
    for rows, times in _sequences(q, cu_seqlens):
        tokens = _chunks(q[:, times], k[:, times], v[:, times], g[:, times], starts.dtype, floor)
        dout = _cut(do[:, times].to(starts.dtype), k.shape[2])
        pieces, dstates[rows] = _backward(*tokens, starts[rows], dout, dstates[rows], scale)
        reset = g[:, times] < floor
        for grad, piece in zip(grads, pieces):
            grad[:, times] = _join(piece, grad[:, times])
        grads[3][:, times].masked_fill_(reset, 0.0)
    return *grads, dstates


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """Rows of the state and span of time of every batch of sequences that is computed at once."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))] if q.shape[1] else []
    bounds = sequence_bounds("gla", cu_seqlens, q.shape[1])
    spans = enumerate(pairwise(bounds))
    return [(slice(n, n + 1), slice(begin, end)) for n, (begin, end) in spans if end > begin]


def _states(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A copy of the initial states, or zeros."""
    wide = wide_dtype(q, k, v, g, state)
    if state is not None:
        return state.to(wide, copy=True, memory_format=torch.contiguous_format)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(sequences, *k.shape[2:], v.shape[-1], dtype=wide, device=q.device)


def _cut(x: Tensor, shared: int, fill: float = 0.0) -> Tensor:
    """[N, T, H, D] -> [chunks, N, Hk, C, G, D], padded at the end."""
    chunk = min(CHUNK, 1 << (x.shape[1] - 1).bit_length())
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk), value=fill)
    x = x.unflatten(1, (-1, chunk)).unflatten(3, (shared, -1))
    return x.permute(1, 0, 3, 2, 4, 5).contiguous()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """[chunks, N, Hk, C, G, D] -> the shape of `like`, [N, T, H, D]."""
    return x.permute(1, 0, 3, 2, 4, 5).flatten(1, 2)[:, : like.shape[1]].reshape(like.shape)


def _chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, wide: torch.dtype, floor: float) -> tuple[Tensor, ...]:
    shared = k.shape[2]
    decay = torch.where(g < floor, 0.0, g.to(wide).exp())
    k, v, decay = (_cut(x, shared, fill).squeeze(4) for x, fill in ((k.to(wide), 0), (v.to(wide), 0), (decay, 1)))
    return _cut(q.to(wide), shared), k, v, decay


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Left and right blocks of `size` tokens of [chunks, N, Hk, C, ...]: two views [chunks, N, Hk, C / 2s, s, ...]."""
    x = x.unflatten(3, (-1, 2, size))
    return x[:, :, :, :, 0], x[:, :, :, :, 1]


def _pairs(scores: Tensor, size: int) -> Tensor:
    """Where right queries meet left keys in [chunks, N, Hk, C, G, C]: a view [..., C / 2s, s, G, s]."""
    right = scores.unflatten(5, (-1, 2, size)).unflatten(3, (-1, 2, size))[:, :, :, :, 1, :, :, :, 0]
    return right.diagonal(dim1=3, dim2=6).movedim(-1, 3)


def _grow(past: Tensor, future: Tensor, size: int) -> None:
    """Double the blocks: `past` = decay from a block's start through a token, `future` = decay after it to the end."""
    left, right = _halves(past, size)
    _halves(future, size)[0].mul_(right[..., -1:, :])
    right.mul_(left[..., -1:, :])


def _carry(states: Tensor, keep: Tensor, order: range, step: int) -> None:
    """states[i + step] += keep * states[i], chunk after chunk."""
    for i in order:
        states[i + step].addcmul_(keep[min(i, i + step)], states[i])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    scores = q.new_zeros(*q.shape[:-1], q.shape[3])
    scores.diagonal(dim1=3, dim2=5).copy_((q * k.unsqueeze(4)).sum(-1).transpose(-1, -2))
    past, future = decay, torch.ones_like(decay)
    size = 1
    while size < q.shape[3]:
        query = _halves(q, size)[1] * _halves(past, size)[1].unsqueeze(5)
        key = _halves(k, size)[0] * _halves(future, size)[0]
        _pairs(scores, size).copy_((query.flatten(4, 5) @ key.mT).view(*query.shape[:-1], size))
        _grow(past, future, size)
        size *= 2

    keep = past[..., -1, :, None]
    states = torch.cat([state[None], (k * future).mT @ v])
    _carry(states, keep, range(k.shape[0]), 1)
    out = scores.flatten(3, 4) @ v
    out += (q * past.unsqueeze(4)).flatten(3, 4) @ states[:-1]
    return _join(out.mul_(scale).view(*q.shape[:-1], -1), like), states[-1]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, do: Tensor, dstate: Tensor, scale: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    do = do.flatten(3, 4) * scale
    dscores = (do @ v.mT).view(*q.shape[:-1], -1)
    scores = torch.zeros_like(dscores)
    scores.diagonal(dim1=3, dim2=5).copy_((q * k.unsqueeze(4)).sum(-1).transpose(-1, -2))
    direct = dscores.diagonal(dim1=3, dim2=5).transpose(-1, -2).unsqueeze(-1)
    dq = direct * k.unsqueeze(4)
    dk = (direct * q).sum(4)
    dg = torch.zeros_like(decay)
    past, future = decay, torch.ones_like(decay)
    size = 1
    while size < q.shape[3]:
        to_query, to_key = _halves(past, size)[1], _halves(future, size)[0]
        query = _halves(q, size)[1] * to_query.unsqueeze(5)
        key = _halves(k, size)[0] * to_key
        _pairs(scores, size).copy_((query.flatten(4, 5) @ key.mT).view(*query.shape[:-1], size))
        block = _pairs(dscores, size).flatten(4, 5)
        dquery = (block @ key).view(query.shape)
        dkey = block.mT @ query.flatten(4, 5)
        _halves(dq, size)[1].add_(dquery * to_query.unsqueeze(5))
        _halves(dk, size)[0].add_(dkey * to_key)
        left, right = _halves(dg, size)
        right.add_(_sum_from((query * dquery).sum(5), dg))
        left.add_(_sum_before(key * dkey, dg))
        _grow(past, future, size)
        size *= 2

    keep = past[..., -1, :, None]
    query = (q * past.unsqueeze(4)).flatten(3, 4)
    key = k * future
    states = torch.cat([state[None], key.mT @ v])
    _carry(states, keep, range(k.shape[0]), 1)
    dstates = torch.cat([query.mT @ do, dstate[None]])
    _carry(dstates, keep, range(k.shape[0], 0, -1), -1)

    dv = scores.flatten(3, 4).mT @ do
    dv += key @ dstates[1:]
    dquery = (do @ states[:-1].mT).view(q.shape)
    dkey = v @ dstates[1:].mT
    dq += dquery * past.unsqueeze(4)
    dk += dkey * future
    through = (keep * (states[:-1] * dstates[1:]).sum(-1, keepdim=True)).mT
    after = (query.view(q.shape) * dquery).sum(4)
    after[..., -1:, :] += through
    dg += _sum_from(after, dg)
    dg += _sum_before(key * dkey, dg)
    return (dq, dk.unsqueeze(4), dv.unsqueeze(4), dg.unsqueeze(4)), dstates[0]


def _sum_from(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the tokens of a block from each token on, over channels too where they share a gate."""
    x = x.sum(-1, keepdim=True) if like.shape[-1] == 1 else x
    ones = torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype, device=x.device)
    return ones.triu() @ x


def _sum_before(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the tokens of a block before each token, over channels too where they share a gate."""
    x = x.sum(-1, keepdim=True) if like.shape[-1] == 1 else x
    ones = torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype, device=x.device)
    return ones.tril(-1) @ x
