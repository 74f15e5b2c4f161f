"""The definition of WKV, token by token in plain torch; autograd gives its gradients. `wkv.py` holds the equations."""

from itertools import pairwise

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype

# Exponent of a state that has seen nothing: finite, for the difference of two infinities is not a number.
EMPTY = -1e38


def empty_state(sequences: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """States [N, 3, C] before the first token; `like` has C channels and the device."""
    state = torch.zeros(sequences, 3, like.shape[-1], dtype=dtype, device=like.device)
    state[:, 2] = EMPTY
    return state


def wkv_step_reference(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, k and v [B, C], state [B, 3, C], in their own dtypes: y [B, C] and the state behind it.

    Results do not depend on the scale e^o that numerator and denominator are divided by, so scales are constants.
    """
    p, q, o = state[:, 0], state[:, 1], state[:, 2].detach()
    top = torch.maximum(o, u + k).detach()
    old, new = torch.exp(o - top), torch.exp(u + k - top)
    y = (old * p + new * v) / (old * q + new)
    top = torch.maximum(o + w, k).detach()
    old, new = torch.exp(o + w - top), torch.exp(k - top)
    return y, torch.stack([old * p + new * v, old * q + new, top], 1)


def wkv_reference(
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
    """The definition of `wkv`, one token after the other. Arguments and results as there."""
    wide = wide_dtype(k, v, w, u, initial_state)
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = empty_state(sequences, k, wide) if initial_state is None else initial_state.to(wide)
    bounds = [0, k.shape[1]] if cu_seqlens is None else sequence_bounds("wkv_reference", cu_seqlens, k.shape[1])
    states = torch.cat([states[:, :2], states[:, 2:].detach()], 1)
    nothing = empty_state(1, k, wide)
    w, u = w.to(wide), u.to(wide)

    outs, finals = [v.new_zeros(v.shape[0], 0, v.shape[2])], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = states if cu_seqlens is None else states[n : n + 1]
        for t in range(begin, end):
            k_t, v_t = k[:, t].to(wide), v[:, t].to(wide)
            if reset_mask is not None:
                state = torch.where(reset_mask[:, t, None, None], nothing, state)
            if valid is None:
                y, state = wkv_step_reference(k_t, v_t, w, u, state)
            else:
                real = valid[:, t, None]
                # Whatever a padding token holds, NaN too, it stays out of results and gradients.
                k_t, v_t = (x.masked_fill(~real, 0.0) for x in (k_t, v_t))
                y, after = wkv_step_reference(k_t, v_t, w, u, state)
                y, state = y.masked_fill(~real, 0.0), torch.where(real[:, None], after, state)
            outs.append(y.unsqueeze(1).to(v.dtype))
        finals.append(state)
    return torch.cat(outs, 1), torch.cat(finals)
