"""Evaluate a spiking model beside its baseline, part by part: quality, tasks, spikes, energy and more; one report.

    report = evaluate(model, source_model, tokenizer, [read_text("essay.txt")], parts=PARTS, out="report/")

Each part is measured on its own and kept in `out/parts` as soon as it is finished: an interrupted run goes on at the
next one when it is asked for again. A part that fails is reported as failed, with its error, and the others still run.
`docs/report.md` says what every key of the report means.
"""

import dataclasses
import time
import traceback
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml
from torch import nn
from tqdm import tqdm

from spikelm.conversion.texts import calibration_sample
from spikelm.eval import energy, plots, quality, spike_detail, tasks
from spikelm.eval.data import Text
from spikelm.eval.fidelity import check_pair
from spikelm.eval.files import png, write_whole
from spikelm.eval.parts import PROMPT, Part, Result, Subject, evaluating
from spikelm.eval.report import build, environment, finite, write_report
from spikelm.eval.store import Store
from spikelm.spiking.site import SpikeSite

EXECUTE = ("counts", "trains")
# In the order of the report.
PARTS: dict[str, Part] = {part.name: part for part in (quality.PART, tasks.PART, spike_detail.PART, energy.PART)}


def evaluate(
    model: nn.Module,
    baseline: nn.Module | None,
    tokenizer: Any,
    texts: list[Text],
    *,
    parts: Sequence[str] = ("quality",),
    quick: bool = False,
    settings: dict[str, dict[str, Any]] | None = None,
    calibration: Text | None = None,
    execute: str = "counts",
    prompt: str = PROMPT,
    names: tuple[str, str | None] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure `model`, and `baseline` beside it on the same data in the same run.

    Args:
        model: a spikelm model, with or without spike sites (then the spike fields of the report are None).
        baseline: the model it came from; any causal language model of transformers with the same vocabulary. None:
            what compares with it is left out.
        tokenizer: of both.
        texts: what to measure on; their names must differ.
        parts: names of `PARTS`; they run in its order.
        quick: whether to begin from the parts' quick settings instead of the full ones.
        settings: part -> fields of its settings that shall be others, e.g. `{"quality": {"tokens": 4096}}`.
        calibration: text for the thresholds of controls and curve; default: `conversion.texts.calibration_sample`.
        execute: `counts`, or `trains` to run the model itself on expanded trains, slot by slot.
        prompt: for the spike raster.
        names: how the report calls model and baseline; default: what they were loaded from.
        out: folder for `report.json`, `report.md`, `report.html`, pictures, and `parts/`, from which a run with the
            same models, texts and settings goes on; None: nothing is written, nothing kept.
        progress: whether to show a bar with an estimate of the time left.

    Returns:
        The report, as in `report.json`. Its `parts` say which of them failed.

    Raises:
        ValueError: texts that are too short or share a name, a tokenizer or vocabularies that do not fit, logits that
            are not finite, an unknown part, setting or way to execute, trains without spike sites, a file where the
            folder should be.
    """
    calibration = calibration or Text("Python reference topics", calibration_sample(), "pydoc_data.topics")
    subject = Subject(model, baseline, tokenizer, texts, calibration, execute, prompt)
    _check(subject, out)
    chosen = _chosen(parts, quick, settings or {})
    folder = None if out is None else Path(out)
    with evaluating(model, baseline):
        # Whatever is asked for: models, tokenizer and texts must fit together.
        sizes = next((setting for part, setting in chosen if part is quality.PART), quality.Settings(16, 16))
        check_pair(model, baseline, subject.cut(sizes.tokens, sizes.window))
        wanted = [part for part, _ in chosen if part.lacks(subject) is None]
        total = sum(part.cost(subject, setting) for part, setting in chosen if part in wanted)
        store = Store(folder / "parts" if folder else None, subject)
        results: dict[str, Result] = {}
        records = []
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
            for part, setting in chosen:
                bar.set_description(part.title)
                record, result = _one(part, setting, subject, store, results, bar)
                records.append(record)
                if result is not None:
                    results[part.name] = result
        report = build(results, records, environment(subject, names), PARTS)
        if folder is not None:
            _write(report, subject, folder)
    return report


def failed(report: dict[str, Any]) -> list[str]:
    """One line for each part of a report that failed: its name and its error."""
    return [f"{part['name']}: {part['error']}" for part in report["parts"] if part["status"] == "failed"]


def assigned(changes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Settings as `evaluate` takes them, out of texts `PART.NAME=VALUE` with a YAML value: numbers, words, [lists].

    Raises:
        ValueError: a text of another form.
    """
    settings: dict[str, dict[str, Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        part, dot, field = name.partition(".")
        if not equals or not dot or "." in field:
            raise ValueError(f"{change!r} is not of the form PART.NAME=VALUE, as in quality.tokens=4096.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{change!r}: {text!r} is no YAML value; write numbers, words or [lists].") from None
        settings.setdefault(part, {})[field] = tuple(value) if isinstance(value, list) else value
    return settings


def _one(
    part: Part, setting: Any, subject: Subject, store: Store, results: dict[str, Result], bar: tqdm
) -> tuple[dict[str, Any], Result | None]:
    """Measure one part, or find what is kept of it; how it ended, and its result."""
    reason = part.lacks(subject)
    if reason is not None:
        return _record(part, setting, "left out", reason), None
    expected, before = part.cost(subject, setting), bar.n
    needed = {name: results.get(name) for name in part.needs}
    kept = store.read(part, setting, needed)
    if kept is not None:
        bar.update(expected)
        return kept["record"], kept["result"]
    started, result = time.monotonic(), None
    record = _record(part, setting, "finished", None)
    trace = None
    try:
        if lost := [name for name in needed if needed[name] is None]:
            raise RuntimeError(f"it is made from the part {lost[0]!r}, which has no result in this run")
        result = finite(part.run(subject, setting, bar, needed))
    except Exception as error:  # whatever it is: the other parts are still wanted
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        trace = traceback.format_exc()
        bar.write(f"{part.title}: failed. {record['error']}")
    record["seconds"] = time.monotonic() - started
    bar.update(before + expected - bar.n)  # an estimate that was wrong must not shift those of later parts
    store.write(part, setting, needed, record | {"traceback": trace}, result)
    return record, result


def _record(part: Part, setting: Any, status: str, error: str | None) -> dict[str, Any]:
    return {
        "name": part.name,
        "status": status,
        "error": error,
        "seconds": 0.0,
        "load_average": [round(x, 2) for x in psutil.getloadavg()],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": dataclasses.asdict(setting),
    }


def _chosen(parts: Sequence[str], quick: bool, settings: dict[str, dict[str, Any]]) -> list[tuple[Part, Any]]:
    """The parts in order, each with its settings."""
    if unknown := sorted({*parts, *settings} - PARTS.keys()):
        raise ValueError(f"There is no part {unknown[0]!r}; choose among {', '.join(PARTS)}.")
    if not parts:
        raise ValueError(f"No part was asked for; choose among {', '.join(PARTS)}.")
    chosen = []
    for name, part in PARTS.items():
        if name not in parts:
            continue
        setting = part.quick if quick else part.full
        changes = settings.get(name, {})
        known = [field.name for field in dataclasses.fields(setting)]
        if strange := sorted(changes.keys() - set(known)):
            raise ValueError(f"The part {name} has no setting {strange[0]!r}; it has {', '.join(known)}.")
        chosen.append((part, dataclasses.replace(setting, **changes)))
    return chosen


def _check(subject: Subject, out: str | Path | None) -> None:
    names = [text.name for text in subject.texts]
    if not names:
        raise ValueError("There is no text to evaluate on; give at least one.")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several texts are called {doubled[0]!r}; give each its own name.")
    if subject.execute not in EXECUTE:
        raise ValueError(f"execute must be one of {', '.join(EXECUTE)}; got {subject.execute!r}.")
    if subject.execute == "trains" and not subject.spiking:
        raise ValueError("execute is 'trains', but the model has no spike sites; evaluate it with 'counts'.")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{str(out)!r} is a file; give a folder for the report.")


def _write(report: dict[str, Any], subject: Subject, folder: Path) -> None:
    """Pictures and pages; every file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if subject.spiking and all(isinstance(group.site, SpikeSite) for group in subject.groups):
        figures["raster.png"] = plots.raster(subject.model, subject.tokenizer, subject.prompt)
    for record in report["parts"]:
        if record["status"] == "finished":
            part = PARTS[record["name"]]
            figures |= part.figures(report if part.name == "quality" else report[part.name])
    for name, figure in figures.items():
        write_whole(folder / name, png(figure))
    write_report(report, PARTS, folder)
