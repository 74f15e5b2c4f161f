"""Several reports side by side: `spikelm compare A B ...`.

One line per number that at least one report has, one column per report, and first of all what they do not share:
numbers from other texts, beside another baseline or from another machine do not belong beside each other.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikelm.eval.parts import Part
from spikelm.eval.report import SCHEMA_VERSION
from spikelm.eval.tables import table


def read_report(path: str | Path) -> dict[str, Any]:
    """The report in a folder, or in a `report.json`.

    Raises:
        ValueError: there is none, or it is not one that this version reads.
    """
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"There is no report at {str(path)!r}; give the folder that `spikelm eval --out` wrote."
        ) from None
    except ValueError:
        raise ValueError(f"{str(file)!r} is not JSON; give the report.json that `spikelm eval` wrote.") from None
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION or "parts" not in report:
        raise ValueError(f"{str(file)!r} is not a report of schema {SCHEMA_VERSION}; evaluate the model again.")
    return report


def compare_reports(reports: Mapping[str, dict[str, Any]], parts: Mapping[str, Part]) -> str:
    """Markdown: what the reports do not share, and their numbers side by side.

    Args:
        reports: how a column is called -> the report.
        parts: all parts, for what each makes of its own result.
    """
    page = [f"# {len(reports)} reports side by side", _differences(reports)]
    for name, part in parts.items():
        columns = [_summary(part, report) for report in reports.values()]
        labels = list(dict.fromkeys(label for column in columns for label in column))
        if labels:
            rows = [[label, *(_shown(column.get(label)) for column in columns)] for label in labels]
            page += [f"## {part.title}", table(["", *reports], rows)]
        if states := _not_finished(name, reports):
            page.append(states)
    return "\n\n".join(part for part in page if part) + "\n"


def column_names(paths: Sequence[str | Path]) -> list[str]:
    """Short names that differ: of the folders, numbered where they are the same."""
    names: list[str] = []
    for path in map(Path, paths):
        stem = (path.parent if path.suffix == ".json" else path).name or str(path)
        names.append(next(name for n in range(1, len(names) + 2) if (name := stem + f"-{n}" * (n > 1)) not in names))
    return names


def _summary(part: Part, report: dict[str, Any]) -> dict[str, Any]:
    finished = any(record["name"] == part.name and record["status"] == "finished" for record in report["parts"])
    if not finished:
        return {}
    numbers = part.summary(report if part.name == "quality" else report[part.name])
    return {label: value for label, value in numbers.items() if value is not None}


def _not_finished(name: str, reports: Mapping[str, dict[str, Any]]) -> str:
    lines = []
    for column, report in reports.items():
        for record in report["parts"]:
            if record["name"] == name and record["status"] != "finished":
                lines.append(f"- {column}: {record['status']}. {' '.join(record['error'].split())}")
    return "\n".join(lines)


def _differences(reports: Mapping[str, dict[str, Any]]) -> str:
    """What numbers depend on, where it is not the same everywhere."""
    facts = {column: _facts(report) for column, report in reports.items()}
    labels = list(dict.fromkeys(label for column in facts.values() for label in column))
    rows = [[label, *(str(column.get(label, "")) for column in facts.values())] for label in labels]
    differing = [row for row in rows if row[0] != "model" and len(set(row[1:])) > 1]
    head = ["", *reports]
    models = table(head, [row for row in rows if row[0] == "model"])
    if not differing:
        return models + "\n\nMeasured on the same data, beside the same baseline, with the same settings and libraries."
    return models + "\n\n**Not the same for all**: take care where a number depends on it.\n\n" + table(head, differing)


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    on = report["measured_on"]
    texts = "; ".join(f"{t['name']} ({t['tokens']:,} tokens, windows of {t['window']})" for t in on["texts"])
    settings = {
        f"settings of {record['name']}": ", ".join(f"{name} {value}" for name, value in record["settings"].items())
        for record in report["parts"]
        if record["status"] == "finished"
    }
    return {
        "model": on["model"],
        "baseline": on["baseline"] or "none",
        "texts": texts,
        "dtype": on["dtype"]["model"],
        "weights": on["weights"] or "as they are",
        "run on": on["execute"],
        "machine": f"{on['cpu']}, {on['threads']} threads, {on['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in on["versions"].items() if version),
        **settings,
    }


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
