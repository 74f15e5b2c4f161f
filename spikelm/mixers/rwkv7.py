"""RWKV-7's token mixer: heads with a matrix state that forgets by channel, erases along a key, and writes.

    x_z = x_t + mu_z (x_(t-1) - x_t)                                  for z in r, w, k, v, a, g
    r, k, v = W_r x_r, W_k x_k, W_v x_v
    log d = -e^(-1/2) sigmoid(w0 + tanh(x_w w1) w2)                   decay of the state's key channels
    a = sigmoid(a0 + x_a a1 a2)     g = sigmoid(x_g g1) g2            rate of erasing, output gate
    v <- v + (v_first - v) sigmoid(v0 + x_v v1 v2)                    v_first: values of the first such layer
    kk = k k_k, each head normed to length 1      k <- k (1 + (a - 1) k_a)
    S_t = S_{t-1} diag(d_t) - (S_{t-1} kk_t) (kk_t a_t)^T + v_t k_t^T        y_t = S_t r_t
    out = W_o (g (groupnorm(y) + sum_head(r k r_k) v))

(Peng et al. 2025, arXiv 2503.14456.) The values of the first layer reach the others through the context.

States: `recurrent` `[B, H, D, D]`, float32 or better; `last` `[B, hidden]`, the token before.
"""

from functools import partial
from math import exp, sqrt
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from spikelm.cache import Stateful, StateSpec
from spikelm.ffns.rwkv import falling_ramp
from spikelm.initial import declare
from spikelm.kernels.delta_rule import generalized_delta_rule, generalized_delta_rule_step
from spikelm.kernels.runtime import wide_dtype
from spikelm.precision import KeepsDtype
from spikelm.shift import Previous
from spikelm.spiking.site import make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext

INPUTS = ("r", "w", "k", "v", "a", "g")
FIRST_VALUE = "rwkv7.first_value"  # in the context, for later layers


def default_ranks(hidden: int) -> dict[str, int]:
    """Ranks of the low-rank maps that RWKV-7 uses for a width."""

    def rank(factor: float) -> int:
        return max(32, round(factor * sqrt(hidden) / 32) * 32)

    return {"decay": rank(2.5), "rate": rank(2.5), "value": rank(1.7), "gate": rank(5.0)}


class LowRank(nn.Sequential):
    """`[B, T, hidden]` -> `[B, T, hidden]` through `rank` channels: two linears, the first zero at the start."""

    def __init__(self, hidden: int, rank: int):
        super().__init__(
            declare(nn.Linear(hidden, rank, bias=False), weight=0.0),
            declare(nn.Linear(rank, hidden, bias=False), weight=partial(init.orthogonal_, gain=0.1)),
        )


