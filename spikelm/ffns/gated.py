"""Gated channel mixer: down(act(gate(x)) * up(x)); SwiGLU with SiLU, GeGLU with GELU (Shazeer 2020)."""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.activations import ACT2FN

from spikelm.spiking.site import make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class GatedFFN(nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`; sites `gate_up` and `down`."""

    site_readers = {"gate_up_site": ("gate_proj", "up_proj"), "down_site": ("down_proj",)}

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        hidden, inner = config.hidden_size, config.at("intermediate_size", layer_idx)
        bias = config.at("ffn_bias", layer_idx)
        self.gate_up_site = make_site(config, layer_idx, "gate_up", hidden)
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.act = ACT2FN[config.hidden_act]
        self.down_site = make_site(config, layer_idx, "down", inner)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor, context: "ForwardContext | None") -> Tensor:
        """Mix the channels of every token."""
        x = self.gate_up_site(x, context)
        inner = self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.down_site(inner, context))
