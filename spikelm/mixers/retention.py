"""Retention (Sun et al. 2023, arXiv 2307.08621) on heads: linear attention whose heads forget at fixed rates.

    S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = norm(D^-0.5 q_t S_t) * silu(W_g x_t),   gamma_h = 1 - 2^(-5 - h)

q and k are rotated as in attention. State: `recurrent` `[B, Hkv, D, D]`, float32 or better.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec
from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.simple_gla import simple_gla, simple_gla_step
from spikelm.mixers.attention import rotate
from spikelm.norms import make_norm

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class RetentionCore(Stateful, nn.Module):
    """Retention on heads, with its output gate and its per-head output norm."""

    normalises = True
    input_readers = ("g_proj",)

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        queries, self.heads, self.head_dim = config.head_shape
        self.state_macs = (2 * self.heads + queries) * self.head_dim**2
        self.rope = config.at("attention_rope", layer_idx)
        self.g_proj = nn.Linear(config.hidden_size, queries * self.head_dim, bias=False)
        self.norm = make_norm("rmsnorm", self.head_dim, config.norm_eps)

    def state_specs(self) -> dict[str, StateSpec]:
        """The matrix of every key-value head; the query heads of a group share it."""
        return {"recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), torch.float32)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: "ForwardContext") -> tuple[Tensor, None]:
        """q `[B, T, H, D]`, k, v `[B, T, Hkv, D]`, x `[B, T, hidden]` -> heads `[B, T, H, D]`, None."""
        if self.rope != "none":
            q, k = (rotate(t.transpose(1, 2), *context.rope[self.rope]).transpose(1, 2) for t in (q, k))
        wide = wide_dtype(k)
        log_decay = torch.log1p(-(2.0 ** -(5 + torch.arange(self.heads, dtype=wide, device=k.device))))
        log_decay = log_decay.expand(*k.shape[:3])
        if context.valid is not None:
            k, log_decay = k * context.valid[:, :, None, None], log_decay * context.valid[:, :, None]
        if context.boundary is not None:
            log_decay = log_decay.masked_fill(context.boundary[:, :, None], float("-inf"))
        state = self.read_state(context, "recurrent")
        if q.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            out, state = simple_gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], state)
            out = out[:, None]
        else:
            out, state = simple_gla(q, k, v, log_decay, initial_state=state)
        self.write_state(context, "recurrent", state)
        return self.norm(out) * F.silu(self.g_proj(x)).unflatten(-1, (-1, self.head_dim)), None