class RWKV7(Stateful, nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`; site `qkv` codes each of the six shifted inputs, `o` the gated heads."""

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, _, self.head_dim = config.head_shape
        hidden = config.hidden_size
        self.state_macs = 5 * self.heads * self.head_dim**2
        self.first = "rwkv7" not in "+".join(config.mixers[:layer_idx]).split("+")
        self.reads_earlier_layers = not self.first
        ranks = {name: getattr(config, f"rwkv_{name}_rank") or n for name, n in default_ranks(hidden).items()}

        self.previous = Previous(layer_idx, hidden)
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        self.initial = {}
        for name in INPUTS:
            setattr(self, f"mix_{name}", nn.Parameter(torch.empty(hidden)))
            power = powers[name] * (1 - layer_idx / config.num_hidden_layers)
            self.initial[f"mix_{name}"] = partial(falling_ramp, power=power)
            setattr(self, f"{name}_site", make_site(config, layer_idx, "qkv", hidden))
        bound = 0.5 / sqrt(hidden)
        for name, width in (("r", bound), ("k", 0.1 * bound), ("v", bound)):
            uniform = partial(init.uniform_, a=-width, b=width)
            setattr(self, f"{name}_proj", declare(nn.Linear(hidden, hidden, bias=False), weight=uniform))
        self.decay, self.rate = LowRank(hidden, ranks["decay"]), LowRank(hidden, ranks["rate"])
        self.gate = LowRank(hidden, ranks["gate"])
        if not self.first:
            self.value = LowRank(hidden, ranks["value"])
        self.channels = Channels(self.heads, self.head_dim, layer_idx, config.num_hidden_layers, not self.first)
        if config.rwkv_idle_value_mix and layer_idx == 0:
            self.idle = Idle(hidden, ranks["value"])
        self.norm = declare(nn.GroupNorm(self.heads, hidden, eps=1e-5 * self.head_dim))
        self.norm.initial = {"weight": ((layer_idx + 1) / config.num_hidden_layers) ** 0.7, "bias": 0.0}
        self.o_site = make_site(config, layer_idx, "o", hidden)
        self.o_proj = declare(nn.Linear(hidden, hidden, bias=False), weight=0.0)
        self.site_readers = {
            "r_site": ("r_proj",),
            "w_site": ("decay.0",),
            "k_site": ("k_proj",),
            "v_site": ("v_proj",) if self.first else ("v_proj", "value.0"),
            "a_site": ("rate.0",),
            "g_site": ("gate.0",),
            "o_site": ("o_proj",),
        }

    def state_specs(self) -> dict[str, StateSpec]:
        """The matrix of every head."""
        return {"recurrent": StateSpec((self.heads, self.head_dim, self.head_dim), torch.float32)}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time."""
        before, own = self.previous(x, context), self.channels
        shifted = {}
        for name in INPUTS:
            mixed = torch.lerp(x, before, getattr(self, f"mix_{name}"))
            shifted[name] = getattr(self, f"{name}_site")(mixed, context)
        r, k, v = self.r_proj(shifted["r"]), self.k_proj(shifted["k"]), self.v_proj(shifted["v"])
        rate = torch.sigmoid(own.rate.to(x.dtype) + self.rate(shifted["a"]))
        gate = self.gate[1](torch.sigmoid(self.gate[0](shifted["g"])))
        v = self._with_first_value(v, shifted["v"], context)

        wide = wide_dtype(x)
        logits = own.decay.to(wide) + self.decay[1](torch.tanh(self.decay[0](shifted["w"]))).to(wide)
        log_decay = -exp(-0.5) * torch.sigmoid(logits)
        # Wide: the state decays only while this has length 1, and in float16 the norm's epsilon would be 0.
        erased = F.normalize(self._heads(k.to(wide) * own.erase.to(wide)), dim=-1)
        k = k * (1 + (rate - 1) * own.write.to(x.dtype))
        r, k, v, log_decay, rate = (self._heads(t) for t in (r, k, v, log_decay, rate))
        y = self._recur(r, log_decay, k, v, erased, rate, context)
        y = self.norm(y.flatten(0, 1).flatten(1)).view_as(x)
        bonus = (r * k * own.bonus.to(x.dtype)).sum(-1, keepdim=True) * v
        return self.o_proj(self.o_site(gate * (y + bonus.flatten(2)), context))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def _with_first_value(self, v: Tensor, x: Tensor, context: "ForwardContext") -> Tensor:
        if self.first:
            context.values[FIRST_VALUE] = v
            return v
        share = torch.sigmoid(self.channels.value.to(x.dtype) + self.value(x))
        return torch.lerp(v, context.values[FIRST_VALUE], share.to(v.dtype))

    def _recur(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, erased: Tensor, rate: Tensor, context: "ForwardContext"
    ) -> Tensor:
        """Heads y `[B, T, H, D]`; the state is read and written."""
        if context.valid is not None:
            keep = context.valid[:, :, None, None]
            w, k, erased = w * keep, k * keep, erased * keep
        if context.boundary is not None:
            w = w.masked_fill(context.boundary[:, :, None, None], float("-inf"))
        state = self.read_state(context, "recurrent")
        if r.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            y, state = generalized_delta_rule_step(
                *(t[:, 0] for t in (r, w, k, v, -erased, erased * rate)), state=state
            )
            y = y[:, None]
        else:
            y, state = generalized_delta_rule(r, w, k, v, -erased, erased * rate, initial_state=state)
        self.write_state(context, "recurrent", state)
        return y


class Channels(KeepsDtype):
    """What every channel has of its own, float32: biases of the low-rank maps and factors on keys."""

    def __init__(self, heads: int, head_dim: int, layer_idx: int, layers: int, mixes_values: bool):
        super().__init__()
        width, depth = heads * head_dim, layer_idx / max(1, layers - 1)
        names = ("decay", "rate", "erase", "write", *(("value",) if mixes_values else ()))
        for name in names:
            setattr(self, name, nn.Parameter(torch.empty(width, dtype=torch.float32)))
        self.bonus = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        self.initial = {
            "decay": partial(_decays, depth=depth, head_dim=head_dim),
            "rate": partial(_waves, base=-0.19, zigzag=0.3, slope=0.4, head_dim=head_dim),
            "erase": partial(_waves, base=0.71, zigzag=0.0, slope=-0.1, head_dim=head_dim),
            "write": 1.02,
            "bonus": -0.04,
        }
        if mixes_values:
            self.initial["value"] = partial(_waves, base=0.73, zigzag=0.0, slope=-0.4, head_dim=head_dim)


class Idle(nn.Module):
    """`v0` `[1, 1, C]`, `v1` `[C, rank]`, `v2` `[rank, C]`: a value mix that is only kept, in its published form."""

    def __init__(self, hidden: int, rank: int):
        super().__init__()
        self.initial = {"v0": 0.0, "v1": 0.0, "v2": 0.0}
        for name, shape in (("v0", (1, 1, hidden)), ("v1", (hidden, rank)), ("v2", (rank, hidden))):
            self.register_buffer(name, torch.empty(shape))


def _places(width: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per channel: its place in [0, 1], the same from -1/2 to 1/2, and a signed square over each head."""
    n = torch.arange(width, dtype=torch.float64)
    place = n / max(1, width - 1)
    half = (head_dim - 1) / 2
    wave = ((n % head_dim) - half) / max(half, 0.5)
    return place, place - 0.5, wave * wave.abs()


def _decays(tensor: Tensor, depth: float, head_dim: int) -> Tensor:
    place, _, wave = _places(len(tensor), head_dim)
    return (-6 + 6 * place ** (1 + depth**0.3) + 0.5 + 2.5 * wave).to(tensor)


def _waves(tensor: Tensor, base: float, zigzag: float, slope: float, head_dim: int) -> Tensor:
    _, line, wave = _places(len(tensor), head_dim)
    return (base + zigzag * wave + slope * line).to(tensor)
