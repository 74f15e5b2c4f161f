"""Pictures of a report: spike raster of one prompt, sites by layer, perplexity against silence.

Figures are made without pyplot, so that nothing global changes. Colours: Okabe and Ito, safe for colour blindness;
shape or place says the same as colour everywhere.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from torch import Tensor, nn

from spikelm.kernels.spike_train import expand
from spikelm.spiking.site import Site, SpikeGroup, spike_groups

BLUE, ORANGE, GREEN, RED, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
SKY, LIGHT = "#56B4E9", "#BBBBBB"
SITE_STYLES = {"qkv": (BLUE, "o"), "o": (ORANGE, "s"), "gate_up": (GREEN, "^"), "down": (RED, "D")}
_FAMILIES = {
    "calibrated": ("calibrated allocation", BLUE, "o"),
    "uniform_dead_zone": ("uniform dead zone", ORANGE, "s"),
    "teal": ("TEAL threshold (no spikes)", GREEN, "^"),
    "model": ("this model", BLUE, "*"),
    "int_k": ("int-k ANN, as many levels", GREY, "X"),
    "plain_k3": ("plain k = 3, no dead zone", PINK, "P"),
}
# Slots that a raster shows of every train; larger counts are drawn with all slots full.
_SLOTS = {"bitwise": 4, "twos_complement": 5, "ternary": 8, "binary": 8}
_NEURONS, _TOKENS = 48, 24
_TICKS = (0.5, 0.7, 0.8, 0.9, 1, 1.05, 1.1, 1.2, 1.35, 1.5, 2, 3, 5, 10, 30, 100, 1000)


def raster(model: nn.Module, tokenizer: Any, prompt: str) -> Figure:
    """Spikes of one prompt: slots within tokens against channels, for some layers and all kinds of site.

    Raises:
        ValueError: the model has no spike sites, or the prompt is empty.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0, :_TOKENS]
    groups = _some_groups(model)
    if not groups or not len(ids):
        raise ValueError("A spike raster needs a model with spike sites and a prompt with at least one token.")
    counts = _counts(model, ids, groups)
    groups = [group for group in groups if group.path in counts]
    layers = sorted({group.layer_idx for group in groups})
    names = list(dict.fromkeys(group.name for group in groups))
    config: Any = model.config
    code = config.spike_code
    slots = _SLOTS[code]

    figure = Figure(figsize=(4.2 * len(names) + 1.2, 2.9 * len(layers) + 1.5), dpi=110, layout="constrained")
    axes: Any = figure.subplots(len(layers), len(names), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for group in groups:
        ax = axes[layers.index(group.layer_idx)][names.index(group.name)]
        ax.set_axis_on()
        _draw_trains(ax, counts[group.path], code, slots)
        step = _step(group.site)
        shown = min(_NEURONS, -(-group.site.width // step))
        ax.set_title(f"layer {group.layer_idx}, {group.name}: {shown} of {group.site.width} channels", fontsize=10)
        if group.name == names[0]:
            ax.set_ylabel("channel")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda row, _, step=step: f"{row * step:.0f}"))
        ax.set_xticks([slots * (t + 0.5) - 0.5 for t in range(len(ids))])
        ax.set_xticklabels([])
        if group.layer_idx == layers[-1]:
            labels = [_shown(tokenizer.decode([token])) for token in ids.tolist()]
            ax.set_xticklabels(labels, rotation=90, fontsize=8, parse_math=False)
            ax.set_xlabel(f"token, {slots} slots each")
    figure.suptitle(f"Spike trains of one prompt ({code} code; counts that need more slots are drawn full)")
    figure.legend(
        handles=[Patch(color=RED, label="spike +1"), Patch(color=BLUE, label="spike -1")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def sites(report: dict[str, Any]) -> Figure:
    """Silent share and firing rate of every site over the layers."""
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(site["site"] for site in report["sites"]))
    for name in names:
        colour, marker = SITE_STYLES.get(name, (GREY, "v"))
        rows = [site for site in report["sites"] if site["site"] == name]
        layers = [row["layer"] for row in rows]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": name}
        left.plot(layers, [row["silent_share"] for row in rows], **style)
        right.plot(layers, [row["firing_rate"]["bitwise"] for row in rows], **style)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels = {
        left: ("Silent share", "inputs that are exactly zero (%)", report["silent_share"]),
        right: ("Firing rate", "bitwise spikes per input", report["firing_rate"]["bitwise"]),
    }
    for ax, (title, unit, mean) in panels.items():
        ax.axhline(mean, color=GREY, linestyle=":", linewidth=1.4, label="mean over\nall inputs")
        ax.set_title(title)
        ax.set_ylabel(unit)
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
        plain(ax)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, title="site", loc="outside right center", frameon=False)
    figure.suptitle(f"Silence and spikes by layer and site, {_data(report)}", fontsize=11)
    return figure


def curve(report: dict[str, Any]) -> Figure:
    """Perplexity ratio against silent share (reads): what silence costs, by how it is allocated."""
    figure = Figure(figsize=(8.4, 5.4), dpi=110, layout="constrained")
    ax = figure.subplots()
    shown = []
    for family, (label, colour, marker) in _FAMILIES.items():
        points = [p for p in report["curve"] if p["family"] == family and p["perplexity_ratio"] is not None]
        points.sort(key=lambda p: p["silent_share_reads"])
        if not points:
            continue
        x, y = [p["silent_share_reads"] for p in points], [p["perplexity_ratio"] for p in points]
        shown += y
        single = points[0]["target_silent_share"] is None
        size = {"*": 17, "X": 10, "P": 10}.get(marker, 6)
        error = [p["perplexity_ratio_error"] for p in points]
        ax.errorbar(x, y, error, color=colour, marker=marker, markersize=size, linewidth=0 if single else 1.6,
                    elinewidth=1, label=label, markeredgecolor="white" if single else colour,
                    zorder=3 if single else 2)  # fmt: skip
    ax.axhline(1, color=GREY, linewidth=1, linestyle=":")
    ax.set_yscale("log")
    top = max([*shown, 1.2])
    ax.yaxis.set_major_locator(FixedLocator(_TICKS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylim(min([0.985, *(0.99 * ratio for ratio in shown)]), 1.08 * top)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("silent share, weighted by reads (% of the weight reads behind spike sites)")
    ax.set_ylabel("perplexity, times the baseline's (log scale)")
    tokens = report["curve"][0]["tokens"]
    ax.set_title(f"What silence costs, on {tokens:,} tokens per point (bars: standard error)", fontsize=11)
    ax.legend(frameon=False, loc="upper left")
    plain(ax)
    return figure


def _some_groups(model: nn.Module) -> list[SpikeGroup]:
    """Sites of the first, middle and last layer that have any."""
    groups = list(spike_groups(model))
    layers = sorted({group.layer_idx for group in groups})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    return [group for group in groups if group.layer_idx in chosen]


@torch.no_grad()
def _counts(model: nn.Module, ids: Tensor, groups: list[SpikeGroup]) -> dict[str, Tensor]:
    """Path -> counts `[tokens, channels]` of a sample of channels, evenly spaced."""
    seen: dict[str, Tensor] = {}
    paths = {group.site: group.path for group in groups}

    def observe(site: Site, counts: Tensor, threshold: Tensor, context: Any) -> None:
        if counts.dim() == 3:  # an expert gets some tokens only, `[n, channels]`
            seen[paths[site]] = counts[0, :, :: _step(site)][:, :_NEURONS].cpu()

    for group in groups:
        group.site.observers.append(observe)
    try:
        model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for group in groups:
            group.site.observers.remove(observe)
    return seen


def _step(site: Site) -> int:
    return max(1, site.width // _NEURONS)


def _draw_trains(ax: Axes, counts: Tensor, code: str, slots: int) -> None:
    largest = {"bitwise": 2**slots - 1, "twos_complement": 2 ** (slots - 1) - 1}.get(code, slots)
    trains = expand(counts.clamp(-largest, largest), code, slots)  # [slots, tokens, channels]
    image = trains.permute(2, 1, 0).flatten(1).numpy()
    colours = ListedColormap([BLUE, "#f7f7f7", RED])
    ax.imshow(image, cmap=colours, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    ax.vlines(np.arange(slots, image.shape[1], slots) - 0.5, -0.5, image.shape[0] - 0.5, color="#bbbbbb", linewidth=0.6)
    ax.tick_params(length=2)


def _shown(token: str) -> str:
    """A token as a label: white space visible, long ones cut."""
    text = token.replace(" ", "\u00b7").replace("\n", "\\n").replace("\t", "\\t") or "(empty)"
    return text if len(text) <= 14 else text[:13] + "\u2026"


def plain(ax: Axes) -> None:
    """Only two spines, a light grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _data(report: dict[str, Any]) -> str:
    texts = report["measured_on"]["texts"]
    return f"{sum(t['tokens'] for t in texts):,} tokens of {', '.join(t['name'] for t in texts)}"
