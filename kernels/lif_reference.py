"""The definition of the leaky integrate-and-fire unit, token by token in plain torch; autograd gives its gradients.

Rows of `params` [P, D]: decay, threshold, and with astrocyte modulation (P = 7) trace decay, calcium decay,
sensitivity, threshold gain, input gain. Rows of `state` [N, S, D]: membrane, and with modulation (S = 3) the trace
that the next token sees and the calcium level. `kernels/lif.py` holds the equations and documents the options.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor


def surrogate_primal(z: Tensor, surrogate: str, width: float) -> Tensor:
    """A smooth step of the distance z to the threshold; its slope is the surrogate gradient."""
    u = z / width
    if surrogate == "atan":
        return torch.atan(math.pi * u) / math.pi + 0.5
    if surrogate == "sigmoid":
        return torch.sigmoid(4.0 * u)
    if surrogate == "triangle":
        u = u.clamp(-1.0, 1.0)
        return 0.5 + u - 0.5 * u * u.abs()
    return u.clamp(-0.5, 0.5) + 0.5


def lif_reference(
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
) -> tuple[Tensor, Tensor]:
    """Spikes [B, T, D] and final state [N, S, D]; window 0 keeps every gradient in time, n cuts it every n tokens."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [
            lif_reference(
                x[:, start:stop],
                params,
                state[n : n + 1],
                None,
                None if reset_mask is None else reset_mask[:, start:stop],
                reset,
                detach_reset,
                surrogate,
                width,
                unit_gain,
                window,
            )
            for n, (start, stop) in enumerate(pairwise(bounds))
        ]
        if not pieces:
            return x.new_zeros(x.shape), state.clone()
        return torch.cat([s for s, _ in pieces], 1), torch.cat([f for _, f in pieces], 0)

    dtype = state.dtype
    decay, threshold = params[0], params[1]
    astro = params[2:] if params.shape[0] > 2 else None
    gain = 1.0 - decay if unit_gain else torch.ones_like(decay)
    since_reset = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
    spikes = []
    for t in range(x.shape[1]):
        if reset_mask is not None:
            fresh = reset_mask[:, t, None]
            state = torch.where(fresh[:, None], torch.zeros_like(state), state)
            since_reset = torch.where(fresh, 0, since_reset)
        if window > 0:
            cut = since_reset % window == 0
            state = torch.where(cut[:, None], state.detach(), state)
            since_reset = since_reset + 1
        drive, level = x[:, t].to(dtype), threshold
        if astro is not None:
            trace_decay, calcium_decay, sensitivity, threshold_gain, input_gain = astro
            trace = state[:, 1]
            calcium = calcium_decay * state[:, 2] + (1.0 - calcium_decay) * trace
            modulation = torch.tanh(sensitivity * calcium)
            level = threshold + threshold_gain * modulation
            drive = drive * (1.0 + input_gain * modulation)
        membrane = decay * state[:, 0] + gain * drive
        z = membrane - level
        smooth = surrogate_primal(z, surrogate, width)
        spike = (membrane >= level).to(dtype) + (smooth - smooth.detach())
        by = spike.detach() if detach_reset else spike
        if reset == "hard":
            after = (1.0 - by) * membrane
        elif reset == "soft":
            after = membrane - by * level
        else:
            after = membrane
        if astro is None:
            state = after[:, None]
        else:
            trace = trace_decay * trace + (1.0 - trace_decay) * spike
            state = torch.stack([after, trace, calcium], 1)
        spikes.append(spike.to(x.dtype))
    if not spikes:
        return x.new_zeros(x.shape), state.clone()
    return torch.stack(spikes, 1), state
