"""A softmax window and linear attention over everything before it, under one normaliser.

    num_t = gamma * sum_{i in window} exp(s_ti - c_t) v_i + sum_{i before} (fq_t . fk_i) v_i    s_ti = scale * q_t . k_i
    den_t = gamma * sum_{i in window} exp(s_ti - c_t)     + sum_{i before} (fq_t . fk_i)        c_t = max_window s_ti
    o_t   = num_t / max(den_t, EPSILON)                  the window: the last `window` tokens, t among them

q [B, T, H, D]   k [B, T, Hk, D]   v [B, T, Hk, V]   features fq [B, T, H, F], fk [B, T, Hk, F], >= 0   gamma [H], > 0
o [B, T, H, V]. Query head h reads key-value head h // (H / Hk). This is the attention of LoLCATs (Zhang et al. 2024,
arXiv 2410.10254); its feature maps are in `feature_maps.py`.

c_t is part of the function, not just a guard against overflow: it is subtracted in one of two terms that share a
normaliser, so it weighs the window against the past, and gradients flow through it. Where several scores are the
maximum, the first of them gets that gradient. (Published code splits it among them; there is no derivative there.)

One registered op, `spikelm::window_linear`, runs `window_linear_torch.py` on the CPU and in float64, and the kernels of
`window_linear_triton.py` otherwise. State, padding and the stream that the op sees: `window_linear_state.py`.
"""

import torch
from torch import Tensor

from spikelm.kernels import window_linear_torch
from spikelm.kernels.runtime import contiguous, sequence_bounds, use_triton, wide_dtype, without_autocast
from spikelm.kernels.window_linear_state import (
    EPSILON,
    WindowState,
    by_age,
    check_window_linear,
    cut_sequences,
    empty_state,
    last_state,
    make_stream,
)

# Widths D, F and V beyond which a GPU takes the torch path: the kernels hold whole rows.
WIDEST = 128


def window_linear(
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
    """Windowed softmax and linear attention over a sequence.

    Time is counted in real tokens: padding takes no place in a window, enters no sum, and its output is zero.

    Args:
        q: [B, T, H, D], with k [B, T, Hk, D], v [B, T, Hk, V] and H a multiple of Hk. Any floating dtype each; the
            arithmetic is float32, or float64 if any floating argument is float64.
        k: keys, see q.
        v: values, see q.
        fq: [B, T, H, F], features of the queries, >= 0.
        fk: [B, T, Hk, F], features of the keys, >= 0.
        gamma: [H], factor on the window, > 0. With 0, tokens that have nothing before their window give 0.
        window: tokens of the window, >= 1, the query's own among them.
        scale: factor on q . k, default D ** -0.5.
        initial_state: what an earlier call returned; nothing by default.
        valid: [B, T] bool, False for padding, wherever it stands; all real by default.
        reset_mask: [B, T] bool, True where a document begins: nothing before it is seen, the state neither. Ignored at
            padding.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one, some perhaps empty; without it
            N = B. Its values and those of `reset_mask` are read, which waits for a GPU.

    Returns:
        o [B, T, H, V] in the dtype of q, and the state behind the last tokens. Both carry gradients to all floating
        arguments, the initial state's among them; second derivatives are not defined.

    Raises:
        ValueError: shapes that do not fit, a window below 1, or bounds that do not rise from 0 to T.
    """
    check_window_linear(q, k, v, fq, fk, gamma, window, initial_state, valid, reset_mask, cu_seqlens)
    scale, kept = q.shape[-1] ** -0.5 if scale is None else float(scale), window - 1
    if initial_state is None and valid is None:
        outputs = windowed_linear(q, k, v, fq, fk, gamma, None, None, cu_seqlens, reset_mask, window, scale)
        bounds = torch.arange(q.shape[0] + 1, device=q.device) * q.shape[1] if cu_seqlens is None else cu_seqlens
        flat = None if reset_mask is None else reset_mask.flatten()
        tokens = k.flatten(0, 1), v.flatten(0, 1), fk.flatten(0, 1)
        return outputs[0], last_state(tokens, bounds.long(), flat, None, kept, *outputs[1:3])

    if cu_seqlens is not None and not torch.compiler.is_compiling():
        sequence_bounds("window_linear", cu_seqlens, q.shape[1])
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = empty_state(k, v, fk, sequences, window) if initial_state is None else initial_state
    stream = make_stream(state.length, valid, reset_mask, cu_seqlens, q.shape[:2], kept)
    keys, values, features = (
        stream.gather(x, by_age(slots, state.length)) for x, slots in zip((k, v, fk), (state[:3]))
    )
    sums, norm = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (state.sums, state.norm))
    # Kept tokens have no query any more; zeros stand in for it.
    tensors = stream.gather(q), keys, values, stream.gather(fq), features, gamma
    o, sums, norm, _, _ = windowed_linear(*tensors, sums, norm, stream.bounds, stream.reset, window, scale)
    gone = state.length - state.length.clamp_max(kept)
    final = last_state(
        (keys[0], values[0], features[0]), stream.bounds[:-1], stream.reset, gone, kept, sums[:-1], norm[:-1]
    )
    return o[0, stream.place].view(*q.shape[:3], v.shape[-1]), final


