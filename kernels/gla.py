"""Gated linear attention: a matrix state with one decay per key channel and token.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        rows of S (key channels) decay before the new outer product is added
    o_t = scale * q_t S_t                     the output sees the updated state

q [B, T, H, K]   k, g [B, T, Hk, K]   v [B, T, Hk, V]   o [B, T, H, V]   state [N, Hk, K, V], float32 or better.
Query head h reads key-value head h // (H / Hk): the state is kept once per key-value head. (Yang et al. 2023,
arXiv 2312.06635; as used in SpikingBrain, arXiv 2509.05276.)

One registered op, `spikelm::gated_linear`, serves this file and `simple_gla.py`: its gates are [B, T, Hk, K] or
[B, T, Hk, 1]. It runs `gla_torch.py` on the CPU and in float64, and the kernels of `gla_triton.py` otherwise.
"""

import torch
from torch import Tensor

from spikelm.kernels import gla_torch
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

# Gates below this log decay are resets. exp(-30) = 9e-14 is a millionth of float32's rounding step: what such a gate
# would keep of a state of the size of its update, the update's own rounding hides, so taking it for zero changes no
# result; and a caller who means "forget all" may write any number below it, or -inf, and gets exactly that.
GATE_FLOOR = -30.0


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

    Padding is expressed by the caller as k = 0 and g = 0: such a token leaves the state as it is.

    Args:
        q: [B, T, H, K], with k [B, T, Hk, K], v [B, T, Hk, V] and H a multiple of Hk. Any floating dtype each;
            the arithmetic is float32, or float64 if any of them is float64.
        k: keys, see q.
        v: values, see q.
        g: [B, T, Hk, K], log decays, <= 0. Below `GATE_FLOOR` (-inf included) a gate is a reset: the state of that
            channel is dropped exactly, and g gets no gradient.
        scale: factor on q, default K ** -0.5.
        initial_state: [N, Hk, K, V]; zeros by default.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one, some perhaps empty;
            without it N = B. Its values are read, which waits for a GPU.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [N, Hk, K, V] in float32 (float64 for float64 inputs).
        Both carry gradients to all of q, k, v, g and initial_state; second derivatives are not defined.

    Raises:
        ValueError: shapes that do not fit, or bounds that do not rise from 0 to T.
    """
    check_gated_linear("gla", q, k, v, g, tuple(k.shape), initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return gated_linear(q, k, v, g, initial_state, cu_seqlens, float(scale))


@without_autocast
def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `gla`, for decoding: plain torch, nothing registered, and ordinary autograd if it is asked for.

    Args:
        q: [B, H, K], with k and g [B, Hk, K], v [B, Hk, V].
        k: keys, see q.
        v: values, see q.
        g: log decays, see q; resets as in `gla`.
        state: [B, Hk, K, V], float32 (float64).
        scale: factor on q, default K ** -0.5.

    Returns:
        o [B, H, V] in the dtype of q, and the new state in the dtype of `state`; `state` itself is left as it is.
    """
    wide, shared = state.dtype, k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decay = torch.where(g < GATE_FLOOR, 0.0, g.to(wide).exp()).unsqueeze(-1)
    state = torch.addcmul(k.to(wide).unsqueeze(-1) * v.to(wide).unsqueeze(-2), decay, state)
    query = q.to(wide).unflatten(1, (shared, -1)) * scale
    return (query @ state).flatten(1, 2).to(q.dtype), state


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
    check_gated_linear("gla_reference", q, k, v, g, tuple(k.shape), initial_state, cu_seqlens)
    wide, shared = wide_dtype(q, k, v, g, initial_state), k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_zeros(sequences, *k.shape[2:], v.shape[-1], dtype=wide) if initial_state is None else initial_state
    bounds = [0, q.shape[1]] if cu_seqlens is None else sequence_bounds("gla_reference", cu_seqlens, q.shape[1])
    steps = list(zip(*(x.to(wide).unbind(1) for x in (q, k, v, g))))

    outs, finals = [q.new_zeros(q.shape[0], 0, q.shape[2], v.shape[-1])], []
    for n in range(len(bounds) - 1):
        s = (state if cu_seqlens is None else state[n : n + 1]).to(wide)
        for q_t, k_t, v_t, g_t in steps[bounds[n] : bounds[n + 1]]:
            decay = torch.where(g_t < GATE_FLOOR, 0.0, g_t.clamp_min(GATE_FLOOR).exp())
            s = decay[..., None] * s + k_t[..., None] * v_t[:, :, None]
            outs.append((scale * q_t.unflatten(1, (shared, -1)) @ s).flatten(1, 2).unsqueeze(1).to(q.dtype))
        finals.append(s)
    return torch.cat(outs, 1), torch.cat(finals)


