"""WKV, the token mixer of RWKV-4 and SpikeGPT: a decaying softmax average of v with logits k, channel by channel.

    y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{(t-1-i) w + k_i} + e^{u + k_t})

k, v, y [B, T, C]   w [C] logarithm of the decay, <= 0   u [C] bonus of the newest token   state [N, 3, C]

(Peng et al. 2023, arXiv 2305.13048; Zhu et al. 2023, arXiv 2302.13939.) No exponential is taken that could overflow:
the state holds p and q, numerator and denominator divided by e^o, and o, the largest exponent among its terms:

    m = max(o, u + k):    y = (e^{o-m} p + e^{u+k-m} v) / (e^{o-m} q + e^{u+k-m})
    m = max(o + w, k):    p <- e^{o+w-m} p + e^{k-m} v      q <- e^{o+w-m} q + e^{k-m}      o <- m

before the first token p = q = 0, o = EMPTY = -1e38.

Backward, with P and Q the gradients of numerator and denominator behind token t, S and Z numerator and denominator in
front of it, D = Z + e^{u+k} and g the gradient of y, all without the scale, from the last token to the first:

    r = g / D      dv = e^{u+k} r + e^k P      dk = e^{u+k} r (v - y) + e^k (v P + Q)
    du += e^{u+k} r (v - y)      dw += e^w (P S + Q Z)      P <- r + e^w P      Q <- -r y + e^w Q

The scale o is chosen, not computed from: y and all later states are the same whatever it is. So no gradient flows to
or from o, and the gradients of p and q are those at fixed o, e^o P and e^o Q. Sequences cut into pieces, each given the
state of the one before, thus have the gradients of the whole. A function of a state should use p e^o, q e^o or p / q.
"""

import torch
from torch import Tensor

from spikelm.kernels import wkv_torch
from spikelm.kernels.runtime import (
    check_cu_seqlens,
    check_floating,
    contiguous,
    expect,
    use_triton,
    wide_dtype,
)
from spikelm.kernels.wkv_reference import EMPTY, empty_state, wkv_reference, wkv_step_reference
from spikelm.kernels.wkv_torch import CHUNK, PADDING, RESET

__all__ = ["CHUNK", "EMPTY", "wkv", "wkv_reference", "wkv_step"]


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    reset_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """WKV over a sequence; see the module for the equations.

    Args:
        k: [B, T, C], logits, finite, any floating dtype; the arithmetic is float32, or float64 if any argument is.
        v: [B, T, C], values.
        w: [C], finite logarithms of the decay of one token; RWKV-4's layer passes -exp(time_decay).
        u: [C], logits added for the token itself, of a size below 80; `time_first` of RWKV-4.
        initial_state: [N, 3, C], rows p, q, o; (0, 0, EMPTY) by default.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one, some perhaps empty; without it
            N = B. Its values are read, which waits for a GPU.
        valid: [B, T] bool, False for padding: such a token leaves the state exactly as it is, without decay. Its y is
            0, its k and v are not looked at and have gradient 0.
        reset_mask: [B, T] bool; the state is emptied in front of these tokens, padding or not.

    Returns:
        y [B, T, C] in the dtype of v, and the final state [N, 3, C] in float32 (float64 for float64 inputs). Both carry
        gradients to k, v, w, u and initial_state, except to and from o; second derivatives are not defined.

    Raises:
        ValueError: shapes or dtypes that do not fit, or bounds that do not rise from 0 to T.
    """
    _check(k, v, w, u, initial_state, cu_seqlens, valid, reset_mask)
    if initial_state is None:
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = empty_state(sequences, k, wide_dtype(k, v, w, u))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, w, u, initial_state))
    y, final, _ = chunked_wkv(k, v, w, u, initial_state, cu_seqlens, _marks(valid, reset_mask), save)
    return y, final


