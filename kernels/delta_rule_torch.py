"""The delta rule in plain torch, chunk by chunk: the fast CPU path, forward and backward.

What `a` reads, u_t = a_t^T S_{t-1} [V], turns the rule into gated linear attention with two writes per token, (k, v)
and (b, u), and two reads, o and u itself. Within a chunk that starts in state S, with D the decay between tokens:

    U = a~ S + A_ak V + A_ab U         A_xy[i, j] = sum_c x[i, c] y[j, c] D[i, j, c]
    O = q~ S + A_qk V + A_qb U         a~, q~: decayed from the chunk's start
    S' = decay S + k~^T V + b~^T U     k~, b~: decayed to its end

A_ab is strictly lower triangular, so U = T (a~ S + A_ak V) with T = (I - A_ab)^{-1}. The inverse, like the decays
(see `gla_torch.py`, whose tiles and halves serve here too), grows block by block: nothing is divided or subtracted.
The backward pass solves the transposed system: G, the gradient of U, meets T^T, and with U and G known the rest is the
gradient of linear attention.

Where one key serves both writes (b = k), the two are one write of z_t = u_t + v_t, and Z = T (a~ S + V): no score
matrix of k is needed. Below, u then stands for z.

`a` reads before the token's own decay, q after it. Both become reads before it by giving q its own decay as a factor;
only the token's own two writes meet the bare q. Rows of a tile hold (a, q), columns (b, k) or k alone, their values
(u, v) or z, each behind time: [chunks, N, H, C, 2 or 1, D].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from spikelm.kernels import gla_torch as gla
from spikelm.kernels.runtime import wide_dtype

CHUNK = 16


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [N, H, K, V]; arguments as in `delta_rule`, checked."""
    tokens = [x.unsqueeze(3) for x in (q, k, v, g, a, b) if x is not None]
    finals = _states(tokens, state, cu_seqlens)
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    for part, tiles in gla._tiles(tokens[0], tokens[1], tokens[2], cu_seqlens, CHUNK):
        for tile in tiles:
            work = _Tile([x[tile] for x in tokens], finals.dtype, floor)
            piece, finals[part] = work.forward(finals[part], scale)
            gla._put(out.unsqueeze(3), tile, piece)
    return out, finals


def backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> list[Tensor]:
    """Gradients of q, k, v, g, a, b (if given) and of the initial state; everything inside a tile is computed anew."""
    tokens = [x.unsqueeze(3) for x in (q, k, v, g, a, b) if x is not None]
    starts = _states(tokens, state, cu_seqlens)
    dstates = torch.zeros_like(starts) if dfinal is None else dfinal.to(starts.dtype, copy=True)
    do = torch.zeros(v.shape, dtype=q.dtype, device=q.device) if do is None else do
    grads = [torch.empty_like(x) for x in (q, k, v, g, a, b) if x is not None]
    for part, tiles in gla._tiles(tokens[0], tokens[1], tokens[2], cu_seqlens, CHUNK):
        entries = [starts[part]]
        for tile in tiles[:-1]:
            work = _Tile([x[tile] for x in tokens], starts.dtype, floor)
            entries.append(work.solve(entries[-1])[1][-1])
        for tile, entry in zip(reversed(tiles), reversed(entries)):
            work = _Tile([x[tile] for x in tokens], starts.dtype, floor)
            upstream = gla._cut(do.unsqueeze(3)[tile], starts.dtype, CHUNK).mul_(scale)
            pieces, dstates[part] = work.backward(entry, upstream, dstates[part])
            for grad, piece in zip(grads, pieces):
                gla._put(grad.unsqueeze(3), tile, piece)
    if g.numel() and g.amin() < floor:
        grads[3].masked_fill_(g < floor, 0.0)
    return [*grads, dstates]


