"""Spike sites: one activation, coded once, in front of the plain linears that read it or at the output of a block.

A site holds a code (this file) or a neuron with a membrane (`spikelm.spiking.neurons`). The code:

    m   = mean(|x|) over the channels of a token, or a stored mean           (adaptive threshold, SpikingBrain 2.1)
    V   = m / k
    s   = round(x / V), and 0 where |x| < dead_zone * m                       integer spike counts
    out = s * V                                                              what the linears read

`dead_zone`, `k` and `magnitude` are float32 tensors of the checkpoint whatever the dtype of the model, so that a
bfloat16 model fires like its float32 twin on the same activations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.initial import fill
from spikelm.kernels.spike_encode import spike_encode, spike_quantize
from spikelm.precision import KeepsDtype

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext

Observer = Callable[["Site", Tensor, Tensor, "ForwardContext | None"], None]


class Site(KeepsDtype):
    """What all sites share: where they stand, and who watches them.

    Attributes:
        layer_idx, name: where the site stands. width: channels of what it codes.
        observers: called with (site, counts, threshold, context) at every pass; see `SpikeStatistics`.
        substitute: if set, called instead of the code: x -> what the linears read; for controls.
        handed_on: what the readers were given last, as (values, counts, threshold); kept only if `hands_counts`.
        graded: whether spikes carry values that no train of slots holds; their counts are then 0 and 1.
        recurrent_reads: weights of a recurrent matrix that one spike is multiplied with, beside those of readers.
    """

    graded = False
    recurrent_reads = 0

    def __init__(self, layer_idx: int, name: str, width: int):
        super().__init__()
        self.layer_idx, self.name, self.width = layer_idx, name, width
        self.observers: list[Observer] = []
        self.substitute: Callable[[Tensor], Tensor] | None = None
        self.hands_counts = False
        self.handed_on: tuple[Tensor, Tensor, Tensor] | None = None

    def _show(self, counts: Tensor, threshold: Tensor, context: "ForwardContext | None") -> None:
        for observer in self.observers:
            observer(self, counts, threshold, context)


class SpikeSite(Site):
    """Codes `[..., width]` into integer counts and a threshold, and hands on their product.

    Attributes:
        k: `[1]`, counts per mean magnitude.
        dead_zone: `[1]` or `[width]`, in units of the mean magnitude.
        magnitude: `[1]`, the stored mean magnitude in units of x; only if `spike_threshold` is not "token".
    """

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, name: str, width: int):
        super().__init__(layer_idx, name, width)
        self.max_count = config.spike_max_count
        self.rectify = config.spike_code == "binary"
        self.initial = {
            "k": float(config.at("spike_k", layer_idx)),
            "dead_zone": float(config.at("spike_dead_zone", layer_idx)),
            "magnitude": float(config.spike_magnitude),
        }
        zones = width if config.spike_dead_zone_per_channel else 1
        self.k: Tensor
        self.dead_zone: Tensor
        self.magnitude: Tensor | None
        self.register_buffer("k", torch.empty(1, dtype=torch.float32))
        self.register_buffer("dead_zone", torch.empty(zones, dtype=torch.float32))
        if config.spike_threshold == "learned":
            self.magnitude = nn.Parameter(torch.empty(1, dtype=torch.float32))
        else:
            stored = config.spike_threshold == "calibrated"
            self.register_buffer("magnitude", torch.empty(1, dtype=torch.float32) if stored else None)
        fill(self)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Counts `[..., width]` (integers, as float32 or float64) and threshold `[..., 1]`; no gradient."""
        if self.rectify:
            x = x.relu()
        return spike_encode(x, self.k, dead_zone=self.dead_zone, magnitude=self.magnitude, max_count=self.max_count)

    def forward(self, x: Tensor, context: "ForwardContext | None" = None) -> Tensor:
        """`[..., width]` -> counts times threshold, same shape and dtype; straight-through gradient."""
        if self.substitute is not None:
            return self.substitute(x)
        if torch.is_grad_enabled() and (x.requires_grad or self._learns()):
            if self.observers:
                with torch.no_grad():
                    self._show(*self.encode(x), context)
            if self.rectify:
                x = x.relu()
            return spike_quantize(
                x, self.k, dead_zone=self.dead_zone, magnitude=self.magnitude, max_count=self.max_count
            )
        counts, threshold = self.encode(x)
        self._show(counts, threshold, context)
        values = (counts * threshold).to(x.dtype)
        if self.hands_counts:
            self.handed_on = values, counts, threshold
        return values

    def _learns(self) -> bool:
        return self.magnitude is not None and self.magnitude.requires_grad

    def extra_repr(self) -> str:
        """Name, width, and how thresholds are found."""
        mode = "token" if self.magnitude is None else "stored"
        return f"{self.name}, width={self.width}, threshold={mode}, dead_zones={self.dead_zone.numel()}"


class NoSite(nn.Module):
    """Stands where an activation is not spike-coded: hands it on unchanged."""

    def forward(self, x: Tensor, context: "ForwardContext | None" = None) -> Tensor:
        """`[..., width]` -> itself."""
        return x


def make_site(config: "SpikeLMConfig", layer_idx: int, name: str, width: int) -> nn.Module:
    """The site `name` of a layer: a code or a neuron if the configuration lists it, else a `NoSite`."""
    if name not in config.sites_at(layer_idx):
        return NoSite()
    neuron = config.at("spike_neuron", layer_idx)
    if neuron == "none":
        return SpikeSite(config, layer_idx, name, width)
    from spikelm.spiking.neurons import NEURONS  # a neuron is a site with a membrane

    return NEURONS[neuron](config, layer_idx, name, width)


@dataclass(frozen=True)
class SpikeGroup:
    """A site and the linears that read it: what an event-driven runtime replaces as one.

    Attributes:
        path: the site's full name in the model, e.g. `model.layers.0.mixer.qkv_site`.
        site: the site. layer_idx, name: where it stands and what it codes.
        readers: name -> linear, in the order of the computation; none at the output of a block.
    """

    path: str
    site: Site
    readers: dict[str, nn.Linear]

    @property
    def layer_idx(self) -> int:
        """Index of the decoder layer."""
        return self.site.layer_idx

    @property
    def name(self) -> str:
        """A name of `configuration.SITES`."""
        return self.site.name

    @property
    def fan_out(self) -> int:
        """Weights that one input channel is multiplied with."""
        return sum(linear.out_features for linear in self.readers.values()) + self.site.recurrent_reads


def spike_groups(model: nn.Module) -> Iterator[SpikeGroup]:
    """All spike sites of a model with their readers, in layer order.

    A module that owns sites says which linears read them: `site_readers = {"o_site": ("o_proj",)}`, names of both
    relative to itself (dots allowed).
    """
    for path, module in model.named_modules():
        for site_name, readers in getattr(module, "site_readers", {}).items():
            site = module.get_submodule(site_name)
            if isinstance(site, Site):
                linears = {name: _plain(module.get_submodule(name)) for name in readers}
                yield SpikeGroup(f"{path}.{site_name}", site, linears)  # type: ignore[arg-type]


def _plain(linear: nn.Module) -> nn.Module:
    """The linear itself, without the low-rank pair that an adapter puts beside it."""
    return getattr(linear, "base_layer", linear)
