"""Paragraphs and pictures of the part `spikes`; made of its result alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from spikelm.eval.parts import Result
from spikelm.eval.plots import BLUE, GREY, LIGHT, ORANGE, RED, SITE_STYLES, SKY, plain
from spikelm.eval.tables import millions, number, percent, table

Rows = list[dict[str, Any]]
_KINDS = {
    "spike_fed": "linears behind spike sites",
    "event_fed": "products with graded events",
    "float_fed": "linears that read real values",
    "head": "head",
    "attention": "softmax attention",
    "linear_attention": "recurrent states",
    "norms": "norms",
}
_HEAT, _OVER, _HISTOGRAM = "spike_layers.png", "spike_positions.png", "spike_counts.png"


def page(result: Result) -> list[str]:
    """Sites, positions, counts, operations and bytes."""
    names = ", ".join(f"{text['name']} ({text['tokens']:,} tokens)" for text in result["texts"])
    parts = [f"Counted on {result['tokens']:,} tokens, in windows of {result['window']}: {names}."]
    if not result["sites"]:
        parts.append("The model has no spike sites, so there are no spikes to count.")
    else:
        parts += [
            _kinds_of_sites(result["sites"], result["tokens"]),
            "### Layers and sites",
            f"![Silent share by layer and site]({_HEAT})",
            "### Position in the document",
            _positions(result["positions"]),
            f"![Spikes over the position]({_OVER})",
            "### Counts",
            f"![How often each count occurs]({_HISTOGRAM})",
        ]
    return [*parts, "### Operations", _operations(result), "### Bytes of weights", _bytes(result)]


def figures(result: Result) -> dict[str, Figure]:
    """`spike_layers.png`, `spike_positions.png` and `spike_counts.png`; none without spike sites."""
    if not result["sites"]:
        return {}
    drawn = {_HEAT: _layers(result), _HISTOGRAM: _counts(result)}
    return drawn | {_OVER: _over_positions(result)} if result["positions"] else drawn


def summary(result: Result) -> dict[str, float | str | None]:
    """Dead and overflowing channels, and what is left to read."""
    width = sum(row["width"] for row in result["sites"])
    shares = {
        f"{kind} channels (share)": sum(row[f"{kind}_channels"] for row in result["sites"]) / width if width else None
        for kind in ("dead", "overflowing")
    }
    read = next(row for row in result["weight_bytes"] if row["network"] == "model" and row["format"] == "int8")
    return shares | {"int8 weights, event-driven (MB per token)": read["event_driven"] / 1e6}


def _mean(rows: Rows, value: Callable[[dict[str, Any]], float]) -> float:
    """Mean over inputs: a row counts with its width, if it has one, and its tokens."""
    weights = [row["tokens"] * row.get("width", 1) for row in rows]
    return sum(value(row) * weight for row, weight in zip(rows, weights)) / sum(weights)


def _by(rows: Rows, *keys: str) -> dict[tuple, Rows]:
    found: dict[tuple, Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _kinds_of_sites(sites: Rows, tokens: int) -> str:
    lines = []
    for (name,), rows in _by(sites, "site").items():
        width = sum(row["width"] for row in rows)
        shares = [
            sum(row[f"{kind}_channels"] for row in rows) / width for kind in ("dead", "always_active", "overflowing")
        ]
        limited = [row for row in rows if row["at_limit_share"] is not None]
        bits = [row["bits"] for row in rows if row["bits"] is not None]
        lines.append(
            [
                name,
                percent(_mean(rows, lambda row: row["silent_share"])),
                number(_mean(rows, lambda row: row["firing_rate"]["unary"])),
                number(_mean(rows, lambda row: row["firing_rate"]["bitwise"])),
                percent(_mean(rows, lambda row: row["spike_slot_sparsity"]["4"])),
                percent(_mean(rows, lambda row: row["clipped_share"]["4"])),
                str(max(row["max_count"] for row in rows)),
                f"{min(bits)} to {max(bits)}" if bits else "n/a",
                *map(percent, shares),
                percent(_mean(limited, lambda row: row["at_limit_share"])) if limited else "no limit",
            ]
        )
    head = [
        "site", "silent share", "unary rate (spikes per input)", "bitwise rate (spikes per input)",
        "empty slots, T = 4", "counts that do not fit T = 4", "largest count", "bits of as many levels",
        "dead channels", "always active channels", "overflowing channels", "inputs at the limit",
    ]  # fmt: skip
    note = (
        f"All layers of a site together. Dead: no spike on any of the {tokens:,} tokens. Always active: a spike on "
        "every one. Overflowing: on more than half of the tokens a count of 16 or more, too large for four bitwise "
        "slots. The limit is the largest count that the model's code allows."
    )
    return table(head, lines) + "\n\n" + note


def _span(row: dict[str, Any]) -> str:
    return str(row["first"]) if row["first"] == row["last"] else f"{row['first']} to {row['last']}"


def _positions(positions: Rows) -> str:
    names = list(dict.fromkeys(row["site"] for row in positions))
    lines = []
    for _, rows in sorted(_by(positions, "first").items()):
        by_site = _by(rows, "site")
        tokens = max(row["tokens"] for row in rows)
        cells = []
        for name in names:
            own = by_site.get((name,))
            cells += [
                "" if own is None else percent(_mean(own, lambda row: row["silent_share"])),
                "" if own is None else number(_mean(own, lambda row: row["firing_rate"]["unary"])),
            ]
        lines.append([_span(rows[0]), str(tokens), *cells])
    head = ["position", "tokens", *(f"{name}, {what}" for name in names for what in ("silent", "unary rate"))]
    note = (
        "Tokens by their position in the document, all layers of a site together: silent share, and unary spikes per "
        "input. The first token of a text is an outlier in many models."
    )
    return table(head, lines) + "\n\n" + note


def _operations(result: Result) -> str:
    lines = []
    for row in result["operations"]:
        cells = [row["network"], _KINDS[row["kind"]]]
        cells += ["not counted" if row[key] is None else millions(row[key]) for key in ("dense_macs", "macs")]
        additions = [millions(row["acs"][form]) if row["acs"][form] else "" for form in ("unary", "bitwise")]
        lines.append(cells + additions)
    head = [
        "network", "product", "dense MACs per token", "MACs on inputs that are not zero, per token",
        "additions per token, unary", "additions per token, bitwise",
    ]  # fmt: skip
    note = (
        "Behind a spike site an input is an integer count, and a product is additions of weights, scaled once; "
        "elsewhere it is a real value, and a product is MACs. Not counted: softmax, activation functions, rotary "
        "embeddings, residual additions."
    )
    return table(head, lines) + "\n\n" + note


def _bytes(result: Result) -> str:
    lines = [
        [
            row["network"],
            row["format"],
            f"{row['dense'] / 1e6:.2f}",
            f"{row['event_driven'] / 1e6:.2f}",
            percent(row["event_driven"] / row["dense"]),
            f"{row['head'] / 1e6:.2f}",
            f"{row['scales'] / 1e6:.2f}",
        ]
        for row in result["weight_bytes"]
    ]
    head = [
        "network", "format", "dense (MB per token)", "event-driven (MB per token)", "of dense", "head in both (MB)",
        "scales in both (MB)",
    ]  # fmt: skip
    note = (
        "Weights that one token reads at batch size 1, laid out by input row: an input that is zero saves its row. "
        "Scales of integer formats, and the head, are always read."
    )
    return table(head, lines) + "\n\n" + note


def _names(rows: Rows) -> list[str]:
    """Kinds of site, in the order of the computation."""
    return list(dict.fromkeys(row["site"] for row in rows))


def _layers(result: Result) -> Figure:
    """Silent share, and spikes per input, of every layer and site."""
    sites = result["sites"]
    names, layers = _names(sites), sorted({row["layer"] for row in sites})
    figure = Figure(figsize=(1.6 + 0.36 * max(len(layers), 12), 1.6 + 0.9 * len(names)), dpi=110, layout="constrained")
    axes: Any = figure.subplots(2, 1, sharex=True)
    panels: list[tuple[str, str, Callable[[dict[str, Any]], float], float | None]] = [
        ("Silent share", "inputs that are zero (%)", lambda row: 100 * row["silent_share"], 100),
        ("Firing rate", "bitwise spikes per input", lambda row: row["firing_rate"]["bitwise"], None),
    ]
    for ax, (title, unit, value, top) in zip(axes, panels):
        image = np.full((len(names), len(layers)), np.nan)
        for (layer, name), rows in _by(sites, "layer", "site").items():
            image[names.index(name), layers.index(layer)] = _mean(rows, value)
        drawn = ax.imshow(image, cmap="viridis", aspect="auto", vmin=0, vmax=top or np.nanmax(image))
        figure.colorbar(drawn, ax=ax, label=unit)
        ax.set_title(title, fontsize=10)
        ax.set_yticks(range(len(names)), names)
    step = -(-len(layers) // 32)
    axes[1].set_xticks(range(0, len(layers), step), layers[::step])
    axes[1].set_xlabel("layer")
    figure.suptitle(f"Spikes by layer and site, {_data(result)}", fontsize=11)
    return figure


def _over_positions(result: Result) -> Figure:
    """Silent share, firing rate and large counts over the position, by kind of site."""
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    axes: Any = figure.subplots(1, 3)
    panels: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("Silent share", "inputs that are zero", lambda row: row["silent_share"]),
        ("Firing rate", "bitwise spikes per input", lambda row: row["firing_rate"]["bitwise"]),
        ("Large counts", "counts that do not fit 4 slots", lambda row: row["clipped_share"]["4"]),
    ]
    spans = sorted({(row["first"], row["last"]) for row in result["positions"]})
    for ax, (title, unit, value) in zip(axes, panels):
        for name, rows in _by(result["positions"], "site").items():
            places = sorted(_by(rows, "first", "last").items())
            x = [spans.index(span) for span, _ in places]
            ax.plot(x, [_mean(own, value) for _, own in places], **_style(name[0]))
        ax.set_xticks(range(len(spans)), [str(first) for first, _ in spans], rotation=45, fontsize=8)
        ax.set_xlabel("position in the document, from")
        ax.set_title(title)
        ax.set_ylabel(unit)
        ax.set_ylim(0, 1.08 * max(ax.dataLim.ymax, 1e-3))
        plain(ax)
    for ax in (axes[0], axes[2]):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, axes[0], "site")
    figure.suptitle(f"Spikes over the position of a token, all layers, {_data(result)}", fontsize=11)
    return figure


def _counts(result: Result) -> Figure:
    """How often each count occurs, by kind of site; and the share of large ones over the layers."""
    figure = Figure(figsize=(12, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = sorted({(one["low"], one["high"]) for row in result["histograms_by_site"] for one in row["bins"]})
    for row in result["histograms_by_site"]:
        shares = {(one["low"], one["high"]): one["share"] for one in row["bins"]}
        style = _style(row["site"]) | {"markersize": 3}
        left.plot(range(len(edges)), [shares.get(edge) or np.nan for edge in edges], **style)
    left.set_yscale("log")
    step = -(-len(edges) // 24)
    shown = [i for i in range(len(edges)) if (i - edges.index((0, 0))) % step == 0]
    left.set_xticks(shown, [_count_label(*edges[i]) for i in shown], rotation=90, fontsize=7)
    left.set_xlabel("count (ranges: octaves)")
    left.set_ylabel("share of the inputs of a site (log scale)")
    left.set_title("Counts by site, all layers")
    layers = [row["layer"] for row in result["histograms_by_layer"]]
    for low, high, colour in ((0, 0, LIGHT), (1, 1, SKY), (2, 7, BLUE), (8, 15, ORANGE)):
        sizes = [_between(row["bins"], low, high) for row in result["histograms_by_layer"]]
        label = str(low) if low == high else f"{low} to {high}"
        right.plot(layers, sizes, color=colour, marker="o", markersize=3, label=label)
    rest = [1 - _between(row["bins"], 0, 15) for row in result["histograms_by_layer"]]
    right.plot(layers, rest, color=RED, marker="D", markersize=3, label="16 or more")
    right.set_xlabel("layer")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylabel("share of the inputs of a layer")
    right.set_title("Sizes of counts over the layers, all sites")
    for ax in (left, right):
        plain(ax)
    left.legend(title="site", frameon=False, fontsize=8)
    right.legend(title="size of the count", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"Histogram of counts, {_data(result)}", fontsize=11)
    return figure


def _between(bins: Iterable[dict[str, Any]], low: int, high: int) -> float:
    """Share of the counts whose size lies between two exact ones."""
    return sum(one["share"] for one in bins if low <= min(abs(one["low"]), abs(one["high"])) <= high)


def _count_label(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _style(name: str) -> dict[str, Any]:
    colour, marker = SITE_STYLES.get(name, (GREY, "v"))
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": name}


def _legend(figure: Figure, ax: Axes, title: str) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside right center", frameon=False)


def _data(result: Result) -> str:
    texts: Sequence[dict[str, Any]] = result["texts"]
    return f"{result['tokens']:,} tokens of {', '.join(text['name'] for text in texts)}"