def _states(tokens: list[Tensor], state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """A copy of the initial states in the wide dtype."""
    wide = wide_dtype(*tokens, state)
    if state is not None:
        return state.to(wide, copy=True)
    keys, values = tokens[1], tokens[2]
    sequences = keys.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(sequences, keys.shape[2], keys.shape[-1], values.shape[-1], dtype=wide, device=keys.device)


class _Tile:
    """What is known of the chunks of a tile before their first state is.

    `within` [2, m, chunks, N, H, C, C] are the score matrices, (a, q) times (b, k) or b alone; `past` and `future` the
    decays [chunks, N, H, C, W] from a chunk's start to before a token, and after a token to the chunk's end.
    """

    def __init__(self, tokens: list[Tensor], wide: torch.dtype, floor: float):
        q, k, v, g, a, *b = (gla._cut(x, wide, CHUNK) for x in tokens)
        self.q, self.v, self.decay = q, v.squeeze(4), gla._decay(g, floor)
        self.rows = torch.cat([a, q * self.decay.unsqueeze(4)], 4)
        self.columns = torch.cat([*b, k], 4) if b else k
        scores = self._scores()
        _own(scores).copy_((q * self.columns).sum(-1))
        self.within = scores.permute(4, 6, 0, 1, 2, 3, 5).contiguous()
        self.inverse = _inverse(self.within[0, 0])
        self.past, self.future = _whole(self.decay)
        self.keep = (self.past[..., -1, :] * self.decay[..., -1, :]).unsqueeze(-1)
        self.read, self.write = self.rows * self.past.unsqueeze(4), self.columns * self.future.unsqueeze(4)

    def solve(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (z) [chunks, N, H, C, V], states at chunk bounds [chunks + 1, N, H, K, V], T a~ [chunks, N, H, C, K]."""
        reads = self.inverse @ self.read.select(4, 0)
        erase, *write = self.write.unbind(4)
        u = self.inverse @ (self.within[0, 1] @ self.v if write else self.v)
        states = u.new_zeros(len(u) + 1, *state.shape)
        states[0] = state
        if write:
            torch.matmul(write[0].mT, self.v, out=states[1:])
        for i in range(len(u)):
            now, after = slice(i, i + 1), slice(i + 1, i + 2)
            gla._add_product(u[now], reads[now], states[now])
            gla._add_product(states[after], erase[now].mT, u[now])
            states[after].addcmul_(self.keep[now], states[now])
        return u, states, reads

    def forward(self, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Outputs [chunks, N, H, C, 1, V] and the last state."""
        u, states, _ = self.solve(state)
        out = self.within[1, 0] @ u
        if self.columns.shape[4] == 2:
            gla._add_product(out, self.within[1, 1], self.v)
        return gla._add_product(out, self.read.select(4, 1), states[:-1]).mul_(scale).unsqueeze(4), states[-1]

    def backward(self, state: Tensor, do: Tensor, dstate: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of q, k, v, g, a, b (if it is given) and of the first state; `do` comes scaled."""
        u, states, reads = self.solve(state)
        erase, *write = self.write.unbind(4)
        do = do.squeeze(4)
        du = self.within[1, 0].mT @ do  # of u as a result; through T below it becomes that of what T acts on
        dstates = gla._enter(self.read.select(4, 1).mT, do, last=dstate)
        for i in reversed(range(len(u))):
            now, after = slice(i, i + 1), slice(i + 1, i + 2)
            gla._add_product(du[now], erase[now], dstates[after])
            gla._add_product(dstates[now], reads[now].mT, du[now])
            dstates[now].addcmul_(self.keep[now], dstates[after])
        du = self.inverse.mT @ du
        dv, values = du, u
        if write:
            dv = gla._add_product(self.within[1, 1].mT @ do, self.within[0, 1].mT, du)
            gla._add_product(dv, write[0], dstates[1:])
            values = torch.stack([u, self.v], 4).flatten(3, 4)
        upstream = torch.stack([du, do], 4).flatten(3, 4)
        dscores = (upstream @ values.mT).view(*self.rows.shape[:5], *self.columns.shape[3:5])
        dread = (upstream @ states[:-1].mT).view(self.rows.shape)
        dwrite = (values @ dstates[1:].mT).view(self.columns.shape)
        drows, dcolumns, terms = self._scores_backward(dscores)
        drows.addcmul_(dread, self.past.unsqueeze(4))
        dcolumns.addcmul_(dwrite, self.future.unsqueeze(4))
        _put_before(_share(self.read * dread, terms), terms[-2])
        terms[-1] = _share(self.write * dwrite, terms)
        through = (self.keep * (states[:-1] * dstates[1:]).sum(-1, keepdim=True)).mT
        terms[-2].narrow(-2, -1, 1).copy_(through.sum_to_size(terms[-2][..., -1:, :].shape))
        dg = gla._gate_gradient(terms)

        # q has its own decay as a factor, but meets the token's own writes without it.
        da, dq = drows.split(1, 4)
        dg += _share(self.rows[..., 1:, :] * dq, terms)
        own = _own(dscores).unsqueeze(-1)
        dq = (dq * self.decay.unsqueeze(4)).add_((own * self.columns).sum(4, keepdim=True))
        *db, dk = dcolumns.addcmul_(own, self.q).split(1, 4)
        return (dq, dk, dv.unsqueeze(4), dg.unsqueeze(4), da, *db), dstates[0]

    def _scores(self) -> Tensor:
        """Rows meet the columns of earlier tokens: [chunks, N, H, C, 2, C, m]."""
        rows, columns = self.rows, self.columns
        shape = *rows.shape[:5], *columns.shape[3:5]
        if self.decay.shape[-1] < rows.shape[-1]:
            scores = rows.flatten(3, 4) @ columns.flatten(3, 4).mT
            return scores.view(shape).mul_(self._pair_decays())
        scores = rows.new_zeros(shape)
        for size, past, future in _levels(self.decay):
            row, column = _meeting(rows, columns, size, past, future)
            _pairs(scores, size).copy_((row @ column.mT).view(_pairs(scores, size).shape))
        return scores

    def _scores_backward(self, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows and columns; per level, what the log gates get (see `_gate_gradient` of `gla_torch.py`)."""
        rows, columns = self.rows, self.columns
        terms = rows.new_zeros(rows.shape[3].bit_length() + 1, *self.decay.shape)
        if self.decay.shape[-1] < rows.shape[-1]:
            flat_rows, flat_columns = rows.flatten(3, 4), columns.flatten(3, 4)
            dscores = dscores * self._pair_decays()
            dlog = (flat_rows @ flat_columns.mT).view(dscores.shape).mul_(dscores).sum((4, 6))
            for size, term in zip(gla._sizes(rows.shape[3]), terms):
                block = _pairs(dlog[..., None, :, None], size)[..., 0, :, 0]
                left, right = gla._halves(term, size)
                left.copy_(block.sum(-2).unsqueeze(-1))
                _put_before(block.sum(-1, keepdim=True), right)
            flat = dscores.flatten(5, 6).flatten(3, 4)
            drows, dcolumns = flat @ flat_columns, flat.mT @ flat_rows
            return drows.view(rows.shape), dcolumns.view(columns.shape), terms
        drows, dcolumns = torch.zeros_like(rows), torch.zeros_like(columns)
        for (size, past, future), term in zip(_levels(self.decay), terms):
            row, column = _meeting(rows, columns, size, past, future)
            block = _pairs(dscores, size).flatten(6, 7).flatten(4, 5)
            drow = gla._meet(block, column).unflatten(-2, (size, 2))
            dcolumn = gla._meet(block.mT, row).unflatten(-2, (size, -1))
            gla._halves(drows, size)[1].addcmul_(drow, past.unsqueeze(5))
            gla._halves(dcolumns, size)[0].addcmul_(dcolumn, future.unsqueeze(5))
            left, right = gla._halves(term, size)
            if size > 1:  # between neighbours lies no gate
                left.copy_(gla._fold(column.view(dcolumn.shape) * dcolumn, 5))
                _put_before(gla._fold(row.view(drow.shape) * drow, 5), right)
        return drows, dcolumns, terms

    def _pair_decays(self) -> Tensor:
        """Decays of pairs of tokens for a gate per head, as a factor on the scores: [chunks, N, H, C, 1, C, 1]."""
        *lead, chunk, _ = self.decay.shape
        decays = self.decay.new_zeros(*lead, chunk, 1, chunk, 1)
        for size, past, future in _levels(self.decay):
            _pairs(decays, size)[..., 0, :, 0] = past * future.mT
        return decays


def _levels(decay: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For blocks of 1, 2, 4, ... tokens: decays from the middle of a pair of blocks to before a token on its right, and
    after a token on its left to the middle: [chunks, N, H, C / 2s, s, W]. They are views, good until the next are due.
    """
    past, future = torch.ones_like(decay), torch.ones_like(decay)
    for size in gla._sizes(decay.shape[3]):
        yield size, gla._halves(past, size)[1], gla._halves(future, size)[0]
        _grow(past, future, decay, size)


def _whole(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Decays from the start of the chunk to before a token, and after a token to its end."""
    past, future = torch.ones_like(decay), torch.ones_like(decay)
    for size in gla._sizes(decay.shape[3]):
        _grow(past, future, decay, size)
    return past, future


def _grow(past: Tensor, future: Tensor, decay: Tensor, size: int) -> None:
    """Double the blocks that `past` (from a block's start to before a token) and `future` (to its end) refer to."""
    (left, right), (left_own, right_own) = gla._halves(past, size), gla._halves(decay, size)
    gla._halves(future, size)[0].mul_(right[..., -1:, :] * right_own[..., -1:, :])
    right.mul_(left[..., -1:, :] * left_own[..., -1:, :])


def _meeting(rows: Tensor, columns: Tensor, size: int, past: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
    """Right rows and left columns, both decayed to the middle: [chunks, N, H, C / 2s, 2 s, K]."""
    row, column = gla._halves(rows, size)[1], gla._halves(columns, size)[0]
    return (row * past.unsqueeze(5)).flatten(4, 5), (column * future.unsqueeze(5)).flatten(4, 5)


def _pairs(scores: Tensor, size: int) -> Tensor:
    """Where right rows meet left columns: a view [chunks, N, H, C / 2s, s, n, s, m] of contiguous [..., C, n, C, m]."""
    *lead, chunk, rows, _, columns = scores.shape
    step = scores.stride(3)
    shape = (*lead, chunk // (2 * size), size, rows, size, columns)
    stride = (*scores.stride()[:3], 2 * size * (step + columns), step, *scores.stride()[4:])
    return scores.as_strided(shape, stride, scores.storage_offset() + size * step)


def _own(scores: Tensor) -> Tensor:
    """Where q meets the writes of its own token: a view [chunks, N, H, C, m] of [..., C, 2, C, m]."""
    return scores.select(4, 1).diagonal(dim1=3, dim2=4).mT


def _share(x: Tensor, terms: Tensor) -> Tensor:
    """Sum [chunks, N, H, C, rows, K] over rows, and over channels that share a gate."""
    x = x.sum(4)
    return x if terms.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)


def _put_before(x: Tensor, to: Tensor) -> None:
    """Decays to before a token are decays through the token before it, of which the last has none here."""
    to[..., :-1, :].copy_(x[..., 1:, :])


def _inverse(scores: Tensor) -> Tensor:
    """(I - scores)^{-1} for strictly lower triangular scores [chunks, N, H, C, C]: blocks on the diagonal double."""
    inverse = torch.zeros_like(scores)
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    for size in gla._sizes(scores.shape[-1]):
        left, right = _diagonal_blocks(inverse, size)
        lower = _pairs(scores[..., None, :, None], size)[..., 0, :, 0]
        _pairs(inverse[..., None, :, None], size)[..., 0, :, 0] = right @ lower @ left
    return inverse


def _diagonal_blocks(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Left and right blocks on the diagonal: two views [chunks, N, H, C / 2s, s, s] of contiguous [..., C, C]."""
    *lead, chunk, _ = x.shape
    shape = (*lead, chunk // (2 * size), 2, size, size)
    stride = (*x.stride()[:3], 2 * size * (chunk + 1), size * (chunk + 1), chunk, 1)
    return x.as_strided(shape, stride, x.storage_offset()).unbind(4)
