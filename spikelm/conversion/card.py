"""The model card of a converted model, written from the record of its conversion."""

from collections import Counter
from typing import Any

from spikelm.conversion.plan import ATTENDING


def model_card(record: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    source = record["source"]
    head = ["---", "library_name: spikelm", "pipeline_tag: text-generation", "tags: [spiking, spikelm]"]
    if source["licence"]:
        head.append(f"license: {source['licence']}")
    if source["kind"] == "hub":
        head.append(f"base_model: {source['name']}")
    parts = [
        "\n".join([*head, "---"]),
        *_introduction(record),
        "```python\nimport spikelm\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```',
        "## What was done\n\n" + _bullets(_steps(record)),
    ]
    if record["measured"]:
        rows = [f"| {name} | {_number(value)} |" for name, value in record["measured"].items()]
        parts.append("\n".join(["## Measured", "", "| | |", "|---|---|", *rows]))
    else:
        how = ": `spikelm eval` compares this model with its baseline" if record["plan"] is not None else ""
        parts.append(f"## Measured\n\nNothing yet{how}.")
    limits = [*record["notes"]]
    named = {name for mixer in record["result"]["layers"] for name in mixer.split("+")}
    if record["plan"] is not None and not record.get("transfer") and (untrained := named - set(ATTENDING)):
        limits.append(
            f"Layers with {', '.join(sorted(untrained))} have new, untrained parameters: train them before use."
        )
    if source["licence"] or record["result"]["spike_sites"] or record["plan"] is None:
        licence = source["licence"] or "the source's licence"
        limits.append(f"The weights are those of the source and stay under its licence ({licence}).")
    parts.append("## Notes\n\n" + _bullets(limits))
    return "\n\n".join(parts) + "\n"


def _introduction(record: dict[str, Any]) -> list[str]:
    source, version = record["source"], record["versions"]["spikelm"]
    name = _short(source["name"])
    if record["plan"] is None:
        return [
            f"# {source['family']} for spikelm",
            f"Imported from `{name}`, a published checkpoint of kind `{source['format']}`, with spikelm {version}; "
            f"`spikelm export {source['format']}` writes it back. `conversion.json` holds the details.",
        ]
    return [
        f"# {name} in spiking form",
        f"Converted from `{name}` ({source['family']}) with spikelm {version}, without training"
        f"{' beyond attention transfer' if record.get('transfer') else ''}. "
        "`conversion.json` holds every choice and result.",
    ]


def _steps(record: dict[str, Any]) -> list[str]:
    plan, result, calibration = record["plan"], record["result"], record["calibration"]
    layers = ", ".join(f"{count} x `{name}`" for name, count in Counter(result["layers"]).items())
    steps = [f"Layers: {layers}; weights in {result['dtype']}."]
    if transfer := record.get("transfer"):
        losses = transfer["layers"].values()
        before, after = (sum(layer[when] for layer in losses) / len(losses) for when in ("before", "after"))
        steps.append(
            f"The mixers of {len(losses)} layers learned the attention that they replace on {transfer['tokens']} "
            f"tokens of {transfer['text']}: relative squared error {before:.3f} before, {after:.3f} after (mean of "
            "layers)."
        )
    if search := record.get("search"):
        steps.append(
            f"Layers that keep their attention, by measurement: {', '.join(map(str, search['auto']['kept']))}; after a "
            f"first transfer KL {search['auto']['kl']:.3f} nats per token, with {len(search['random']['kept'])} random "
            f"layers {search['random']['kl']:.3f}."
        )
    if record.get("rotated"):
        steps.append("The residual stream is rotated, and with it the weights: outliers are spread over all channels.")
    if not result["spike_sites"]:
        return [*steps, "No activation is spike-coded."]
    sites = ", ".join(f"`{site}`" for site in result["spike_sites"])
    if plan is None:
        return [*steps, f"Spike sites {sites} in every layer, as published."]
    steps.append(f"Spike sites {sites} in every layer; {plan['code']} code, k = {plan['k']:g}.")
    steps.append(f"Threshold: {plan['threshold']}.")
    if plan["max_count"] is not None:
        steps.append(f"Counts are clipped to {plan['max_count']}.")
    if calibration is None:
        steps.append(f"Dead zone: {plan['dead_zone']:g} of the mean magnitude at every site.")
    else:
        steps.append(f"Calibrated on {calibration['tokens']} tokens of {calibration['text']}.")
    if calibration is not None and plan["silent_share"] is not None:
        steps.append(
            f"Dead zones by {plan['allocation']} allocation: {calibration['silent_share_reads']:.3f} of the weighted "
            f"site inputs are silent on that text ({plan['silent_share']:g} asked)."
        )
    return steps


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _short(name: str) -> str:
    """A hub id as it is, a path without its folders."""
    return name if name.count("/") == 1 and not name.startswith(("/", ".")) else name.rstrip("/").rpartition("/")[2]


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
