"""WKV in plain torch: the fast CPU path, forward and backward; `wkv.py` holds the equations.

Chunk by chunk. In a chunk every exponent is taken relative to one `top` per sequence and channel, the largest that
occurs. What remains is a sum with a constant decay, two products and sums per token and no exponential:

    x_t = e^{k_t - top} (v_t, 1)      s_{t+1} = e^w s_t + x_t      y_t = ratio of the two rows of s_t + e^u x_t

Nothing overflows, as no exponent is above 0. What underflows is too small to be seen as long as no token's own term
does: its k must not lie further below `top` than the dtype reaches. If float32 does not hold a chunk, float64 does; if
that does not either, the chunk is halved. The backward pass recomputes a chunk from the state in front of it.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype
from spikelm.kernels.wkv_reference import EMPTY

CHUNK = 32
# Bits of a token's mark.
PADDING, RESET = 1, 2
# How far below `top` a token's exponent may lie. In float32 up to here it is rounded by 1e-6 at most; sums of
# gradients grow as e^REACH.
REACH = {torch.float32: 32.0, torch.float64: 600.0}


def slots(k: Tensor, state: Tensor) -> int:
    """How many places for states in front of chunks there are; see `wkv.chunked_wkv`."""
    return k.shape[0] * k.shape[1] // CHUNK + state.shape[0]


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
    wide = wide_dtype(k, v, w, u, state)
    finals, y = state.to(wide, copy=True), torch.empty_like(v)
    # Not every slot is used, and what is saved should hold no accidental numbers.
    checkpoints = torch.zeros(slots(k, state) if save else 0, *state.shape[1:], dtype=wide, device=k.device)
    w, u = w.to(wide), u.to(wide)
    for rows, chunks in _sequences(k, cu_seqlens):
        carry = finals[rows]
        for places, times in chunks:
            if save:
                checkpoints[places] = carry
            for frame in _frames(k, v, w, u, carry, marks, times):
                y[:, frame.times] = frame.outputs().transpose(0, 1)
                carry = frame.end
        finals[rows] = carry
    return y, finals, checkpoints


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
    wide = final.dtype
    dstates = dfinal.to(wide, copy=True)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dw, du = (torch.zeros(k.shape[2], dtype=wide, device=k.device) for _ in range(2))
    wide_w, wide_u = w.to(wide), u.to(wide)
    for rows, chunks in _sequences(k, cu_seqlens):
        dstate = dstates[rows]
        for places, times in reversed(chunks):
            frames = list(_frames(k, v, wide_w, wide_u, checkpoints[places], marks, times))
            for frame in reversed(frames):
                grads = frame.gradients(dy[:, frame.times].transpose(0, 1), dstate)
                dk[:, frame.times], dv[:, frame.times] = (x.transpose(0, 1) for x in grads[:2])
                dw += grads[2]
                du += grads[3]
                dstate = grads[4]
        dstates[rows] = dstate
    dstates[:, 2] = 0.0
    return dk, dv, dw.to(w.dtype), du.to(u.dtype), dstates


def _sequences(k: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, list[tuple[Tensor, slice]]]]:
    """Rows of the state of every batch of sequences computed at once, and of each chunk slots and span of time."""
    if k.numel() == 0:
        return []
    if cu_seqlens is None:
        bounds, rows = [0, k.shape[1]], [slice(None)]
        firsts = [torch.arange(k.shape[0]) * k.shape[1] // CHUNK + torch.arange(k.shape[0])]
    else:
        bounds = sequence_bounds("wkv", cu_seqlens, k.shape[1])
        rows = [slice(n, n + 1) for n in range(len(bounds) - 1)]
        firsts = [torch.tensor([begin // CHUNK + n]) for n, begin in enumerate(bounds[:-1])]
    return [
        (row, [(first + j, slice(t, min(t + CHUNK, end))) for j, t in enumerate(range(begin, end, CHUNK))])
        for row, first, (begin, end) in zip(rows, firsts, pairwise(bounds))
    ]


def _frames(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, marks: Tensor | None, times: slice
) -> Iterator["_Frame"]:
    """The tokens `times` from `state` on, in pieces (nearly always one) whose exponents one scale holds."""
    logits = k[:, times]
    padding = None if marks is None else (marks[:, times, None] & PADDING).bool()
    if padding is None:
        low, high = logits.amin(1), logits.amax(1)  # on a CPU ten times as fast as aminmax
    else:
        low = logits.masked_fill(padding, math.inf).amin(1)
        high = logits.masked_fill(padding, -math.inf).amax(1)
    top = torch.maximum(state[:, 2], high + u.clamp(min=0.0))
    reach = float((top - low - u.clamp(max=0.0)).max())
    dtype = next((d for d in (state.dtype, torch.float64) if reach < REACH[d]), None)
    if dtype is None and times.stop - times.start > 1:
        middle = (times.start + times.stop) // 2
        for half in (slice(times.start, middle), slice(middle, times.stop)):
            for frame in _frames(k, v, w, u, state, marks, half):
                yield frame
                state = frame.end
        return
    yield _Frame(k, v, w, u, state, marks, times, top, dtype)


class _Frame:
    """Some tokens L of b sequences at one scale. Time comes first, so that a token is one piece of memory.

    Attributes:
        times: where the tokens lie.
        end: [b, 3, C], the state behind them.
        terms: [L, 2, b, C], what each token adds to numerator and denominator, over e^top.
        states: [L + 1, 2, b, C], numerator and denominator in front of each token and at the end, over e^top.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor,
        begin: Tensor,
        marks: Tensor | None,
        times: slice,
        top: Tensor,
        dtype: torch.dtype | None,
    ) -> None:
        """Sum up the tokens `times` behind the state `begin`; dtype None: a single token that is out of reach."""
        lost, dtype = dtype is None, dtype or torch.float64
        self.times, self.length = times, times.stop - times.start
        self.k, self.v = (x[:, times].transpose(0, 1).to(dtype) for x in (k, v))
        self.w, self.top, self.begin = w.to(dtype), top.to(dtype), begin.to(dtype)
        self.decay, self.bonus = torch.exp(self.w), torch.exp(u.to(dtype))
        self.terms = torch.empty(self.length, 2, *top.shape, dtype=dtype, device=k.device)
        weights = torch.sub(self.k, self.top, out=self.terms[:, 1])
        if lost:  # beside a term e^600 times as large it is not seen, but it must not vanish
            weights.clamp_(min=-REACH[dtype])
        torch.mul(weights.exp_(), self.v, out=self.terms[:, 0])
        self.padding: Tensor | None = None  # [L, b, 1], tokens to pass over
        self.fresh: dict[int, Tensor] = {}  # token -> [b, 1], sequences with a reset in front of it
        self.decays = [self.decay] * self.length
        if marks is not None:
            self._read(marks[:, times].t()[..., None])
        self._sum_up()
        self.end = self._state_behind(begin.dtype)

    def _read(self, marks: Tensor) -> None:
        """What the marks [L, b, 1] say."""
        self.padding, fresh = (marks & PADDING).bool(), (marks & RESET).bool()
        self.terms.masked_fill_(self.padding[:, None], 0.0)
        self.decays = list(torch.where(self.padding, 1.0, self.decay).unbind(0))
        self.fresh = {t: fresh[t] for t in fresh.flatten(1).any(1).nonzero().flatten().tolist()}

    def _sum_up(self) -> None:
        self.states = self.terms.new_empty(self.length + 1, *self.terms.shape[1:])
        scale = torch.exp(self.begin[:, 2] - self.top)
        torch.mul(self.begin[:, :2].transpose(0, 1), scale, out=self.states[0])
        states = self.states.unbind(0)
        for t, (term, decay) in enumerate(zip(self.terms.unbind(0), self.decays)):
            if t in self.fresh:
                states[t].masked_fill_(self.fresh[t], 0.0)
            torch.addcmul(term, states[t], decay, out=states[t + 1])

    def _state_behind(self, dtype: torch.dtype) -> Tensor:
        """[b, 3, C], at the scale of its largest term."""
        ages = torch.arange(self.length, -1, -1, device=self.k.device)[:, None, None]  # decays behind begin and tokens
        gone = None
        if self.padding is not None:
            ages = (~self.padding).long().flip(0).cumsum(0)
            ages = torch.cat([ages.flip(0), torch.zeros_like(ages[:1])])
            gone = torch.zeros_like(ages, dtype=torch.bool)
            gone[1:] = self.padding
            for t, rows in self.fresh.items():
                gone[: t + 1] |= rows
        exponents = torch.cat([self.begin[None, :, 2], self.k]).addcmul_(ages.to(self.w.dtype), self.w)
        if gone is not None:
            exponents.masked_fill_(gone, EMPTY)
        largest = exponents.amax(0).to(dtype)
        # Dividing by the rounded scale keeps p e^o and q e^o free of its rounding.
        sums = self.states[-1].transpose(0, 1) * self._over(largest)
        return torch.cat([sums.to(dtype), largest[:, None]], 1)

    def _over(self, exponent: Tensor) -> Tensor:
        """e^top over e^exponent [b, 1, C]; a state that is empty at the end has no use for it."""
        return torch.exp((self.top - exponent).clamp(max=REACH[self.top.dtype]))[:, None]

    def _ratio(self) -> tuple[Tensor, Tensor]:
        """y and the denominators [L, b, C]."""
        sums = torch.addcmul(self.states[:-1], self.terms, self.bonus)
        return sums[:, 0] / sums[:, 1], sums[:, 1]

    def outputs(self) -> Tensor:
        """y [L, b, C]."""
        y = self._ratio()[0]
        return y if self.padding is None else y.masked_fill_(self.padding, 0.0)

    def gradients(self, dy: Tensor, dend: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of k and v [L, b, C], w and u [C], and the state in front [b, 3, C], from those of y and `end`."""
        y, denominators = self._ratio()
        direct = torch.empty_like(self.terms)  # of the sums that y is the ratio of
        torch.div(dy, denominators, out=direct[:, 0])
        torch.mul(direct[:, 0], y, out=direct[:, 1]).neg_()
        if self.padding is not None:
            direct.masked_fill_(self.padding[:, None], 0.0)

        grads = torch.empty_like(self.states)
        torch.mul(dend[:, :2], self._over(self.end[:, 2]), out=grads[-1].transpose(0, 1))
        steps = grads.unbind(0)
        for t in reversed(range(self.length)):
            torch.addcmul(direct[t], steps[t + 1], self.decays[t], out=steps[t])
            if t in self.fresh:
                steps[t].masked_fill_(self.fresh[t], 0.0)

        past, weights = self.states[:-1], self.terms[:, 1]
        by_decay = grads[1:] * past
        direct_weights = direct[:, 0] * weights * self.bonus
        # v - y as (Z v - S) / D: where a token outweighs its past, y is v but for a rounding error.
        by_bonus = (past[:, 1] * self.v).sub_(past[:, 0]).mul_(direct_weights).div_(denominators)
        dv = torch.addcmul(direct_weights, weights, grads[1:, 0])
        dk = torch.addcmul(grads[1:, 1], grads[1:, 0], self.v).mul_(weights).add_(by_bonus)
        if self.padding is not None:
            by_decay.masked_fill_(self.padding[:, None], 0.0)
            by_bonus.masked_fill_(self.padding, 0.0)
            dk.masked_fill_(self.padding, 0.0)
        dw, du = by_decay.sum((0, 1, 2)) * self.decay, by_bonus.sum((0, 1))
        scale = torch.exp(self.begin[:, 2] - self.top)[:, None]
        dbegin = torch.cat([grads[0].transpose(0, 1) * scale, torch.zeros_like(scale)], 1)
        return dk, dv, dw, du, dbegin.to(dend.dtype)
