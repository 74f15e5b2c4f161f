"""Quality: the model beside its baseline and its controls on the same windows; the curve of quality against silence.

What it finds stands at the top level of `report.json`; docs/report.md says what every key means.
"""

from dataclasses import dataclass
from typing import Any

import psutil
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.eval import plots
from spikelm.eval.controls import MagnitudeProfile
from spikelm.eval.data import TokenizedText, spread
from spikelm.eval.fidelity import Measured, Row, combine, compare, merge, run
from spikelm.eval.markdown import quality_page
from spikelm.eval.parts import DECODED, Part, Result, Subject
from spikelm.eval.rows import TARGETS, calibrated_allocation, control_rows, curve_rows, curve_windows, model_row
from spikelm.eval.speed import DECODE_TOKENS, PREFILL_PASSES, PROMPT_TOKENS, tokens_per_second
from spikelm.eval.tables import ratio
from spikelm.spiking.site import SpikeSite, spike_groups

SILENT = ("silent_share", "silent_share_reads", "silent_share_reads_all_weights")
SPIKES = (
    *SILENT, "spike_slot_sparsity", "clipped_share", "slots", "firing_rate", "synops_per_token",
    "dense_macs_per_token", "max_count",
)  # fmt: skip
_QUALITY = ("perplexity_ratio", "perplexity_ratio_error", "top1_agreement", "top5_agreement", "kl_nats")
_ON_CURVE = ("model", "int_k", "plain_k3")
_SITE = (
    "layer", "site", "path", "width", "fan_out", "tokens", "silent_share", "firing_rate", "spike_slot_sparsity",
    "clipped_share", "max_count",
)  # fmt: skip
_CALIBRATION_TOKENS = 2048
_CONTROLS = 4


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        tokens: of each text. window: tokens of a window; windows are disjoint.
        controls: whether to measure the control rows: uniform dead zone, TEAL, int-k ANN, plain k = 3.
        curve: whether to measure perplexity against silent share.
        curve_tokens: tokens of a point of the curve, over all texts, in whole windows.
    """

    tokens: int = 8000
    window: int = 512
    controls: bool = True
    curve: bool = True
    curve_tokens: int = 2000


def measure(subject: Subject, settings: Settings, bar: tqdm, earlier: dict[str, Result]) -> Result:
    """All rows in one pass over the texts."""
    model, baseline = subject.model, subject.baseline
    texts = subject.cut(settings.tokens, settings.window)
    windows = curve_windows(texts, settings.curve_tokens) if _has_curve(subject, settings) else None
    load, progress = list(psutil.getloadavg()), not bar.disable
    speed = tokens_per_second(subject.networks(), texts[0].windows)
    bar.update(_speed_cost(subject, texts[0].windows[0]))
    rows = [model_row(model, subject.running)]
    held_out: list[Tensor] = []
    if _has_controls(subject, settings) or windows:
        held_out = spread(subject.calibration, subject.tokenizer, _CALIBRATION_TOKENS, settings.window)
        profile = _profile(model, held_out, progress)
        if _has_controls(subject, settings):
            rows += control_rows(model, texts, profile, progress)
        if windows:
            allocate = calibrated_allocation(model, held_out, progress)
            rows += curve_rows(model, profile, allocate, windows, TARGETS)
    compare(model, baseline, texts, rows, bar)
    return {
        **_entry(rows[0].select()),
        "tokens_per_second": speed,
        "load_average": load,
        "controls_left_out": _no_code(subject),
        "rows": _table(rows),
        "curve": _curve(rows, windows) if windows else [],
        "texts": [
            {"name": text.name, **_entry(rows[0].select(t)), "rows": _table(rows, t)} for t, text in enumerate(texts)
        ],
        "sites": _sites(model, rows[0].select()),
        "transfer": _transfer(model),
        "measured_on": {
            "texts": [_description(text) for text in texts],
            "calibration": {
                "name": subject.calibration.name if held_out else None,
                "source": subject.calibration.source if held_out else None,
                "tokens": sum(map(len, held_out)),
            },
        },
    }


def cost(subject: Subject, settings: Settings) -> float:
    """Tokens of all forward passes: the baseline's, those of every row, and those that find the speed."""
    texts = subject.cut(settings.tokens, settings.window)
    total = sum(text.tokens for text in texts)
    passes = (2 if subject.baseline is not None else 1) + _CONTROLS * _has_controls(subject, settings)
    points = 0
    if _has_curve(subject, settings):
        points = 3 * len(TARGETS) * sum(
            sum(map(len, text.windows[:n])) for text, n in zip(texts, curve_windows(texts, settings.curve_tokens))
        )  # fmt: skip
    return passes * total + points + _speed_cost(subject, texts[0].windows[0])


def figures(result: Result) -> dict[str, Figure]:
    """`sites.png` and `curve.png`, as far as there is something to draw."""
    drawn = {"sites.png": plots.sites(result)} if result["sites"] else {}
    return drawn | {"curve.png": plots.curve(result)} if result["curve"] else drawn


