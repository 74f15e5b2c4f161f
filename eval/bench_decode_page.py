"""The decoding benchmark as a page and a picture: `decode.md`, `decode.png`, from the same numbers as `decode.json`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from spikelm.eval.files import png, write_whole
from spikelm.eval.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED

_COLOURS = {"never": GREY, "always": BLUE, "dense": ORANGE, "llama.cpp": GREEN}
_NAMES = {
    "never": "this engine, events never",
    "always": "this engine, events always",
    "dense": "dense source in transformers",
    "llama.cpp": "llama.cpp, same file",
}
_PARTS = ("products", "coding", "state", "head", "python")
# Silent shares that the page answers for: what a calibrated conversion reaches, and what training may.
_ASKED = (0.38, 0.7)


def write(report: dict[str, Any], folder: Path) -> None:
    """Write `decode.md` and `decode.png` into `folder`."""
    write_whole(folder / "decode.md", page(report).encode())
    write_whole(folder / "decode.png", png(picture(report)))


def page(report: dict[str, Any]) -> str:
    """The Markdown page."""
    machine = report["machine"]
    lines = [
        "# Decoding speed",
        "",
        f"Model: {report['model']}. {machine['processor']}, {machine['threads']} threads, load average "
        f"{machine['load_before'][0]} before and {machine['load_after'][0]} after; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}; {machine['date']}.",
        "",
        "Medians of a step, quartiles in brackets; contenders take turns token by token and read the same tokens.",
    ]
    if "dense_ways_ms" in report:
        ways = ", ".join(f"{name} {ms:.1f} ms" for name, ms in report["dense_ways_ms"].items())
        lines += ["", f"Ways to run the dense source that were tried: {ways}. The fastest one competes."]
    for name, result in report["formats"].items():
        lines += ["", f"## {name}", *_speed(result), *_bytes(result, report), *_profile(result)]
        if "curve" in result:
            lines += _curve(result["curve"])
    return "\n".join(lines) + "\n"


def _speed(result: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(n for row in result["speed"] for n in row["contenders"]))
    lines = ["", "Tokens per second of all texts of a batch together, and milliseconds of a step:", ""]
    lines += ["| batch | context | " + " | ".join(_NAMES[n] for n in names) + " | always / never |"]
    lines += ["|" + "---|" * (len(names) + 3)]
    for row in result["speed"]:
        cells = [_cell(row["contenders"].get(name)) for name in names]
        gain = row["contenders"]["never"]["ms"] / row["contenders"]["always"]["ms"]
        lines.append(f"| {row['batch']} | {row['context']} | " + " | ".join(cells) + f" | {gain:.2f} |")
    return lines


def _cell(summary: dict[str, float] | None) -> str:
    if summary is None:
        return ""
    spread = f"{summary['low_ms']:.2f}-{summary['high_ms']:.2f}"
    return f"{summary['tokens_per_s']:.1f} ({summary['ms']:.2f} ms; {spread})"


def _bytes(result: dict[str, Any], report: dict[str, Any]) -> list[str]:
    read = result["weight_bytes"]
    line = (
        f"Weight bytes that a token reads: {read['never'] / 1e6:.1f} MB without events, {read['always'] / 1e6:.1f} MB "
        f"with ({read['head'] / 1e6:.1f} MB of both is the head); {read['silent_share_reads']:.1%} of the reads behind "
        f"sites are silent on this text. The limit of the gain is {read['never'] / read['always']:.2f}."
    )
    if "dense_weight_bytes" in report:
        line += f" The dense source holds {report['dense_weight_bytes'] / 1e6:.1f} MB."
    return ["", line]


def _profile(result: dict[str, Any]) -> list[str]:
    lines = ["", "Where a token's milliseconds go (calls timed one by one, which costs some by itself):", ""]
    lines += ["| events | " + " | ".join(_PARTS) + " | total |", "|" + "---|" * (len(_PARTS) + 2)]
    for name, parts in result["profile"].items():
        lines.append(f"| {name} | " + " | ".join(f"{parts[p]:.2f}" for p in _PARTS) + f" | {parts['total']:.2f} |")
    return lines


def _curve(curve: dict[str, Any]) -> list[str]:
    lines = ["", "Speed against silence, another random share of the channels of every site for every token:", ""]
    lines += ["| silent | never, ms | always, ms | gain |", "|---|---|---|---|"]
    for row in curve["points"]:
        never, always = row["never"], row["always"]
        lines.append(f"| {row['silent']:.0%} | {_ms(never)} | {_ms(always)} | {never['ms'] / always['ms']:.2f} |")
    at = curve["break_even"]
    lines += ["", "Events do not pay at any share." if at is None else f"Events pay from {at:.0%} silent inputs on."]
    for share in _ASKED:
        row = next((r for r in curve["points"] if r["silent"] == share), None)
        if row is not None:
            lines.append(f"At {share:.0%} silent: {row['never']['ms'] / row['always']['ms']:.2f} times as fast.")
    return lines


def _ms(summary: dict[str, float]) -> str:
    return f"{summary['ms']:.2f} ({summary['low_ms']:.2f}-{summary['high_ms']:.2f})"


def picture(report: dict[str, Any]) -> Figure:
    """Tokens per second against context and batch, and the gain against silence, one column for each format."""
    formats = report["formats"]
    figure = Figure(figsize=(5.2 * len(formats) + 0.6, 8.6), dpi=110, layout="constrained")
    axes: Any = figure.subplots(2, len(formats), squeeze=False)
    for column, (name, result) in enumerate(formats.items()):
        _draw_speed(axes[0][column], name, result)
        _draw_curve(axes[1][column], result.get("curve"))
    return figure


def _draw_speed(ax: Any, name: str, result: dict[str, Any]) -> None:
    rows = [row for row in result["speed"] if row["batch"] == 1]
    for contender in dict.fromkeys(n for row in rows for n in row["contenders"]):
        own = [row for row in rows if contender in row["contenders"]]
        contexts = [row["context"] for row in own]
        speeds = [row["contenders"][contender] for row in own]
        colour = _COLOURS[contender]
        ax.loglog(contexts, [s["tokens_per_s"] for s in speeds], "o-", color=colour, label=_NAMES[contender])
        ax.fill_between(
            contexts, *[[1e3 / s[k] for s in speeds] for k in ("low_ms", "high_ms")], color=colour, alpha=0.2
        )
    ax.set_title(f"{name}, batch 1")
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("tokens per second")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.grid(which="both", alpha=0.2)
    ax.legend(fontsize=8, frameon=False)


def _draw_curve(ax: Any, curve: dict[str, Any] | None) -> None:
    if curve is None:
        ax.set_axis_off()
        return
    shares = [row["silent"] for row in curve["points"]]
    for name in ("never", "always"):
        speeds = [row[name] for row in curve["points"]]
        ax.semilogy(shares, [s["tokens_per_s"] for s in speeds], "o-", color=_COLOURS[name], label=_NAMES[name])
        low, high = ([1e3 / s[key] for s in speeds] for key in ("low_ms", "high_ms"))
        ax.fill_between(shares, low, high, color=_COLOURS[name], alpha=0.2)
    if curve["break_even"] is not None:
        ax.axvline(curve["break_even"], color=RED, linestyle="--", label=f"break-even, {curve['break_even']:.0%}")
    for share in _ASKED:
        ax.axvline(share, color=PINK, linestyle=":", linewidth=1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("silent inputs of sites")
    ax.set_ylabel("tokens per second")
    ax.grid(which="both", alpha=0.2)
    ax.legend(fontsize=8, frameon=False)
