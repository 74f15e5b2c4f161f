"""RWKV's channel mixers: squared ReLU behind a token shift.

    rwkv (RWKV-4, SpikeGPT)   x_z = mu_z x_t + (1 - mu_z) x_(t-1)   for z in k, r
                              out = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2
    rwkv7                     x_k = x_t + mu_k (x_(t-1) - x_t)
                              out = W_v relu(W_k x_k)^2

(Peng et al. 2023, arXiv 2305.13048; Zhu et al. 2023, arXiv 2302.13939; Peng et al. 2025, arXiv 2503.14456.) The two
meanings of mu are those of the published checkpoints.

State: `last` `[B, hidden]`, the token before.
"""

from functools import partial
from math import sqrt
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from spikelm.initial import declare
from spikelm.shift import Previous
from spikelm.spiking.site import make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


def channel_ramp(tensor: Tensor, power: float) -> Tensor:
    """`(i / C) ** power` for channel i of C: RWKV's initial mixing coefficients."""
    return (torch.arange(len(tensor), dtype=torch.float64) / len(tensor)).pow(power).to(tensor)


def falling_ramp(tensor: Tensor, power: float) -> Tensor:
    """`1 - (i / C) ** power`: the same for coefficients that weigh the token before (RWKV-7)."""
    return 1 - channel_ramp(tensor, power)


def orthogonal(inputs: int, outputs: int) -> partial:
    """RWKV's initialisation of a projection: orthogonal, louder where it widens."""
    return partial(init.orthogonal_, gain=max(1.0, outputs / inputs) ** 0.5)


class RWKVFFN(nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`; site `gate_up` codes each of the two shifted inputs, `down` the squares."""

    site_readers = {
        "key_site": ("key_proj",),
        "receptance_site": ("receptance_proj",),
        "down_site": ("value_proj",),
    }

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        hidden, inner = config.hidden_size, config.at("intermediate_size", layer_idx)
        self.previous = Previous(layer_idx, hidden)
        self.mix_key = nn.Parameter(torch.empty(hidden))
        self.mix_receptance = nn.Parameter(torch.empty(hidden))
        ramp = partial(channel_ramp, power=1 - layer_idx / config.num_hidden_layers)
        self.initial = {"mix_key": ramp, "mix_receptance": ramp}
        self.key_site = make_site(config, layer_idx, "gate_up", hidden)
        self.key_proj = declare(nn.Linear(hidden, inner, bias=False), weight=orthogonal(hidden, inner))
        self.receptance_site = make_site(config, layer_idx, "gate_up", hidden)
        self.receptance_proj = declare(nn.Linear(hidden, hidden, bias=False), weight=0.0)
        self.down_site = make_site(config, layer_idx, "down", inner)
        self.value_proj = declare(nn.Linear(inner, hidden, bias=False), weight=0.0)

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix the channels of every token and the one before."""
        before = self.previous(x, context)
        key = self.key_site(torch.lerp(before, x, self.mix_key), context)
        receptance = self.receptance_site(torch.lerp(before, x, self.mix_receptance), context)
        inner = F.relu(self.key_proj(key)).square()
        return torch.sigmoid(self.receptance_proj(receptance)) * self.value_proj(self.down_site(inner, context))


class RWKV7FFN(nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`; sites `gate_up` and `down`."""

    site_readers = {"gate_up_site": ("key_proj",), "down_site": ("value_proj",)}

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        hidden, inner = config.hidden_size, config.at("intermediate_size", layer_idx)
        self.previous = Previous(layer_idx, hidden)
        self.mix_key = nn.Parameter(torch.empty(hidden))
        power = (1 - layer_idx / config.num_hidden_layers) ** 4
        self.initial = {"mix_key": partial(falling_ramp, power=power)}
        self.gate_up_site = make_site(config, layer_idx, "gate_up", hidden)
        uniform = partial(init.uniform_, a=-0.5 / sqrt(hidden), b=0.5 / sqrt(hidden))
        self.key_proj = declare(nn.Linear(hidden, inner, bias=False), weight=uniform)
        self.down_site = make_site(config, layer_idx, "down", inner)
        self.value_proj = declare(nn.Linear(inner, hidden, bias=False), weight=0.0)

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix the channels of every token and the one before."""
        shifted = torch.lerp(x, self.previous(x, context), self.mix_key)
        inner = F.relu(self.key_proj(self.gate_up_site(shifted, context))).square()
        return self.value_proj(self.down_site(inner, context))
