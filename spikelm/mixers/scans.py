"""Parallel event-based relatives of the EGRU: gated scans whose states leave as events, and train in parallel.

    hgrn     f_t = b + (1 - b) sigmoid(W_f x_t),   h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)
             out = W_o (norm(events(h_t)) * silu(W_g x_t))
    mingru   u_t = sigmoid(W_u x_t),               h_t = (1 - u_t) h_{t-1} + u_t W_z x_t
             out = W_o events(h_t)

(HGRN: Qin et al. 2023, arXiv 2311.04823; minGRU: Feng et al. 2024, arXiv 2410.01201; events: `spikelm.spiking.events`.)
HGRN learns the lower bounds b through a softmax over layers; here they rise evenly with depth, b = layer / layers.

State: `recurrent` `[B, hidden]`, float32 or better.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec
from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.scan import scan, scan_step
from spikelm.norms import make_norm
from spikelm.spiking.events import Events
from spikelm.spiking.site import NoSite, make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class ScanMixer(Stateful, nn.Module):
    """What the two share: state, padding, document boundaries, events, the sites `qkv` and `o`."""

    readers: tuple[str, ...]

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        self.layer_idx, self.hidden = layer_idx, config.hidden_size
        self.state_macs = 2 * self.hidden
        self.qkv_site = make_site(config, layer_idx, "qkv", self.hidden)
        self.events = Events(layer_idx, self.hidden, config.at("event_threshold", layer_idx))
        self.o_site = make_site(config, layer_idx, "o", self.hidden)
        self.o_proj = nn.Linear(self.hidden, self.hidden, bias=False)
        self.site_readers = {"qkv_site": self.readers, "o_site": ("o_proj",)}
        # What reads the events: the output projection, unless a site codes them anew.
        self.site_readers["events"] = ("o_proj",) if isinstance(self.o_site, NoSite) else ()

    def state_specs(self) -> dict[str, StateSpec]:
        """One number per channel."""
        return {"recurrent": StateSpec((self.hidden,), torch.float32)}

    def _project(self) -> nn.Linear:
        return nn.Linear(self.hidden, self.hidden, bias=False)

    def _scan(self, inputs: Tensor, keep: Tensor, context: "ForwardContext") -> Tensor:
        """`h_t = keep_t h_(t-1) + inputs_t` over the real tokens of each document: `[B, T, hidden]`."""
        if context.valid is not None:
            valid = context.valid[..., None]
            inputs, keep = inputs * valid, torch.where(valid, keep, 1.0)
        if context.boundary is not None:
            keep = keep.masked_fill(context.boundary[..., None], 0.0)
        state = self.read_state(context, "recurrent")
        if inputs.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            h, state = scan_step(inputs[:, 0], keep[:, 0], state)
            h = h[:, None]
        else:
            h, state = scan(inputs, keep, initial_state=state)
        self.write_state(context, "recurrent", state)
        return h


class HGRN(ScanMixer):
    """`[B, T, hidden]` -> `[B, T, hidden]`."""

    readers = ("f_proj", "i_proj", "g_proj")

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__(config, layer_idx)
        self.lower_bound = layer_idx / config.num_hidden_layers
        self.f_proj, self.i_proj, self.g_proj = self._project(), self._project(), self._project()
        self.norm = make_norm("rmsnorm", self.hidden, config.norm_eps)  # scale only: silence stays silent

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time."""
        x = self.qkv_site(x, context)
        wide = wide_dtype(x)
        forget = self.lower_bound + (1 - self.lower_bound) * torch.sigmoid(self.f_proj(x).to(wide))
        h = self._scan((1 - forget) * F.silu(self.i_proj(x).to(wide)), forget, context)
        y = self.norm(self.events(h, context)).to(x.dtype) * F.silu(self.g_proj(x))
        return self.o_proj(self.o_site(y, context))


class MinGRU(ScanMixer):
    """`[B, T, hidden]` -> `[B, T, hidden]`."""

    readers = ("u_proj", "z_proj")

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__(config, layer_idx)
        self.u_proj, self.z_proj = self._project(), self._project()

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time."""
        x = self.qkv_site(x, context)
        wide = wide_dtype(x)
        update = torch.sigmoid(self.u_proj(x).to(wide))
        h = self._scan(update * self.z_proj(x).to(wide), 1 - update, context)
        return self.o_proj(self.o_site(self.events(h, context).to(x.dtype), context))
