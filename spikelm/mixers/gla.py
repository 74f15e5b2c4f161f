"""Gated linear attention as in SpikingBrain-7B (section 1.2), on heads.

    S_t = diag(g_t) S_{t-1} + phi(k_t)^T v_t,   o_t = norm(D^-0.5 phi(q_t) S_t)

with a non-negative feature map phi, no rotation, and per-channel gates g_t: learned through a low-rank map of the
layer's input, log g = logsigmoid(W_1 W_0 x + b) / 16, or a dense one (W8ASpike holds W_1 W_0 as one matrix), or tied
to the keys, g = 1 - phi(k) (SpikingBrain-76B).

State: `recurrent` `[B, Hkv, D, D]`, float32 or better.
"""

from functools import partial
from math import exp, log, log1p
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from spikelm.cache import Stateful, StateSpec
from spikelm.initial import Initial, declare, half_lives
from spikelm.kernels.gla import gla, gla_step
from spikelm.kernels.runtime import wide_dtype
from spikelm.norms import make_norm

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext

_FEATURE_MAPS = {"relu": F.relu, "sigmoid": torch.sigmoid, "softplus": F.softplus}


class GatedLinearCore(Stateful, nn.Module):
    """Gated linear attention on heads, with its gate and its per-head output norm."""

    normalises = True

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        queries, self.heads, self.head_dim = config.head_shape
        # Multiply-adds of a token: decay and update of a state per key-value head, one read per query head.
        self.state_macs = (2 * self.heads + queries) * self.head_dim**2
        self.feature_map = _FEATURE_MAPS[config.at("gla_feature_map", layer_idx)]
        self.normalizer = config.gla_gate_normalizer
        kind, width = config.at("gla_gate", layer_idx), self.heads * self.head_dim
        first = float(config.at("gla_gate_bias", layer_idx))
        bias: Initial = first
        if config.gla_longest_memory is not None:
            bias = partial(_spread, first, config.gla_longest_memory, self.normalizer, self.head_dim)
        self.tied = kind == "tied"
        self.input_readers = {"low_rank": ("gate.0",), "dense": ("gate",), "tied": ()}[kind]
        if kind == "low_rank":
            self.gate: nn.Module = LowRankGate(config.hidden_size, config.at("gla_gate_rank", layer_idx), width, bias)
        elif kind == "dense":
            self.gate = declare(nn.Linear(config.hidden_size, width), bias=bias)
        self.norm = make_norm("rmsnorm", self.head_dim, config.norm_eps)

    def state_specs(self) -> dict[str, StateSpec]:
        """The matrix of every key-value head; the query heads of a group share it."""
        return {"recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), torch.float32)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: "ForwardContext") -> tuple[Tensor, None]:
        """q `[B, T, H, D]`, k, v `[B, T, Hkv, D]`, x `[B, T, hidden]` -> heads `[B, T, H, D]`, None."""
        log_decay = self._log_decay(k, x)
        q, k = self.feature_map(q), self.feature_map(k)
        if context.valid is not None:
            keep = context.valid[:, :, None, None]
            k, log_decay = k * keep, log_decay * keep
        if context.boundary is not None:
            log_decay = log_decay.masked_fill(context.boundary[:, :, None, None], float("-inf"))
        state = self.read_state(context, "recurrent")
        if q.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            out, state = gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], state)
            out = out[:, None]
        else:
            out, state = gla(q, k, v, log_decay, initial_state=state)
        self.write_state(context, "recurrent", state)
        return self.norm(out), None

    def _log_decay(self, k: Tensor, x: Tensor) -> Tensor:
        """log g `[B, T, Hkv, D]` in float32 or better, from the raw keys or from the layer's input."""
        wide = wide_dtype(k)
        if self.tied:
            return F.logsigmoid(-k.to(wide))  # log(1 - sigmoid(k)) without cancellation
        logits = self.gate(x).unflatten(-1, (self.heads, self.head_dim))
        return F.logsigmoid(logits.to(wide)) / self.normalizer


class LowRankGate(nn.Sequential):
    """Gate logits W_1 W_0 x + b: `[B, T, hidden]` -> `[B, T, width]`."""

    def __init__(self, hidden: int, rank: int, width: int, bias: Initial):
        small = partial(init.xavier_uniform_, gain=2**-2.5)  # as published
        super().__init__(
            declare(nn.Linear(hidden, rank, bias=False), weight=small),
            declare(nn.Linear(rank, width), weight=small, bias=bias),
        )


def _spread(bias: float, longest: float, normalizer: float, head_dim: int, tensor: Tensor) -> Tensor:
    """Biases `[H D]` under which each head's channels begin with half-lives from that of `bias` to `longest` tokens."""
    shortest = log(2) * normalizer / log1p(exp(-bias))
    log_keep = -log(2) * normalizer / half_lives(shortest, longest, head_dim)
    logits = log_keep - torch.log(-torch.expm1(log_keep))  # logsigmoid(logit) = log_keep
    return logits.repeat(tensor.numel() // head_dim)