def summary(result: Result) -> dict[str, float | str | None]:
    """The headline, and the loss of every control."""
    speed = result["tokens_per_second"]
    controls = {
        f"perplexity ratio of the control {row['name']}": row["perplexity_ratio"]
        for row in result["rows"]
        if row["name"] not in ("baseline", "model")
    }
    rates = result["firing_rate"] or {}
    return {
        "perplexity (per token)": result["perplexity"]["model"],
        "bits per byte": result["bits_per_byte"]["model"],
        "perplexity ratio": result["perplexity_ratio"] and ratio(result),
        "KL (nats per token)": result["kl_nats"],
        "top-1 agreement": result["top1_agreement"],
        "top-5 agreement": result["top5_agreement"],
        "silent share (reads)": result["silent_share_reads"],
        "silent share (reads, all weights)": result["silent_share_reads_all_weights"],
        **{f"firing rate, {form} (spikes per input)": rate for form, rate in rates.items()},
        "prefill (tokens per second)": speed["model"]["prefill"],
        "decode (tokens per second)": speed["model"]["decode"],
        **controls,
    }


def missing() -> Result:
    """The keys of a result, without numbers: what the report holds where this part did not come to an end."""
    lists: Result = {key: [] for key in ("rows", "curve", "texts", "sites")}
    others = ("tokens_per_second", "load_average", "controls_left_out", "transfer")
    calibration = {"name": None, "source": None, "tokens": 0}
    return (
        combine([])
        | dict.fromkeys((*SPIKES, *others))
        | lists
        | {"measured_on": {"texts": [], "calibration": calibration}}
    )


def _no_code(subject: Subject) -> str | None:
    """Why there are no controls although there are spikes."""
    strange = next((group for group in subject.groups if not isinstance(group.site, SpikeSite)), None)
    if strange is None:
        return None
    kind = type(strange.site).__name__
    return f"{strange.path} holds {kind}: neurons and events have no code whose levels or dead zones could be compared"


def _has_controls(subject: Subject, settings: Settings) -> bool:
    return settings.controls and subject.spiking and _no_code(subject) is None


def _has_curve(subject: Subject, settings: Settings) -> bool:
    return settings.curve and subject.spiking and _no_code(subject) is None


def _speed_cost(subject: Subject, window: Tensor) -> float:
    one = (1 + PREFILL_PASSES) * len(window) + PROMPT_TOKENS + DECODED * (1 + DECODE_TOKENS)
    return one * len(subject.networks())


def _profile(model: nn.Module, windows: list[Tensor], progress: bool) -> MagnitudeProfile:
    profile = MagnitudeProfile(model)
    with profile.collecting():
        for window in tqdm(windows, desc="Reading magnitudes", unit="window", leave=False, disable=not progress):
            run(model, window)
    return profile


def _description(text: TokenizedText) -> dict[str, Any]:
    return {
        "name": text.name,
        "source": text.source,
        "tokens": text.tokens,
        "predicted_tokens": text.predicted_tokens,
        "bytes": sum(text.text_bytes),
        "window": text.window,
        "stride": text.window,
    }


def _entry(measured: list[Measured]) -> dict[str, Any]:
    """Quality and spikes of one row over some windows; the spike fields are None without sites."""
    spikes = [one.spikes for one in measured if one.spikes is not None]
    merged = merge(spikes) if spikes else {}
    return combine([one.score for one in measured]) | {key: merged.get(key) for key in SPIKES}


def _table(rows: list[Row], text: int | None = None) -> list[dict[str, Any]]:
    """The rows on all windows, below the baseline if there is one."""
    entries = [_line(row, row.select(text)) for row in rows if row.windows is None]
    perplexity = combine([one.score for one in rows[0].select(text)])["perplexity"]["baseline"]
    if perplexity is None:
        return entries
    same = {
        "name": "baseline",
        "tokens": entries[0]["tokens"],
        "perplexity_ratio": 1.0,
        "perplexity_ratio_error": 0.0,
        "top1_agreement": 1.0,
        "top5_agreement": 1.0,
        "kl_nats": 0.0,
        "perplexity": perplexity,
    }
    return [dict.fromkeys(entries[0]) | same, *entries]


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
    settings: dict[str, dict[str, float | None]] = {}
    for group in spike_groups(model):
        settings[group.path] = {"k": None, "dead_zone": None}  # of neurons and events
        if isinstance(site := group.site, SpikeSite):
            settings[group.path] = {"k": float(site.k), "dead_zone": float(site.dead_zone.mean())}
    merged = [merge(list(passes)) for passes in zip(*(one.sites for one in measured))]
    return [{key: row[key] for key in _SITE} | settings[row["path"]] for row in merged]


def _transfer(model: nn.Module) -> dict[str, Any] | None:
    """What the record of the model's conversion says of attention transfer, with a list of layers; None without."""
    transfer = (getattr(model, "conversion", None) or {}).get("transfer")
    if transfer is None:
        return None
    layers = [{"layer": int(layer)} | losses for layer, losses in transfer["layers"].items()]
    return transfer | {"layers": layers}


PART = Part(
    name="quality",
    title="Quality",
    full=Settings(),
    quick=Settings(tokens=2048, curve_tokens=1024),
    run=measure,
    cost=cost,
    page=quality_page,
    figures=figures,
    summary=summary,
)
