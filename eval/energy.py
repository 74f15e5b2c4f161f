"""Energy: an estimate by an analytic model with published constants (`eval/energy.yaml`); no model runs.

`spikelm.eval.energy_model` says what is counted. docs/report.md says what every key of the result means.
"""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from spikelm.eval.energy_model import (
    ACCOUNTINGS,
    COLUMNS,
    CONSTANTS,
    PARTS,
    Constants,
    Network,
    network_of,
    read_constants,
)
from spikelm.eval.parts import Part, Result, Subject
from spikelm.eval.plots import BLUE, GREEN, GREY, LIGHT, ORANGE, PINK, RED, SKY, plain
from spikelm.eval.tables import number, percent, table

_SPIKING, _DENSE = ("spiking", "spiking_reread"), ("fp16_dense", "int8_dense", "int_k_dense")
_CALLED = {
    "fp16_dense": "fp16 dense",
    "int8_dense": "int8 dense",
    "int_k_dense": "int-k dense",
    "spiking": "**spiking, event-driven**",
    "spiking_reread": "spiking, a row read again for every spike",
    "arithmetic": "Arithmetic alone",
    "weights_in_sram": "With memory traffic, weights in SRAM",
    "weights_in_dram": "With memory traffic, weights in DRAM",
}
_DRAWN = {  # the parts of a bar, from below
    "shared_products": ("same in all: arithmetic", LIGHT),
    "shared_weights": ("same in all: weights", GREY),
    "shared_states": ("same in all: states, keys and values", PINK),
    "products": ("products behind sites", BLUE),
    "coding": ("coding and scaling", ORANGE),
    "weights": ("weights behind sites", RED),
    "activations": ("activations", GREEN),
    "membranes": ("membranes", SKY),
}
_PICTURE = "energy.png"


@dataclass(frozen=True)
class Settings:
    """What the estimate is made with.

    Attributes:
        constants: path of a file like `eval/energy.yaml`; None: that file.
    """

    constants: str | None = None


def measure(subject: Subject, settings: Settings, bar: tqdm, earlier: dict[str, Result]) -> Result:
    """Every column in every accounting, and where the spiking ones break even. ValueError for wrong constants."""
    constants = read_constants(settings.constants)
    spikes = earlier["spikes"]
    unary = subject.spiking and getattr(subject.model.config, "spike_code", None) in ("binary", "ternary")
    return estimate(spikes, constants, "unary" if unary else "bitwise")


def estimate(spikes: Result, constants: Constants, form: str) -> Result:
    """The result of this part, out of that of `spikes`; `form` says how counts become spikes: unary or bitwise."""
    network, spiking = network_of(spikes, form), bool(spikes["sites"])
    columns = [column for column in COLUMNS if spiking or column in ("fp16_dense", "int8_dense")]
    bits = [(row["bits"], row["width"] * row["tokens_share"]) for row in spikes["sites"] if row["bits"] is not None]
    return {
        "kind": "estimate",
        "unit": "picojoules per token",
        "tokens": spikes["tokens"],
        "form": form if spiking else None,
        "spikes_per_input": network.rate if spiking else None,
        "active_share": network.active() if spiking else None,
        "bits_mean": sum(b * n for b, n in bits) / sum(n for _, n in bits) if bits else None,
        "bits_max": max(b for b, _ in bits) if bits else None,
        "columns": [_column(network, column, how, constants) for how in ACCOUNTINGS for column in columns],
        "break_even": [
            _break_even(network, column, against, how, constants)
            for how in ACCOUNTINGS
            for column in _SPIKING
            for against in _DENSE
        ]
        if spiking
        else [],
        "constants": {
            "name": constants.name,
            "address_bits": constants.address_bits,
            "values": constants.rows,
        },
    }


def _column(network: Network, column: str, accounting: str, constants: Constants) -> dict[str, Any]:
    parts = network.energy(column, accounting, constants)
    dense = sum(network.energy("int8_dense", accounting, constants).values())
    total = sum(parts.values())
    return {"accounting": accounting, "column": column, "total": total, "over_int8_dense": total / dense, **parts}


def _break_even(network: Network, column: str, against: str, accounting: str, constants: Constants) -> dict[str, Any]:
    scale = network.break_even(column, against, accounting, constants)
    exists = scale is not None and isfinite(scale)
    ours, theirs = (sum(network.energy(name, accounting, constants).values()) for name in (column, against))
    return {
        "accounting": accounting,
        "column": column,
        "against": against,
        "spikes_per_input": scale * network.rate if exists else None,
        "active_share": network.active(scale) if exists else None,
        "takes_less": "below" if exists else "never" if scale is None else "always",
        "takes_less_now": ours < theirs,
    }


