"""Event-based GRU over tokens: a gated unit whose output is an event, nonzero only above a threshold.

    a_t      the projected input x_t W + b of three blocks, computed for all tokens at once by an ordinary linear layer
    o_t = 1 if p_t > threshold else 0      p: the state before its reset      y_t = o_t p_t      the graded event

form "evnn" (the authors' library EvNN): blocks z, r, g; the reset gate acts behind the product, z keeps the old state,
an event takes the threshold off:

    q = y_{t-1} R + d      z = sigmoid(a_z + q_z)      r = sigmoid(a_r + q_r)      g = tanh(a_g + r q_g)
    p_t = z c_{t-1} + (1 - z) g                        c_t = p_t - o_t threshold

form "paper" (Subramoney et al., ICLR 2023, arXiv 2206.06178): blocks u, r, z; the reset gate acts in front of the
product, u takes the new state, the last event is taken off in full:

    u = sigmoid(a_u + y_{t-1} R_u)      r = sigmoid(a_r + y_{t-1} R_r)      z = tanh(a_z + (r y_{t-1}) R_z)
    p_t = u z + (1 - u) c_{t-1} - y_{t-1}              c_t = p_t

Zoneout puts p_t + (1 - m_t) (c_{t-1} - p_t) in place of p_t. EvNN's traces are left to who needs them.

Heads: R [heads, D, 3D] is block-diagonal, H = heads D; a full matrix [H, 3H] is one head. The last axis of a (and of
d) is [heads, 3, D]: each head has its three blocks side by side, so a slice of heads is a slice of columns.

State [N, 2, H]: c_t and y_t, both carried. After a token both follow from p_t alone, which is what the backward pass
keeps; an initial state may be any pair.

Backward, with h = dampening max(0, 1 - support |p - threshold|) in place of the derivative of the step, from Y and K,
the gradients of y_t and c_t from all later uses:

    dp = K + o Y + h (p Y - threshold K)      dthreshold = -sum(h (p Y - threshold K) + o K)       ("paper": without K)

The rest is the ordinary derivative of a GRU. Gates are computed anew from p, for many tokens at once; only dp and the
product that carries it to y_{t-1} go token by token.
"""

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels import egru_cpp, egru_torch
from spikelm.kernels.event_linear_torch import FEW
from spikelm.kernels.runtime import (
    check_cu_seqlens,
    check_floating,
    contiguous,
    expect,
    use_triton,
    wide_dtype,
    without_autocast,
)
from spikelm.kernels.segments import find_segments

FORMS = ("evnn", "paper")