@without_autocast
def window_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    state: WindowState,
    scale: float | None = None,
) -> tuple[Tensor, WindowState]:
    """One token of `window_linear`, for decoding: plain torch, nothing registered, ordinary autograd if asked for.

    Args:
        q: [N, H, D], with k [N, Hk, D], v [N, Hk, V], fq [N, H, F], fk [N, Hk, F], gamma [H].
        k: keys, see q.
        v: values, see q.
        fq: features of the query, see q.
        fk: features of the key, see q.
        gamma: factor on the window.
        state: as `window_linear` or `empty_state` returns it; the window is read from its shape.
        scale: factor on q . k, default D ** -0.5.

    Returns:
        o [N, H, V] in the dtype of q, and the new state; `state` itself is left as it is.
    """
    wide, shared, kept = state.sums.dtype, k.shape[1], state.keys.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slots = torch.arange(kept + 1, device=k.device)
    keys, values = (torch.cat([old, new.unsqueeze(2)], 2).to(wide) for old, new in ((state.keys, k), (state.values, v)))
    unwritten = (slots >= state.length[:, None]) & (slots < kept)  # the last one is the token itself
    query, fquery = (x.to(wide).unflatten(1, (shared, -1)) for x in (q, fq))  # [N, Hk, G, D]
    scores = (query * scale @ keys.mT).masked_fill(unwritten[:, None, None], -torch.inf)
    weights = gamma.to(wide).view(shared, -1, 1) * (scores - scores.max(-1, keepdim=True).values).exp()
    num = weights @ values + fquery @ state.sums
    den = weights.sum(-1, keepdim=True) + fquery @ state.norm.unsqueeze(-1)
    o = (num / den.clamp_min(EPSILON)).flatten(1, 2).to(q.dtype)

    if kept:
        slot = state.length % kept
        index = slot[:, None, None, None]
        full = (state.length >= kept)[:, None, None]
        leaving = [x.gather(2, index.expand(-1, shared, 1, x.shape[3]))[:, :, 0] for x in state[1:3]]
        leaving_v, leaving_f = leaving[0].to(wide), torch.where(full, leaving[1].to(wide), 0.0)
        here = (slots[:-1] == slot[:, None])[:, None, :, None]
        buffers = [torch.where(here, new.unsqueeze(2).to(x.dtype), x) for x, new in zip(state[:3], (k, v, fk))]
    else:
        leaving_v, leaving_f, buffers = v.to(wide), fk.to(wide), list(state[:3])
    sums = torch.addcmul(state.sums, leaving_f.unsqueeze(-1), leaving_v.unsqueeze(-2))
    return o, WindowState(*buffers, sums, state.norm + leaving_f, state.length + 1)


