"""The delta rule: a matrix state that erases what it holds along one key before it writes along another.

    S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T        decay, what `a` reads is added along `b`, a new write
    o_t = scale * q_t S_t                                         the output sees the updated state

q, k, a, b [B, T, H, K]   v [B, T, H, V]   g [B, T, H, K] or, one per head, [B, T, H, 1]   o [B, T, H, V]
state [N, H, K, V], float32 or better: key channels are rows, in both functions below.

`gated_delta_rule` is Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a = -beta exp(g) k, b = k, beta v for v.
`generalized_delta_rule` is the time mix of RWKV-7 (Peng et al. 2025, arXiv 2503.14456), whose papers write the state
transposed. Both run the registered op `spikelm::delta_rule`, and that runs `delta_rule_torch.py` on the CPU and in
float64, and the kernels of `delta_rule_triton.py` otherwise.
"""

import torch
from torch import Tensor

from spikelm.kernels import delta_rule_torch
from spikelm.kernels.gla import GATE_FLOOR
from spikelm.kernels.runtime import (
    check_cu_seqlens,
    check_floating,
    contiguous,
    expect,
    sequence_bounds,
    use_triton,
    wide_dtype,
    without_autocast,
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over a sequence: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.

    The caller normalises the keys to length 1; where beta |k|^2 exceeds 2, the state explodes. A padding token is g = 0
    and beta = 0: it leaves the state as it is.

    Args:
        q: [B, T, H, K], with k of the same shape and v [B, T, H, V]. Any floating dtype each; the arithmetic is
            float32, or float64 if any input is float64.
        k: keys of length 1, see q.
        v: values, see q.
        g: [B, T, H], log decays, <= 0. Below `GATE_FLOOR` (-inf included) a gate is a reset: the state is dropped
            exactly, and g gets no gradient.
        beta: [B, T, H], write strengths, usually in [0, 1].
        scale: factor on q, default K ** -0.5.
        initial_state: [N, H, K, V]; zeros by default.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one, some perhaps empty;
            without it N = B. Its values are read, which waits for a GPU.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [N, H, K, V] in float32 (float64 for float64 inputs).
        Both carry gradients to all tensors; second derivatives are not defined.

    Raises:
        ValueError: shapes that do not fit, or bounds that do not rise from 0 to T.
    """
    _check("gated_delta_rule", {"q": q, "k": k}, v, {"g": g, "beta": beta}, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = wide_dtype(q, k, v, g, beta, initial_state)
    strength = beta.to(wide).unsqueeze(-1)
    # In the wide dtype: rounded once more, they would cost as much precision as the inputs' own rounding.
    erase, value = -strength * _decay(g, wide).unsqueeze(-1) * k, strength * v
    return delta_rule(q, k, value, g.unsqueeze(-1), erase, None, initial_state, cu_seqlens, float(scale))


def generalized_delta_rule(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Delta rule with a decay per channel and a free erase: S_t = (diag(exp(w_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T.

    RWKV-7 has w = -exp(-1/2) sigmoid(.), a = -kk and b = kk * rate with kk of length 1; the caller keeps
    diag(exp(w)) + b a^T from growing. A padding token is w = 0 and k, a or b = 0 (k and one of a, b): it leaves the
    state as it is.

    Args:
        r: [B, T, H, K], what reads the state, with w, k, a and b of the same shape and v [B, T, H, V]. Any floating
            dtype each; the arithmetic is float32, or float64 if any input is float64.
        w: log decays, <= 0. Below `GATE_FLOOR` (-inf included) a gate is a reset: that channel of the old state is
            dropped exactly, from what `a` reads too, and the gate gets no gradient.
        k: keys, see r.
        v: values, see r.
        a: what reads the old state, before it decays.
        b: where that is added.
        scale: factor on r.
        initial_state: [N, H, K, V], keys first; zeros by default.
        cu_seqlens: as in `gated_delta_rule`.

    Returns:
        o [B, T, H, V] in the dtype of r, and the final state [N, H, K, V] in float32 (float64 for float64 inputs).
        Both carry gradients to all tensors; second derivatives are not defined.

    Raises:
        ValueError: shapes that do not fit, or bounds that do not rise from 0 to T.
    """
    keys = {"r": r, "w": w, "k": k, "a": a, "b": b}
    _check("generalized_delta_rule", keys, v, {}, initial_state, cu_seqlens)
    return delta_rule(r, k, v, w, a.masked_fill(w < GATE_FLOOR, 0.0), b, initial_state, cu_seqlens, float(scale))


@without_autocast
def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`, for decoding: plain torch, and ordinary autograd if it is asked for.

    Args:
        q: [B, H, K], with k of the same shape, v [B, H, V], g and beta [B, H]. Several queries may read one state:
            with q [G, B, H, K], o is [G, B, H, V].
        k: keys, see q.
        v: values, see q.
        g: log decays, see q; resets as in `gated_delta_rule`.
        beta: write strengths, see q.
        state: [B, H, K, V], float32 (float64).
        scale: factor on q, default K ** -0.5.

    Returns:
        o [B, H, V] in the dtype of q, and the new state in the dtype of `state`; `state` itself is left as it is.
    """
    wide = state.dtype
    key, state = k.to(wide).unsqueeze(-2), _decay(g, wide)[..., None, None] * state
    change = beta.to(wide)[..., None, None] * (v.to(wide).unsqueeze(-2) - key @ state)
    state = torch.addcmul(state, key.mT, change)
    return _read(q, state, q.shape[-1] ** -0.5 if scale is None else scale), state


@without_autocast
def generalized_delta_rule_step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token of `generalized_delta_rule`, for decoding: plain torch, and ordinary autograd if it is asked for.

    Args:
        r: [B, H, K], with w, k, a and b of the same shape and v [B, H, V].
        w: log decays, see r; resets as in `generalized_delta_rule`.
        k: keys, see r.
        v: values, see r.
        a: what reads the old state, see r.
        b: where that is added, see r.
        state: [B, H, K, V], float32 (float64).
        scale: factor on r.

    Returns:
        o [B, H, V] in the dtype of r, and the new state in the dtype of `state`; `state` itself is left as it is.
    """
    wide = state.dtype
    decay = _decay(w, wide).unsqueeze(-1)
    found = a.masked_fill(w < GATE_FLOOR, 0.0).to(wide).unsqueeze(-2) @ state
    state = torch.addcmul(k.to(wide).unsqueeze(-1) * v.to(wide).unsqueeze(-2), decay, state)
    state = torch.addcmul(state, b.to(wide).unsqueeze(-1), found)
    return _read(r, state, scale), state


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `gated_delta_rule`, one token after the other. Arguments and results as there."""
    _check("gated_delta_rule_reference", {"q": q, "k": k}, v, {"g": g, "beta": beta}, initial_state, cu_seqlens)
    return _loop(gated_delta_rule_step, (q, k, v, g, beta), v, scale, initial_state, cu_seqlens)


def generalized_delta_rule_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `generalized_delta_rule`, one token after the other. Arguments and results as there."""
    keys = {"r": r, "w": w, "k": k, "a": a, "b": b}
    _check("generalized_delta_rule_reference", keys, v, {}, initial_state, cu_seqlens)
    return _loop(generalized_delta_rule_step, (r, w, k, v, a, b), v, scale, initial_state, cu_seqlens)


def _loop(step, tokens: tuple[Tensor, ...], v: Tensor, scale, state: Tensor | None, cu_seqlens: Tensor | None):
    """`step` from token to token of every sequence, in the wide dtype."""
    first, wide = tokens[0], wide_dtype(*tokens, state)
    batch, length, heads, width = first.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = first.new_zeros(sequences, heads, width, v.shape[-1], dtype=wide) if state is None else state
    bounds = [0, length] if cu_seqlens is None else sequence_bounds("delta_rule_reference", cu_seqlens, length)
    steps = list(zip(*(x.unbind(1) for x in tokens)))

    outs, finals = [first.new_zeros(batch, 0, heads, v.shape[-1])], []
    for n in range(len(bounds) - 1):
        s = (state if cu_seqlens is None else state[n : n + 1]).to(wide)
        for token in steps[bounds[n] : bounds[n + 1]]:
            out, s = step(*token, s, scale)
            outs.append(out.unsqueeze(1))
        finals.append(s)
    return torch.cat(outs, 1), torch.cat(finals)


def _decay(g: Tensor, wide: torch.dtype) -> Tensor:
    """exp(g), and 0 without a gradient for a reset. The clamp keeps the gradient of -inf from becoming 0 * inf."""
    return torch.where(g < GATE_FLOOR, 0.0, g.to(wide).clamp_min(GATE_FLOOR).exp())


def _read(q: Tensor, state: Tensor, scale: float) -> Tensor:
    return (scale * (q.to(state.dtype).unsqueeze(-2) @ state)).squeeze(-2).to(q.dtype)


def _check(
    op: str,
    keys: dict[str, Tensor],
    v: Tensor,
    per_head: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument that does not fit the first of `keys`."""
    check_floating(op, **keys, v=v, **per_head, initial_state=initial_state)
    (name, first), *others = keys.items()
    remedy = "Split the heads into an axis of their own."
    expect(first.ndim == 4, op, name, "[B, T, H, K]", tuple(first.shape), remedy)
    batch, length, heads, width = first.shape
    for other, x in others:
        expect(x.shape == first.shape, op, other, f"{list(first.shape)} like {name}", tuple(x.shape), "See the shapes.")
    fits = v.ndim == 4 and v.shape[:3] == first.shape[:3]
    expect(fits, op, "v", f"[B, T, H, V] = {[batch, length, heads, 'V']}", tuple(v.shape), "Values share heads.")
    for other, x in per_head.items():
        expected = f"[B, T, H] = {[batch, length, heads]}"
        expect(x.shape == first.shape[:3], op, other, expected, tuple(x.shape), "There is one per token and head.")
    check_cu_seqlens(op, cu_seqlens, batch)
    shape = (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, heads, width, v.shape[-1])
    expect(
        initial_state is None or tuple(initial_state.shape) == shape,
        op,
        "initial_state",
        f"[N, H, K, V] = {list(shape)}",
        None if initial_state is None else tuple(initial_state.shape),
        "One state per sequence and head, key channels before value channels.",
    )


@torch.library.custom_op("spikelm::delta_rule", mutates_args=())
@without_autocast
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The registered op under both functions: g [B, T, H, K] or [B, T, H, 1], and `a` is zero where g is a reset.

    Without b, k takes its place: half of the work.
    """
    tensors = contiguous(q, k, v, g, a, b, initial_state)
    return _path(*tensors).forward(*tensors, cu_seqlens, scale, GATE_FLOOR)


@delta_rule.register_fake
def _(q, k, v, g, a, b, initial_state, cu_seqlens, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = wide_dtype(q, k, v, g, a, b, initial_state)
    state = q.new_empty(sequences, *k.shape[2:], v.shape[-1], dtype=wide)
    return q.new_empty(v.shape), state


@torch.library.custom_op("spikelm::delta_rule_backward", mutates_args=())
@without_autocast
def delta_rule_backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, g, a, b (if it is given) and the initial states."""
    do, dfinal, *tensors = contiguous(do, dfinal, q, k, v, g, a, b, initial_state)
    return _path(*tensors).backward(do, dfinal, *tensors, cu_seqlens, scale, GATE_FLOOR)


@delta_rule_backward.register_fake
def _(do, dfinal, q, k, v, g, a, b, initial_state, cu_seqlens, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = wide_dtype(q, k, v, g, a, b, initial_state)
    state = q.new_empty(sequences, *k.shape[2:], v.shape[-1], dtype=wide)
    return [*(x.new_empty(x.shape) for x in (q, k, v, g, a, b) if x is not None), state]


def _path(*tensors: Tensor | None):
    """The module that computes on these tensors."""
    if use_triton(*tensors):
        from spikelm.kernels import delta_rule_triton

        return delta_rule_triton
    return delta_rule_torch


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do: Tensor | None, dfinal: Tensor | None):
    if do is None and dfinal is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    b, initial_state = saved[5:7]
    *grads, dstate = delta_rule_backward(do, dfinal, *saved, ctx.scale)
    grads += [None] * (b is None)
    return *grads, None if initial_state is None else dstate.to(initial_state.dtype), None, None


delta_rule.register_autograd(_differentiate, setup_context=_save)
