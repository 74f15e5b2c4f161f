"""Gated linear attention in plain torch, chunk by chunk: the fast CPU path, forward and backward.

Time is cut into chunks of C tokens. Between chunks the state is carried one chunk at a time; within a chunk the scores
A[i, j] = sum_c q[i, c] k[j, c] D[i, j, c], with D the decay from token j to token i, are built by halving: for blocks
of s = 1, 2, 4, ... tokens, a query in the right block of a pair meets a key in the left one through their common bound,

    D[i, j] = (decay from the bound to i) * (decay from j to the bound),

so each level is one batch of matrix products. The two factors are products of single decays a = exp(g) and grow from
level to level by multiplication alone: nothing is divided or subtracted, so no gate overflows, a decay of 0 cuts
exactly, and a reset costs no precision elsewhere. The same holds for the gradient of g, a sum over the pairs that a
gate lies between: each level adds what its pairs contribute, and terms on two sides of a reset never meet.

The work is done in tiles that stay in the caches: some rows of the batch, some heads, a span of time. A tile is
laid out [chunks, N, Hk, C, D]; queries carry their group behind time, [chunks, N, Hk, C, G, K]. Gates have width W: K,
or 1 where all channels of a head share a gate.
"""

from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype

CHUNK = 32
# Elements of the largest tensors of a tile: 2 MiB in float32, so that a tile's work stays in the last cache.
TILE = 1 << 19


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
    finals = _copy_states(q, k, v, g, state, cu_seqlens)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    grouped = _group(k.shape[2], q, k, v, g, out)
    for part, tiles in _tiles(grouped[0], grouped[1], grouped[2], cu_seqlens, CHUNK):
        for tile in tiles:
            q_, k_, v_, g_ = (_cut(x[tile], finals.dtype, CHUNK) for x in grouped[:4])
            piece, finals[part] = _forward(q_, k_, v_, _decay(g_, floor), finals[part], scale)
            _put(grouped[4], tile, piece)
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
    """Gradients of q, k, v, g and of the initial state. Everything inside a tile is computed anew."""
    starts = _copy_states(q, k, v, g, state, cu_seqlens)
    dstates = torch.zeros_like(starts) if dfinal is None else dfinal.to(starts.dtype, copy=True)
    do = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device) if do is None else do
    grads = tuple(torch.empty_like(t) for t in (q, k, v, g))
    grouped = _group(k.shape[2], q, k, v, g, do, *grads)
    for part, tiles in _tiles(grouped[0], grouped[1], grouped[2], cu_seqlens, CHUNK):
        entries = [starts[part]]
        for tile in tiles[:-1]:
            k_, v_, g_ = (_cut(x[tile], starts.dtype, CHUNK) for x in grouped[1:4])
            entries.append(_advance(k_, v_, _decay(g_, floor), entries[-1]))
        for tile, entry in zip(reversed(tiles), reversed(entries)):
            q_, k_, v_, g_, do_ = (_cut(x[tile], starts.dtype, CHUNK) for x in grouped[:5])
            pieces, dstates[part] = _backward(q_, k_, v_, _decay(g_, floor), entry, do_, dstates[part], scale)
            for grad, piece in zip(grouped[5:], pieces):
                _put(grad, tile, piece)
    if g.numel() and g.amin() < floor:
        grads[3].masked_fill_(g < floor, 0.0)
    return *grads, dstates