@torch.library.custom_op("spikelm::window_linear", mutates_args=())
@without_autocast
def windowed_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor | None,
    norm: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered op: N sequences, each with sums [N, Hk, F, V] and norm [N, Hk, F] of what came before it.

    Returns o [B, T, H, V], the last sums and norm, and for the backward pass, without gradients: the pair c, den
    [B, T, H, 2] and how many tokens back the maximum c lies, [B, T, H] int32.
    """
    q, k, v, fq, fk, gamma, sums, norm = contiguous(q, k, v, fq, fk, gamma, sums, norm)
    tensors = [x.flatten(0, 1) for x in (q, k, v, fq, fk)]
    parts = cut_sequences(cu_seqlens, reset, q.shape[0], q.shape[1])
    wide = wide_dtype(q, k, v, fq, fk, gamma, sums, norm)
    sums = parts.enter(sums, (*fk.shape[2:], v.shape[-1]), wide, q.device)
    norm = parts.enter(norm, fk.shape[2:], wide, q.device)
    path = _path(*tensors, gamma, sums, norm)
    o, sums, norm, weight, peak = path.forward(*tensors, gamma, sums, norm, parts.bounds, window, scale)
    o, weight, peak = (x.unflatten(0, q.shape[:2]) for x in (o, weight, peak))
    return o, parts.leave(sums), parts.leave(norm), weight, peak


@windowed_linear.register_fake
def _(q, k, v, fq, fk, gamma, sums, norm, cu_seqlens, reset, window, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = wide_dtype(q, k, v, fq, fk, gamma, sums, norm)
    return (
        q.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(sequences, *fk.shape[2:], v.shape[-1], dtype=wide),
        q.new_empty(sequences, *fk.shape[2:], dtype=wide),
        q.new_empty(*q.shape[:3], 2, dtype=wide),
        q.new_empty(q.shape[:3], dtype=torch.int32),
    )


@torch.library.custom_op("spikelm::window_linear_backward", mutates_args=())
@without_autocast
def windowed_linear_backward(
    do: Tensor | None,
    dsums: Tensor | None,
    dnorm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor | None,
    norm: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    o: Tensor,
    weight: Tensor,
    peak: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, fq, fk, gamma and of the first sums and norms."""
    do = torch.zeros_like(o) if do is None else do
    q, k, v, fq, fk, gamma, sums, norm = contiguous(q, k, v, fq, fk, gamma, sums, norm)
    tensors = [x.flatten(0, 1) for x in (q, k, v, fq, fk)]
    saved = [x.contiguous().flatten(0, 1) for x in (do, o, weight, peak)]
    parts = cut_sequences(cu_seqlens, reset, q.shape[0], q.shape[1])
    wide = wide_dtype(q, k, v, fq, fk, gamma, sums, norm)
    shapes = (*fk.shape[2:], v.shape[-1]), fk.shape[2:]
    firsts = [parts.enter(x, shape, wide, q.device) for x, shape in zip((sums, norm), shapes)]
    lasts = [parts.enter_back(x, shape, wide, q.device) for x, shape in zip((dsums, dnorm), shapes)]
    path = _path(*tensors, gamma, *firsts)
    *grads, dgamma, dsums, dnorm = path.backward(*saved, *lasts, *tensors, gamma, *firsts, parts.bounds, window, scale)
    grads = (x.unflatten(0, q.shape[:2]) for x in grads)
    return *grads, dgamma, parts.leave_back(dsums), parts.leave_back(dnorm)


@windowed_linear_backward.register_fake
def _(do, dsums, dnorm, q, k, v, fq, fk, gamma, sums, norm, cu_seqlens, reset, o, weight, peak, window, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = sequences, *fk.shape[2:]
    states = (q.new_empty(size, dtype=weight.dtype) for size in ((*shape, v.shape[-1]), shape))
    return *(x.new_empty(x.shape) for x in (q, k, v, fq, fk, gamma)), *states


def _path(*tensors: Tensor):
    """The module that computes on q, k, v, fq, fk, ..."""
    if use_triton(*tensors) and max(x.shape[-1] for x in tensors[:5]) <= WIDEST:
        from spikelm.kernels import window_linear_triton

        return window_linear_triton
    return window_linear_torch


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    o, _, _, weight, peak = output
    ctx.mark_non_differentiable(weight, peak)
    ctx.save_for_backward(*tensors, o, weight, peak)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do: Tensor | None, dsums: Tensor | None, dnorm: Tensor | None, *_):
    if do is None and dsums is None and dnorm is None:
        return (None,) * 12
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    *grads, dsums, dnorm = windowed_linear_backward(do, dsums, dnorm, *saved, ctx.window, ctx.scale)
    sums, norm = saved[6:8]
    states = (None if x is None else dx.to(x.dtype) for x, dx in ((sums, dsums), (norm, dnorm)))
    return *grads, *states, None, None, None, None


windowed_linear.register_autograd(_differentiate, setup_context=_save)