def page(result: Result) -> list[str]:
    """A table for each accounting, where spiking breaks even, and what is not counted."""
    parts = [
        f"An **estimate** by an analytic model, never a measurement: operations and bytes per token, counted on "
        f"{result['tokens']:,} tokens by the part before, times the constants below. Weights behind spike sites are "
        "int8 in every column but the first. Head, linears that read real values, attention, recurrent states and "
        "norms are the same work in every column.",
    ]
    if result["form"] is None:
        parts.append(
            "The model has no spike sites, so only dense columns can be estimated: its linears without the head."
        )
    else:
        bits = (
            f"k of int-k has as many levels as the counts of each site: {result['bits_mean']:.1f} bits on average, at "
            f"most {result['bits_max']}. "
            if result["bits_max"]
            else ""
        )
        parts.append(
            f"Counts become {result['form']} spikes: {result['spikes_per_input']:.3f} per input and "
            f"{percent(result['active_share'])} active inputs, weighted by the weights that each reads. {bits}"
        )
    parts.append(f"![Energy per token by part, an estimate]({_PICTURE})")
    for how in ACCOUNTINGS:
        rows = [row for row in result["columns"] if row["accounting"] == how]
        parts += [f"### {_CALLED[how]} (estimate)", _columns(rows)]
    if result["break_even"]:
        parts += ["### Break-even (estimate)", _break_evens(result)]
    return [*parts, "### Constants", _constants(result["constants"]), _HOLES]


def _columns(rows: list[dict[str, Any]]) -> str:
    shown = [part for part in PARTS if any(row[part] for row in rows)]
    lines = [
        [
            _CALLED[row["column"]],
            _micro(row["total"]),
            number(row["over_int8_dense"], 3),
            *(_micro(row[part]) for part in shown),
        ]
        for row in rows
    ]
    parts = [f"{_DRAWN[part][0]} (µJ, estimate)" for part in shown]
    return table(["column", "µJ per token (estimate)", "times int8 dense (estimate)", *parts], lines)


def _break_evens(result: Result) -> str:
    lines = []
    for row in result["break_even"]:
        at, active = row["spikes_per_input"], row["active_share"]
        lines.append(
            [
                _CALLED[row["accounting"]],
                _CALLED[row["column"]],
                _CALLED[row["against"]],
                row["takes_less"] if at is None else f"{at:.3f}",
                percent(active),
                f"{result['spikes_per_input']:.3f}",
                "yes" if row["takes_less_now"] else "no",
            ]
        )
    head = [
        "accounting", "column", "against", "break-even (spikes per input, estimate)", "active inputs there (estimate)",
        "spikes per input now", "spiking takes less (estimate)",
    ]  # fmt: skip
    note = (
        "Spikes and active inputs of all sites are scaled together, until the model above gives as much as for the "
        "dense column; active inputs end at all of them. Never: spiking takes more even without a single spike; "
        "always: it takes less at any rate."
    )
    return table(head, lines) + "\n\n" + note


def _constants(constants: dict[str, Any]) -> str:
    lines = [[row["name"], f"{row['pj']:g}", row["node"], row["source"]] for row in constants["values"]]
    note = f"{constants['name']}. An event carries {constants['address_bits']} bits of address beside its count."
    return table(["constant", "pJ", "node", "source"], lines) + "\n\n" + note


_HOLES = (
    "Not counted: softmax, activation functions, rotary embeddings, residual additions and embedding rows; routing of "
    "events over a chip, clocks, leakage, control, and the granularity of memory (a row of weights is taken to be read "
    "by itself); accumulators wider than 8 bits, and shifts of bitwise spikes; membranes of hardware that unrolls "
    "counts into slots. Reuse of weights within a batch or a prompt is left out in every column: this is one token at "
    "batch size 1."
)


def _micro(pj: float) -> str:
    return f"{pj / 1e6:.3g}"


def figures(result: Result) -> dict[str, Figure]:
    """`energy.png`: stacked bars of every column in every accounting."""
    figure = Figure(figsize=(13, 4.6), dpi=110, layout="constrained")
    axes: Any = figure.subplots(1, len(ACCOUNTINGS))
    for ax, how in zip(axes, ACCOUNTINGS):
        rows = [row for row in result["columns"] if row["accounting"] == how]
        bottom = [0.0] * len(rows)
        for part, (label, colour) in _DRAWN.items():
            heights = [row[part] / 1e6 for row in rows]
            ax.bar(range(len(rows)), heights, bottom=bottom, color=colour, label=label, width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights)]
        labels = [
            _CALLED[row["column"]].strip("*").replace(", ", ",\n").replace("again for", "again\nfor") for row in rows
        ]
        ax.set_xticks(range(len(rows)), labels, rotation=35, ha="right", fontsize=8)
        ax.set_title(_CALLED[how], fontsize=10)
        ax.set_ylabel("µJ per token (estimate)")
        plain(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"Energy of a token: an estimate with constants of {result['constants']['name']}", fontsize=11)
    return {_PICTURE: figure}


def summary(result: Result) -> dict[str, float | str | None]:
    """The spiking column, in every accounting."""
    columns = {(row["accounting"], row["column"]): row["over_int8_dense"] for row in result["columns"]}
    return {
        f"energy over int8 dense, {how.replace('_', ' ')} (ratio, estimate)": columns.get((how, "spiking"))
        for how in ACCOUNTINGS
    }


PART = Part(
    name="energy",
    title="Energy (estimate)",
    full=Settings(),
    quick=Settings(),
    run=measure,
    cost=lambda subject, settings: 0.0,
    page=page,
    figures=figures,
    summary=summary,
    needs=("spikes",),
    reads=lambda settings: [CONSTANTS if settings.constants is None else Path(settings.constants)],
)
