"""The report: its keys (described in docs/report.md), what it was measured on, and how it gets to disk."""

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spikelm
from spikelm.eval import quality
from spikelm.eval.files import write_whole
from spikelm.eval.html_page import html
from spikelm.eval.markdown import markdown
from spikelm.eval.parts import Part, Subject
from spikelm.kernels.runtime import processor_name
from spikelm.spiking.site import SpikeSite

SCHEMA_VERSION = 1
_LIBRARIES = ("torch", "transformers", "triton", "lm_eval", "neurobench")
GLOSSARY = Path(__file__).with_name("glossary.md")


def build(
    results: dict[str, Any], records: list[dict[str, Any]], environment: dict[str, Any], parts: Iterable[str]
) -> dict[str, Any]:
    """The report.

    Args:
        results: part -> what it found; parts without a result are missing.
        records: how every part ended.
        environment: what a number depends on beside models and texts.
        parts: names of all parts; each has a key of its own, but for `quality`, which stands at the top.
    """
    top = quality.missing() | results.get("quality", {})
    measured_on = top.pop("measured_on") | environment
    report = {
        "schema_version": SCHEMA_VERSION,
        **top,
        **{name: results.get(name) for name in parts if name != "quality"},
        "parts": records,
        "measured_on": measured_on,
    }
    return finite(report)


def environment(subject: Subject, names: tuple[str, str | None] | None) -> dict[str, Any]:
    """What a number depends on beside models and texts."""
    networks = {"model": subject.model, "baseline": subject.baseline}
    named = dict(zip(networks, names or [_name(network) for network in networks.values()]))
    config: Any = subject.model.config
    return {
        **named,
        "revision": {name: _revision(network) for name, network in networks.items()},
        "dtype": {name: None if network is None else _dtype(network) for name, network in networks.items()},
        "weights": getattr(getattr(subject.model, "prepared", None), "weights", None),
        "code": config.spike_code if subject.spiking else None,
        "threshold": config.spike_threshold if subject.spiking else None,
        "k": sorted({group.site.initial["k"] for group in subject.groups if isinstance(group.site, SpikeSite)}),
        "execute": subject.execute,
        "device": str(next(subject.model.parameters()).device),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "peak_memory_gib": _peak_memory(),
        "versions": {"python": platform.python_version(), "spikelm": spikelm.__version__} | {
            name: _version(name) for name in _LIBRARIES
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def write_report(report: dict[str, Any], parts: Mapping[str, Part], out: str | Path) -> None:
    """Write `report.json`, `report.md`, `report.html` and `glossary.md` into the folder `out`.

    Pictures that the pages show must lie there already: the HTML page carries them in itself.

    Raises:
        ValueError: the report holds a number that is not finite.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    write_pages(markdown(report, parts), out, "report")
    write_whole(Path(out) / "report.json", (text + "\n").encode())


def write_pages(page: str, out: str | Path, name: str) -> None:
    """Write a page of Markdown as `NAME.md` and `NAME.html`, and `glossary.md`, into the folder `out`."""
    folder, glossary = Path(out), GLOSSARY.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "glossary.md", glossary.encode())
    write_whole(folder / f"{name}.md", page.encode())
    write_whole(folder / f"{name}.html", html(page, glossary, folder).encode())


def finite(value: Any) -> Any:
    """The same with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _name(network: nn.Module | None) -> str | None:
    if network is None:
        return None
    return getattr(network, "name_or_path", "") or type(network).__name__


def _revision(network: nn.Module | None) -> str | None:
    """The commit of the hub that a model came from, or the source's in the record of its conversion."""
    config: Any = getattr(network, "config", None)
    commit = getattr(config, "_commit_hash", None)
    return commit or (getattr(network, "conversion", None) or {}).get("source", {}).get("revision")


def _dtype(network: nn.Module) -> str:
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory() -> float | None:
    """The most memory that this process has held so far, in GiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