def wkv_step(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `wkv`: k, v [B, C], state [B, 3, C] -> y [B, C] in the dtype of v, new state in that of `state`."""
    y, state = wkv_step_reference(*(x.to(state.dtype) for x in (k, v, w, u)), state)
    return y.to(v.dtype), state


def _marks(valid: Tensor | None, reset_mask: Tensor | None) -> Tensor | None:
    """Both masks in one [B, T] uint8, as sums of PADDING and RESET."""
    marks = None if valid is None else PADDING * (~valid).to(torch.uint8)
    if reset_mask is not None:
        resets = RESET * reset_mask.to(torch.uint8)
        marks = resets if marks is None else marks + resets
    return marks


def _check(k, v, w, u, initial_state, cu_seqlens, valid, reset_mask) -> None:
    check_floating("wkv", k=k, v=v, w=w, u=u, initial_state=initial_state)
    expect(k.ndim == 3, "wkv", "k", "[B, T, C]", tuple(k.shape), "Merge any heads into C.")
    expect(v.shape == k.shape, "wkv", "v", f"{list(k.shape)} like k", tuple(v.shape), "Every logit weighs one value.")
    for name, x in (("w", w), ("u", u)):
        channels = [k.shape[-1]]
        expect(list(x.shape) == channels, "wkv", name, f"[C] = {channels}", tuple(x.shape), "One number per channel.")
    for name, mask in (("valid", valid), ("reset_mask", reset_mask)):
        if mask is not None:
            fits = mask.dtype == torch.bool and mask.shape == k.shape[:2]
            found = f"{tuple(mask.shape)} {mask.dtype}"
            expect(fits, "wkv", name, f"bool [B, T] = {list(k.shape[:2])}", found, "One flag per token.")
    check_cu_seqlens("wkv", cu_seqlens, k.shape[0])
    if initial_state is not None:
        expected = [k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 3, k.shape[-1]]
        got = tuple(initial_state.shape)
        expect(list(got) == expected, "wkv", "initial_state", f"[N, 3, C] = {expected}", got, "One per sequence.")


@torch.library.custom_op("spikelm::wkv", mutates_args=())
def chunked_wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    marks: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op under `wkv`: y, final states and, with `save`, the states in front of chunks [slots, 3, C].

    Chunk j of sequence n, which begins at token b of the batch (B * T tokens), has slot b // CHUNK + n + j: one place
    for every chunk, in a tensor whose size needs no look at the bounds.
    """
    k, v, w, u, state, marks = contiguous(k, v, w, u, state, marks)
    return _path(k, v, w, u, state).forward(k, v, w, u, state, cu_seqlens, marks, save)


@chunked_wkv.register_fake
def _(k, v, w, u, state, cu_seqlens, marks, save):
    wide = wide_dtype(k, v, w, u, state)
    slots = wkv_torch.slots(k, state) if save else 0
    return (
        v.new_empty(v.shape),
        state.new_empty(state.shape, dtype=wide),
        k.new_empty(slots, *state.shape[1:], dtype=wide),
    )


@torch.library.custom_op("spikelm::wkv_backward", mutates_args=())
def chunked_wkv_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    final: Tensor,
    checkpoints: Tensor,
    cu_seqlens: Tensor | None,
    marks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial states, from the states in front of chunks and at the end."""
    dy = torch.zeros_like(v) if dy is None else dy
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal
    dy, dfinal, k, v, w, u, marks = contiguous(dy, dfinal, k, v, w, u, marks)
    path = _path(dy, dfinal, k, v, w, u, final)
    return path.backward(dy, dfinal, k, v, w, u, final, checkpoints, cu_seqlens, marks)


@chunked_wkv_backward.register_fake
def _(dy, dfinal, k, v, w, u, final, checkpoints, cu_seqlens, marks):
    return (*(x.new_empty(x.shape) for x in (k, v, w, u)), final.new_empty(final.shape))


def _path(*tensors: Tensor):
    """The module that computes on these tensors."""
    if use_triton(*tensors):
        from spikelm.kernels import wkv_triton

        return wkv_triton
    return wkv_torch


def _save(ctx, inputs, output) -> None:
    k, v, w, u, state, cu_seqlens, marks, _ = inputs
    _, final, checkpoints = output
    ctx.state_dtype = state.dtype
    ctx.save_for_backward(k, v, w, u, final, checkpoints, cu_seqlens, marks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, dfinal: Tensor | None, _):
    if dy is None and dfinal is None:
        return (None,) * 8
    *grads, dstate = chunked_wkv_backward(dy, dfinal, *ctx.saved_tensors)
    return *grads, dstate.to(ctx.state_dtype), None, None, None


chunked_wkv.register_autograd(_differentiate, setup_context=_save)
