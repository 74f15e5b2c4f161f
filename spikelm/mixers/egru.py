"""Event-based GRUs as token mixers: cells whose outputs are events, read by their own recurrent matrix and by the next
linear only where they are not zero.

    egru         y = cell(x),                     out = W_o y
    egru_stack   y = cell_n(... cell_1(x)),       out = y             (EvNN's language model: cells of different sizes)

A cell projects its input to three blocks of H channels, a = W x + b, and hands them to `spikelm.kernels.egru`, where
both published forms stand (Subramoney et al., ICLR 2023, arXiv 2206.06178; EvNN). In the form "evnn" the recurrent
product has a bias of its own. Thresholds are trained in [0, 1].

State of a cell: `egru` `[B, 2, H]`, internal state c and event y, float32 or better. EvNN's benchmark hands on y alone
from window to window; `egru_drop_internal` does the same between two passes.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from spikelm.cache import Stateful, StateSpec
from spikelm.initial import declare
from spikelm.kernels.egru import egru, egru_step
from spikelm.spiking.events import EventSite
from spikelm.spiking.site import NoSite, make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class EGRUCell(Stateful, nn.Module):
    """`[B, T, inputs]` -> events `[B, T, width]`, zero or above their threshold.

    Args:
        config, layer_idx: the model's configuration and the layer's index.
        inputs, width: channels of input and output.
        form: "evnn" or "paper".
        heads: blocks of the recurrent matrix `[heads, D, 3D]`, width = heads D; 1 is a full matrix.

    The rows of `in_proj` lie as `[heads, 3, D]`: the three blocks of a head side by side.
    """

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, inputs: int, width: int, form: str, heads: int = 1):
        super().__init__()
        self.layer_idx, self.width, self.form = layer_idx, width, form
        head_dim = width // heads
        # Multiply-adds of a token: reset, old state, new state. The products with events are counted by their site.
        self.state_macs = 3 * width
        self.zoneout = float(config.at("egru_zoneout", layer_idx))
        self.dampening, self.support = config.egru_dampening, config.egru_support
        self.drops_internal = config.egru_drop_internal
        self.in_proj = declare(nn.Linear(inputs, 3 * width), weight=init.xavier_normal_, bias=0.0)
        self.recurrent = nn.Parameter(torch.empty(heads, head_dim, 3 * head_dim))
        self.recurrent_bias = nn.Parameter(torch.empty(3 * width)) if form == "evnn" else None
        spread = (2 / (4 * head_dim)) ** 0.5  # Xavier over the matrix [D, 3D] of a head
        self.initial = {"recurrent": partial(init.normal_, std=spread), "recurrent_bias": 0.0}
        threshold = partial(_thresholds, mean=config.at("egru_threshold_mean", layer_idx))
        self.events = EventSite(layer_idx, width, threshold, recurrent_reads=3 * head_dim)

    def state_specs(self) -> dict[str, StateSpec]:
        """Internal state and event of every channel."""
        return {"egru": StateSpec((2, self.width), torch.float32)}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Run the cell over the real tokens of each document."""
        a = self.in_proj(x)
        state = self.read_state(context, "egru")
        if state is not None and self.drops_internal:
            state = torch.stack([torch.zeros_like(state[:, 0]), state[:, 1]], 1)
        cell = {"form": self.form, "bias": self.recurrent_bias}
        threshold = _clamped(self.events.thresholds)
        draws = self.training and self.zoneout > 0
        single = a.shape[1] == 1 and context.valid is None and context.boundary is None
        if single and state is not None and not draws and not torch.is_grad_enabled():
            y, state = egru_step(a[:, 0], self.recurrent, threshold, state, zoneout=self.zoneout or None, **cell)
            y = y[:, None]
        else:
            y, state = egru(
                a,
                self.recurrent,
                threshold,
                zoneout=self._mask(a) if draws else self.zoneout or None,
                dampening=self.dampening,
                support=self.support,
                initial_state=state,
                valid=context.valid,
                reset_mask=context.boundary,
                **cell,
            )
        self.write_state(context, "egru", state)
        return self.events(y, context)

    def _mask(self, a: Tensor) -> Tensor:
        """Which channels take their new state, `[B, T, H]`, drawn anew for every token."""
        return torch.rand(*a.shape[:2], self.width, device=a.device) >= self.zoneout


class EGRU(nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]`: one cell of `egru_size` channels; sites `qkv` and `o`."""

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        hidden = config.hidden_size
        width = config.at("egru_size", layer_idx) or hidden
        form, heads = config.at("egru_form", layer_idx), config.at("egru_heads", layer_idx)
        self.qkv_site = make_site(config, layer_idx, "qkv", hidden)
        self.cell = EGRUCell(config, layer_idx, hidden, width, form, heads)
        self.o_site = make_site(config, layer_idx, "o", width)
        # Events are not negative, so this projection alone decides signs; it starts small, as deep residual sums ask.
        spread = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
        self.o_proj = declare(nn.Linear(width, hidden, bias=False), weight=partial(init.normal_, std=spread))
        self.site_readers = {
            "qkv_site": ("cell.in_proj",),
            # The output projection reads the events, unless a site codes them anew.
            "cell.events": ("o_proj",) if isinstance(self.o_site, NoSite) else (),
            "o_site": ("o_proj",),
        }

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time."""
        return self.o_proj(self.o_site(self.cell(self.qkv_site(x, context), context), context))


class EGRUStack(nn.Module):
    """`[B, T, hidden]` -> events `[B, T, hidden]`: cells of `egru_stack_sizes`, form "evnn", full matrices.

    Every cell reads the events of the one before; the last has the model's width, so nothing is projected. The site
    `qkv` codes the input of the first; there is no site `o` (`mixer_out` codes the output).
    """

    def __init__(self, config: "SpikeLMConfig", layer_idx: int):
        super().__init__()
        sizes = config.egru_stack_sizes
        assert sizes is not None  # validated
        inputs = [config.hidden_size, *sizes[:-1]]
        self.qkv_site = make_site(config, layer_idx, "qkv", config.hidden_size)
        self.cells = nn.ModuleList(
            EGRUCell(config, layer_idx, read, width, "evnn") for read, width in zip(inputs, sizes, strict=True)
        )
        self.site_readers: dict[str, tuple[str, ...]] = {"qkv_site": ("cells.0.in_proj",)}
        for i in range(len(sizes)):
            self.site_readers[f"cells.{i}.events"] = (f"cells.{i + 1}.in_proj",) if i + 1 < len(sizes) else ()

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time, cell after cell."""
        x = self.qkv_site(x, context)
        for cell in self.cells:
            x = cell(x, context)
        return x


def _thresholds(tensor: Tensor, mean: float) -> Tensor:
    """EvNN's draw: Beta(3 m / (1 - m), 3), whose mean is m."""
    return torch.distributions.Beta(3 * mean / (1 - mean), 3.0).sample(tensor.shape).to(tensor)


def _clamped(thresholds: Tensor) -> Tensor:
    """Thresholds in [0, 1]; exact inside, and with gradient 1 everywhere, so that one that has left can come back."""
    return thresholds - (thresholds - thresholds.clamp(0.0, 1.0)).detach()
