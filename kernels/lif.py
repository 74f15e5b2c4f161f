"""Leaky integrate-and-fire units over tokens: the token axis is the time axis of the spikes.

    H_t = decay * V_(t-1) + gain * X_t          S_t = 1 if H_t >= threshold else 0
    V_t = (1 - S_t) * H_t   (hard reset)        V_t = H_t - S_t * threshold   (soft)        V_t = H_t   (none)

X [B, T, D] -> spikes S [B, T, D] and final membrane V [B, D]. gain is 1 - decay ("euler": a constant input is
reached, not amplified; decay = 1 - 1 / tau) or 1 ("additive"). SpikeGPT (arXiv 2302.13939): tau 2, threshold 1,
hard, euler, atan, reset not detached.

Backward: dS/dH = g(H - threshold), with peak 1 / width and area 1 for every surrogate; with u = z / width,
width * g(z) is

    atan        1 / (1 + (pi u)^2)                  (its usual alpha is 2 / width)
    sigmoid     4 s (1 - s), s = sigmoid(4 u)
    triangle    max(0, 1 - |u|)
    rectangle   1 where |u| <= 1/2, else 0

An astrocyte adds two slow traces per channel and modulates threshold and input with them:

    a_t = trace_decay * a_(t-1) + (1 - trace_decay) * S_(t-1)            the unit's own spikes
    c_t = calcium_decay * c_(t-1) + (1 - calcium_decay) * a_t
    g_t = tanh(sensitivity * c_t)
    threshold_t = threshold + threshold_gain * g_t                       X_t is read as X_t * (1 + input_gain * g_t)

The modulated unit is this project's formulation in the manner of AstroSNN (arXiv 2312.07625, whose equations are
not public); when both gains are zero it equals LIF, spike for spike.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spikelm.kernels.lif_cpu import lif_cpu_backward, lif_cpu_forward
from spikelm.kernels.runtime import check_cu_seqlens, use_triton, wide_dtype

RESETS = ("hard", "soft", "none")
SURROGATES = ("atan", "sigmoid", "triangle", "rectangle")
GAINS = ("euler", "additive")
TEMPORAL_GRADS = ("full", "truncated", "none")


class Astrocyte(NamedTuple):
    """Parameters of the astrocyte that modulates a unit; each a float, or a tensor [1] or [D] (learnable).

    Attributes:
        trace_decay: decay of the trace of the unit's own spikes, in [0, 1].
        calcium_decay: decay of the calcium level, in [0, 1].
        sensitivity: slope of the tanh, >= 0 (up to 8 is sensible).
        threshold_gain: > 0 calms a busy unit, < 0 excites it; its size should stay below the threshold.
        input_gain: share by which a busy unit's input grows (< 0: shrinks).
    """

    trace_decay: Tensor | float
    calcium_decay: Tensor | float
    sensitivity: Tensor | float
    threshold_gain: Tensor | float
    input_gain: Tensor | float


def lif(
    x: Tensor,
    decay: Tensor | float,
    threshold: Tensor | float,
    *,
    astrocyte: Astrocyte | None = None,
    initial_state: Tensor | None = None,
    reset: str = "hard",
    detach_reset: bool = False,
    surrogate: str = "atan",
    width: float = 1.0,
    gain: str = "euler",
    temporal_grad: str = "full",
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    reset_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire over tokens; see the module for the equations.

    Args:
        x: input current [B, T, D], float16, bfloat16, float32 or float64. Membranes are float32 (float64 for
            float64).
        decay: membrane left after one token, in [0, 1]; a float, or a tensor [1] or [D] (learnable).
        threshold: firing threshold; a float, or a tensor [1] or [D] (learnable).
        astrocyte: modulation of threshold and input by the unit's own slow activity; None for plain LIF.
        initial_state: membrane before the first token [N, D]; with an astrocyte [N, 3, D]: membrane, the trace
            that the next token sees, calcium level. None is zero. N is B, or the number of packed sequences.
        reset: "hard" (to zero), "soft" (by the threshold) or "none".
        detach_reset: no gradient through the spike that resets.
        surrogate: "atan", "sigmoid", "triangle" or "rectangle".
        width: width of the surrogate, in units of x, > 0.
        gain: "euler" (1 - decay) or "additive" (1).
        temporal_grad: "full"; "none", no gradient from a token to its predecessor (SLTT, ICCV 2023), so that
            the gradient needs no loop over time; "truncated", the gradient is cut in front of every `window`-th
            token, counted from the start of the sequence or the last reset. "none" is window 1. The cut in
            front of the first token also keeps the gradient from `initial_state`.
        window: tokens per piece; only with "truncated".
        cu_seqlens: [N + 1] int32 or int64, boundaries of N sequences packed into x [1, T, D]; may be empty ones.
        reset_mask: [B, T] bool; the state is set to zero in front of these tokens.

    Returns:
        spikes [B, T, D] in {0, 1}, in the dtype of x, and the final state, shaped like `initial_state`. Both
        carry gradients to x, initial_state and every learnable parameter.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
    """
    _check_input(x, cu_seqlens, reset_mask)
    _check_choice("reset", reset, RESETS)
    _check_choice("surrogate", surrogate, SURROGATES)
    _check_choice("gain", gain, GAINS)
    if not width > 0:
        raise ValueError(f"width: expected a number > 0, got {width}; 1.0 gives a slope of at most 1")
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    params = _stack_params(x, decay, threshold, astrocyte)
    state = _initial_state(x, initial_state, sequences, astrocyte is not None)
    save = torch.is_grad_enabled() and (x.requires_grad or params.requires_grad or state.requires_grad)
    spikes, final, _ = _lif(
        x,
        params,
        state,
        cu_seqlens,
        reset_mask,
        reset,
        detach_reset,
        surrogate,
        float(width),
        gain == "euler",
        _window(temporal_grad, window),
        save,
    )
    return spikes, final if astrocyte is not None else final[:, 0]


