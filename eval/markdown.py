"""`report.md`: the report for readers; every number with its unit and what it was measured on."""

from typing import Any

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


def markdown(report: dict[str, Any]) -> str:
    """The text of `report.md`."""
    on = report["measured_on"]
    spiking = report["silent_share"] is not None
    parts = [
        f"# {on['model']} beside {on['baseline']}",
        _opening(report),
        "## Quality",
        _rows_table(report["rows"]),
        _notes(report["rows"]),
    ]
    if len(report["texts"]) > 1:
        for text in report["texts"]:
            parts += [f"### On {text['name']}", _rows_table(text["rows"])]
    parts += ["## Speed", _speed(report)]
    if spiking:
        parts += ["## Spikes", _spikes(report)]
        if report["curve"]:
            parts += ["## Quality against silence", _curve(report["curve"])]
        parts += ["## Layer by layer", _sites(report["sites"])]
    else:
        parts += ["## Spikes", "The model has no spike sites: nothing of it is silent, and nothing was counted."]
    if report["transfer"] is not None:
        parts += ["## Attention transfer", _transfer(report["transfer"])]
    parts += ["## Measured on", _measured_on(on)]
    parts.append(
        f"Keys and units of `report.json` (schema {report['schema_version']}): `docs/report.md` of spikelm; what the "
        "words mean: `docs/glossary.md`."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(report: dict[str, Any]) -> str:
    texts = report["measured_on"]["texts"]
    tokens = sum(text["tokens"] for text in texts)
    lines = [
        f"Perplexity is **{_ratio(report)} times** that of the baseline "
        f"({_number(report['perplexity']['model'])} against {_number(report['perplexity']['baseline'])} per token), "
        f"the likeliest next token is the same in {_percent(report['top1_agreement'])} of all cases, "
        f"and the predictions differ by {_number(report['kl_nats'], 4)} nats per token (KL, baseline against model)."
    ]
    if report["silent_share"] is not None:
        lines.append(
            f"**{_percent(report['silent_share_reads'])}** of the weight reads behind spike sites fall on silent "
            f"inputs, which is {_percent(report['silent_share_reads_all_weights'])} of all weights that a token reads."
        )
    names = ", ".join(f"{text['name']} ({text['source']}, {text['tokens']:,} tokens)" for text in texts)
    lines.append(f"Measured in one run on {tokens:,} tokens, in windows of {texts[0]['window']}: {names}.")
    return " ".join(lines)


def _rows_table(rows: list[dict[str, Any]]) -> str:
    uniform = next((row for row in rows if row["name"] == "uniform_dead_zone"), None)
    table = []
    for row in rows:
        loss = _loss_against(row, uniform) if row["name"] == "model" else ""
        table.append(
            [
                NAMES[row["name"]],
                _number(row["perplexity"]),
                _ratio(row) + loss,
                _number(row["kl_nats"], 4),
                _percent(row["top1_agreement"]),
                _percent(row["silent_share_reads"]),
                _form(row),
            ]
        )
    head = [
        "row", "perplexity per token", "perplexity ratio", "KL (nats per token)", "top-1 agreement",
        "silent share (reads)", "setting",
    ]  # fmt: skip
    data = f"{rows[0]['tokens']:,} tokens, paired: every row on the same windows in the same run."
    return data + "\n\n" + _table(head, table)


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
    speed, on = report["tokens_per_second"], report["measured_on"]
    table = []
    for kind, what in (("prefill", "reading a window"), ("decode", "one token after the other")):
        ours, theirs = speed["model"][kind], speed["baseline"][kind]
        table.append([f"{kind} ({what})", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"])
    load = ", ".join(f"{value:.2f}" for value in report["load_average"])
    note = (
        f"Batch size 1, {on['device']}, {on['threads']} threads, run on {on['execute']}; interleaved, medians. Load "
        f"average before (1, 5, 15 min): {load}. Counts are run through dense products here: spikes save no time in "
        "this table."
    )
    return _table(["", "model (tokens/s)", "baseline (tokens/s)", "ratio"], table) + "\n\n" + note


def _spikes(report: dict[str, Any]) -> str:
    macs = report["dense_macs_per_token"]
    sparsity, clipped = report["spike_slot_sparsity"], report["clipped_share"]
    table = [
        ["silent share", _percent(report["silent_share"]), "of the inputs of all sites"],
        ["silent share (reads)", _percent(report["silent_share_reads"]), "of the weight reads behind sites"],
        [
            "silent share (reads, all weights)",
            _percent(report["silent_share_reads_all_weights"]),
            "of all weights that a token reads, head included",
        ],
    ]
    for slots in map(str, report["slots"]):
        table.append(
            [
                f"spike-slot sparsity, T = {slots}",
                _percent(sparsity[slots]),
                f"of bitwise slots are empty; {_percent(clipped[slots])} of the counts do not fit and are clipped",
            ]
        )
    for form in ("unary", "bitwise"):
        table.append([f"firing rate, {form}", f"{report['firing_rate'][form]:.3f}", "spikes per input"])
    for form in ("unary", "bitwise"):
        table.append([f"synaptic operations, {form}", _millions(report["synops_per_token"][form]), "per token"])
    table += [
        [f"dense MACs that remain: {kind.replace('_', ' ')}", _millions(value), "per token"]
        for kind, value in macs.items()
    ]
    table.append(["largest count", str(report["max_count"]), "spikes (unary) of one input"])
    pictures = ("![Spike raster of one prompt](raster.png)", "![Silent share and firing rate by site](sites.png)")
    return "\n\n".join([_table(["", "value", "unit"], table), *pictures])


def _curve(points: list[dict[str, Any]]) -> str:
    table = [
        [
            NAMES[point["family"]],
            _percent(point["target_silent_share"]),
            _percent(point["silent_share_reads"]),
            _ratio(point),
            _number(point["kl_nats"], 4),
            _percent(point["top1_agreement"]),
        ]
        for point in points
    ]
    head = [
        "row", "asked for", "silent share (reads)", "perplexity ratio", "KL (nats per token)", "top-1 agreement",
    ]  # fmt: skip
    data = f"Measured on {points[0]['tokens']:,} tokens per point, the first windows of the texts above."
    return "![Perplexity ratio against silent share](curve.png)\n\n" + data + "\n\n" + _table(head, table)


def _sites(sites: list[dict[str, Any]]) -> str:
    table = [
        [
            str(site["layer"]),
            site["site"],
            _percent(site["silent_share"]),
            f"{site['firing_rate']['unary']:.2f}",
            f"{site['firing_rate']['bitwise']:.2f}",
            str(site["max_count"]),
            f"{site['k']:g}",
            f"{site['dead_zone']:.3f}",
            f"{site['width']} x {site['fan_out']}",
        ]
        for site in sites
    ]
    head = [
        "layer", "site", "silent share", "unary rate (spikes per input)", "bitwise rate (spikes per input)",
        "largest count", "k", "dead zone (mean magnitudes)", "inputs x weights of each",
    ]  # fmt: skip
    return _table(head, table)


def _transfer(transfer: dict[str, Any]) -> str:
    rows = [[str(at["layer"]), f"{at['before']:.4f}", f"{at['after']:.4f}"] for at in transfer["layers"]]
    data = (
        f"When the model was converted, the mixers of {len(rows)} layers learned the outputs of the attention that "
        f"they replace, on {transfer['tokens']:,} tokens of {transfer['text']}. Losses are squared errors relative to "
        f"the variance of those outputs, on {transfer['held_out_tokens']:,} other tokens of that text."
    )
    return data + "\n\n" + _table(["layer", "loss before", "loss after"], rows)


def _measured_on(on: dict[str, Any]) -> str:
    texts = [
        [t["name"], t["source"], f"{t['tokens']:,}", f"{t['predicted_tokens']:,}", f"{t['bytes']:,}", str(t["window"])]
        for t in on["texts"]
    ]
    head = ["text", "source", "tokens", "predicted tokens", "bytes of them", "window (tokens)"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    memory = "" if on["peak_memory_gib"] is None else f"{on['peak_memory_gib']:.1f} GiB"
    facts = {
        "model": f"{on['model']} ({on['dtype']['model']})",
        "baseline": f"{on['baseline']} ({on['dtype']['baseline']})",
        "spike code": on["code"]
        and f"{on['code']}, threshold per {on['threshold']}, "
        f"k = {', '.join(f'{k:g}' for k in on['k'])}, run on {on['execute']}",
        "thresholds of controls and curve": _calibration(on["calibration"]),
        "machine": f"{on['cpu']}, {on['threads']} of {on['cores']} threads, {on['platform']}, device {on['device']}",
        "most memory held by the process": memory,
        "versions": versions,
        "date": on["date"],
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    return _table(head, texts) + "\n\n" + "\n".join(lines)


def _calibration(text: dict[str, Any]) -> str:
    return f"found on {text['tokens']:,} tokens of {text['name']} ({text['source']})" if text["tokens"] else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "n/a"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _ratio(row: dict[str, Any]) -> str:
    if row["perplexity_ratio"] is None:
        return "n/a"
    return f"{row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_error']:.4f}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f} million" if value >= 1e5 else f"{value:,.0f}"
