"""Neurons: sites whose units keep a membrane from token to token; the token axis is their time axis.

    lif         H_t = decay V_(t-1) + gain x_t,   s_t = 1 where H_t >= threshold,   V_t = H_t after the reset
    plif        the same, with a learned decay and threshold per channel (Fang et al. 2021, arXiv 2007.05785, learn
                the decay; Rathi & Roy 2020, arXiv 2008.03658, both)
    astrocyte   a lif whose threshold and input follow the unit's own slow activity (see `spikelm.kernels.lif`)
    dsn         no reset: H_t = alpha_t H_(t-1) + (1 - alpha_t) x_t with a decay read off the last inputs,
                alpha_t = sigmoid(causal depthwise convolution of x); then the site's code of H_t (arXiv 2602.01133)

The first three fire 0 or 1; with the code `ternary` every channel has an ON and an OFF unit, fed x and -x, and the
site hands on ON - OFF. Their spikes have size 1: what amplitude they need, the next weights learn. `dsn` fires any
code, with the thresholds of the code (`spike_k`, `spike_threshold`, `spike_max_count`): its potential is a plain scan,
so it trains in parallel over time. `neuron_temporal_grad` holds for all four.

States: `membrane` `[B, D]` (`[B, 2 D]` with OFF units; `[B, 3, ...]` with an astrocyte: membrane, trace, calcium);
dsn: `potential` `[B, D]` and the last inputs `[B, D]` of its convolution. float32 or better.
"""

from functools import partial
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.cache import Stateful, StateSpec
from spikelm.initial import fill
from spikelm.kernels.lif import Astrocyte, gradient_cuts, lif
from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.scan import scan, scan_step
from spikelm.precision import KeepsDtype
from spikelm.shift import Previous
from spikelm.spiking.site import Site, SpikeSite

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


def fire(x: Tensor) -> Tensor:
    """Heaviside step of `[B, T, D]`, 1 where x >= 0, with SpikeGPT's surrogate gradient (atan, alpha 2, width 1)."""
    return lif(x, 0.0, 0.0, gain="additive", reset="none", temporal_grad="none")[0]


class LIFSite(Stateful, Site):
    """Leaky integrate-and-fire units with one decay and threshold for all channels, given by the configuration."""

    traces = 1

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, name: str, width: int):
        super().__init__(layer_idx, name, width)
        self.paired = config.spike_code == "ternary"
        self.units = 2 * width if self.paired else width
        self.decay, self.threshold = float(config.neuron_decay), float(config.neuron_threshold)
        self.options = {
            "reset": config.neuron_reset,
            "detach_reset": config.neuron_detach_reset,
            "surrogate": config.neuron_surrogate,
            "width": float(config.neuron_width),
            "gain": config.neuron_gain,
            "temporal_grad": config.neuron_temporal_grad,
            "window": config.neuron_grad_window,
        }

    def state_specs(self) -> dict[str, StateSpec]:
        """The membranes, with an astrocyte its two traces beside them."""
        shape = (self.units,) if self.traces == 1 else (self.traces, self.units)
        return {"membrane": StateSpec(shape, torch.float32)}

    def parameters_of_units(self) -> tuple[Tensor | float, Tensor | float, Astrocyte | None]:
        """Decay, threshold and astrocyte, each a number or one value per unit."""
        return self.decay, self.threshold, None

    def forward(self, x: Tensor, context: "ForwardContext | None" = None) -> Tensor:
        """Currents `[B, T, width]` -> spikes in {0, 1} or {-1, 0, 1}, same shape and dtype."""
        if self.substitute is not None:
            return self.substitute(x)
        spikes = self._run(torch.cat([x, -x], -1) if self.paired else x, context)
        if self.paired:
            on, off = spikes.chunk(2, -1)
            spikes = on - off
        if self.observers:
            with torch.no_grad():
                counts = spikes.to(wide_dtype(x))
                self._show(counts, torch.ones_like(counts[..., :1]), context)
        return spikes

    def _run(self, x: Tensor, context: "ForwardContext | None") -> Tensor:
        decay, threshold, astrocyte = self.parameters_of_units()
        state = None if context is None else self.read_state(context, "membrane")
        boundary = None if context is None else context.boundary
        options = {"astrocyte": astrocyte, "initial_state": state, **self.options}
        if context is None or context.valid is None:
            spikes, state = lif(x, decay, threshold, reset_mask=boundary, **options)
        else:
            # Only real tokens, one row after the other: padding neither leaks nor fires.
            valid = context.valid
            bounds = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.sum(1).cumsum(0)])
            resets = None if boundary is None else boundary[valid][None]
            real, state = lif(x[valid][None], decay, threshold, cu_seqlens=bounds, reset_mask=resets, **options)
            spikes = torch.zeros_like(x).masked_scatter(valid[..., None], real)
        if context is not None:
            self.write_state(context, "membrane", state)
        return spikes

    def extra_repr(self) -> str:
        """Name and width."""
        return f"{self.name}, width={self.width}"


class PLIFSite(LIFSite):
    """LIF with a learned decay (through a sigmoid) and threshold for every unit.

    A threshold is the magnitude of its parameter: at zero or below a unit would fire at rest, without any input.
    """

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, name: str, width: int):
        super().__init__(config, layer_idx, name, width)
        self.decay_logit = nn.Parameter(torch.empty(self.units, dtype=torch.float32))
        self.thresholds = nn.Parameter(torch.empty(self.units, dtype=torch.float32))
        self.initial = {"decay_logit": log(self.decay / (1 - self.decay)), "thresholds": self.threshold}
        fill(self)

    def parameters_of_units(self) -> tuple[Tensor | float, Tensor | float, Astrocyte | None]:
        """Decay and threshold `[units]`."""
        return torch.sigmoid(self.decay_logit), self.thresholds.abs(), None