def lif_step(
    x: Tensor,
    decay: Tensor | float,
    threshold: Tensor | float,
    state: Tensor | None = None,
    *,
    astrocyte: Astrocyte | None = None,
    reset: str = "hard",
    detach_reset: bool = False,
    surrogate: str = "atan",
    width: float = 1.0,
    gain: str = "euler",
) -> tuple[Tensor, Tensor]:
    """One token of `lif`: x [B, D] and the state [B, D] ([B, 3, D] with an astrocyte; None is zero).

    Returns:
        spikes [B, D] and the new state. Token by token gives the same bits as the sequence form.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected one token per row [B, D], got {list(x.shape)}; `lif` takes [B, T, D]")
    spikes, state = lif(
        x[:, None],
        decay,
        threshold,
        astrocyte=astrocyte,
        initial_state=state,
        reset=reset,
        detach_reset=detach_reset,
        surrogate=surrogate,
        width=width,
        gain=gain,
    )
    return spikes[:, 0], state


def _check_input(x: Tensor, cu_seqlens: Tensor | None, reset_mask: Tensor | None) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating tensor [B, T, D], got {x.dtype} {list(x.shape)}; reshape it")
    check_cu_seqlens("lif", cu_seqlens, x.shape[0])
    if reset_mask is not None and (reset_mask.dtype is not torch.bool or reset_mask.shape != x.shape[:2]):
        raise ValueError(
            f"reset_mask: expected bool {list(x.shape[:2])}, got {reset_mask.dtype} {list(reset_mask.shape)}; "
            "True marks tokens that start from a zero state"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}; choose one of them")


def _window(temporal_grad: str, window: int | None) -> int:
    """0 for the full gradient, else the tokens per piece."""
    _check_choice("temporal_grad", temporal_grad, TEMPORAL_GRADS)
    if (temporal_grad == "truncated") != (window is not None):
        raise ValueError(
            f"window: expected a number with temporal_grad='truncated' and None otherwise, got {window} with "
            f"{temporal_grad!r}; set both or neither"
        )
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}; 1 is temporal_grad='none'")
    return {"full": 0, "none": 1}.get(temporal_grad, window or 0)


def _stack_params(x: Tensor, decay: Tensor | float, threshold: Tensor | float, astrocyte: Astrocyte | None) -> Tensor:
    """Parameters as one tensor [P, D] in the dtype of the arithmetic; P is 2, with an astrocyte 7."""
    named = {"decay": decay, "threshold": threshold}
    if astrocyte is not None:
        named.update(astrocyte._asdict())
    width, rows = x.shape[-1], []
    for name, value in named.items():
        if not isinstance(value, Tensor):
            if name.endswith("decay") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}; decay is 1 - 1 / tau")
            value = torch.full((1,), float(value), dtype=wide_dtype(x), device=x.device)
        if value.shape not in ((1,), (width,)):
            raise ValueError(
                f"{name}: expected a float or a tensor [1] or [{width}], got {list(value.shape)}; reshape it"
            )
        rows.append(value.to(wide_dtype(x)).expand(width))
    return torch.stack(rows)


def _initial_state(x: Tensor, state: Tensor | None, sequences: int, astrocyte: bool) -> Tensor:
    """Initial state as [N, S, D] in the dtype of the arithmetic."""
    width = x.shape[-1]
    if state is None:
        return x.new_zeros((sequences, 3 if astrocyte else 1, width), dtype=wide_dtype(x))
    expected = (sequences, 3, width) if astrocyte else (sequences, width)
    if state.shape != expected:
        raise ValueError(
            f"initial_state: expected {list(expected)}, got {list(state.shape)}; "
            "one state per sequence, as the final state of an earlier call"
        )
    state = state.to(wide_dtype(x))
    return state if astrocyte else state[:, None]


def gradient_cuts(x: Tensor, cu_seqlens: Tensor | None, reset_mask: Tensor | None, window: int) -> Tensor | None:
    """[B, T] bool: no gradient goes from these tokens to their predecessors. None if there is no such token."""
    if window == 0:
        return reset_mask
    batch, time = x.shape[:2]
    step = torch.arange(time, device=x.device).expand(batch, time)
    start = torch.zeros(batch, time, dtype=torch.bool, device=x.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens[:-1].to(torch.long)
        start[0, bounds[bounds < time]] = True
    if reset_mask is not None:
        start = start | reset_mask
    origin = torch.where(start, step, 0).cummax(1).values
    return start | ((step - origin) % window == 0)


@torch.library.custom_op("spikelm::lif", mutates_args=())
def _lif(
    x: Tensor,
    params: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reset_mask: Tensor | None,
    reset: str,
    detach_reset: bool,
    surrogate: str,
    width: float,
    unit_gain: bool,
    window: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, final state and, with `save`, the history [S, B * T, D] that the backward pass reads."""
    run: Callable = lif_cpu_forward
    if use_triton(x, params, state):
        from spikelm.kernels.lif_triton import lif_triton_forward

        run = lif_triton_forward
    return run(x, params, state, cu_seqlens, reset_mask, reset, unit_gain, save)


