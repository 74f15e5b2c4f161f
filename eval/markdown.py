"""`report.md`: the report for readers; every number with its unit and what it was measured on."""

from collections.abc import Mapping
from typing import Any

from spikelm.eval.parts import Part
from spikelm.eval.tables import millions, number, percent, ratio, table

NAMES = {
    "baseline": "baseline",
    "model": "**this model**",
    "uniform_dead_zone": "uniform dead zone",
    "teal": "TEAL",
    "int_k": "int-k ANN",
    "plain_k3": "plain k = 3",
    "calibrated": "calibrated allocation",
}
_EXPLAINED = {
    "uniform_dead_zone": "the same code with one dead zone for all sites, set to the silent share of this model",
    "teal": "no spikes: |x| below a threshold per site is zero, the rest stays exact; at the same silent share",
    "int_k": "no spikes: each token rounded to as many levels as the spike counts of the site have",
    "plain_k3": "the spike code with three counts per mean magnitude and no dead zone",
}


def markdown(report: dict[str, Any], parts: Mapping[str, Part]) -> str:
    """The text of `report.md`: every part that came to an end, how the others ended, what it was measured on."""
    on = report["measured_on"]
    beside = f" beside {on['baseline']}" if on["baseline"] else ""
    page = [f"# {on['model']}{beside}", _opening(report), _ended(report["parts"], parts)]
    for record in report["parts"]:
        part = parts[record["name"]]
        if record["status"] == "finished":
            page += [f"## {part.title}", *part.page(report if part.name == "quality" else report[part.name])]
    page += ["## Measured on", _measured_on(on, report["parts"], parts)]
    page.append(
        f"What the words mean: [glossary](glossary.md). Keys and units of `report.json` (schema "
        f"{report['schema_version']}): `docs/report.md` of spikelm."
    )
    return "\n\n".join(part for part in page if part) + "\n"


def quality_page(report: dict[str, Any]) -> list[str]:
    """Paragraphs of the part that stands at the top of the report."""
    page = [_rows_table(report["rows"]), _notes(report["rows"])]
    if report["controls_left_out"] is not None:
        page.append(f"No controls and no curve: {report['controls_left_out']}.")
    if len(report["texts"]) > 1:
        for text in report["texts"]:
            page += [f"### On {text['name']}", _rows_table(text["rows"])]
    page += ["### Tokens per second", _speed(report), "### Spikes"]
    if report["silent_share"] is None:
        page.append("The model has no spike sites: nothing of it is silent, and nothing was counted.")
    else:
        page.append(_spikes(report))
        if report["curve"]:
            page += ["### Quality against silence", _curve(report["curve"])]
        page += ["### Layer by layer", "![Silent share and firing rate by site](sites.png)", _sites(report["sites"])]
    if report["transfer"] is not None:
        page += ["### Attention transfer", _transfer(report["transfer"])]
    return page


def _opening(report: dict[str, Any]) -> str:
    texts = report["measured_on"]["texts"]
    if not texts:
        return ""
    lines = []
    if report["perplexity_ratio"] is not None:
        lines.append(
            f"Perplexity is **{ratio(report)} times** that of the baseline "
            f"({number(report['perplexity']['model'])} against {number(report['perplexity']['baseline'])} per token), "
            f"the likeliest next token is the same in {percent(report['top1_agreement'])} of all cases, "
            f"and the predictions differ by {number(report['kl_nats'], 4)} nats per token (KL, baseline against model)."
        )
    else:
        lines.append(
            f"Perplexity is **{number(report['perplexity']['model'])}** per token, "
            f"{number(report['bits_per_byte']['model'], 3)} bits per byte."
        )
    if report["silent_share"] is not None:
        lines.append(
            f"**{percent(report['silent_share_reads'])}** of the weight reads behind spike sites fall on silent "
            f"inputs, which is {percent(report['silent_share_reads_all_weights'])} of all weights that a token reads."
        )
    names = ", ".join(f"{text['name']} ({text['source']}, {text['tokens']:,} tokens)" for text in texts)
    tokens, window = sum(text["tokens"] for text in texts), texts[0]["window"]
    lines.append(f"Measured in one run on {tokens:,} tokens, in disjoint windows of {window}: {names}.")
    return " ".join(lines)


def _ended(records: list[dict[str, Any]], parts: Mapping[str, Part]) -> str:
    """Parts that have no result, and why."""
    without = [record for record in records if record["status"] != "finished"]
    lines = []
    for record in without:
        error = " ".join(record["error"].split())
        lines.append(f"- **{parts[record['name']].title}: {record['status']}**. {error}")
    return "\n".join(lines)


