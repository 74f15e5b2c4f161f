"""The leaky integrate-and-fire unit on the CPU: loops over time with few calls per token, backward by hand.

Tokens are laid out in rows [R, D] by time first: step t owns a run of rows, one for every sequence that is still
running, longest sequence first. A batch and a packed batch then take the same loops, without padding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds

ALL, NONE = "all", "none"
# Half of what torch splits over threads: waiting for them would cost more than a piece does.
_CACHED_ELEMENTS = 16384


@dataclass
class Rows:
    """Where the tokens of a batch [B, T] or of a packed batch [1, T] stand among the rows.

    Attributes:
        running: how many sequences run at step t; its sum is the number of rows.
        token: [R] row -> token in b * T + t order; None where `batch` says it all.
        sequence: [N] rank -> sequence, longest first; None for the given order.
        batch: B and T of an unpacked batch, else None.
    """

    running: list[int]
    token: Tensor | None
    sequence: Tensor | None
    batch: tuple[int, int] | None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None) -> "Rows":
        """Rows of x [B, T, D]."""
        if cu_seqlens is None:
            return cls([x.shape[0]] * x.shape[1], None, None, (x.shape[0], x.shape[1]))
        bounds = torch.tensor(sequence_bounds("lif", cu_seqlens, x.shape[1]))
        lengths = bounds.diff()
        sequence = torch.argsort(lengths, descending=True, stable=True)
        rank = torch.empty_like(sequence)
        rank[sequence] = torch.arange(len(sequence))
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        step = torch.arange(x.shape[1]) - bounds[:-1][owner]
        token = torch.argsort(step * len(lengths) + rank[owner])
        return cls(torch.bincount(step).tolist(), token.to(x.device), sequence.to(x.device), None)

    def take(self, tokens: Tensor) -> Tensor:
        """[B, T, ...] -> rows [R, ...]."""
        if self.batch is not None:
            return tokens.transpose(0, 1).flatten(0, 1)
        return tokens.flatten(0, 1)[self.token]

    def give(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [R, ...] -> [B, T, ...] in `dtype`."""
        if self.batch is not None:
            tokens = rows.unflatten(0, self.batch[::-1]).transpose(0, 1)
            return tokens.to(dtype, copy=True).contiguous()
        tokens = rows.new_empty(rows.shape, dtype=dtype)
        tokens[self.token] = rows.to(dtype)
        return tokens[None]

    def rank(self, states: Tensor) -> Tensor:
        """States [N, ...] longest sequence first, as a copy."""
        return states.clone() if self.sequence is None else states[self.sequence]

    def unrank(self, states: Tensor) -> Tensor:
        """The inverse of `rank`."""
        if self.sequence is None:
            return states
        given = torch.empty_like(states)
        given[self.sequence] = states
        return given

    def before(self, first: Tensor, rows: Tensor, begin: int, end: int) -> Tensor:
        """What stood one step earlier in the same sequence, for the rows of steps begin to end - 1.

        `rows` are those of steps begin - 1 to end - 1; the initial states `first` [N, D] stand in for step -1.
        """
        if self.batch is not None and begin > 0:
            return rows[: -self.running[end - 1]]
        earlier = rows.split(self.running[max(begin - 1, 0) : end])
        if begin == 0:
            earlier = (first, *earlier)
        return torch.cat([step[:count] for step, count in zip(earlier, self.running[begin:end])])

    def pieces(self, width: int) -> list[tuple[int, int, int, int]]:
        """Runs of steps whose rows of `width` fit a processor's cache: (first step, end, first row, end)."""
        pieces, step, row, rows = [], 0, 0, 0
        for t, count in enumerate(self.running):
            if rows and (rows + count) * width > _CACHED_ELEMENTS:
                pieces.append((step, t, row, row + rows))
                step, row, rows = t, row + rows, 0
            rows += count
        if rows:
            pieces.append((step, len(self.running), row, row + rows))
        return pieces