def check_gated_linear(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    gates: tuple[int, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument that does not fit the others; g must have shape `gates`."""
    check_floating(op, q=q, k=k, v=v, g=g, initial_state=initial_state)
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(
            x.ndim == 4, op, name, "[B, T, heads, width]", tuple(x.shape), "Split the heads into an axis of their own."
        )
    batch, length, heads, width = q.shape
    shared = k.shape[2]
    expect(
        tuple(k.shape) == (batch, length, shared, width),
        op,
        "k",
        f"[B, T, Hk, K] = [{batch}, {length}, Hk, {width}] as q has it",
        tuple(k.shape),
        "Queries and keys share batch, time and width.",
    )
    expect(
        shared > 0 and heads % shared == 0,
        op,
        "the number of query heads",
        f"a multiple of the {shared} key-value heads",
        heads,
        "Query head h reads key-value head h // (H / Hk).",
    )
    fits = tuple(v.shape[:3]) == tuple(k.shape[:3])
    expect(fits, op, "v", f"[B, T, Hk, V] = {[*k.shape[:3], 'V']}", tuple(v.shape), "Keys and values share heads.")
    expect(tuple(g.shape) == tuple(gates), op, "g", f"{list(gates)}", tuple(g.shape), "Gates are laid out like keys.")
    check_cu_seqlens(op, cu_seqlens, batch)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (sequences, shared, width, v.shape[-1])
    expect(
        initial_state is None or tuple(initial_state.shape) == expected,
        op,
        "initial_state",
        f"[N, Hk, K, V] = {list(expected)}",
        None if initial_state is None else tuple(initial_state.shape),
        "One state per sequence and key-value head.",
    )


@torch.library.custom_op("spikelm::gated_linear", mutates_args=())
@without_autocast
def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The registered op under `gla` and `simple_gla`: g [B, T, Hk, K] or [B, T, Hk, 1]."""
    q, k, v, g, initial_state = contiguous(q, k, v, g, initial_state)
    return _path(q, k, v, g, initial_state).forward(q, k, v, g, initial_state, cu_seqlens, scale, GATE_FLOOR)


@gated_linear.register_fake
def _(q, k, v, g, initial_state, cu_seqlens, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(sequences, *k.shape[2:], v.shape[-1], dtype=wide_dtype(q, k, v, g, initial_state))
    return q.new_empty(*q.shape[:3], v.shape[-1]), state


@torch.library.custom_op("spikelm::gated_linear_backward", mutates_args=())
@without_autocast
def gated_linear_backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial states."""
    do, dfinal, q, k, v, g, initial_state = contiguous(do, dfinal, q, k, v, g, initial_state)
    path = _path(q, k, v, g, initial_state)
    return path.backward(do, dfinal, q, k, v, g, initial_state, cu_seqlens, scale, GATE_FLOOR)


@gated_linear_backward.register_fake
def _(do, dfinal, q, k, v, g, initial_state, cu_seqlens, scale):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(sequences, *k.shape[2:], v.shape[-1], dtype=wide_dtype(q, k, v, g, initial_state))
    return *(x.new_empty(x.shape) for x in (q, k, v, g)), state


def _path(*tensors: Tensor | None):
    """The module that computes on these tensors."""
    if use_triton(*tensors):
        from spikelm.kernels import gla_triton

        return gla_triton
    return gla_torch


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do: Tensor | None, dfinal: Tensor | None):
    if do is None and dfinal is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    initial_state = saved[4]
    *grads, dstate = gated_linear_backward(do, dfinal, *saved, ctx.scale)
    return *grads, None if initial_state is None else dstate.to(initial_state.dtype), None, None


gated_linear.register_autograd(_differentiate, setup_context=_save)
