"""Calibration: dead zones and stored magnitudes of all spike sites, from the float model's activations on a text."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.conversion.texts import calibration_sample
from spikelm.spiking.site import SpikeGroup, spike_groups

WINDOW = 512
_BINS, _TOP = 4096, 8.0  # of the histograms of |x| / m: fine against any dead zone of use
_CORRECTIONS = 3


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    text: str | Tensor | None = None,
    *,
    silent_share: float | None = None,
    allocation: str = "uniform",
    tokens: int = 4096,
    progress: bool = True,
) -> dict[str, Any]:
    """Set `dead_zone`, and `magnitude` where one is stored, of every spike site of a model, in place.

    Args:
        model: a spikelm model with spike sites.
        tokenizer: turns `text` into ids; None if `text` is ids.
        text: what to calibrate on, or token ids `[N]`; None: `texts.calibration_sample()`.
        silent_share: the share of site inputs, weighted by the weights that each reads, that are to be zero.
            None: only magnitudes are set.
        allocation: `uniform`, one dead zone for all sites.
        tokens: how many tokens to look at, in windows of 512 spread over the text.
        progress: whether to show bars.

    Returns:
        What was measured, ready for a record: `text`, `text_sha256`, `tokens`, `silent_share_reads` reached, dead
        zones per site.

    Raises:
        ValueError: a text that is too short, a share that cannot be reached.
    """
    groups = list(spike_groups(model))
    ids, described = _windows(model, tokenizer, text, tokens)
    statistics = _Statistics(groups)
    with _substituted(groups, statistics.see):
        _run(model, ids, "Reading activations", progress)
    for group, magnitude in zip(groups, statistics.magnitudes(), strict=True):
        if group.site.magnitude is not None:
            nn.init.constant_(group.site.magnitude, magnitude)
    result = described
    if silent_share is not None:
        result |= {"allocation": allocation}
        result |= _reach(model, groups, ids, silent_share, statistics.uniform, progress)
    return result


def _windows(model: nn.Module, tokenizer: Any, text: str | Tensor | None, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Ids `[n, T]` spread over the text, and what to record about it."""
    name = "the text given"
    if text is None:
        text, name = calibration_sample(), "Python's built-in reference topics"
    if isinstance(text, Tensor):
        ids, digest = text.flatten().cpu(), hashlib.sha256(text.cpu().numpy().tobytes())
        name = "the token ids given"
    else:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        digest = hashlib.sha256(text.encode())
    length = min(WINDOW, model.config.max_position_embeddings, len(ids))
    if length < 16:
        raise ValueError(f"The calibration text has {len(ids)} tokens; expected at least 16. Give a longer text.")
    pieces = ids[: len(ids) // length * length].view(-1, length)
    count = min(len(pieces), max(tokens // length, 1))
    chosen = torch.linspace(0, len(pieces) - 1, count).round().long()
    described = {"text": name, "text_sha256": digest.hexdigest(), "tokens": count * length}
    return pieces[chosen].to(model.device), described


@contextmanager
def _substituted(groups: list[SpikeGroup], see: Any) -> Iterator[None]:
    """Every site hands its input on as it is, after `see(index, input)`."""

    def passing(index: int) -> Any:
        def substitute(x: Tensor) -> Tensor:
            see(index, x)
            return x

        return substitute

    for index, group in enumerate(groups):
        group.site.substitute = passing(index)
    try:
        yield
    finally:
        for group in groups:
            group.site.substitute = None


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, what: str, progress: bool) -> None:
    for row in tqdm(ids, desc=what, unit="window", disable=not progress, delay=1.0):
        model.model(input_ids=row[None], use_cache=False)


class _Statistics:
    """Per site: the mean magnitude, and a histogram of |x| in units of the magnitude that its threshold uses."""

    def __init__(self, groups: list[SpikeGroup]):
        self.groups = groups
        self.reads = [group.fan_out * group.site.width for group in groups]
        self.total = [0.0] * len(groups)
        self.rows = [0] * len(groups)
        self.counts = torch.zeros(len(groups), _BINS, dtype=torch.float64)

    def see(self, index: int, x: Tensor) -> None:
        """Add the activations `[B, T, width]` of a site."""
        size = x.detach().abs().flatten(0, -2).float()
        mean = size.mean(-1, keepdim=True)
        self.total[index] += float(mean.sum())
        self.rows[index] += mean.shape[0]
        # A stored magnitude is not known yet; the mean of the pass so far stands for it.
        unit = mean if self.groups[index].site.magnitude is None else self.total[index] / self.rows[index]
        scaled = (size / unit).nan_to_num(0.0).clamp_(max=_TOP - 1e-3)
        self.counts[index] += torch.histc(scaled, _BINS, 0.0, _TOP).double().cpu()

    def magnitudes(self) -> list[float]:
        """Mean over tokens of mean |x|, per site."""
        return [max(total / rows, 1e-12) for total, rows in zip(self.total, self.rows, strict=True)]

    def uniform(self, share: float) -> list[float]:
        """One dead zone for all sites, with which `share` of the weighted inputs is silent."""
        weights = torch.tensor(self.reads, dtype=torch.float64)
        silent = (self.counts / self.counts.sum(1, keepdim=True)).cumsum(1)
        silent = (silent * weights[:, None]).sum(0) / weights.sum()
        edge = int(torch.searchsorted(silent, share).clamp_max(_BINS - 1))
        below = float(silent[edge - 1]) if edge else 0.0
        inside = (share - below) / max(float(silent[edge]) - below, 1e-12)
        return [(edge + min(max(inside, 0.0), 1.0)) * _TOP / _BINS] * len(self.groups)


def _reach(
    model: nn.Module, groups: list[SpikeGroup], ids: Tensor, share: float, allocate: Any, progress: bool
) -> dict[str, Any]:
    """Set dead zones by `allocate(share)`, corrected until the spiking model itself reaches the share."""
    asked = share
    for _ in range(_CORRECTIONS):
        zones = allocate(asked)
        for group, zone in zip(groups, zones, strict=True):
            with torch.no_grad():
                group.site.dead_zone.fill_(zone)
        reached, sites = _measure(model, groups, ids, progress)
        if abs(reached - share) < 2e-3:
            break
        asked = min(max(asked + share - reached, 1e-4), 1 - 1e-4)
    names = [f"{group.layer_idx}.{group.name}" for group in groups]
    return {
        "silent_share_asked": share,
        "silent_share_reads": reached,
        "dead_zone": dict(zip(names, (round(zone, 6) for zone in zones), strict=True)),
        "silent_share": dict(zip(names, (round(s, 6) for s in sites), strict=True)),
    }


def _measure(model: nn.Module, groups: list[SpikeGroup], ids: Tensor, progress: bool) -> tuple[float, list[float]]:
    """The silent share of the spiking model, weighted by reads, and that of every site."""
    zeros = {id(group.site): [0, 0] for group in groups}

    def observe(site: Any, counts: Tensor, threshold: Tensor, context: Any) -> None:
        zeros[id(site)][0] += int((counts == 0).sum())
        zeros[id(site)][1] += counts.numel()

    for group in groups:
        group.site.observers.append(observe)
    try:
        _run(model, ids, "Measuring silence", progress)
    finally:
        for group in groups:
            group.site.observers.remove(observe)
    sites = [zeros[id(group.site)][0] / zeros[id(group.site)][1] for group in groups]
    reads = [group.fan_out * group.site.width for group in groups]
    return sum(s * r for s, r in zip(sites, reads, strict=True)) / sum(reads), sites