def _rows_table(rows: list[dict[str, Any]]) -> str:
    uniform = next((row for row in rows if row["name"] == "uniform_dead_zone"), None)
    lines = []
    for row in rows:
        loss = _loss_against(row, uniform) if row["name"] == "model" else ""
        lines.append(
            [
                NAMES[row["name"]],
                number(row["perplexity"]),
                ratio(row) + loss,
                number(row["kl_nats"], 4),
                percent(row["top1_agreement"]),
                percent(row["top5_agreement"]),
                percent(row["silent_share_reads"]),
                _form(row),
            ]
        )
    head = [
        "row", "perplexity per token", "perplexity ratio", "KL (nats per token)", "top-1 agreement",
        "top-5 agreement", "silent share (reads)", "setting",
    ]  # fmt: skip
    data = f"{rows[0]['tokens']:,} tokens, paired: every row on the same windows in the same run."
    return data + "\n\n" + table(head, lines)


def _loss_against(row: dict[str, Any], uniform: dict[str, Any] | None) -> str:
    if uniform is None or not uniform["perplexity_ratio"] or uniform["perplexity_ratio"] <= 1:
        return ""
    share = (row["perplexity_ratio"] - 1) / (uniform["perplexity_ratio"] - 1)
    return f" (loss {share:.2f} of uniform)"


def _form(row: dict[str, Any]) -> str:
    parts = []
    if row["k"] is not None:
        parts.append(f"k = {row['k']:g}")
    if row["dead_zone"] is not None:
        parts.append(f"dead zone {row['dead_zone']:.3g} mean magnitudes")
    if row["bits_max"] is not None:
        parts.append(f"{row['bits_mean']:.1f} bits on average, at most {row['bits_max']}")
    return ", ".join(parts)


def _notes(rows: list[dict[str, Any]]) -> str:
    lines = [f"- {NAMES[row['name']]}: {_EXPLAINED[row['name']]}." for row in rows if row["name"] in _EXPLAINED]
    if any(row["name"] == "uniform_dead_zone" for row in rows):
        lines.append("- loss: perplexity ratio - 1, of this model over that of the uniform dead zone.")
    lines.append("- ±: standard error over tokens. Rounding moves single spikes, so that rows scatter by as much.")
    return "\n".join(lines)


def _speed(report: dict[str, Any]) -> str:
    speed = report["tokens_per_second"]
    rows = []
    for kind, what in (("prefill", "reading a window"), ("decode", "one token after the other")):
        ours, theirs = (speed[name][kind] if name in speed else None for name in ("model", "baseline"))
        beside = [number(theirs, 1), number(ours / theirs)] if theirs else ["", ""]
        rows.append([f"{kind} ({what})", number(ours, 1), *beside])
    load = ", ".join(f"{value:.2f}" for value in report["load_average"])
    note = (
        f"Batch size 1, interleaved, medians. Load average before (1, 5, 15 min): {load}. Unless the model was laid "
        "out for inference, counts run through dense products: then spikes save no time in this table."
    )
    return table(["", "model (tokens/s)", "baseline (tokens/s)", "ratio"], rows) + "\n\n" + note


def _spikes(report: dict[str, Any]) -> str:
    macs = report["dense_macs_per_token"]
    sparsity, clipped = report["spike_slot_sparsity"], report["clipped_share"]
    rows = [
        ["silent share", percent(report["silent_share"]), "of the inputs of all sites"],
        ["silent share (reads)", percent(report["silent_share_reads"]), "of the weight reads behind sites"],
        [
            "silent share (reads, all weights)",
            percent(report["silent_share_reads_all_weights"]),
            "of all weights that a token reads, head included",
        ],
    ]
    for slots in map(str, report["slots"]):
        rows.append(
            [
                f"spike-slot sparsity, T = {slots}",
                percent(sparsity[slots]),
                f"of bitwise slots are empty; {percent(clipped[slots])} of the counts do not fit and are clipped",
            ]
        )
    for form in ("unary", "bitwise"):
        rows.append([f"firing rate, {form}", f"{report['firing_rate'][form]:.3f}", "spikes per input"])
    for form in ("unary", "bitwise"):
        rows.append([f"synaptic operations, {form}", millions(report["synops_per_token"][form]), "per token"])
    rows += [
        [f"dense MACs that remain: {kind.replace('_', ' ')}", millions(value), "per token"]
        for kind, value in macs.items()
    ]
    rows.append(["largest count", str(report["max_count"]), "spikes (unary) of one input"])
    raster = [] if report["controls_left_out"] else ["![Spike raster of one prompt](raster.png)"]
    return "\n\n".join([table(["", "value", "unit"], rows), *raster])


