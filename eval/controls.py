"""Controls: the same model with its spike sites changed for the length of a `with` block.

A spiking row alone proves little: fine counts are a quantiser by another name, and any threshold makes zeros. Beside
it stand, at the same silent share (reads) where they have one:

    uniform dead zone   the code that the configuration states: one k and one dead zone for all sites: what a
                        calibration is worth
    TEAL                x where |x| >= t, else 0; t per site, a quantile of |x|; kept values exact (arXiv 2408.14690)
    int-k ANN           round(x / a) a with a = max|x| of the token / n: 2n + 1 levels, n the site's largest count
    plain k             the code without a dead zone

Every context restores what it changed, also after an error. A substituted site has no counts, so observers (and with
them `SpikeStatistics`) see 1 where its output is not zero: the silent share of such a row is right, and is all that
may be read from it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spikelm.spiking.site import Site, SpikeGroup, SpikeSite, spike_groups

Setting = TypeVar("Setting")
Substitute = Callable[[Tensor], Tensor]


@contextmanager
def restored_sites(model: nn.Module) -> Iterator[list[SpikeSite]]:
    """Within this context the tensors of all spike sites may be changed; afterwards they are as before."""
    sites = [group.site for group in spike_groups(model)]
    saved = [
        (site, name, tensor, tensor.detach().clone())
        for site in sites
        for name, tensor in [*site.named_parameters(recurse=False), *site.named_buffers(recurse=False)]
    ]
    try:
        yield sites
    finally:
        for site, name, tensor, value in saved:
            tensor.data = value
            setattr(site, name, tensor)


@contextmanager
def same_code(model: nn.Module, dead_zone: float, k: float | None = None) -> Iterator[None]:
    """Give all sites one `dead_zone` (in mean magnitudes) and `k` (None: the configuration's)."""
    with restored_sites(model) as sites:
        for site in sites:
            site.k.data.fill_(site.initial["k"] if k is None else k)
            site.dead_zone.data.fill_(dead_zone)
        yield


def uniform_dead_zone(model: nn.Module, dead_zone: float) -> Any:
    """Context: one dead zone for all sites, in mean magnitudes; k as the configuration says."""
    return same_code(model, dead_zone)


@contextmanager
def allocated(model: nn.Module, dead_zones: dict[str, Tensor]) -> Iterator[None]:
    """Give every site its own dead zones, in mean magnitudes: site path -> `[1]` or `[width]`."""
    with restored_sites(model):
        for group in spike_groups(model):
            zone = dead_zones[group.path]
            group.site.dead_zone.data = zone.to(group.site.dead_zone)  # a site may hold one number or one per channel
        yield


def plain_code(model: nn.Module, k: float = 3.0) -> Any:
    """Context: k counts per mean magnitude, no dead zone."""
    return same_code(model, 0.0, k)


def teal(model: nn.Module, thresholds: dict[str, float]) -> Any:
    """Context: zero what is smaller than the site's threshold (path -> units of x), keep the rest exact."""
    return substituted(model, lambda group: partial(_above, thresholds[group.path]))


def int_levels(model: nn.Module, largest: dict[str, int]) -> Any:
    """Context: per-token symmetric quantiser; site path -> n, the largest of its integers -n ... n."""
    return substituted(model, lambda group: partial(_quantize, max(1, largest[group.path])))


def bits_of(largest: int) -> int:
    """Bits that hold the integers -largest ... largest."""
    return math.ceil(math.log2(2 * largest + 1))


@contextmanager
def substituted(model: nn.Module, make: Callable[[SpikeGroup], Substitute]) -> Iterator[None]:
    """Replace the code of every site by the function that `make` gives for its group."""
    with ExitStack() as stack:
        for group in spike_groups(model):
            stack.callback(setattr, group.site, "substitute", group.site.substitute)
            group.site.substitute = make(group)
            stack.callback(group.site.register_forward_hook(_show_zeros).remove)
        yield


def _show_zeros(site: Site, args: tuple, output: Tensor) -> None:
    if not site.observers:
        return
    context = args[1] if len(args) > 1 else None
    passed = (output != 0).to(torch.float32)
    for observer in site.observers:
        observer(site, passed, passed.new_ones(*passed.shape[:-1], 1), context)


def _above(threshold: float, x: Tensor) -> Tensor:
    return x.masked_fill(x.abs() < threshold, 0.0)


def _quantize(largest: int, x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    step = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny) / largest
    return ((wide / step).round() * step).to(x.dtype)


class MagnitudeProfile:
    """How large the inputs of every site are, in absolute terms and against the mean magnitude of their token.

    Made from one pass of the model over calibration tokens with its sites switched to pass everything on. From it
    follow thresholds and dead zones for any silent share without another pass; the shares of a real pass differ a
    little, because zeros in front change what comes behind: see `match_share`.
    """

    def __init__(self, model: nn.Module):
        self.groups = list(spike_groups(model))
        self.model = model
        self.sizes = {group.path: _Histogram() for group in self.groups}
        self.relative = {group.path: _Histogram() for group in self.groups}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within this context every pass of the model is added to the profile."""
        with substituted(self.model, lambda group: partial(self._collect, group)):
            yield

    def _collect(self, group: SpikeGroup, x: Tensor) -> Tensor:
        size = x.detach().abs().float()
        mean = size.mean(-1, keepdim=True) if group.site.magnitude is None else group.site.magnitude
        self.sizes[group.path].add(size)
        self.relative[group.path].add(size / mean.clamp_min(torch.finfo(torch.float32).tiny))
        return x

    def thresholds(self, share: float) -> dict[str, float]:
        """Site path -> the size below which this share of its inputs lies; for `teal`."""
        return {path: histogram.quantile(share) for path, histogram in self.sizes.items()}

    def dead_zone(self, share: float) -> float:
        """The one dead zone that silences this share of the reads; 0 if rounding alone silences more."""
        if self.silent_share(0.0) >= share:
            return 0.0
        low, high = 0.0, 1.0
        while self.silent_share(high) < share and high < 1e6:
            high *= 2
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.silent_share(middle) < share else (low, middle)
        return (low + high) / 2

    def silent_share(self, dead_zone: float) -> float:
        """Silent share (reads) at one dead zone and the configuration's k; what rounds to zero is silent, too."""
        silent = reads = 0.0
        for group in self.groups:
            weight = group.site.width * group.fan_out
            rounded = 0.5 / group.site.initial["k"]
            silent += weight * self.relative[group.path].below(max(dead_zone, rounded))
            reads += weight
        return silent / reads


def match_share(target: float, setting: Callable[[float], Setting], measure: Callable[[Setting], float]) -> Setting:
    """The setting with which a real pass has the silent share `target`.

    Args:
        target: a silent share.
        setting: expected share -> setting, e.g. `profile.dead_zone`.
        measure: runs the model with a setting and returns its silent share.

    Returns:
        the setting that came closest in at most four passes, within 0.001 as a rule.
    """
    aim, tried = target, []
    for _ in range(4):
        chosen = setting(aim)
        measured = measure(chosen)
        tried.append((abs(measured - target), chosen))
        if tried[-1][0] < 0.001:
            break
        aim = min(max(aim + target - measured, 0.0), 0.999)
    return min(tried, key=lambda t: t[0])[1]


class _Histogram:
    """Counts of non-negative float32 values in bins 1/128 of an octave wide: a float's upper bits are its bin."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2**15, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        bins = values.contiguous().view(torch.int32) >> 16
        self.counts += torch.bincount(bins.flatten(), minlength=2**15).cpu()

    def below(self, value: float) -> float:
        """Share of the values below `value`."""
        index = int(torch.tensor(value).view(torch.int32)) >> 16
        low, high = _edge(index), _edge(index + 1)
        part = (value - low) / (high - low)
        return float((self.counts[:index].sum() + part * self.counts[index]) / self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value below which this share lies."""
        total = self.counts.cumsum(0)
        wanted = share * float(total[-1])
        index = min(int(torch.searchsorted(total, wanted)), len(total) - 1)
        inside = float(self.counts[index])
        part = (wanted - float(total[index]) + inside) / inside if inside else 0.0
        return _edge(index) + part * (_edge(index + 1) - _edge(index))


def _edge(index: int) -> float:
    """Lower edge of a bin."""
    return float(torch.tensor(index << 16, dtype=torch.int32).view(torch.float32))