def _copy_states(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    wide = wide_dtype(q, k, v, g, state)
    if state is not None:
        return state.to(wide, copy=True)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(sequences, *k.shape[2:], v.shape[-1], dtype=wide, device=q.device)


def _group(shared: int, *tensors: Tensor) -> list[Tensor]:
    """[B, T, heads, D] -> [B, T, Hk, G, D], with G = 1 for keys, values and gates."""
    return [x.unflatten(2, (shared, -1)) for x in tensors]


def _tiles(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int) -> list:
    """Parts of the state, each an index of [N, Hk], and the tiles, indices of [B, T, Hk], that lead through each."""
    spans = [(0, q.shape[0], 0, q.shape[1])]
    if cu_seqlens is not None:
        bounds = sequence_bounds("gla", cu_seqlens, q.shape[1])
        spans = [(n, n + 1, begin, end) for n, (begin, end) in enumerate(pairwise(bounds))]
    shared, width = k.shape[2], q.shape[3] * max(k.shape[-1], v.shape[-1])
    parts = []
    for first, last, begin, end in spans:
        if begin == end:
            continue
        steps = min(end - begin, max(1, TILE // (width * chunk)) * chunk)
        heads = max(1, min(shared, TILE // (width * steps)))
        rows = max(1, TILE // (width * steps * heads))
        for row, head in product(range(first, last, rows), range(0, shared, heads)):
            part = slice(row, min(row + rows, last)), slice(head, head + heads)
            batch = part[0] if cu_seqlens is None else slice(0, 1)
            times = [slice(t, min(t + steps, end)) for t in range(begin, end, steps)]
            parts.append((part, [(batch, time, part[1]) for time in times]))
    return parts


def _cut(x: Tensor, wide: torch.dtype, chunk: int) -> Tensor:
    """[N, T, Hk, G, D] -> [chunks, N, Hk, C, G, D], padded with zeros: no key, and no decay either."""
    chunk = min(chunk, 1 << (x.shape[1] - 1).bit_length())
    pad = -x.shape[1] % chunk
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, pad)) if pad else x
    return (
        x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4, 5).to(wide, copy=True, memory_format=torch.contiguous_format)
    )


def _put(to: Tensor, tile: tuple[slice, slice, slice], x: Tensor) -> None:
    """The inverse of `_cut`, into a tile of `to`."""
    to = to[tile]
    to.copy_(x.permute(1, 0, 3, 2, 4, 5).flatten(1, 2)[:, : to.shape[1]])


def _decay(g: Tensor, floor: float) -> Tensor:
    """exp(g), and 0 for a reset. Looking for the least gate is a tenth of the work of comparing them all."""
    decay = g.exp()
    return (decay.masked_fill_(g < floor, 0.0) if g.amin() < floor else decay).squeeze(4)


def _halves(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Left and right blocks of `size` tokens of [chunks, N, Hk, C, ...]: two views [chunks, N, Hk, C / 2s, s, ...]."""
    return x.view(*x.shape[:3], -1, 2, size, *x.shape[4:]).unbind(4)


def _pairs(scores: Tensor, size: int) -> Tensor:
    """Where right queries meet left keys in contiguous [chunks, N, Hk, C, G, C]: a view [..., C / 2s, s, G, s]."""
    *lead, chunk, group, _ = scores.shape
    row = group * chunk
    shape = (*lead, chunk // (2 * size), size, group, size)
    stride = (*scores.stride()[:3], 2 * size * (row + 1), row, chunk, 1)
    return scores.as_strided(shape, stride, scores.storage_offset() + size * row)


def _self(scores: Tensor) -> Tensor:
    """Where queries meet the key of their own token: a view [chunks, N, Hk, C, G]."""
    return scores.diagonal(dim1=3, dim2=5).movedim(-1, 3)


def _grow(past: Tensor, future: Tensor, size: int) -> None:
    """Double the blocks: `past` = decay from a block's start through a token, `future` = decay after it to the end."""
    left, right = _halves(past, size)
    _halves(future, size)[0].mul_(right[..., -1:, :])
    right.mul_(left[..., -1:, :])


def _carry(states: Tensor, keep: Tensor, backwards: bool = False) -> None:
    """states[i + 1] += keep[i] * states[i], chunk after chunk; or states[i] += keep[i] * states[i + 1]."""
    chunks, kept = states.unbind(0), keep.unbind(0)
    for i in reversed(range(len(kept))) if backwards else range(len(kept)):
        source, to = (i + 1, i) if backwards else (i, i + 1)
        chunks[to].addcmul_(kept[i], chunks[source])


def _enter(a: Tensor, b: Tensor, first: Tensor | None = None, last: Tensor | None = None) -> Tensor:
    """States at chunk bounds before they are carried: a @ b of every chunk, behind `first` or before `last`."""
    states = a.new_empty(a.shape[0] + 1, *a.shape[1:-1], b.shape[-1])
    torch.matmul(a, b, out=states[1:] if last is None else states[:-1])
    if last is None:
        states[0] = first
    else:
        states[-1] = last
    return states


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """to += a @ b."""
    to.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return to


def _meet(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. Matrices of one or two rows are faster multiplied by hand."""
    if a.shape[-1] > 2:
        return a @ b
    return a * b if a.shape[-1] == 1 else a[..., :1] * b[..., :1, :] + a[..., 1:] * b[..., 1:, :]


def _fold(x: Tensor, dim: int) -> Tensor:
    """x.sum(dim), which is slow over one or two elements."""
    if x.shape[dim] > 2:
        return x.sum(dim)
    return x.select(dim, 0) if x.shape[dim] == 1 else x.select(dim, 0) + x.select(dim, 1)


def _multiply(a: Tensor, b: Tensor, to: Tensor) -> None:
    """Write a * b, summed over the group and over channels that share a gate, where `to` has extent 1 there."""
    if to.shape == a.shape:
        torch.mul(a, b, out=to)
    else:
        to.copy_((a * b).sum_to_size(to.shape))


def _advance(k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """The state at the end of a tile; `decay` is used up."""
    k, v = k.squeeze(4), v.squeeze(4)
    past, future = decay, torch.ones_like(decay)
    for size in _sizes(k.shape[3]):
        _grow(past, future, size)
    states = _enter((k * future).mT, v, first=state)
    _carry(states, past[..., -1, :, None])
    return states[-1]


def _forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and last state of a tile; `decay` is used up."""
    k, v = k.squeeze(4), v.squeeze(4)
    past, future = decay, torch.ones_like(decay)
    within = _channel_scores if decay.shape[-1] == k.shape[-1] else _head_scores
    scores = within(q, k, past, future)[0]
    states = _enter((k * future).mT, v, first=state)
    _carry(states, past[..., -1, :, None])
    out = _add_product(scores.flatten(3, 4) @ v, (q * past.unsqueeze(4)).flatten(3, 4), states[:-1])
    return out.mul_(scale).view(*q.shape[:-1], -1), states[-1]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, do: Tensor, dstate: Tensor, scale: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of a tile's q, k, v, g and first state; `decay` and `do` are used up."""
    k, v, do = k.squeeze(4), v.squeeze(4), do.mul_(scale).flatten(3, 4)
    past, future = decay, torch.ones_like(decay)
    dscores = (do @ v.mT).view(*q.shape[:-1], q.shape[3])
    within = _channel_scores if decay.shape[-1] == k.shape[-1] else _head_scores
    scores, dq, dk, terms = within(q, k, past, future, dscores)

    keep = past[..., -1, :, None]
    query, key = q * past.unsqueeze(4), k * future
    states = _enter(key.mT, v, first=state)
    _carry(states, keep)
    dstates = _enter(query.flatten(3, 4).mT, do, last=dstate)
    _carry(dstates, keep, backwards=True)

    dv = _add_product(scores.flatten(3, 4).mT @ do, key, dstates[1:])
    dquery = (do @ states[:-1].mT).view(q.shape)
    dkey = v @ dstates[1:].mT
    dq.addcmul_(dquery, past.unsqueeze(4))
    dk.addcmul_(dkey, future)
    _multiply(query, dquery, terms[-2].unsqueeze(4))
    _multiply(key, dkey, terms[-1])
    through = (keep * (states[:-1] * dstates[1:]).sum(-1, keepdim=True)).mT
    terms[-2].narrow(-2, -1, 1).add_(through.sum_to_size(keep.mT.shape))
    dg = _gate_gradient(terms)
    return (dq, dk.unsqueeze(4), dv.unsqueeze(4), dg.unsqueeze(4)), dstates[0]


def _channel_scores(q: Tensor, k: Tensor, past: Tensor, future: Tensor, dscores: Tensor | None = None) -> tuple:
    """Scores within chunks for a gate per channel; `past` and `future` grow from single tokens to chunks.

    With the gradient of the scores: also those of q and k, and per level what the log gates get (`_gate_gradient`).
    """
    scores = q.new_zeros(*q.shape[:-1], q.shape[3])
    _self(scores).copy_((q * k.unsqueeze(4)).sum(-1))
    sizes = _sizes(q.shape[3])
    dq: Any = None
    dk: Any = None
    terms: Any = None
    if dscores is not None:
        direct = _self(dscores).unsqueeze(-1)
        dq, dk = direct * k.unsqueeze(4), _fold(direct * q, 4)
        terms = past.new_empty(len(sizes) + 2, *past.shape)
    for level, size in enumerate(sizes):
        to_query, to_key = _halves(past, size)[1].unsqueeze(5), _halves(future, size)[0]
        query, key = _halves(q, size)[1] * to_query, _halves(k, size)[0] * to_key
        flat = query.flatten(4, 5)
        _pairs(scores, size).copy_((flat @ key.mT).view(*query.shape[:-1], size))
        if dscores is not None:
            block = _pairs(dscores, size).flatten(4, 5)
            dquery = _meet(block, key).view(query.shape)
            dkey = _meet(block.mT, flat)
            _halves(dq, size)[1].addcmul_(dquery, to_query)
            _halves(dk, size)[0].addcmul_(dkey, to_key)
            left, right = _halves(terms[level], size)
            _multiply(query, dquery, right.unsqueeze(5))
            if size > 1:  # in a block of one token, no gate lies behind it
                _multiply(key, dkey, left)
        _grow(past, future, size)
    return scores, dq, dk, terms


def _head_scores(q: Tensor, k: Tensor, past: Tensor, future: Tensor, dscores: Tensor | None = None) -> tuple:
    """As `_channel_scores`, for one gate per head: decays are then a factor on whole scores, [..., C, 1, C]."""
    raw = (q.flatten(3, 4) @ k.mT).view(*q.shape[:-1], q.shape[3])
    decays = q.new_zeros(*q.shape[:4], 1, q.shape[3])
    _self(decays).fill_(1.0)
    sizes = _sizes(q.shape[3])
    for size in sizes:
        to_query, to_key = _halves(past, size)[1].unsqueeze(5), _halves(future, size)[0]
        _pairs(decays, size).copy_(to_query * to_key.mT.unsqueeze(4))
        _grow(past, future, size)
    scores = raw * decays
    if dscores is None:
        return scores, None, None, None
    draw = (dscores * decays).flatten(3, 4)
    dq, dk = (draw @ k).view(q.shape), draw.mT @ q.flatten(3, 4)
    terms = past.new_empty(len(sizes) + 2, *past.shape)
    dlog = dscores.mul(scores).sum(4, keepdim=True)
    for size, term in zip(sizes, terms):
        left, right = _halves(term, size)
        block = _pairs(dlog, size).squeeze(5)
        right.copy_(block.sum(-1, keepdim=True))
        left.copy_(block.sum(-2).unsqueeze(-1))
    return scores, dq, dk, terms


def _gate_gradient(terms: Tensor) -> Tensor:
    """Sum, for every gate, the terms of the decays that it is a factor of.

    `terms` [levels + 2, chunks, N, Hk, C, W]: per level, the gradient of the log decay from the bound through a token
    (right blocks) and of that after a token to the bound (left blocks); the last two are these kinds for whole chunks.
    A gate takes part in the former of its own and later tokens, in the latter of earlier tokens. Blocks are halved,
    from the chunk down to single tokens, and what crosses the middle is handed to the last token of a half.
    """
    later, earlier = terms[-2], terms[-1]
    for size, term in zip(reversed(_sizes(later.shape[3])), reversed(terms[:-2].unbind(0))):
        (left, right), (before, _) = _halves(later, size), _halves(earlier, size)
        crossing = _fold(right, -2), _fold(before, -2)
        left.select(-2, -1).add_(crossing[0])
        right.add_(_halves(term, size)[1])
        right.select(-2, -1).add_(crossing[1])
        if size > 1:
            before.add_(_halves(term, size)[0])
    return later


def _sizes(chunk: int) -> list[int]:
    return [1 << level for level in range(chunk.bit_length() - 1)]
