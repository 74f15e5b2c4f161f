"""The event-based GRU in plain torch: the CPU path, forward and backward. `kernels/egru.py` holds the equations.

Tokens stand in rows by step, one row per segment that runs (`segments.py`), and heads come first: [heads, rows, ...].
Forward, a step is one product per head (two in the "paper" form) and a few calls on preallocated memory. Backward, a
step needs even less, because it is linear in the two gradients Y (of y_t) and K (of c_t) that arrive: with u the share
of the new state and m the zoneout mask,

    dp = K P1 + Y P2        K_{t-1} = dp (1 - m u)        dq = dp G        Y_{t-1} = dy_{t-1} + dq R^T

where P1, P2 and the gate factors G follow from p alone. They are found for a piece of time at once, small enough to
stay in a processor's cache, with one matrix product per head; the gradient of R is one product per head and piece too.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.segments import Segments
from spikelm.kernels.weight_rows import Rows as ByInput

# Of one tensor of H channels: a dozen of them are in use, and three times as wide ones.
_CACHED_ELEMENTS = 1 << 15


@dataclass
class Cell:
    """Parameters by head, in the dtype of the arithmetic.

    Attributes:
        weight: [heads, D, 3D].
        bias: [heads, 1, 3D], or None.
        threshold: [heads, 1, D].
        evnn: the form.
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor
    evnn: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, threshold: Tensor, evnn: bool) -> "Cell":
        """Cell from `weight` [heads, D, 3D], which has the dtype of the arithmetic, and parameters as in `egru`."""
        heads, width = weight.shape[:2]
        bias = weight.new_zeros(heads, 1, 3 * width) if bias is None else bias.to(weight.dtype)
        return cls(weight, bias.view(heads, 1, -1), threshold.to(weight.dtype).view(heads, 1, -1), evnn)

    def step(self, a: Tensor, c: Tensor, y: Tensor, mask: Tensor | float, out: Tensor | None = None) -> Tensor:
        """State before the reset [heads, n, D] from a [heads, n, 3D], c and y [heads, n, D]."""
        width = y.shape[2]
        if self.evnn:
            q = self.recur(y)
            z, r, q_g = q.split(width, 2)
            q[..., : 2 * width].add_(a[..., : 2 * width]).sigmoid_()
            g = torch.addcmul(a[..., 2 * width :], r, q_g).tanh_()
            new = torch.lerp(g, c, z, out=out)
        else:
            gates = torch.baddbmm(a[..., : 2 * width], y, self.weight[..., : 2 * width]).sigmoid_()
            u, r = gates.split(width, 2)
            z = torch.baddbmm(a[..., 2 * width :], r.mul_(y), self.weight[..., 2 * width :]).tanh_()
            new = torch.lerp(c, z, u, out=out).sub_(y)
        if isinstance(mask, float) and mask == 1.0:
            return new
        return torch.lerp(c, new, mask, out=new)

    def recur(self, y: Tensor) -> Tensor:
        """y R + bias: [heads, n, D] -> [heads, n, 3D]."""
        return torch.baddbmm(self.bias, y, self.weight)

    def products(self, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the gates of all rows add to a [heads, r, 3D], and what the last block of the weights multiplied."""
        if self.evnn:
            return self.recur(y), y
        q, width = torch.bmm(y, self.weight), y.shape[2]
        seen = torch.sigmoid(a[..., width : 2 * width] + q[..., width : 2 * width]).mul_(y)
        q[..., 2 * width :] = torch.bmm(seen, self.weight[..., 2 * width :])
        return q, seen

    def fire(self, before: Tensor, c: Tensor, y: Tensor) -> None:
        """Write y and c of the state before the reset [heads, n, D]."""
        torch.gt(before, self.threshold, out=y)
        if self.evnn:
            torch.addcmul(before, y, self.threshold, value=-1.0, out=c)
        else:
            c.copy_(before)
        y.mul_(before)


class EventCell(Cell):
    """A cell with one head that reads the rows of its weights only where y has an event; for few rows.

    Where more than a quarter of the units have one, in any row, the dense product is faster, and is taken.
    """

    def recur(self, y: Tensor) -> Tensor:
        """See `Cell`."""
        inputs, outputs = self.weight.shape[1:]
        if torch.compiler.is_compiling() or 4 * int(y[0].any(0).count_nonzero()) > inputs:
            return super().recur(y)
        format = "fp64" if self.weight.dtype == torch.float64 else "fp32"
        rows = ByInput(format, self.weight[0], None, inputs, inputs, outputs)
        return event_linear(y[0], rows, self.bias[0, 0])[None]


@dataclass
class Rows:
    """Tokens [B, T, heads * K] as rows [heads, R, K] by step, and back."""

    segments: Segments
    heads: int

    def take(self, x: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [heads, r, K] of the given tokens of x."""
        return x.view(-1, x.shape[2] // self.heads)[self._places(tokens)].to(dtype)

    def give(self, rows: Tensor, tokens: Tensor, x: Tensor) -> None:
        """Write the rows [heads, r, K] of these tokens to x."""
        x.view(-1, rows.shape[2])[self._places(tokens)] = rows.to(x.dtype)

    def pieces(self, channels: int):
        """Runs of steps whose rows fit a cache: (first row, end, rows of each step)."""
        pieces: list[list[int]] = []
        for count in self.segments.running:
            if not pieces or (sum(pieces[-1]) + count) * channels > _CACHED_ELEMENTS:
                pieces.append([])
            pieces[-1].append(count)
        ends = list(accumulate(map(sum, pieces)))
        return list(zip([0, *ends], ends, pieces))

    def _places(self, tokens: Tensor) -> Tensor:
        return tokens * self.heads + torch.arange(self.heads, device=tokens.device)[:, None]


def _by_head(states: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """c and y, or their gradients, [heads, S, D] each, from [S, 2, H]; copies."""
    c, y = states.unflatten(2, (heads, -1)).permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)
    return c, y


def _by_segment(c: Tensor, y: Tensor) -> Tensor:
    """The inverse of `_by_head`."""
    return torch.stack([c, y]).permute(2, 0, 1, 3).flatten(2)


def previous(cell: Cell, rows: Rows, before: Tensor, first: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """c and y [heads, r, D] in front of rows `begin` to `end`, from the states before the reset and the first ones."""
    earlier = rows.take(before, rows.segments.before[begin:end], before.dtype)
    c, y = torch.empty_like(earlier), torch.empty_like(earlier)
    cell.fire(earlier, c, y)
    if begin == 0 and end > 0:
        n = rows.segments.running[0]
        for state, start in zip((c, y), _by_head(first, rows.heads)):
            state[:, :n] = start[:, :n]
    return c, y


def forward(
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    first: Tensor,
    mask: Tensor | None,
    segments: Segments,
    evnn: bool,
    keep: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Events [B, T, H], states behind every segment [S, 2, H], states before the reset [B, T, H].

    `first` [S, 2, H] holds the states in front of every segment, in the dtype of the arithmetic; the other arguments
    are as in `egru`, checked and contiguous.
    """
    heads, width = weight.shape[:2]
    cell = Cell.of(weight.to(first.dtype), bias, threshold, evnn)
    rows = Rows(segments, heads)
    events = segments.blank((*a.shape[:2], heads * width), a.dtype, a.device)
    states = segments.blank((*a.shape[:2], heads * width), first.dtype, a.device)
    c, y = _by_head(first, heads)
    for begin, end, counts in rows.pieces(heads * width):
        tokens = segments.tokens[begin:end]
        inputs = rows.take(a, tokens, first.dtype)
        before = torch.empty((heads, end - begin, width), dtype=first.dtype, device=a.device)
        masks = [keep] * len(counts) if mask is None else rows.take(mask, tokens, first.dtype).split(counts, 1)
        for n, a_t, m_t, p_t in zip(counts, inputs.split(counts, 1), masks, before.split(counts, 1)):
            c_t, y_t = c[:, :n], y[:, :n]
            cell.fire(cell.step(a_t, c_t, y_t, m_t, p_t), c_t, y_t)
        rows.give(before, tokens, states)
        rows.give(before * (before > cell.threshold), tokens, events)
    return events, _by_segment(c, y), states


def backward(
    dy: Tensor | None,
    dends: Tensor,
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    first: Tensor,
    before: Tensor,
    mask: Tensor | None,
    segments: Segments,
    evnn: bool,
    keep: float,
    dampening: float,
    support: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a [B, T, 3H], weight, threshold, bias [3H] and `first` [S, 2, H].

    `dends` [S, 2, H] are the gradients of the states behind every segment.
    """
    wide, (heads, width) = first.dtype, weight.shape[:2]
    cell, rows = Cell.of(weight.to(wide), bias, threshold, evnn), Rows(segments, heads)
    da, dweight = segments.blank(a.shape, a.dtype, a.device), torch.zeros_like(cell.weight)
    dbias, dthreshold = torch.zeros_like(cell.bias), torch.zeros_like(cell.threshold)
    dc, carried = _by_head(dends, heads)  # K and what is carried to Y, for every segment
    for begin, end, counts in reversed(rows.pieces(heads * width)):
        tokens = segments.tokens[begin:end]
        inputs, p = rows.take(a, tokens, wide), rows.take(before, tokens, wide)
        c, y = previous(cell, rows, before, first, begin, end)
        m = keep if mask is None else rows.take(mask, tokens, wide)
        grads = torch.zeros_like(p) if dy is None else rows.take(dy, tokens, wide)

        fired = (p > cell.threshold).to(wide)
        slope = (p - cell.threshold).abs_().mul_(-support).add_(1.0).clamp_(min=0.0).mul_(dampening)
        at_y, at_c = p * slope, slope * cell.threshold  # what the event gets of Y and K
        by_y, by_c = fired + at_y, 1.0 - at_c
        run = _evnn_piece if evnn else _paper_piece
        grad_a, grad_q, left, dc_rows = run(cell, inputs, c, y, m, grads, by_c, by_y, dc, carried, counts)
        rows.give(grad_a, tokens, da)
        dthreshold -= (grads * at_y).sum(1, keepdim=True)
        if evnn:
            dthreshold -= (dc_rows * (fired - at_c)).sum(1, keepdim=True)
            dbias += grad_q.sum(1, keepdim=True)
        for columns, x in left:
            dweight[..., columns].baddbmm_(x.mT, grad_q[..., columns])
    return da, dweight, dthreshold.flatten(), dbias.flatten(), _by_segment(dc, carried)


def _evnn_piece(cell, a, c, y, m, grads, by_c, by_y, dc, carried, counts):
    """Gradients of a and q [heads, r, 3D]; factors of the gradient of R by columns; K of all rows.

    c and y are the states in front of every row. Overwrites `grads`, to which it adds what is carried, `dc` and
    `carried`.
    """
    width = c.shape[2]
    q = torch.baddbmm(cell.bias, y, cell.weight)
    z, r, q_g = q.split(width, 2)
    q[..., : 2 * width].add_(a[..., : 2 * width]).sigmoid_()
    g = torch.addcmul(a[..., 2 * width :], r, q_g).tanh_()
    new = (1.0 - z).mul_(m)
    stays = 1.0 - new
    at_g = new * torch.addcmul(torch.ones_like(g), g, g, value=-1.0)
    factors = torch.empty_like(q)
    torch.mul((c - g).mul_(m), z, out=factors[..., :width]).mul_(1.0 - z)
    torch.mul(at_g, r, out=factors[..., 2 * width :])
    torch.mul(factors[..., 2 * width :], q_g, out=factors[..., width : 2 * width]).mul_(1.0 - r)

    back, dp, dc_rows = cell.weight.mT, torch.empty_like(c), torch.empty_like(c)
    by_step = zip(*(x.split(counts, 1) for x in (grads, by_c, by_y, stays, factors, dp, dc_rows)), counts)
    for y_t, c_t, p_t, stays_t, factors_t, dp_t, k_t, n in reversed(list(by_step)):
        k_t.copy_(dc[:, :n])
        y_t.add_(carried[:, :n])
        torch.mul(y_t, p_t, out=dp_t).addcmul_(k_t, c_t)
        torch.mul(dp_t, stays_t, out=dc[:, :n])
        factors_t.unflatten(2, (3, width)).mul_(dp_t.unsqueeze(2))
        torch.bmm(factors_t, back, out=carried[:, :n])
    grad_a = torch.cat([factors[..., : 2 * width], dp.mul_(at_g)], 2)
    return grad_a, factors, [(slice(None), y)], dc_rows


def _paper_piece(cell, a, c, y, m, grads, by_c, by_y, dc, carried, counts):
    """As `_evnn_piece`; the gradients of a and of the products are the same here."""
    width = c.shape[2]
    outer, inner = slice(0, 2 * width), slice(2 * width, None)
    gates = torch.baddbmm(a[..., outer], y, cell.weight[..., outer]).sigmoid_()
    u, r = gates.split(width, 2)
    seen = r * y
    z = torch.baddbmm(a[..., inner], seen, cell.weight[..., inner]).tanh_()
    new = u * m
    stays = 1.0 - new
    at_r = seen * (1.0 - r)
    factors = torch.empty_like(a)
    torch.mul((z - c).mul_(m), u, out=factors[..., :width]).mul_(1.0 - u)
    torch.mul(new, torch.addcmul(torch.ones_like(z), z, z, value=-1.0), out=factors[..., inner])

    back_outer, back_inner = cell.weight[..., outer].mT, cell.weight[..., inner].mT
    dc_rows = torch.empty_like(c)
    masks = [m] * len(counts) if isinstance(m, float) else m.split(counts, 1)
    by_step = zip(*(x.split(counts, 1) for x in (grads, by_y, stays, factors, r, at_r)), masks, counts)
    for y_t, p_t, stays_t, factors_t, r_t, at_r_t, m_t, n in reversed(list(by_step)):
        y_t.add_(carried[:, :n])
        dp_t = torch.addcmul(dc[:, :n], y_t, p_t)
        torch.mul(dp_t, stays_t, out=dc[:, :n])
        du, dr, dz = factors_t.split(width, 2)
        du.mul_(dp_t)
        dseen = torch.bmm(dz.mul_(dp_t), back_inner)
        torch.mul(dseen, at_r_t, out=dr)
        torch.baddbmm(dseen.mul_(r_t).sub_(dp_t.mul_(m_t)), factors_t[..., outer], back_outer, out=carried[:, :n])
    return factors, factors, [(outer, y), (inner, seen)], dc_rows
