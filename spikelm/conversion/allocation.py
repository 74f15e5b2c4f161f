"""Where silence costs least: dead zones for all sites from one pass through the float model.

At a site with activation x, mean magnitude m and loss gradient g, silencing channel c where |x_c| = u m costs about
(g_c u m)^2 / 2 of divergence from the model's own predictions (a diagonal Fisher estimate: the loss is that of labels
drawn from the model). With I_c = E[(g_c m)^2] and F the weights that one input is multiplied with, the dead zone

    d_c = sqrt(lambda F / I_c)

silences an input exactly if it saves more than 1 / lambda weight reads per unit of cost: no other choice of dead
zones that saves as many reads costs less. One lambda serves all channels of all sites; it is found by bisection on
the distribution of u, for the share of reads that is to be saved.

Rounding to steps m / k costs sum_c I_c / (24 k^2) per token, and makes k spikes for each input, so F k for each channel
are weights added by spikes. The least cost for as many additions has k^3 proportional to sum_c I_c / (F width).
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from spikelm.spiking.site import SpikeGroup

LARGEST = 1.5  # a channel silenced beyond this is not described by its gradient any more
_BINS, _WIDTH = 200, 0.02  # of the histograms of u
_ROUNDS = 40
_STRIDE = 3  # every third token is counted: shares are sums over many channels, and counting costs time


class ActivationProfile:
    """Per site: the distribution of u = |x| / m for every channel, and the importance I of every channel.

    Attributes:
        importance: per site `[width]`, E[(g m)^2]; zeros until gradients were seen.
        counts: per site `[width, bins]`, how often u fell into each bin; the last bin is open.
    """

    def __init__(self, groups: list[SpikeGroup]):
        self.groups = groups
        device = [group.site.k.device for group in groups]
        self.counts = [
            torch.zeros(group.site.width * (_BINS + 1), dtype=torch.int32, device=d) for group, d in zip(groups, device)
        ]
        self.importance = [
            torch.zeros(group.site.width, dtype=torch.float64, device=d) for group, d in zip(groups, device)
        ]
        self.rows = [0] * len(groups)

    def see(self, index: int, x: Tensor) -> None:
        """Count the activations `[..., width]` of a site; if they take part in a backward pass, their gradient too."""
        site = self.groups[index].site
        size = x.detach().abs().flatten(0, -2).float()
        mean = size.mean(-1, keepdim=True) if site.magnitude is None else site.magnitude.detach()
        mean = mean.clamp_min(torch.finfo(torch.float32).tiny)
        some = (size / mean)[::_STRIDE]
        bins = some.div_(_WIDTH).clamp_(max=_BINS).int()
        bins += torch.arange(site.width, dtype=torch.int32, device=x.device) * (_BINS + 1)
        self.counts[index] += torch.bincount(bins.flatten(), minlength=self.counts[index].numel()).int()
        self.rows[index] += size.shape[0]
        if x.requires_grad:
            x.register_hook(lambda gradient: self._weigh(index, gradient, mean))

    def _weigh(self, index: int, gradient: Tensor, mean: Tensor) -> None:
        weighted = gradient.flatten(0, -2).float() * mean
        self.importance[index] += weighted.square().sum(0).double()

    def uniform(self, share: float) -> list[Tensor]:
        """One dead zone for all sites, with which the weighted share `share` is silent."""
        return self._solve(share, lambda d: [self._one(i, d) for i in range(len(self.groups))], _BINS * _WIDTH)

    def by_gradient(self, share: float) -> list[Tensor]:
        """Dead zones `[width]` per site with the least cost at the weighted share `share`."""
        scales = [
            (group.fan_out * rows / importance.clamp_min(1e-300)).sqrt().clamp_max(1e30)
            for group, importance, rows in zip(self.groups, self.importance, self.rows, strict=True)
        ]
        return self._solve(share, lambda root: [(root * scale).clamp_max(LARGEST).float() for scale in scales], LARGEST)

    def counts_by_gradient(self) -> list[float]:
        """k per site with the least cost of rounding; its mean over the reads stays what it is."""
        sites = [group.site for group in self.groups]
        reads = [group.fan_out * group.site.width for group in self.groups]
        price = [
            (float(importance.sum()) / rows / read) ** (1 / 3)
            for importance, rows, read in zip(self.importance, self.rows, reads, strict=True)
        ]
        before = sum(float(site.k) * read for site, read in zip(sites, reads, strict=True))
        scale = before / sum(p * read for p, read in zip(price, reads, strict=True))
        return [p * scale for p in price]

    def share(self, zones: list[Tensor]) -> float:
        """The silent share, weighted by reads, that dead zones (`[1]` or `[width]` per site) would give."""
        saved = total = 0.0
        for group, below, zone in zip(self.groups, self._cumulative, zones, strict=True):
            site = group.site
            silent = zone.float().maximum(0.5 / site.k).expand(site.width)  # what rounds to zero is silent
            place = (silent / _WIDTH).clamp_max(_BINS)
            edge = place.long()
            low = below.gather(1, edge[:, None])[:, 0]
            high = below.gather(1, edge[:, None] + 1)[:, 0]
            inside = torch.where(edge < _BINS, place - edge, 0.0)
            saved += float((low + inside * (high - low)).sum(dtype=torch.float64)) * group.fan_out
            total += site.width * group.fan_out
        return saved / total

    @cached_property
    def _cumulative(self) -> list[Tensor]:
        """Per site `[width, bins + 2]`: the share of u below every edge of the histogram, from 0 to 1."""
        shares = []
        for group, counts in zip(self.groups, self.counts, strict=True):
            below = torch.nn.functional.pad(counts.view(group.site.width, -1).cumsum(1), (1, 0)).float()
            shares.append(below / below[:, -1:])
        return shares

    def _one(self, index: int, zone: float) -> Tensor:
        return torch.full((1,), zone, device=self.counts[index].device)

    def _solve(self, share: float, zones: Callable[[float], list[Tensor]], largest: float) -> list[Tensor]:
        """`zones(s)`, growing in s, at the s where the share is met; bisected in the logarithm."""
        low, high = math.log(1e-30), math.log(1e30)
        least, most = self.share(zones(0.0)), self.share(zones(math.exp(high)))
        if not least <= share <= most:
            raise ValueError(
                f"A silent share of {share:g} cannot be reached: rounding alone silences {least:.3f} of the reads, "
                f"and dead zones up to {largest:g} no more than {most:.3f}. Choose a share between, or another k."
            )
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(zones(math.exp(middle))) < share else (low, middle)
        return zones(math.exp(high))