def egru(
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    *,
    form: str,
    bias: Tensor | None = None,
    zoneout: Tensor | float | None = None,
    dampening: float = 0.7,
    support: float = 1.0,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    reset_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Event-based GRU over a sequence; see the module for the equations.

    Args:
        a: projected inputs [B, T, 3H], last axis [heads, 3, D]; any floating dtype. The arithmetic is float32, or
            float64 if any argument is float64.
        weight: recurrent weights R [heads, D, 3D], or [H, 3H] for one head; any floating dtype.
        threshold: [H], meant to be >= 0; an event needs strictly more.
        form: "evnn" or "paper".
        bias: recurrent bias d [3H], laid out like a; only for "evnn": in the other form it would be a bias of a.
        zoneout: in training a mask m [B, T, H], bool or floating, without gradient: 1 takes the new state, 0 keeps the
            old one. In evaluation the probability of keeping, whose expectation replaces the mask.
        dampening: peak of the surrogate gradient of the step.
        support: inverse of its half width, > 0, per unit of the state.
        initial_state: [N, 2, H], c and y before the first token; zeros by default.
        valid: [B, T] bool; False is padding, which leaves both states as they are and emits zeros.
        reset_mask: [B, T] bool; both states are set to zero in front of these tokens, padding or not.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one, some perhaps empty; without it
            N = B. The values of this and of the masks above are read, which waits for a GPU.

    Returns:
        y [B, T, H] in the dtype of a, and the final state [N, 2, H] in float32 (float64 for float64 inputs). Both
        carry gradients to a, weight, threshold, bias and initial_state; second derivatives are not defined.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
    """
    weight = weight[None] if weight.ndim == 2 else weight
    _check("egru", a, weight, threshold, form, bias, zoneout, support, initial_state)
    _check_sequences(a, initial_state, valid, reset_mask, cu_seqlens)
    leaves = a, weight, threshold, bias, initial_state
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    mask, keep = (zoneout, 1.0) if isinstance(zoneout, Tensor) else (None, 1.0 - (zoneout or 0.0))
    masks = mask, valid, reset_mask, cu_seqlens
    return event_gru(*leaves, *masks, form == "evnn", keep, float(dampening), float(support), save)[:2]


@torch.no_grad()
@without_autocast
def egru_step(
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    state: Tensor,
    *,
    form: str,
    bias: Tensor | None = None,
    zoneout: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `egru` for decoding: a [B, 3H], state [B, 2, H] -> y [B, H], new state in the dtype of `state`.

    Without gradients; the other arguments are those of `egru`. With one head and the form "evnn" the CPU reads only the
    rows of `weight` whose unit has an event.
    """
    weight = weight[None] if weight.ndim == 2 else weight
    _check("egru_step", a[:, None] if a.ndim == 2 else a, weight, threshold, form, bias, zoneout, 1.0, state)
    heads, width = weight.shape[:2]
    wide, shape = wide_dtype(a, weight, threshold, bias, state), (a.shape[0], heads, width)
    c, y = (x.to(wide).view(shape).transpose(0, 1).contiguous() for x in state.unbind(1))  # [heads, B, D]
    rows = a.to(wide).view(a.shape[0], heads, 3 * width).transpose(0, 1)
    # A full matrix is large, and silent units need none of their rows; the form "paper" gates its events once more.
    sparse = form == "evnn" and heads == 1 and a.device.type == "cpu" and a.shape[0] <= FEW
    kind = egru_torch.EventCell if sparse else egru_torch.Cell
    cell = kind.of(weight.to(wide), bias, threshold, form == "evnn")
    before = cell.step(rows, c, y, 1.0 - (zoneout or 0.0))
    cell.fire(before, c, y)
    c, y = (x.transpose(0, 1).flatten(1) for x in (c, y))
    return y.to(a.dtype), torch.stack([c, y], 1).to(state.dtype)


def _check(op, a, weight, threshold, form, bias, zoneout, support, initial_state) -> None:
    mask = zoneout if isinstance(zoneout, Tensor) and zoneout.is_floating_point() else None
    tensors = {"a": a, "weight": weight, "threshold": threshold, "bias": bias, "initial_state": initial_state}
    check_floating(op, **tensors, zoneout=mask)
    expect(form in FORMS, op, "form", f"one of {FORMS}", repr(form), "Choose one of them.")
    expect(
        weight.ndim == 3 and weight.shape[2] == 3 * weight.shape[1],
        op,
        "weight",
        "[heads, D, 3D] or [H, 3H]",
        tuple(weight.shape),
        "Lay the three blocks of a head side by side.",
    )
    channels = weight.shape[0] * weight.shape[1]
    shape = "[B, T, 3H]" if op == "egru" else "[B, 3H]"
    fits = a.ndim == 3 and a.shape[2] == 3 * channels
    expect(fits, op, "a", f"{shape} with H = {channels}", tuple(a.shape), "Project to three times the width first.")
    for name, x, wanted in (("threshold", threshold, channels), ("bias", bias, 3 * channels)):
        fits = x is None or tuple(x.shape) == (wanted,)
        expect(fits, op, name, f"[{wanted}]", None if x is None else tuple(x.shape), "One value per column.")
    expect(
        bias is None or form == "evnn",
        op,
        "bias",
        "None with form='paper'",
        "a tensor",
        "There it adds to a: give it to the input projection.",
    )
    expect(support > 0, op, "support", "a number > 0", support, "It is the inverse of the half width.")
    if isinstance(zoneout, Tensor):
        expected = [*a.shape[:2], channels]
        fits = list(zoneout.shape) == expected and not zoneout.is_complex()
        expect(fits, op, "zoneout", f"a mask {expected}", tuple(zoneout.shape), "One value per token and channel.")
    elif zoneout is not None:
        expect(0.0 <= zoneout <= 1.0, op, "zoneout", "a probability in [0, 1]", zoneout, "Or pass a mask.")
    if op == "egru_step":
        expected = [a.shape[0], 2, channels]
        fits = list(initial_state.shape) == expected
        expect(fits, op, "state", f"[B, 2, H] = {expected}", tuple(initial_state.shape), "c and y of each row.")


def _check_sequences(a, initial_state, valid, reset_mask, cu_seqlens) -> None:
    for name, mask in (("valid", valid), ("reset_mask", reset_mask)):
        fits = mask is None or (mask.dtype is torch.bool and mask.shape == a.shape[:2])
        got = None if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        expect(fits, "egru", name, f"bool {list(a.shape[:2])}", got, "One flag per token.")
    check_cu_seqlens("egru", cu_seqlens, a.shape[0])
    expected = (a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 2, a.shape[2] // 3)
    fits = initial_state is None or tuple(initial_state.shape) == expected
    shape = None if initial_state is None else tuple(initial_state.shape)
    expect(fits, "egru", "initial_state", f"[N, 2, H] = {list(expected)}", shape, "c and y of every sequence.")


@torch.library.custom_op("spikelm::event_gru", mutates_args=())
@without_autocast
def event_gru(
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    reset_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    evnn: bool,
    keep: float,
    dampening: float,
    support: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op under `egru`: y [B, T, H], final states [N, 2, H], and with `save` p [B, T, H], else [0].

    `keep` is the constant share of the new state where there is no mask.
    """
    a, weight, threshold, bias, initial_state, mask = contiguous(a, weight, threshold, bias, initial_state, mask)
    segments = find_segments("egru", a, cu_seqlens, valid, reset_mask)
    states = _states(a, weight, threshold, bias, initial_state, cu_seqlens)
    run: Any = _path(a, weight, threshold, bias, states)
    y, ends, before = run.forward(a, weight, threshold, bias, segments.first(states), mask, segments, evnn, keep)
    return y, segments.final(ends, states), before if save else before.new_empty(0)


@event_gru.register_fake
def _(
    a,
    weight,
    threshold,
    bias,
    initial_state,
    mask,
    valid,
    reset_mask,
    cu_seqlens,
    evnn,
    keep,
    dampening,
    support,
    save,
):
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide, channels = wide_dtype(a, weight, threshold, bias, initial_state), weight.shape[0] * weight.shape[1]
    y = a.new_empty(a.shape[0], a.shape[1], channels)
    before = y.new_empty(y.shape if save else 0, dtype=wide)
    return y, y.new_empty(sequences, 2, channels, dtype=wide), before


@torch.library.custom_op("spikelm::event_gru_backward", mutates_args=())
@without_autocast
def event_gru_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    reset_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    evnn: bool,
    keep: float,
    dampening: float,
    support: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, weight, threshold, bias [3H] and initial states [N, 2, H]."""
    dy, dfinal, a, weight, threshold, bias, mask = contiguous(dy, dfinal, a, weight, threshold, bias, mask)
    segments = find_segments("egru", a, cu_seqlens, valid, reset_mask)
    states = _states(a, weight, threshold, bias, initial_state, cu_seqlens)
    dfinal = torch.zeros_like(states) if dfinal is None else dfinal
    dends, first = segments.final_backward(dfinal), segments.first(states)
    run: Any = _path(a, weight, threshold, bias, states)
    arguments = a, weight, threshold, bias, first, before, mask, segments, evnn, keep, dampening, support
    da, dweight, dthreshold, dbias, dfirst = run.backward(dy, dends, *arguments)
    dstates = segments.first_backward(dfirst, dfinal)
    return da, dweight.to(weight.dtype), dthreshold.to(threshold.dtype), dbias, dstates


@event_gru_backward.register_fake
def _(
    dy,
    dfinal,
    a,
    weight,
    threshold,
    bias,
    initial_state,
    before,
    mask,
    valid,
    reset_mask,
    cu_seqlens,
    evnn,
    keep,
    dampening,
    support,
):
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dbias = before.new_empty(a.shape[2])
    states = before.new_empty(sequences, 2, before.shape[2])
    return a.new_empty(a.shape), weight.new_empty(weight.shape), threshold.new_empty(threshold.shape), dbias, states


def _states(a, weight, threshold, bias, initial_state, cu_seqlens) -> Tensor:
    """Initial states [N, 2, H] in the dtype of the arithmetic."""
    wide = wide_dtype(a, weight, threshold, bias, initial_state)
    if initial_state is not None:
        return initial_state.to(wide).contiguous()
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return a.new_zeros(sequences, 2, a.shape[2] // 3, dtype=wide)


def _path(a: Tensor, weight: Tensor, *others: Tensor | None) -> Any:
    """The module that computes on these tensors."""
    if use_triton(a, weight, *others):
        from spikelm.kernels import egru_triton

        return egru_triton if weight.shape[1] <= egru_triton.WIDEST else egru_torch
    if weight.device.type == "cpu" and wide_dtype(a, weight, *others) == torch.float32 and egru_cpp.available():
        return egru_cpp
    return egru_torch


def _save(ctx, inputs, output) -> None:
    leaves, masks, options = inputs[:5], inputs[5:9], inputs[9:13]
    ctx.options = options
    ctx.save_for_backward(*leaves, output[2], *masks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, dfinal: Tensor | None, _dbefore):
    if dy is None and dfinal is None:
        return (None,) * 14
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    bias, initial_state = saved[3:5]
    da, dweight, dthreshold, dbias, dstates = event_gru_backward(dy, dfinal, *saved, *ctx.options)
    dbias = None if bias is None else dbias.to(bias.dtype)
    dstates = None if initial_state is None else dstates.to(initial_state.dtype)
    return da, dweight, dthreshold, dbias, dstates, *[None] * 9


event_gru.register_autograd(_differentiate, setup_context=_save)