class AstrocyteSite(LIFSite):
    """LIF modulated by an astrocyte: at the start its gains are zero, and it is plain LIF.

    Half-lives of trace and calcium are spread over the channels, 8 to 2,048 tokens, and learned.
    """

    traces = 3

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, name: str, width: int):
        super().__init__(config, layer_idx, name, width)
        for parameter in ("trace_logit", "calcium_logit", "sensitivity", "threshold_gain", "input_gain"):
            setattr(self, parameter, nn.Parameter(torch.empty(self.units, dtype=torch.float32)))
        slow = partial(_half_life_logits, shortest=8.0, longest=2048.0)
        self.initial = {
            "trace_logit": slow,
            "calcium_logit": slow,
            "sensitivity": 4.0,
            "threshold_gain": 0.0,
            "input_gain": 0.0,
        }
        fill(self)

    def parameters_of_units(self) -> tuple[Tensor | float, Tensor | float, Astrocyte | None]:
        """Decay and threshold of the configuration; the astrocyte's parameters `[units]`.

        The threshold's gain stays below the threshold, so that thresholds stay positive.
        """
        astrocyte = Astrocyte(
            torch.sigmoid(self.trace_logit),
            torch.sigmoid(self.calcium_logit),
            self.sensitivity.clamp(0.0, 8.0),
            self.threshold * torch.tanh(self.threshold_gain / self.threshold),
            self.input_gain,
        )
        return self.decay, self.threshold, astrocyte


def _half_life_logits(tensor: Tensor, shortest: float, longest: float) -> Tensor:
    """Logits of decays whose half-lives are spread evenly on a logarithmic scale."""
    lives = torch.logspace(log(shortest, 10), log(longest, 10), len(tensor), dtype=torch.float64)
    return torch.logit(0.5 ** (1 / lives)).to(tensor)


class DynamicSite(SpikeSite):
    """Reset-free units with input-dependent decay in front of the site's code."""

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, name: str, width: int):
        super().__init__(config, layer_idx, name, width)
        self.potential = ResetFree(config, layer_idx, width)

    def forward(self, x: Tensor, context: "ForwardContext | None" = None) -> Tensor:
        """`[B, T, width]` -> counts times threshold of the units' potentials, same shape and dtype."""
        # Coded as wide as they are: rounded first, potentials of a bfloat16 model would give other counts.
        return super().forward(x if context is None else self.potential(x, context), context).to(x.dtype)


class ResetFree(Stateful, KeepsDtype):
    """Potentials `H_t = alpha_t H_(t-1) + (1 - alpha_t) x_t`, alpha_t from a convolution over four tokens."""

    taps = 4

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, width: int):
        super().__init__()
        self.layer_idx, self.width, decay = layer_idx, width, float(config.neuron_decay)
        # Tokens of a piece that the gradient does not leave: 0 for the whole text, 1 for none (SLTT).
        self.grad_window = {"full": 0, "none": 1}.get(config.neuron_temporal_grad, config.neuron_grad_window or 0)
        self.weight = nn.Parameter(torch.empty(self.taps, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        # With weights of zero every unit starts as a plain leaky one with the configuration's decay.
        self.initial = {"weight": 0.0, "bias": log(decay / (1 - decay))}
        self.earlier = nn.ModuleList(Previous(layer_idx, width) for _ in range(self.taps - 1))
        fill(self)

    def state_specs(self) -> dict[str, StateSpec]:
        """The potentials."""
        return {"potential": StateSpec((self.width,), torch.float32)}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """`[B, T, width]` -> potentials of the same shape, float32 or better."""
        wide = wide_dtype(x)
        weight, logits, tap = self.weight.to(wide), self.bias.to(wide), x
        for i in range(self.taps):
            logits = logits + weight[i] * tap.to(wide)
            if i < self.taps - 1:
                tap = self.earlier[i](tap, context)
        alpha = torch.sigmoid(logits)
        inputs = (1 - alpha) * x.to(wide)
        if context.valid is not None:
            keep = context.valid[..., None]
            alpha, inputs = torch.where(keep, alpha, 1.0), inputs * keep
        if context.boundary is not None:
            alpha = alpha.masked_fill(context.boundary[..., None], 0.0)
        state = self.read_state(context, "potential")
        if x.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            potentials, state = scan_step(inputs[:, 0], alpha[:, 0], state)
            potentials = potentials[:, None]
        else:
            start = state
            potentials, state = scan(inputs, alpha, initial_state=start)
            if self.grad_window and torch.is_grad_enabled():
                potentials = self._cut(inputs, alpha, potentials.detach(), start, context)
        self.write_state(context, "potential", state)
        return potentials

    def _cut(
        self, inputs: Tensor, alpha: Tensor, potentials: Tensor, start: Tensor | None, context: "ForwardContext"
    ) -> Tensor:
        """The same potentials `[B, T, width]`, whose gradient ends in front of the first token of every piece."""
        first = torch.zeros_like(potentials[:, :1]) if start is None else start[:, None].to(potentials.dtype)
        before = torch.cat([first, potentials[:, :-1]], 1)
        cuts = gradient_cuts(inputs, None, context.boundary, self.grad_window)
        assert cuts is not None  # there is a window
        cuts = cuts[..., None]
        pieces, _ = scan(inputs + torch.where(cuts, alpha * before, 0.0), alpha.masked_fill(cuts, 0.0))
        return potentials + (pieces - pieces.detach())  # not one bit of a potential depends on how it is trained


NEURONS = {"lif": LIFSite, "plif": PLIFSite, "astrocyte": AstrocyteSite, "dsn": DynamicSite}