def _curve(points: list[dict[str, Any]]) -> str:
    rows = [
        [
            NAMES[point["family"]],
            percent(point["target_silent_share"]),
            percent(point["silent_share_reads"]),
            ratio(point),
            number(point["kl_nats"], 4),
            percent(point["top1_agreement"]),
        ]
        for point in points
    ]
    head = [
        "row", "asked for", "silent share (reads)", "perplexity ratio", "KL (nats per token)", "top-1 agreement",
    ]  # fmt: skip
    data = f"Measured on {points[0]['tokens']:,} tokens per point, the first windows of the texts above."
    return "![Perplexity ratio against silent share](curve.png)\n\n" + data + "\n\n" + table(head, rows)


def _sites(sites: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(site["layer"]),
            site["site"],
            percent(site["silent_share"]),
            f"{site['firing_rate']['unary']:.2f}",
            f"{site['firing_rate']['bitwise']:.2f}",
            str(site["max_count"]),
            "" if site["k"] is None else f"{site['k']:g}",
            "" if site["dead_zone"] is None else f"{site['dead_zone']:.3f}",
            f"{site['width']} x {site['fan_out']}",
        ]
        for site in sites
    ]
    head = [
        "layer", "site", "silent share", "unary rate (spikes per input)", "bitwise rate (spikes per input)",
        "largest count", "k", "dead zone (mean magnitudes)", "inputs x weights of each",
    ]  # fmt: skip
    return table(head, rows)


def _transfer(transfer: dict[str, Any]) -> str:
    rows = [[str(at["layer"]), f"{at['before']:.4f}", f"{at['after']:.4f}"] for at in transfer["layers"]]
    data = (
        f"When the model was converted, the mixers of {len(rows)} layers learned the outputs of the attention that "
        f"they replace, on {transfer['tokens']:,} tokens of {transfer['text']}. Losses are squared errors relative to "
        f"the variance of those outputs, on {transfer['held_out_tokens']:,} other tokens of that text."
    )
    return data + "\n\n" + table(["layer", "loss before", "loss after"], rows)


def _measured_on(on: dict[str, Any], records: list[dict[str, Any]], parts: Mapping[str, Part]) -> str:
    texts = [
        [t["name"], t["source"], f"{t['tokens']:,}", f"{t['predicted_tokens']:,}", f"{t['bytes']:,}", str(t["window"])]
        for t in on["texts"]
    ]
    head = ["text", "source", "tokens", "predicted tokens", "bytes of them", "window = stride (tokens)"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items() if version)
    facts = {
        **{name: on[name] and _network(on, name) for name in ("model", "baseline")},
        "spike code": on["code"]
        and f"{on['code']}, threshold per {on['threshold']}, "
        f"k = {', '.join(f'{k:g}' for k in on['k'])}, run on {on['execute']}",
        "weights laid out for inference": on["weights"],
        "thresholds of controls and curve": _calibration(on["calibration"]),
        "machine": f"{on['cpu']}, {on['threads']} of {on['cores']} threads, {on['platform']}, device {on['device']}",
        "most memory held by the process": on["peak_memory_gib"] and f"{on['peak_memory_gib']:.1f} GiB",
        "versions": versions,
        "date": on["date"],
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    ended = [
        [
            parts[record["name"]].title,
            record["status"],
            f"{record['seconds']:.0f}",
            f"{record['load_average'][0]:.2f}",
            record["date"],
            ", ".join(f"{name} {value}" for name, value in record["settings"].items()),
        ]
        for record in records
    ]
    how = table(["part", "status", "seconds", "load before (1 min)", "date", "settings"], ended)
    return "\n\n".join([*([table(head, texts)] if texts else []), "\n".join(lines), how])


def _network(on: dict[str, Any], name: str) -> str:
    revision = f", revision {on['revision'][name]}" if on["revision"][name] else ""
    return f"{on[name]} ({on['dtype'][name]}{revision})"


def _calibration(text: dict[str, Any]) -> str:
    return f"found on {text['tokens']:,} tokens of {text['name']} ({text['source']})" if text["tokens"] else ""