def surrogate_slope(z: Tensor, surrogate: str, width: float) -> Tensor:
    """Surrogate gradient of the step at distance z from the threshold: peak 1 / width, area 1."""
    u = z / width
    if surrogate == "atan":
        slope = u.mul_(math.pi).square_().add_(1.0).reciprocal_()
    elif surrogate == "sigmoid":
        slope = torch.sigmoid(u.mul_(4.0))
        slope = slope.mul_(1.0 - slope).mul_(4.0)
    elif surrogate == "triangle":
        slope = u.abs_().neg_().add_(1.0).clamp_(min=0.0)
    else:
        slope = (u.abs_() <= 0.5).to(z.dtype)
    return slope.mul_(1.0 / width)


def lif_cpu_forward(
    x: Tensor,
    params: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reset_mask: Tensor | None,
    reset: str,
    unit_gain: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [B, T, D], final state [N, S, D], and for the backward pass history [S, R, D] (or nothing)."""
    layout = Rows.of(x, cu_seqlens)
    states = layout.rank(state)
    fresh = _steps(layout, reset_mask)
    drive = layout.take(x).to(state.dtype)
    run = _run_lif if params.shape[0] == 2 else _run_astro
    spikes, history = run(drive, params, states, layout.running, fresh, reset, unit_gain)
    if not save:
        history = state.new_empty(0)
    return layout.give(spikes, x.dtype), layout.unrank(states), history


def _run_lif(drive, params, states, running, fresh, reset, unit_gain):
    """Advance states [N, 1, D] in place over drive [R, D]; returns spikes and history [1, R, D].

    Spikes are floats, as comparisons and products with bool tensors are slow; s is 0 or 1, so h - s h and h - s V_th
    are exact.
    """
    decay, threshold = params
    membranes = drive * (1.0 - decay) if unit_gain else drive.clone()
    spikes = torch.empty_like(membranes)
    state = states[:, 0]
    kept = torch.empty_like(state)
    for t, (h, s) in enumerate(zip(membranes.split(running), spikes.split(running))):
        v, keep = (state, kept) if len(h) == len(state) else (state[: len(h)], kept[: len(h)])
        if fresh is not None:
            _clear(v, fresh[t])
        torch.mul(v, decay, out=keep)
        h.add_(keep)
        torch.ge(h, threshold, out=s)
        if reset == "hard":
            torch.addcmul(h, h, s, value=-1.0, out=v)
        elif reset == "soft":
            torch.addcmul(h, threshold, s, value=-1.0, out=v)
        else:
            v.copy_(h)
    return spikes, membranes[None]


def _run_astro(drive, params, states, running, fresh, reset, unit_gain):
    """As `_run_lif` for states [N, 3, D]; history [3, R, D] holds membranes, traces, calcium levels."""
    decay, threshold, trace_decay, calcium_decay, sensitivity, threshold_gain, input_gain = params
    history = drive.new_empty(3, *drive.shape)
    spikes = drive.new_empty(drive.shape, dtype=torch.bool)
    gain = 1.0 - decay if unit_gain else None
    parts = zip(drive.split(running), spikes.split(running), *(part.split(running) for part in history))
    for t, (current, s, h, a, c) in enumerate(parts):
        v, trace, calcium = states[: len(h)].unbind(1)
        if fresh is not None:
            _clear(states[: len(h)], fresh[t])
        a.copy_(trace)
        calcium.mul_(calcium_decay).add_((1.0 - calcium_decay) * trace)
        c.copy_(calcium)
        modulation = torch.tanh(sensitivity * calcium)
        level = threshold + threshold_gain * modulation
        current = current * (1.0 + input_gain * modulation)
        torch.mul(v, decay, out=h)
        h.add_(current if gain is None else current.mul_(gain))
        torch.ge(h, level, out=s)
        if reset == "hard":
            v.copy_(h.masked_fill(s, 0.0))
        elif reset == "soft":
            v.copy_(h - level * s)
        else:
            v.copy_(h)
        trace.mul_(trace_decay).add_((1.0 - trace_decay) * s)
    return spikes, history


def lif_cpu_backward(
    dspikes: Tensor,
    dstate: Tensor,
    x: Tensor,
    params: Tensor,
    state: Tensor,
    history: Tensor,
    cu_seqlens: Tensor | None,
    reset_mask: Tensor | None,
    cut: Tensor | None,
    reset: str,
    detach_reset: bool,
    surrogate: str,
    width: float,
    unit_gain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, D], params [P, D], state [N, S, D]; no gradient goes back from where `cut` [B, T]."""
    layout = Rows.of(x, cu_seqlens)
    args = (
        layout.take(dspikes).to(state.dtype),
        layout.rank(dstate),
        layout.take(x).to(state.dtype),
        params,
        layout.rank(state),
        history,
        layout,
        _steps(layout, cut),
        None if reset_mask is None else layout.take(reset_mask)[:, None],
        reset,
        detach_reset,
        surrogate,
        width,
        unit_gain,
    )
    dx, dparams, dstates = (_lif_gradients if params.shape[0] == 2 else _astro_gradients)(*args)
    return layout.give(dx, x.dtype), dparams, layout.unrank(dstates)


def _lif_gradients(
    ds, dstates, x, params, state, history, layout, cuts, fresh, reset, detach, surrogate, width, unit_gain
):
    """Gradients in rows. One recurrence runs backwards: dh_t = ds_t g_t + dv_t m_t, dv_(t-1) = decay dh_t.

    Everything else is done for a piece of time at once, while the piece is in the cache.
    """
    decay, threshold = params
    gain = 1.0 - decay
    dparams = torch.zeros_like(params)
    dx = torch.empty_like(x)
    initial, dv = state[:, 0], dstates[:, 0]
    alone = layout.batch is not None and cuts is not None and all(cut is ALL for cut in cuts)
    for begin, end, row, stop in reversed(layout.pieces(x.shape[1])):
        membranes, dfire = history[0, row:stop], ds[row:stop]
        fired = torch.ge(membranes, threshold, out=torch.empty_like(membranes))
        slope = surrogate_slope(membranes - threshold, surrogate, width)
        if reset == "hard":
            through = 1.0 - fired
        else:
            through = torch.ones_like(membranes)
        if not detach and reset != "none":
            through.addcmul_(membranes if reset == "hard" else threshold, slope, value=-1.0)
        dmembranes, after = dfire * slope, torch.empty_like(membranes)
        running = layout.running[begin:end]
        steps = list(zip(range(begin, end), *(part.split(running) for part in (dmembranes, through, after))))
        if alone:
            # Only the last token hears from a later one: from the final state.
            after.zero_()
            steps = steps[-1:] if end == len(layout.running) else []
        if steps:
            steps[-1][3].copy_(dv[: running[-1]])
        for at in range(len(steps) - 1, -1, -1):
            t, dh, m, dafter = steps[at]
            dh.addcmul_(dafter, m)
            # What the token before hears, where that one's step stands in this piece; else it waits in dv.
            heard = steps[at - 1][3] if at else dv
            count = len(dh)
            if count < len(heard):
                if at:
                    heard[count:] = dv[count : len(heard)]
                heard = heard[:count]
            torch.mul(dh, decay, out=heard)
            if cuts is not None:
                _clear(heard, cuts[t])
        dx[row:stop] = dmembranes * gain if unit_gain else dmembranes

        # What the reset sends to the threshold: through the spike, and in the soft case directly.
        if not detach and reset != "none":
            dfire = dfire - after * (membranes if reset == "hard" else threshold)
        dparams[1] -= slope.mul_(dfire).sum(0)
        if reset == "soft":
            dparams[1] -= after.mul_(fired).sum(0)
        earlier = history[0, row - layout.running[begin - 1] if begin else 0 : stop]
        if reset == "hard":
            earlier = torch.lt(earlier, threshold, out=torch.empty_like(earlier)).mul_(earlier)
        elif reset == "soft":
            taken = torch.ge(earlier, threshold, out=torch.empty_like(earlier)).mul_(threshold)
            earlier = earlier - taken
        earlier = layout.before(initial, earlier, begin, end)
        if fresh is not None:
            earlier = earlier.masked_fill(fresh[row:stop], 0.0)
        if unit_gain:
            earlier = earlier - x[row:stop]
        dparams[0] += dmembranes.mul_(earlier).sum(0)
    return dx, dparams, dstates


def _astro_gradients(
    ds, dstates, x, params, state, history, layout, cuts, fresh, reset, detach, surrogate, width, unit_gain
):
    """As `_lif_gradients` for P = 7, S = 3; everything that needs no recurrence is taken out of the loop."""
    decay, threshold, trace_decay, calcium_decay, sensitivity, threshold_gain, input_gain = params
    membranes, traces, calcium = history
    modulation = torch.tanh(sensitivity * calcium)
    level = threshold + threshold_gain * modulation
    boost = 1.0 + input_gain * modulation
    fired = (membranes >= level).to(membranes.dtype)
    slope = surrogate_slope(membranes - level, surrogate, width)
    gain = 1.0 - decay if unit_gain else torch.ones_like(decay)
    bend = sensitivity * (1.0 - modulation * modulation)

    dmembranes, dlevels, dafter, dtraces, dcalcium = (torch.empty_like(membranes) for _ in range(5))
    running = layout.running
    read = (ds, x, membranes, level, fired, slope, bend)
    written = (dmembranes, dlevels, dafter, dtraces, dcalcium)
    parts = [tensor.split(running) for tensor in (*read, *written)]
    for t in reversed(range(len(running))):
        ds_t, x_t, h, level_t, s, g, bend_t, dh, dlevel, dv_t, da_t, dc_t = (part[t] for part in parts)
        dv, da, dc = dstates[: len(h)].unbind(1)
        dv_t.copy_(dv)
        da_t.copy_(da)
        dfire = ds_t + (1.0 - trace_decay) * da
        if not detach and reset != "none":
            dfire = dfire - dv * (h if reset == "hard" else level_t)
        torch.mul(dfire, g, out=dlevel)
        torch.add(dlevel, dv * (1.0 - s) if reset == "hard" else dv, out=dh)
        dlevel.neg_()
        if reset == "soft":
            dlevel.sub_(s * dv)
        dmodulation = threshold_gain * dlevel + (input_gain * gain) * x_t * dh
        torch.add(dc, dmodulation * bend_t, out=dc_t)
        torch.mul(dh, decay, out=dv)
        da.mul_(trace_decay).add_((1.0 - calcium_decay) * dc_t)
        torch.mul(dc_t, calcium_decay, out=dc)
        if cuts is not None:
            _clear(dstates[: len(h)], cuts[t])

    reached = membranes
    if reset == "hard":
        reached = membranes * (1.0 - fired)
    elif reset == "soft":
        reached = membranes - level * fired
    before = layout.before(state[:, 0], reached, 0, len(running))
    calcium_before = layout.before(state[:, 2], calcium, 0, len(running))
    if fresh is not None:
        before, calcium_before = before.masked_fill(fresh, 0.0), calcium_before.masked_fill(fresh, 0.0)
    ddrive = gain * dmembranes
    dmodulation = threshold_gain * dlevels + input_gain * x * ddrive
    dparams = torch.stack(
        [
            (dmembranes * (before - x * boost if unit_gain else before)).sum(0),
            dlevels.sum(0),
            (dtraces * (traces - fired)).sum(0),
            (dcalcium * (calcium_before - traces)).sum(0),
            (dmodulation * (1.0 - modulation * modulation) * calcium).sum(0),
            (dlevels * modulation).sum(0),
            (ddrive * x * modulation).sum(0),
        ]
    )
    return ddrive * boost, dparams, dstates


def _steps(layout: Rows, mask: Tensor | None) -> list | None:
    """A mask [B, T] as one entry per step: `ALL`, `NONE`, or a tensor [n] where the sequences differ."""
    if mask is None:
        return None
    steps = layout.take(mask).split(layout.running)
    return [ALL if bool(step.all()) else step if bool(step.any()) else NONE for step in steps]


def _clear(states: Tensor, where) -> None:
    """Zero the states [n, ...] that an entry of `_steps` names."""
    if where is ALL:
        states.zero_()
    elif where is not NONE:
        states[where] = 0.0
