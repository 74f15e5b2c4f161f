"""RWKV-4's token mixer, as in SpikeGPT: a decaying softmax average of values, gated by a receptance.

    x_z = mu_z x_t + (1 - mu_z) x_(t-1)              for z in k, v, r
    out = W_o (sigmoid(W_r x_r) * wkv(W_k x_k, W_v x_v))

with `wkv` of `spikelm.kernels.wkv`, decay -exp(time_decay) and bonus time_first per channel (Peng et al. 2023,
arXiv 2305.13048; Zhu et al. 2023, arXiv 2302.13939).

States: `wkv` `[B, 3, hidden]`, float32 or better; `last` `[B, hidden]`, the token before.
"""

from functools import partial
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec
from spikelm.ffns.rwkv import channel_ramp, orthogonal
from spikelm.initial import declare
from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.wkv import wkv, wkv_step
from spikelm.precision import KeepsDtype
from spikelm.shift import Previous
from spikelm.spiking.site import make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class RWKV4(Stateful, nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`; site `qkv` codes each shifted input, `o` the gated average."""

    site_readers = {
        "key_site": ("k_proj",),
        "value_site": ("v_proj",),
        "receptance_site": ("r_proj",),
        "o_site": ("o_proj",),
    }

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx, self.hidden = layer_idx, config.hidden_size
        self.state_macs = 6 * self.hidden
        hidden, layers = config.hidden_size, config.num_hidden_layers
        self.previous = Previous(layer_idx, hidden)
        for name in ("mix_key", "mix_value", "mix_receptance"):
            setattr(self, name, nn.Parameter(torch.empty(hidden)))
        depth, rest = layer_idx / max(1, layers - 1), 1 - layer_idx / layers
        self.initial = {
            "mix_key": partial(channel_ramp, power=rest),
            "mix_value": partial(_raised_ramp, power=rest, by=0.3 * depth),
            "mix_receptance": partial(channel_ramp, power=rest / 2),
        }
        self.time = Time(hidden, depth)
        for name, start in (("key", 0.0), ("value", orthogonal(hidden, hidden)), ("receptance", 0.0), ("o", 0.0)):
            site = "o" if name == "o" else "qkv"
            setattr(self, f"{name}_site", make_site(config, layer_idx, site, hidden))
            setattr(self, f"{name[0]}_proj", declare(nn.Linear(hidden, hidden, bias=False), weight=start))

    def state_specs(self) -> dict[str, StateSpec]:
        """Numerator, denominator and their exponent, per channel."""
        return {"wkv": StateSpec((3, self.hidden), torch.float32)}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time."""
        before = self.previous(x, context)
        key = self.k_proj(self.key_site(torch.lerp(before, x, self.mix_key), context))
        value = self.v_proj(self.value_site(torch.lerp(before, x, self.mix_value), context))
        receptance = self.r_proj(self.receptance_site(torch.lerp(before, x, self.mix_receptance), context))
        decay, bonus = -self.time.decay.to(wide_dtype(x)).exp(), self.time.first
        state = self.read_state(context, "wkv")
        single = x.shape[1] == 1 and context.valid is None and context.boundary is None
        if single and state is not None and not torch.is_grad_enabled():
            y, state = wkv_step(key[:, 0], value[:, 0], decay, bonus, state)
            y = y[:, None]
        else:
            masks = {"valid": context.valid, "reset_mask": context.boundary}
            y, state = wkv(key, value, decay, bonus, initial_state=state, **masks)
        self.write_state(context, "wkv", state)
        return self.o_proj(self.o_site(torch.sigmoid(receptance) * y, context))


class Time(KeepsDtype):
    """`decay` and `first` `[hidden]`, float32: logarithm of the decay's rate, and the bonus of the newest token."""

    def __init__(self, width: int, depth: float):
        super().__init__()
        self.decay = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.first = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.initial = {"decay": partial(_decays, power=0.7 + 1.3 * depth), "first": _zigzag}


def _decays(tensor: Tensor, power: float) -> Tensor:
    """From -5 (half-life 103 tokens) to 3 over the channels."""
    places = torch.arange(len(tensor), dtype=torch.float64) / max(1, len(tensor) - 1)
    return (-5 + 8 * places.pow(power)).to(tensor)


def _zigzag(tensor: Tensor) -> Tensor:
    """ln 0.3, and half a unit around it."""
    return (log(0.3) + 0.5 * ((torch.arange(len(tensor), dtype=torch.float64) + 1) % 3 - 1)).to(tensor)


def _raised_ramp(tensor: Tensor, power: float, by: float) -> Tensor:
    return channel_ramp(tensor, power) + by
