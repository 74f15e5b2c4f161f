"""The definition of the event-based GRU, token by token in plain torch; autograd gives its gradients.

`kernels/egru.py` holds the equations and documents the arguments. The step function has the surrogate gradient that
is written there, everything else its own.
"""

from itertools import pairwise

import torch
from torch import Tensor

from spikelm.kernels.runtime import sequence_bounds, wide_dtype


class Event(torch.autograd.Function):
    """1 where v > 0, else 0; backward, the triangle dampening * max(0, 1 - support * |v|)."""

    @staticmethod
    def forward(ctx, v: Tensor, dampening: float, support: float) -> Tensor:
        """Events, in the dtype of v."""
        ctx.save_for_backward(v)
        ctx.shape = dampening, support
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradient of v."""
        (v,) = ctx.saved_tensors
        dampening, support = ctx.shape
        return grad * dampening * (1.0 - support * v.abs()).clamp(min=0.0), None, None


def egru_reference(
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
    """Arguments and results as in `egru`, which checks them; here they are taken as right."""
    wide = wide_dtype(a, weight, threshold, bias, initial_state)
    weight = (weight if weight.ndim == 3 else weight[None]).to(wide)  # [heads, D, 3D]
    heads, width = weight.shape[:2]
    bias = a.new_zeros(3 * heads * width, dtype=wide) if bias is None else bias.to(wide)
    bias, threshold = bias.view(heads, 3 * width), threshold.to(wide).view(heads, width)
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = a.new_zeros(sequences, 2, heads * width, dtype=wide) if initial_state is None else initial_state.to(wide)
    mask = zoneout.to(wide) if isinstance(zoneout, Tensor) else a.new_full((1, 1, 1), 1.0 - (zoneout or 0.0))
    masks = mask.to(wide).expand(*a.shape[:2], heads * width).unflatten(2, (heads, width)).unbind(1)
    inputs = a.to(wide).unflatten(2, (heads, 3 * width)).unbind(1)  # one by one, [B, heads, 3D]
    bounds = [0, a.shape[1]] if cu_seqlens is None else sequence_bounds("egru", cu_seqlens, a.shape[1])

    events, finals = [a.new_zeros(a.shape[0], 0, heads * width)], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        start = state if cu_seqlens is None else state[n : n + 1]
        c, y = start.unflatten(2, (heads, width)).unbind(1)  # [B, heads, D]
        for t in range(begin, end):
            if reset_mask is not None:
                c, y = (torch.where(reset_mask[:, t, None, None], 0.0, x) for x in (c, y))
            if form == "evnn":
                q = torch.einsum("bhd,hde->bhe", y, weight) + bias
                (a_z, a_r, a_g), (q_z, q_r, q_g) = inputs[t].chunk(3, -1), q.chunk(3, -1)
                z, r = torch.sigmoid(a_z + q_z), torch.sigmoid(a_r + q_r)
                new = z * c + (1.0 - z) * torch.tanh(a_g + r * q_g)
            else:
                (a_u, a_r, a_z), (w_u, w_r, w_z) = inputs[t].chunk(3, -1), weight.chunk(3, -1)
                u = torch.sigmoid(a_u + torch.einsum("bhd,hde->bhe", y, w_u))
                r = torch.sigmoid(a_r + torch.einsum("bhd,hde->bhe", y, w_r))
                z = torch.tanh(a_z + torch.einsum("bhd,hde->bhe", r * y, w_z))
                new = u * z + (1.0 - u) * c - y
            before = new if zoneout is None else c + masks[t] * (new - c)
            event = Event.apply(before - threshold, dampening, support)
            c_t, y_t = before - event * threshold if form == "evnn" else before, event * before
            if valid is None:
                c, y, out = c_t, y_t, y_t
            else:
                here = valid[:, t, None, None]
                c, y, out = torch.where(here, c_t, c), torch.where(here, y_t, y), torch.where(here, y_t, 0.0)
            events.append(out.flatten(1).unsqueeze(1).to(a.dtype))
        finals.append(torch.stack([c.flatten(1), y.flatten(1)], 1))
    return torch.cat(events, 1), torch.cat(finals)
