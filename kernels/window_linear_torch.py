"""Windowed softmax and linear attention in plain torch, tile by tile: the CPU path, forward and backward.

A tile is CHUNK queries and its columns: the CHUNK + window - 1 tokens from the first key in the first query's window to
the last query. With window - 1 zeros in front of a sequence, tile i has the columns from i * CHUNK on, and for row a

    columns b < a have left the window: weight fq . fk     columns a <= b < a + window are in it: gamma exp(s - c)

What lies before the columns is in the sums in front of the tile. From tile to tile these grow by the first CHUNK
columns. So the work is O(T (CHUNK + window)). Tiles are taken in batches of as many as TILE allows; the backward pass
keeps the sums in front of each batch.

Layout of a batch: [N, Hk, n, rows, C], with rows = G * CHUNK for the G query heads of a key-value head, and n tiles.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spikelm.kernels.window_linear_state import EPSILON

CHUNK = 64
# Weights in a batch of tiles: 2 MiB in float32, so that they stay in the last cache.
TILE = 1 << 19


class _Run(NamedTuple):
    """Equally long parts that are computed at once: their states, their tokens, and tiles per batch."""

    states: slice
    tokens: slice
    length: int
    tiles: int

    def cut(self, x: Tensor) -> Tensor:
        """[M, heads, C] -> [N, L, heads, C]; a view."""
        return x[self.tokens].unflatten(0, (-1, self.length))

    def batches(self) -> list[tuple[int, int]]:
        """First and last tile of every batch."""
        count = -(-self.length // CHUNK)
        return [(i, min(i + self.tiles, count)) for i in range(0, count, self.tiles)]


def _runs(bounds: list[int], heads: int, window: int) -> Iterator[_Run]:
    weights = heads * CHUNK * (CHUNK + window - 1)
    lengths = {end - begin for begin, end in pairwise(bounds)}
    rows = max(1, TILE // weights) if len(lengths) == 1 else 1
    for first in range(0, len(bounds) - 1, rows):
        last = min(first + rows, len(bounds) - 1)
        begin, end = bounds[first], bounds[last]
        if begin < end:
            tiles = max(1, TILE // (weights * (last - first)))
            yield _Run(slice(first, last), slice(begin, end), bounds[first + 1] - begin, tiles)


class _Keys(NamedTuple):
    """Keys, values and features of a run behind window - 1 zeros: [N, Hk, tokens, C].

    Features end with the run, so that what is in the last window enters no sum.
    """

    k: Tensor
    v: Tensor
    fk: Tensor
    window: int

    @classmethod
    def lay(cls, run: _Run, k: Tensor, v: Tensor, fk: Tensor, window: int, wide: torch.dtype) -> "_Keys":
        kept, length = window - 1, run.length
        tiles = -(-length // CHUNK) * CHUNK

        def place(x: Tensor, to: int, count: int) -> Tensor:
            x = run.cut(x)[:, :count].transpose(1, 2)
            laid = x.new_zeros(*x.shape[:2], to, x.shape[3], dtype=wide)
            laid[:, :, kept : kept + x.shape[2]] = x
            return laid

        return cls(
            place(k, tiles + kept, length),
            place(v, tiles + kept, length),
            place(fk, max(tiles, kept), max(length - kept, 0)),
            window,
        )

    def columns(self, x: Tensor, tiles: tuple[int, int]) -> Tensor:
        """k or v by tile: [N, Hk, n, columns, C]."""
        width = CHUNK + self.window - 1
        x = x[:, :, tiles[0] * CHUNK : tiles[1] * CHUNK + self.window - 1]
        return x.unfold(2, width, CHUNK).mT.contiguous()

    def leaving(self, tiles: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features and values of the first CHUNK columns of every tile: [N, Hk, n, CHUNK, C]."""
        span = slice(tiles[0] * CHUNK, tiles[1] * CHUNK)
        return tuple(x[:, :, span].unflatten(2, (-1, CHUNK)) for x in (self.fk, self.v))

    def masks(self, tiles: tuple[int, int], group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Columns out of the window [n or 1, rows, columns], first ones not left of it [rows, CHUNK], own [rows, 1]."""
        column = torch.arange(CHUNK + self.window - 1, device=self.k.device)
        row = column[:CHUNK].repeat(group).unsqueeze(1)
        own = row + self.window - 1
        outside = ((column < row) | (column > own)).unsqueeze(0)
        if tiles[0] * CHUNK < self.window - 1:  # the zeros in front of the sequence
            first = torch.arange(*tiles, device=self.k.device)[:, None, None] * CHUNK
            outside = outside | (first + column < self.window - 1)
        return outside, column[:CHUNK] >= row, own


def _rows(run: _Run, x: Tensor, shared: int, tiles: tuple[int, int], wide: torch.dtype) -> Tensor:
    """Tokens of queries [M, H, C] by tile: [N, Hk, n, G * CHUNK, C], with zeros behind the end."""
    x = run.cut(x)[:, tiles[0] * CHUNK : tiles[1] * CHUNK]
    n, length, heads, width = x.shape
    laid = x.new_zeros(n, shared, tiles[1] - tiles[0], heads // shared, CHUNK, width, dtype=wide)
    whole = length // CHUNK
    x = x.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4)  # [N, Hk, G, L, C]
    laid[:, :, :whole] = x[:, :, :, : whole * CHUNK].unflatten(3, (whole, CHUNK)).transpose(2, 3)
    if length % CHUNK:
        laid[:, :, whole, :, : length % CHUNK] = x[:, :, :, whole * CHUNK :]
    return laid.flatten(3, 4)


def _put(run: _Run, to: Tensor, x: Tensor, tiles: tuple[int, int]) -> None:
    """The inverse of `_rows`, into [M, H, C]."""
    to = run.cut(to)[:, tiles[0] * CHUNK : tiles[1] * CHUNK]
    x = x.unflatten(3, (-1, CHUNK)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    to.copy_(x[:, : to.shape[1]])


def _spread(to: Tensor, x: Tensor, tiles: tuple[int, int]) -> None:
    """Add columns [N, Hk, n, columns, C] of the tiles to tokens laid like `_Keys`, CHUNK at a time."""
    for column in range(0, x.shape[3], CHUNK):
        piece = x[:, :, :, column : column + CHUNK]
        span = to[:, :, tiles[0] * CHUNK + column : tiles[1] * CHUNK + column]
        span.unflatten(2, (-1, CHUNK))[:, :, :, : piece.shape[3]] += piece


def _grow(states: Tensor, leaving: Tensor) -> Tensor:
    """States [N, Hk, n + 1, ...] in front of every tile and behind the last one, from the first [N, Hk, ...]."""
    return torch.cat([states.unsqueeze(2), leaving], 2).cumsum(2)


def _shrink(dstates: Tensor, last: Tensor) -> Tensor:
    """Backward of `_grow`: what every tile reads from its state, and the last state's gradient -> all gradients."""
    return torch.cat([dstates, last.unsqueeze(2)], 2).flip(2).cumsum(2).flip(2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor,
    norm: Tensor,
    bounds: list[int],
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last sums and norms, weights and peaks as in the op, for parts of M tokens.

    Args:
        q: [M, H, D].
        k: [M, Hk, D].
        v: [M, Hk, V].
        fq: [M, H, F].
        fk: [M, Hk, F].
        gamma: [H].
        sums: [P, Hk, F, V], where the parts begin.
        norm: [P, Hk, F].
        bounds: P + 1 first tokens of the parts.
        window: tokens in the window.
        scale: factor on q . k.
    """
    wide, (tokens, heads), shared = sums.dtype, q.shape[:2], k.shape[1]
    out = torch.empty(tokens, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    weight = torch.empty(tokens, heads, 2, dtype=wide, device=q.device)
    peak = torch.empty(tokens, heads, 1, dtype=torch.int32, device=q.device)
    sums, norm = sums.clone(), norm.clone()
    factor = _per_row(gamma.to(wide), shared)
    for run in _runs(bounds, heads, window):
        keys = _Keys.lay(run, k, v, fk, window, wide)
        for tiles in run.batches():
            q_, fq_ = (_rows(run, x, shared, tiles, wide) for x in (q, fq))
            left_f, left_v = keys.leaving(tiles)
            state = _grow(sums[run.states], left_f.mT @ left_v)
            past = _grow(norm[run.states], left_f.sum(3))
            outside, inside, own = keys.masks(tiles, heads // shared)

            scores = (q_.mul_(scale) @ keys.columns(keys.k, tiles).mT).masked_fill_(outside, -torch.inf)
            top, column = scores.max(-1, keepdim=True)
            weights = scores.sub_(top).exp_().mul_(factor)
            weights[..., :CHUNK] += (fq_ @ left_f.mT).masked_fill_(inside, 0.0)
            num = fq_ @ state[:, :, :-1] + weights @ keys.columns(keys.v, tiles)
            den = fq_ @ past[:, :, :-1].unsqueeze(-1) + weights.sum(-1, keepdim=True)
            _put(run, out, num.div_(den.clamp_min(EPSILON)), tiles)
            _put(run, weight, torch.cat([top, den], -1), tiles)
            _put(run, peak, own - column, tiles)
            sums[run.states], norm[run.states] = state[:, :, -1], past[:, :, -1]
    return out, sums, norm, weight, peak.squeeze(-1)


def backward(
    do: Tensor,
    o: Tensor,
    weight: Tensor,
    peak: Tensor,
    dsums: Tensor,
    dnorm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor,
    norm: Tensor,
    bounds: list[int],
    window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, fq, fk, gamma, sums, norm; scores and states are computed anew.

    `dsums` and `dnorm` belong to the ends of the parts; other arguments as in `forward`.
    """
    wide, heads, shared = sums.dtype, q.shape[1], k.shape[1]
    grads = [torch.empty_like(x) for x in (q, k, v, fq, fk)]
    dgamma = torch.zeros(heads, dtype=wide, device=q.device)
    dsums, dnorm = dsums.clone(), dnorm.clone()
    factor = _per_row(gamma.to(wide), shared)
    for run in _runs(bounds, heads, window):
        keys = _Keys.lay(run, k, v, fk, window, wide)
        room = keys.k.shape[2] + CHUNK  # the last piece that `_spread` adds may be a whole chunk
        dk, dv, dfk = (x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in keys[:3])
        states, pasts = [sums[run.states]], [norm[run.states]]
        for tiles in run.batches()[:-1]:
            left_f, left_v = keys.leaving(tiles)
            states.append(states[-1] + (left_f.mT @ left_v).sum(2))
            pasts.append(pasts[-1] + left_f.sum((2, 3)))
        for tiles, first, before in zip(reversed(run.batches()), reversed(states), reversed(pasts)):
            q_, fq_, do_, weight_ = (_rows(run, x, shared, tiles, wide) for x in (q, fq, do, weight))
            peak_ = _rows(run, peak.unsqueeze(-1), shared, tiles, torch.int64)
            left_f, left_v = keys.leaving(tiles)
            state = _grow(first, left_f.mT @ left_v)[:, :, :-1]
            past = _grow(before, left_f.sum(3))[:, :, :-1]
            outside, inside, own = keys.masks(tiles, heads // shared)
            columns_k, columns_v = keys.columns(keys.k, tiles), keys.columns(keys.v, tiles)

            top, den = weight_[..., :1], weight_[..., 1:]
            dnum = do_ / den.clamp_min(EPSILON)
            products = dnum @ columns_v.mT
            linear = (fq_ @ left_f.mT).masked_fill_(inside, 0.0)
            dfq = dnum @ state.mT
            before = linear.sum(-1, keepdim=True) + fq_ @ past.unsqueeze(-1)
            dbefore = (linear * products[..., :CHUNK]).sum(-1, keepdim=True) + (fq_ * dfq).sum(-1, keepdim=True)

            weights = (q_.mul_(scale) @ columns_k.mT).sub_(top).masked_fill_(outside, -torch.inf).exp_()
            dscores = weights * products
            now, dnow = weights.sum(-1, keepdim=True), dscores.sum(-1, keepdim=True)
            counts, den = den >= EPSILON, den.clamp_min(EPSILON)
            dden = torch.where(counts, (dnow * factor + dbefore) / -den, 0.0)
            # The sum of the gradients of p = exp(s - c), without its large terms, which cancel.
            dp = torch.where(counts, (before * dnow - now * dbefore) / den, dnow)
            dgamma += dp.unflatten(3, (-1, CHUNK)).sum((0, 2, 4, 5)).flatten()
            dscores.addcmul_(weights, dden)
            dscores.scatter_add_(-1, own - peak_, -dscores.sum(-1, keepdim=True)).mul_(factor)
            weights.mul_(factor)[..., :CHUNK] += linear
            dlinear = (products[..., :CHUNK] + dden).masked_fill_(inside, 0.0)
            dstate = _shrink(fq_.mT @ dnum, dsums[run.states])
            dpast = _shrink((fq_ * dden).sum(3), dnorm[run.states])
            dsums[run.states], dnorm[run.states] = dstate[:, :, 0], dpast[:, :, 0]

            dq = (dscores @ columns_k).mul_(scale)
            dfq += dlinear @ left_f + dden * past.unsqueeze(3)
            _put(run, grads[0], dq, tiles)
            _put(run, grads[3], dfq, tiles)
            _spread(dk, dscores.mT @ q_, tiles)
            dcolumns = weights.mT @ dnum
            dcolumns[..., :CHUNK, :] += left_f @ dstate[:, :, 1:]
            _spread(dv, dcolumns, tiles)
            _spread(dfk, dlinear.mT @ fq_ + left_v @ dstate[:, :, 1:].mT + dpast[:, :, 1:].unsqueeze(3), tiles)
        # What is in the last window has features that nothing has read.
        dfk[:, :, run.length :] = 0.0
        for to, grad in zip((grads[1], grads[2], grads[4]), (dk, dv, dfk)):
            run.cut(to).copy_(grad[:, :, window - 1 : window - 1 + run.length].transpose(1, 2))
    return *grads, dgamma.to(gamma.dtype), dsums, dnorm


def _per_row(gamma: Tensor, shared: int) -> Tensor:
    """[H] -> [Hk, 1, G * CHUNK, 1]."""
    return gamma.view(shared, 1, -1, 1, 1).expand(-1, -1, -1, CHUNK, -1).flatten(2, 3)
