"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) on heads, without its short convolutions and its output gate.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = norm(D^-0.5 q_t S_t)
    g_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)

q, k and v pass through SiLU, q and k are then scaled to length 1; there is no rotation. This is the form that
SpikingBrain's sparse state expansion builds on, without the expansion. g and beta are one number per key-value head, so
the query heads of a group read one state.

State: `recurrent` `[B, Hkv, D, D]`, keys first, float32 or better.
"""

from functools import partial
from math import log
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec
from spikelm.initial import Initial, half_lives
from spikelm.kernels.delta_rule import gated_delta_rule, gated_delta_rule_step
from spikelm.kernels.runtime import wide_dtype
from spikelm.norms import make_norm
from spikelm.precision import KeepsDtype

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class DeltaCore(Stateful, nn.Module):
    """The gated delta rule on heads, with its decay, its write strength and its per-head output norm."""

    normalises = True
    input_readers = ("a_proj", "b_proj")

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        queries, self.heads, self.head_dim = config.head_shape
        self.groups = queries // self.heads
        # Of a token: decay, what the key reads, update of a state per key-value head, one read per query head.
        self.state_macs = (3 * self.heads + queries) * self.head_dim**2
        self.a_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.rates = Rates(self.heads, config.delta_longest_memory)
        self.norm = make_norm("rmsnorm", self.head_dim, config.norm_eps)

    def state_specs(self) -> dict[str, StateSpec]:
        """The matrix of every key-value head; the query heads of a group share it."""
        return {"recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), torch.float32)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: "ForwardContext") -> tuple[Tensor, None]:
        """q `[B, T, H, D]`, k, v `[B, T, Hkv, D]`, x `[B, T, hidden]` -> heads `[B, T, H, D]`, None."""
        q, k, v = _unit(F.silu(q)), _unit(F.silu(k)), F.silu(v)
        g, beta = self.rates(self.a_proj(x)), torch.sigmoid(self.b_proj(x))
        if context.valid is not None:
            g, beta = g * context.valid[:, :, None], beta * context.valid[:, :, None]
        if context.boundary is not None:
            g = g.masked_fill(context.boundary[:, :, None], float("-inf"))
        state = self.read_state(context, "recurrent")
        if q.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            out, state = self._step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)
            out = out[:, None]
        else:
            out, state = self._sequence(q, k, v, g, beta, state)
        self.write_state(context, "recurrent", state)
        return self.norm(out), None

    def _sequence(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every query head computes the state of its group anew; one of each group is kept."""
        k, v, g, beta = (t.repeat_interleave(self.groups, 2) for t in (k, v, g, beta))
        state = None if state is None else state.repeat_interleave(self.groups, 1)
        out, state = gated_delta_rule(q, k, v, g, beta, initial_state=state)
        return out, state[:, :: self.groups].contiguous()  # a view would hold all of them

    def _step(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One update for each key-value head, read by all queries of its group."""
        grouped = q.unflatten(1, (self.heads, self.groups)).movedim(2, 0)
        out, state = gated_delta_rule_step(grouped, k, v, g, beta, state)
        return out.movedim(0, 2).flatten(1, 2), state


class Rates(KeepsDtype):
    """`A_log` and `dt_bias` `[Hkv]`, float32: logits `[B, T, Hkv]` -> log decays -exp(A_log) softplus(logit + dt_bias).

    They start as in Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): exp(A_log) uniform in 1 to 16, softplus(dt_bias)
    log-uniform in 0.001 to 0.1, so a zero logit has a half-life of 0.4 to 693 tokens. With a `longest` memory the
    half-lives at a zero logit are 16 tokens in the first head and so many in the last.
    """

    def __init__(self, heads: int, longest: float | None = None):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.initial: dict[str, Initial] = {"A_log": _logarithms, "dt_bias": _biases}
        if longest is not None:
            self.initial = {"A_log": 0.0, "dt_bias": partial(_spread, longest)}

    def forward(self, logits: Tensor) -> Tensor:
        """In float32 or better."""
        wide = wide_dtype(logits)
        return -self.A_log.to(wide).exp() * F.softplus(logits.to(wide) + self.dt_bias.to(wide))


def _logarithms(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor).uniform_(1, 16).log()


def _biases(tensor: Tensor) -> Tensor:
    steps = torch.empty_like(tensor).uniform_(log(0.001), log(0.1)).exp()
    return _inverse_softplus(steps)


def _spread(longest: float, tensor: Tensor) -> Tensor:
    return _inverse_softplus(log(2) / half_lives(16.0, longest, tensor.numel()))


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + (-torch.expm1(-x)).log()


def _unit(x: Tensor) -> Tensor:
    """x `[..., D]` at length 1; zeros stay zeros."""
    wide = x.to(wide_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
