"""Spikes in detail: by layer, site and position, channels that never or always fire, and what every product reads.

One pass over the texts; what it finds stands under `spikes` in `report.json`. docs/report.md says what every key means.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from spikelm.eval.data import TokenizedText
from spikelm.eval.fidelity import run
from spikelm.eval.parts import Part, Result, Subject
from spikelm.eval.spike_counts import (
    Channels,
    ProductCounts,
    byte_rows,
    kind_of,
    linear_rows,
    operation_rows,
    states,
    watched_channels,
)
from spikelm.eval.spike_page import figures, page, summary
from spikelm.spiking.site import Site
from spikelm.spiking.statistics import AttentionCounts, SpikeStatistics

_TOTALS = (
    "silent_share", "silent_share_reads", "silent_share_reads_all_weights", "firing_rate", "spike_slot_sparsity",
    "clipped_share", "synops_per_token", "max_count",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        tokens: of each text, through the model and, if there is one, the baseline. window: tokens of a window.
    """

    tokens: int = 8000
    window: int = 512


def measure(subject: Subject, settings: Settings, bar: tqdm, earlier: dict[str, Result]) -> Result:
    """One pass of every network over the texts."""
    texts = subject.cut(settings.tokens, settings.window)
    result: Result = {
        "texts": [{"name": text.name, "tokens": text.tokens} for text in texts],
        "tokens": sum(text.tokens for text in texts),
        "window": settings.window,
        "totals": dict.fromkeys(_TOTALS),
        **{key: [] for key in ("sites", "positions", "histograms_by_site", "histograms_by_layer", "linears")},
        "operations": [],
        "weight_bytes": [],
        "states": None,
    }
    for name, (network, running) in subject.networks().items():
        _one(network, running, name, texts, bar, result)
    return result


def cost(subject: Subject, settings: Settings) -> float:
    """Tokens of all forward passes."""
    return len(subject.networks()) * sum(text.tokens for text in subject.cut(settings.tokens, settings.window))


def _one(
    network: nn.Module,
    running: Callable[[], AbstractContextManager],
    name: str,
    texts: list[TokenizedText],
    bar: tqdm,
    result: Result,
) -> None:
    """Run one network over the texts and add what it did to the result."""
    spiking = name == "model" and any(isinstance(module, Site) for module in network.modules())
    counts, attention = ProductCounts(network), AttentionCounts(network)
    spikes = SpikeStatistics(network, positions=True) if spiking else None
    with ExitStack() as stack:
        for counter in (counts, attention, running()):
            stack.enter_context(counter)
        channels = {}
        if spikes is not None:
            stack.enter_context(spikes)
            channels = stack.enter_context(watched_channels(network))
        for text in texts:
            for window in text.windows:
                run(network, window)
                bar.update(len(window))
    linears = linear_rows(counts, spikes)
    result["operations"] += operation_rows(network, name, linears, attention, counts.tokens)
    result["weight_bytes"] += byte_rows(network, name, linears)
    if name == "model":
        result["linears"] = linears
        result["states"] = states(network, attention, counts.tokens)
    if spikes is None:
        return
    summary = spikes.summary()
    result["totals"] = {key: summary[key] for key in _TOTALS}
    result["sites"] = _sites(spikes, channels, counts.tokens)
    result["positions"] = [_without(row, "width", "fan_out") for row in spikes.by_position()]
    histograms = spikes.histograms()
    result["histograms_by_site"] = _joined(histograms, "site")
    result["histograms_by_layer"] = _joined(histograms, "layer")


def _sites(spikes: SpikeStatistics, channels: dict[str, Channels], tokens: int) -> list[dict[str, Any]]:
    sites = {group.path: group.site for group in spikes.groups}
    rows = []
    for row in spikes.by_site():
        site, own = sites[row["path"]], channels[row["path"]].row(sites[row["path"]])
        signed = own.pop("signed")
        # Graded events have values between their levels; a code without a sign has one level for each count, and 0.
        levels = None if site.graded else (2 if signed else 1) * row["max_count"] + 1
        bits = None if levels is None else max(1, (levels - 1).bit_length())
        extra = {"kind": kind_of(site), "tokens_share": row["tokens"] / tokens, "levels": levels, "bits": bits}
        rows.append(row | extra | own)
    return rows


def _joined(histograms: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """The histograms of all sites of one kind, or of one layer, as one."""
    joined: dict[Any, dict[tuple[int, int], int]] = {}
    for row in histograms:
        bins = joined.setdefault(row[by], {})
        for one in row["bins"]:
            span = one["low"], one["high"]
            bins[span] = bins.get(span, 0) + one["inputs"]
    rows = []
    for value, bins in joined.items():
        total = sum(bins.values())
        spans = [{"low": low, "high": high, "inputs": n, "share": n / total} for (low, high), n in sorted(bins.items())]
        rows.append({by: value, "bins": spans})
    return rows


def _without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


PART = Part(
    name="spikes",
    title="Spikes in detail",
    full=Settings(),
    quick=Settings(tokens=2048),
    run=measure,
    cost=cost,
    page=page,
    figures=figures,
    summary=summary,
)
