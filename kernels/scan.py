"""Gated scan: every channel is a leaky sum whose leak is given token by token.

    h_t = a_t h_{t-1} + x_t

x, a, h [B, T, D]   state [N, D], float32 or better. The gates a are plain values in [0, 1], not logarithms, so a = 0 is
an exact reset. With x = (1 - a) z this is minGRU (Feng et al. 2024, arXiv 2410.01201) and HGRN (Qin et al. 2023,
arXiv 2311.04823); with constant a, a spiking neuron without reset.

The backward pass is the same scan towards the past: with e_t the gradient of h_t from all later uses,

    e_t = dh_t + a_{t+1} e_{t+1},    dx_t = e_t,    da_t = e_t h_{t-1}.
"""

import torch
from torch import Tensor

from spikelm.kernels import scan_torch
from spikelm.kernels.runtime import (
    check_cu_seqlens,
    check_floating,
    contiguous,
    expect,
    sequence_bounds,
    use_triton,
    wide_dtype,
)


def scan(
    x: Tensor, a: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated scan over a sequence.

    Args:
        x: [B, T, D], any floating dtype; the arithmetic is float32, or float64 if any argument is float64.
        a: [B, T, D], gates as values, meant for [0, 1]; 0 is a reset.
        initial_state: [N, D]; zeros by default.
        cu_seqlens: [N + 1] integers, bounds of N sequences packed into a batch of one, some perhaps empty; without it
            N = B. Its values are read, which waits for a GPU.

    Returns:
        h [B, T, D] in the dtype of x, and the final state [N, D] in float32 (float64 for float64 inputs). Both carry
        gradients to x, a and initial_state; second derivatives are not defined.

    Raises:
        ValueError: shapes that do not fit, or bounds that do not rise from 0 to T.
    """
    _check("scan", x, a, initial_state, cu_seqlens)
    return gated_scan(x, a, initial_state, cu_seqlens)


def scan_step(x: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `scan`: x, a, state [B, D] -> h [B, D] in the dtype of x, and the new state in that of `state`."""
    state = torch.addcmul(x.to(state.dtype), a.to(state.dtype), state)
    return state.to(x.dtype), state


def scan_reference(
    x: Tensor, a: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `scan`, one token after the other. Arguments and results as there."""
    _check("scan_reference", x, a, initial_state, cu_seqlens)
    wide = wide_dtype(x, a, initial_state)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_zeros(sequences, x.shape[-1], dtype=wide) if initial_state is None else initial_state
    bounds = [0, x.shape[1]] if cu_seqlens is None else sequence_bounds("scan_reference", cu_seqlens, x.shape[1])
    steps = list(zip(x.to(wide).unbind(1), a.to(wide).unbind(1)))

    outs, finals = [x.new_zeros(x.shape[0], 0, x.shape[-1])], []
    for n in range(len(bounds) - 1):
        h = (state if cu_seqlens is None else state[n : n + 1]).to(wide)
        for x_t, a_t in steps[bounds[n] : bounds[n + 1]]:
            h = a_t * h + x_t
            outs.append(h.unsqueeze(1).to(x.dtype))
        finals.append(h)
    return torch.cat(outs, 1), torch.cat(finals)


def _check(op: str, x: Tensor, a: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check_floating(op, x=x, a=a, initial_state=initial_state)
    expect(x.ndim == 3, op, "x", "[B, T, D]", tuple(x.shape), "Merge any further axes into D.")
    expect(a.shape == x.shape, op, "a", f"{list(x.shape)} like x", tuple(a.shape), "Expand the gates to the inputs.")
    check_cu_seqlens(op, cu_seqlens, x.shape[0])
    expected = (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[-1])
    expect(
        initial_state is None or tuple(initial_state.shape) == expected,
        op,
        "initial_state",
        f"[N, D] = {list(expected)}",
        None if initial_state is None else tuple(initial_state.shape),
        "One state per sequence.",
    )


@torch.library.custom_op("spikelm::gated_scan", mutates_args=())
def gated_scan(x: Tensor, a: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The registered op under `scan`: h [B, T, D] and final states [N, D]."""
    x, a, initial_state = contiguous(x, a, initial_state)
    return _path(x, a, initial_state).forward(x, a, initial_state, cu_seqlens)


@gated_scan.register_fake
def _(x, a, initial_state, cu_seqlens):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[-1], dtype=wide_dtype(x, a, initial_state))


@torch.library.custom_op("spikelm::gated_scan_backward", mutates_args=())
def gated_scan_backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and the initial states; needs x or, if it has the dtype of the states, h."""
    dh, dfinal, x, h, a, initial_state = contiguous(dh, dfinal, x, h, a, initial_state)
    return _path(x, h, a, initial_state).backward(dh, dfinal, x, h, a, initial_state, cu_seqlens)


@gated_scan_backward.register_fake
def _(dh, dfinal, x, h, a, initial_state, cu_seqlens):
    x = h if x is None else x
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty(sequences, x.shape[-1], dtype=wide_dtype(x, a, initial_state))
    return x.new_empty(x.shape), a.new_empty(a.shape), state


def _path(*tensors: Tensor | None):
    """The module that computes on these tensors."""
    if use_triton(*tensors):
        from spikelm.kernels import scan_triton

        return scan_triton
    return scan_torch


def _save(ctx, inputs, output) -> None:
    x, a, initial_state, cu_seqlens = inputs
    h, final = output
    exact = h.dtype == final.dtype
    ctx.save_for_backward(None if exact else x, h if exact else None, a, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dh: Tensor | None, dfinal: Tensor | None):
    if dh is None and dfinal is None:
        return (None,) * 4
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    initial_state = saved[3]
    dx, da, dstate = gated_scan_backward(dh, dfinal, *saved)
    return dx, da, None if initial_state is None else dstate.to(initial_state.dtype), None


gated_scan.register_autograd(_differentiate, setup_context=_save)
