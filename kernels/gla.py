"""Gated linear attention: a matrix state with one decay per key channel and token.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        rows of S (key channels) decay before the new outer product is added
    o_t = scale * q_t S_t                     the output sees the updated state

q [B, T, H, K]   k, g [B, T, Hk, K]   v [B, T, Hk, V]   o [B, T, H, V]   state [N, Hk, K, V], float32 or better.
Query head h reads key-value head h // (H / Hk): the state is kept once per key-value head. (Yang et al. 2023; as used
in SpikingBrain, section 1.1.)

Chunks of tokens are computed at once. Within a chunk every exponent is a difference of cumulative gates of a later and
an earlier token, hence never positive: no gate, however strong, overflows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(-30) = 9e-14: below float32's resolution of the state, so a gate this strong is taken for a reset.
GATE_FLOOR = -30.0
CHUNK = 16


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `gla`, one token after the other. Arguments and results as there."""
    scale, bounds, state = _prepare(q, k, v, g, scale, initial_state, cu_seqlens)
    wide, groups = state.dtype, q.shape[2] // k.shape[2]
    outs, finals = [], []
    for n, (begin, end) in enumerate(bounds):
        s = state if cu_seqlens is None else state[n : n + 1]
        for t in range(begin, end):
            decay = torch.where(g[:, t] < GATE_FLOOR, 0.0, g[:, t].to(wide).clamp_min(GATE_FLOOR).exp())
            s = decay[..., None] * s + k[:, t, :, :, None].to(wide) * v[:, t, :, None].to(wide)
            query = q[:, t].to(wide).unflatten(1, (-1, groups))
            outs.append((scale * query @ s).flatten(1, 2))
        finals.append(s)
    out = torch.stack(outs, 1) if outs else q.new_zeros(*q.shape[:3], v.shape[-1])
    return out.to(q.dtype), torch.cat(finals)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention over a sequence.

    Args:
        q: [B, T, H, K]; k: [B, T, Hk, K]; v: [B, T, Hk, V]; H a multiple of Hk.
        g: [B, T, Hk, K], log decays, <= 0. Below `GATE_FLOOR` (-inf included) a gate is a reset: the state of that
            channel is dropped exactly, and g gets no gradient.
        scale: factor on q, default K ** -0.5.
        initial_state: [N, Hk, K, V]; zeros by default.
        cu_seqlens: [N + 1] int, bounds of N sequences packed into a batch of one; else N = B.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [N, Hk, K, V] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
    """
    scale, bounds, state = _prepare(q, k, v, g, scale, initial_state, cu_seqlens)
    if cu_seqlens is None:
        return _chunked(q, k, v, g, scale, state)
    outs, finals = [], []
    for n, (begin, end) in enumerate(bounds):
        piece = slice(begin, end)
        o, final = _chunked(q[:, piece], k[:, piece], v[:, piece], g[:, piece], scale, state[n : n + 1])
        outs.append(o)
        finals.append(final)
    return torch.cat(outs, 1), torch.cat(finals)


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: q [B, H, K], k, g [B, Hk, K], v [B, Hk, V], state [B, Hk, K, V] -> o [B, H, V], new state."""
    wide = state.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decay = torch.where(g < GATE_FLOOR, 0.0, g.to(wide).exp())
    state = decay[..., None] * state + k[..., None].to(wide) * v[:, :, None].to(wide)
    query = q.to(wide).unflatten(1, (k.shape[1], -1))
    return (scale * query @ state).flatten(1, 2).to(q.dtype), state


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    shared, wide, dtype = k.shape[2], state.dtype, q.dtype
    if length == 0:
        return q.new_zeros(batch, 0, heads, v.shape[-1]), state
    pad = -length % CHUNK
    # [chunks, B, Hk, (groups,) C, D]; padding has k = 0 and g = 0 and so changes no state.
    q, k, v, g = (F.pad(t.to(wide), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)) for t in (q, k, v, g))
    q = q.unflatten(3, (shared, -1)).permute(1, 0, 3, 4, 2, 5) * scale
    k, v, g = (t.permute(1, 0, 3, 2, 4) for t in (k, v, g))

    reset = g < GATE_FLOOR
    total = torch.where(reset, 0.0, g).cumsum(-2)
    segment = reset.cumsum(-2)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()[..., None]
    linked = causal & (segment[..., :, None, :] == segment[..., None, :, :])
    between = torch.where(linked, total[..., :, None, :] - total[..., None, :, :], float("-inf")).exp()
    scores = torch.einsum("nbhgik,nbhjk,nbhijk->nbhgij", q, k, between)
    out = scores @ v[:, :, :, None]

    from_start = torch.where(segment == 0, total, float("-inf")).exp()
    last = slice(-1, None)
    to_end = torch.where(segment == segment[..., last, :], total[..., last, :] - total, float("-inf")).exp()
    updates = (k * to_end).transpose(-1, -2) @ v
    keep = from_start[..., -1, :, None]
    query = q * from_start[:, :, :, None]
    parts = []
    for chunk in range(q.shape[0]):
        parts.append(query[chunk] @ state[:, :, None])
        state = keep[chunk] * state + updates[chunk]
    out = out + torch.stack(parts)
    out = out.permute(1, 0, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)
    return out[:, :length].to(dtype), state


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[float, list[tuple[int, int]], Tensor]:
    batch, length, heads, width = q.shape
    shared = k.shape[2]
    if k.shape != (batch, length, shared, width) or g.shape != k.shape or v.shape[:3] != k.shape[:3] or heads % shared:
        raise ValueError(
            "gla expects q [B, T, H, K], k and g [B, T, Hk, K], v [B, T, Hk, V] with H a multiple of Hk; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}."
        )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = [(0, length)]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if batch != 1 or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
            raise ValueError(f"cu_seqlens must rise from 0 to T = {length} over a batch of 1; got {ends}, B = {batch}.")
        bounds = list(zip(ends[:-1], ends[1:]))
    sequences = len(bounds) if cu_seqlens is not None else batch
    shape = (sequences, shared, width, v.shape[-1])
    if initial_state is None:
        initial_state = q.new_zeros(shape, dtype=wide)
    elif initial_state.shape != shape:
        raise ValueError(f"initial_state must be [N, Hk, K, V] = {shape}; got {tuple(initial_state.shape)}.")
    return (width**-0.5 if scale is None else scale), bounds, initial_state.to(wide)