@_lif.register_fake
def _(
    x,
    params,
    state,
    cu_seqlens,
    reset_mask,
    reset,
    detach_reset,
    surrogate,
    width,
    unit_gain,
    window,
    save,
):
    rows = (state.shape[1], x.shape[0] * x.shape[1], x.shape[2]) if save else (0,)
    return x.new_empty(x.shape), state.new_empty(state.shape), state.new_empty(rows)


@torch.library.custom_op("spikelm::lif_backward", mutates_args=())
def _lif_backward(
    dspikes: Tensor | None,
    dstate: Tensor | None,
    x: Tensor,
    params: Tensor,
    state: Tensor,
    history: Tensor,
    cu_seqlens: Tensor | None,
    reset_mask: Tensor | None,
    reset: str,
    detach_reset: bool,
    surrogate: str,
    width: float,
    unit_gain: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dspikes = torch.zeros_like(x) if dspikes is None else dspikes
    dstate = torch.zeros_like(state) if dstate is None else dstate
    cut = gradient_cuts(x, cu_seqlens, reset_mask, window)
    run: Callable = lif_cpu_backward
    if use_triton(x, params, state):
        from spikelm.kernels.lif_triton import lif_triton_backward

        run = lif_triton_backward
    return run(
        dspikes,
        dstate,
        x,
        params,
        state,
        history,
        cu_seqlens,
        reset_mask,
        cut,
        reset,
        detach_reset,
        surrogate,
        width,
        unit_gain,
    )


@_lif_backward.register_fake
def _(
    dspikes,
    dstate,
    x,
    params,
    state,
    history,
    cu_seqlens,
    reset_mask,
    reset,
    detach_reset,
    surrogate,
    width,
    unit_gain,
    window,
):
    return x.new_empty(x.shape), params.new_empty(params.shape), state.new_empty(state.shape)


def _setup(ctx, inputs, output) -> None:
    x, params, state, cu_seqlens, reset_mask, *options, _save = inputs
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.save_for_backward(x, params, state, output[2], cu_seqlens, reset_mask)


def _backward(ctx, dspikes, dstate, _dhistory):
    x, params, state, history, cu_seqlens, reset_mask = ctx.saved_tensors
    grads = _lif_backward(dspikes, dstate, x, params, state, history, cu_seqlens, reset_mask, *ctx.options)
    return *grads, *[None] * 9


_lif.register_autograd(_backward, setup_context=_setup)
