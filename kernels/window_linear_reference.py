"""The definition of `window_linear`, in plain torch and O(T^2); the equations are in `window_linear.py`."""

from itertools import pairwise

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype
from spikelm.kernels.window_linear_state import EPSILON, WindowState, check_window_linear, empty_state


def window_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: WindowState | None = None,
    valid: Tensor | None = None,
    reset_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, WindowState]:
    """The definition of `window_linear`: all pairs of tokens of a sequence. Arguments and results as there."""
    check_window_linear(q, k, v, fq, fk, gamma, window, initial_state, valid, reset_mask, cu_seqlens)
    kept = window - 1
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spans = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    if cu_seqlens is not None:
        spans = [(0, *span) for span in pairwise(sequence_bounds("window_linear", cu_seqlens, q.shape[1]))]
    state = empty_state(k, v, fk, len(spans), window) if initial_state is None else initial_state
    wide = wide_dtype(q, k, v, fq, fk, gamma, *state[:5])
    state = state._replace(sums=state.sums.to(wide), norm=state.norm.to(wide))
    o, finals = q.new_zeros(*q.shape[:3], v.shape[-1]), []
    for n, (row, begin, end) in enumerate(spans):
        real = torch.arange(begin, end, device=q.device)
        real = real if valid is None else real[valid[row, begin:end]]
        document = torch.zeros_like(real) if reset_mask is None else reset_mask[row, real].long().cumsum(0)
        # In front of the tokens stand those that the state keeps, from the oldest to the newest, of document 0.
        old = int(state.length[n].clamp_max(kept))
        slots = (state.length[n] - old + torch.arange(old, device=q.device)) % max(kept, 1)
        document = torch.cat([document.new_zeros(old), document])
        tokens = [
            torch.cat([buffer[n][:, slots].transpose(0, 1), x[row, real]]) for buffer, x in zip(state[:3], (k, v, fk))
        ]
        finals.append(_final(state, n, tokens, document, kept))
        if real.numel():
            query, asked = q[row, real].to(wide) * scale, fq[row, real].to(wide)
            keys, values, features = (x.to(wide) for x in tokens)
            sums = state.sums[n], state.norm[n]
            out = _outputs(query, asked, keys, values, features, gamma.to(wide), *sums, document, window)
            o = o.index_put((torch.tensor(row, device=q.device), real), out.to(q.dtype))
    return o, WindowState(*map(torch.stack, zip(*finals)))


def _outputs(
    q: Tensor,
    fq: Tensor,
    k: Tensor,
    v: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor,
    norm: Tensor,
    document: Tensor,
    window: int,
) -> Tensor:
    """Outputs [T, H, V] of queries that are the last T of L tokens, which belong to `document` [L]."""
    group = q.shape[1] // k.shape[1]
    k, v, fk = (x.repeat_interleave(group, 1) for x in (k, v, fk))
    sums, norm = (x.repeat_interleave(group, 0) for x in (sums, norm))
    token = torch.arange(k.shape[0], device=k.device)
    distance = (token[:, None] - token)[-q.shape[0] :]
    same = (document[:, None] == document)[-q.shape[0] :]
    inside, before = same & (distance >= 0) & (distance < window), same & (distance >= window)
    seen = fq * (document[-q.shape[0] :] == 0)[:, None, None]  # by queries of document 0, the state's

    scores = torch.einsum("thd,jhd->htj", q, k).masked_fill(~inside, -torch.inf)
    weights = gamma[:, None, None] * (scores - scores.max(-1, keepdim=True).values).exp()
    weights = weights + torch.einsum("thf,jhf->htj", fq, fk) * before
    num = torch.einsum("htj,jhv->thv", weights, v) + torch.einsum("thf,hfv->thv", seen, sums)
    den = weights.sum(-1).T + torch.einsum("thf,hf->th", seen, norm)
    return num / den.clamp_min(EPSILON).unsqueeze(-1)


def _final(state: WindowState, n: int, tokens: list[Tensor], document: Tensor, kept: int) -> tuple[Tensor, ...]:
    """State n behind k, v, fk [L, Hk, C], whose tokens belong to the numbered documents; 0 is that of the state."""
    last = int(document.max()) if document.numel() else 0
    keys, values, features = (x[document == last] for x in tokens)
    count = keys.shape[0]
    before = state.length[n] - state.length[n].clamp_max(kept) if last == 0 else torch.zeros_like(state.length[n])
    sums, norm = (x[n] if last == 0 else torch.zeros_like(x[n]) for x in (state.sums, state.norm))
    gone = max(count - kept, 0)
    sums = sums + torch.einsum("jhf,jhv->hfv", features[:gone].to(sums.dtype), values[:gone].to(sums.dtype))
    norm = norm + features[:gone].to(norm.dtype).sum(0)
    slots = (before + torch.arange(gone, count, device=document.device)) % max(kept, 1)
    buffers = (x.new_zeros(kept, *x.shape[1:]).index_put((slots,), x[gone:]) for x in (keys, values, features))
    return *(x.transpose(0, 1) for x in buffers), sums, norm, before + count
