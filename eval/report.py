"""The report: its keys (described in docs/report.md), what it was measured on, and how it gets to disk."""

import json
import math
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import spikelm
from spikelm.eval.data import TokenizedText
from spikelm.eval.fidelity import Measured, Row, combine, merge
from spikelm.eval.markdown import markdown
from spikelm.kernels.runtime import processor_name
from spikelm.spiking.site import spike_groups

SCHEMA_VERSION = 1
SILENT = ("silent_share", "silent_share_reads", "silent_share_reads_all_weights")
SPIKES = (
    *SILENT, "spike_slot_sparsity", "clipped_share", "slots", "firing_rate", "synops_per_token",
    "dense_macs_per_token", "max_count",
)  # fmt: skip
_QUALITY = ("perplexity_ratio", "perplexity_ratio_error", "top1_agreement", "kl_nats")
_ON_CURVE = ("model", "int_k", "plain_k3")
_SITE = (
    "layer", "site", "path", "width", "fan_out", "tokens", "silent_share", "firing_rate", "spike_slot_sparsity",
    "clipped_share", "max_count",
)  # fmt: skip


def build(
    texts: list[TokenizedText],
    rows: list[Row],
    curve: list[int] | None,
    model: nn.Module,
    speed: dict[str, Any],
    measured_on: dict[str, Any],
) -> dict[str, Any]:
    """The report of what was measured.

    Args:
        texts: what it was measured on.
        rows: the model first, then its controls, then the points of the curve.
        curve: how many windows of each text a point of the curve took; None: there is no curve.
        model: the model, for the settings of its sites.
        speed: `tokens_per_second` and `load_average`. measured_on: all that is not said by the texts.
    """
    headline = [row for row in rows if row.windows is None]
    described = [
        {
            "name": text.name,
            "source": text.source,
            "tokens": text.tokens,
            "predicted_tokens": text.predicted_tokens,
            "bytes": sum(text.text_bytes),
            "window": text.window,
        }
        for text in texts
    ]
    report = {
        "schema_version": SCHEMA_VERSION,
        **_entry(rows[0].select()),
        **speed,
        "rows": _table(headline),
        "curve": _curve(rows, curve) if curve else [],
        "texts": [
            {"name": text.name, **_entry(rows[0].select(t)), "rows": _table(headline, t)}
            for t, text in enumerate(texts)
        ],
        "sites": _sites(model, rows[0].select()),
        "transfer": _transfer(model),
        "measured_on": {"texts": described, **measured_on},
    }
    return _finite(report)


def environment(model: nn.Module, baseline: nn.Module, names: tuple[str, str] | None) -> dict[str, Any]:
    """What a number depends on beside model and text."""
    named = names or tuple(_name(network) for network in (model, baseline))
    sites = [group.site for group in spike_groups(model)]
    config = model.config
    return {
        "model": named[0],
        "baseline": named[1],
        "dtype": {name: _dtype(network) for name, network in (("model", model), ("baseline", baseline))},
        "code": getattr(config, "spike_code", None) if sites else None,
        "threshold": getattr(config, "spike_threshold", None) if sites else None,
        "k": sorted({site.initial["k"] for site in sites}),
        "device": str(next(model.parameters()).device),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "peak_memory_gib": _peak_memory(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "spikelm": spikelm.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_report(report: dict[str, Any], out: str | Path) -> None:
    """Write `report.json` and `report.md` into the folder `out`; each appears whole or not at all.

    Raises:
        ValueError: the report holds a number that is not finite.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "report.json", (text + "\n").encode())
    write_whole(folder / "report.md", markdown(report).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name beside it, then rename: nobody ever reads a half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _entry(measured: list[Measured]) -> dict[str, Any]:
    """Quality and spikes of one row over some windows; the spike fields are None without sites."""
    spikes = [one.spikes for one in measured if one.spikes is not None]
    merged = merge(spikes) if spikes else {}
    return combine([one.score for one in measured]) | {key: merged.get(key) for key in SPIKES}


def _table(rows: list[Row], text: int | None = None) -> list[dict[str, Any]]:
    entries = [_line(row, row.select(text)) for row in rows]
    nothing = dict.fromkeys(entries[0])
    same = {
        "name": "baseline",
        "tokens": entries[0]["tokens"],
        "perplexity_ratio": 1.0,
        "perplexity_ratio_error": 0.0,
        "top1_agreement": 1.0,
        "kl_nats": 0.0,
        "perplexity": combine([one.score for one in rows[0].select(text)])["perplexity"]["baseline"],
    }
    return [nothing | same, *entries]


def _line(row: Row, measured: list[Measured]) -> dict[str, Any]:
    entry = _entry(measured)
    return {
        "name": row.name,
        "tokens": sum(one.score.predicted + 1 for one in measured),
        "perplexity": entry["perplexity"]["model"],
        **{key: entry[key] for key in (*_QUALITY, *SILENT)},
        **row.setting,
    }


def _curve(rows: list[Row], windows: list[int]) -> list[dict[str, Any]]:
    """Points of the curve, and the rows that have one place on it, all on the same windows."""
    points = []
    for row in rows:
        if row.windows is None and row.name not in _ON_CURVE:
            continue
        line = _line(row, row.select(windows=windows))
        kept = ("tokens", *_QUALITY, *SILENT, "dead_zone")
        target = line.get("target_silent_share")
        points.append({"family": row.name, "target_silent_share": target, **{key: line[key] for key in kept}})
    return points


def _sites(model: nn.Module, measured: list[Measured]) -> list[dict[str, Any]]:
    settings = {
        group.path: {"k": float(group.site.k), "dead_zone": float(group.site.dead_zone.mean())}
        for group in spike_groups(model)
    }
    merged = [merge(list(passes)) for passes in zip(*(one.sites for one in measured))]
    return [{key: row[key] for key in _SITE} | settings[row["path"]] for row in merged]


def _transfer(model: nn.Module) -> dict[str, Any] | None:
    """What the record of the model's conversion says of attention transfer, with a list of layers; None without."""
    transfer = (getattr(model, "conversion", None) or {}).get("transfer")
    if transfer is None:
        return None
    layers = [{"layer": int(layer)} | losses for layer, losses in transfer["layers"].items()]
    return transfer | {"layers": layers}


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _name(network: nn.Module) -> str:
    return getattr(network, "name_or_path", "") or type(network).__name__


def _dtype(network: nn.Module) -> str:
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def _peak_memory() -> float | None:
    """The most memory that this process has held so far, in GiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
