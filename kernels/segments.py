"""Packing, resets and padding as one thing: segments, runs of tokens that depend on each other and on no other.

A sequence falls into segments at its resets; padding is left out. The first segment of a sequence starts from the
initial state unless a reset stands in front of it, every other one from zero. Segments run side by side, longest
first, one token of each at a time: step t owns `running[t]` rows, one for each segment that has a t-th token. So a
batch, a packed batch and a batch of many documents take the same loop, and nobody computes padding.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds


@dataclass(frozen=True)
class Segments:
    """S segments of N sequences; R rows, one per token that is not padding. Tokens are numbered b * T + t.

    Attributes:
        running: segments that have a t-th token, for every step t; falls, and sums to R.
        tokens: [R] int64, token of every row, by step and then by segment.
        before: [R] int64, token in front of it in its segment; a first token stands for itself.
        sequence: [S] int64, sequence of every segment.
        fresh: [S] bool, whether the segment starts from zero.
        lengths: [S] int64, tokens of every segment that are not padding.
        last: [N] int64, segment that ends every sequence; -1 for one without tokens, whose state stays.
    """

    running: tuple[int, ...]
    tokens: Tensor
    before: Tensor
    sequence: Tensor
    fresh: Tensor
    lengths: Tensor
    last: Tensor

    def blank(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor [B, T, ...] for results by token: zero if there is padding, which nobody writes."""
        make = torch.empty if len(self.tokens) == shape[0] * shape[1] else torch.zeros
        return make(shape, dtype=dtype, device=device)

    def first(self, states: Tensor) -> Tensor:
        """States before the first token of every segment [S, ...] from initial states [N, ...]."""
        first = states[self.sequence]
        first[self.fresh] = 0.0
        return first

    def first_backward(self, dfirst: Tensor, dfinal: Tensor) -> Tensor:
        """Gradient of the initial states; one without tokens is its sequence's final state too."""
        dstates = torch.where((self.last < 0).view(-1, *[1] * (dfinal.ndim - 1)), dfinal, 0.0)
        dstates[self.sequence[~self.fresh]] = dfirst[~self.fresh]  # at most one segment of a sequence is not fresh
        return dstates

    def final(self, ends: Tensor, states: Tensor) -> Tensor:
        """Final states [N, ...] from the states behind every segment [S, ...] and the initial states."""
        final, ended = states.clone(), self.last >= 0
        final[ended] = ends[self.last[ended]]
        return final

    def final_backward(self, dfinal: Tensor) -> Tensor:
        """Gradient of the states behind every segment [S, ...]."""
        dends, ended = dfinal.new_zeros(len(self.sequence), *dfinal.shape[1:]), self.last >= 0
        dends[self.last[ended]] = dfinal[ended]
        return dends


def find_segments(
    op: str,
    tokens: Tensor,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    reset_mask: Tensor | None = None,
) -> Segments:
    """Segments of a batch `tokens` [B, T, ...].

    Args:
        op: who asks, for errors.
        tokens: only its shape and device matter.
        cu_seqlens: [N + 1] bounds of the sequences packed into a batch of one.
        valid: [B, T] bool, False for padding.
        reset_mask: [B, T] bool, True where the state is zero in front of the token, padding or not.

    The values of the last three are read, which waits for a GPU.
    """
    batch, length = tokens.shape[:2]
    if cu_seqlens is None and valid is None and reset_mask is None:
        return _uniform(batch, length, tokens.device)
    bounds = [b * length for b in range(batch + 1)] if cu_seqlens is None else sequence_bounds(op, cu_seqlens, length)
    valid, reset_mask = (None if m is None else m.cpu().flatten() for m in (valid, reset_mask))
    return _find(bounds, valid, reset_mask, tokens.device)


@lru_cache(maxsize=64)
def _uniform(batch: int, length: int, device: torch.device) -> Segments:
    return _find([b * length for b in range(batch + 1)], None, None, device)


def _find(bounds: list[int], valid: Tensor | None, reset: Tensor | None, device: torch.device) -> Segments:
    edges = torch.tensor(bounds)
    sequences = torch.repeat_interleave(torch.arange(len(edges) - 1), edges.diff())  # of every token
    starts = torch.zeros(bounds[-1], dtype=torch.bool)
    starts[edges[:-1][edges.diff() > 0]] = True
    starts = starts if reset is None else starts | reset
    sequence = sequences[starts]
    fresh = torch.zeros(len(sequence), dtype=torch.bool) if reset is None else reset[starts]

    tokens = torch.arange(bounds[-1]) if valid is None else valid.nonzero()[:, 0]
    owner = (starts.cumsum(0) - 1)[tokens]
    lengths = torch.bincount(owner, minlength=len(sequence))
    order = torch.argsort(lengths, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    last = torch.full((len(edges) - 1,), -1)
    ends = sequence != torch.cat([sequence[1:], torch.tensor([-1])])[: len(sequence)]
    last[sequence[ends]] = rank[ends]

    step = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[owner]
    before = tokens[torch.arange(len(tokens)) - (step > 0).long()]
    rows = torch.argsort(step * max(1, len(sequence)) + rank[owner])
    tensors = tokens[rows], before[rows], sequence[order], fresh[order], lengths[order], last
    return Segments(tuple(torch.bincount(step).tolist()), *(x.to(device) for x in tensors))
