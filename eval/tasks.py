"""Tasks of lm-evaluation-harness: model and baseline on the same documents, metrics with the error of the difference.

A task is a name. It is looked for in the folders of YAML tasks that are given, among the tasks that this library brings
(`eval/bundled_tasks.py`), and among the thousands of the harness, whose data a model hub has to hand out.
docs/evaluation.md says how to write one.
"""

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spikelm.eval.bundled_tasks import BUNDLED
from spikelm.eval.harness import Loaded, check_names, load, secluded, seed
from spikelm.eval.paired import combined, errors
from spikelm.eval.parts import DECODED, Part, Result, Subject
from spikelm.eval.tables import number, table

# Aggregates over whole texts that take seconds: no error is computed by leaving out documents.
_SLOW = ("bleu", "chrf", "chrfpp", "ter")
# What a task costs before its documents are at hand.
_DOCUMENTS, _TOKENS_PER_DOCUMENT = 1000, 300

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Which tasks, and how much of them.

    Attributes:
        tasks: names of tasks, groups or tags.
        include_path: folders with YAML tasks; their code runs, if they have some.
        limit: documents of each task, the first ones; None: all.
        shots: solved examples before each document; None: as the task says. Tasks that say 0 keep it.
        batch_size: texts in one pass; fewer where they are long.
        window: tokens that a model reads at once; fewer where a configuration says so. The part of the context that
            does not fit is cut off at its beginning, and a rolling text is scored window by window.
    """

    tasks: tuple[str, ...] = tuple(BUNDLED)
    include_path: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 8
    window: int = 2048


def measure(subject: Subject, settings: Settings, bar: tqdm, earlier: dict[str, Result]) -> Result:
    """The rows of all tasks, on the same documents."""
    from lm_eval import evaluate

    from spikelm.eval.lm_eval_model import SpikeLM

    with secluded():
        loaded = load(settings.tasks, settings.include_path, settings.shots)
    window = _window(subject, settings)
    outputs: dict[str, Any] = {}
    counts: dict[str, Counter[str]] = {"model": Counter(), "baseline": Counter()}
    for name, (network, running) in subject.networks().items():

        def count(read: int, generated: int, found: Counter[str] = counts[name]) -> None:
            found.update(tokens=read, generated=generated)
            bar.update(read + DECODED * generated)

        lm = SpikeLM(network, subject.tokenizer, max_length=window, batch_size=settings.batch_size, on_tokens=count)
        with secluded(), running():
            seed(loaded)
            outputs[name] = evaluate(lm, loaded, limit=settings.limit, bootstrap_iters=0)
        counts[name]["shortened"] = lm.shortened
    return {
        "window": window,
        "prefix_token": subject.tokenizer.decode([lm.prefix_token_id]),
        **{
            key: {name: counts[name][key] if name in outputs else None for name in counts}
            for key in ("tokens", "generated", "shortened")
        },
        "rows": _rows(loaded, outputs),
    }


def cost(subject: Subject, settings: Settings) -> float:
    """Tokens of both networks: of bundled tasks as they are, of others a guess.

    Raises:
        ValueError: a task that there is not, no task at all, no folder, a size below 1.
    """
    for name, least in {"limit": 1, "shots": 0, "batch_size": 1, "window": 1}.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} of the tasks must be at least {least}; got {value}.")
    with secluded():
        check_names(settings.tasks, settings.include_path)
        bundled = load([name for name in settings.tasks if name in BUNDLED], (), None)["tasks"].values()
        for task in bundled:
            task.build_all_requests(limit=settings.limit)
    total = 0.0
    for request in (request for task in bundled for request in task.instances):
        text = "".join(one for one in request.args if isinstance(one, str))
        total += len(subject.tokenizer(text, verbose=False)["input_ids"])
        if request.request_type == "generate_until":
            total += DECODED * request.args[1]["max_gen_toks"]
    others = len(settings.tasks) - len(bundled)
    total += others * min(settings.limit or _DOCUMENTS, _DOCUMENTS) * _TOKENS_PER_DOCUMENT
    return total * len(subject.networks())


def page(result: Result) -> list[str]:
    """One table: a line for each metric."""
    paired = any(row["value"]["baseline"] is not None for row in result["rows"])
    head = ["task", "documents", "shots", "metric", "this model"]
    lines = []
    for row in result["rows"]:
        line = [
            row["task"] if row["kind"] != "group" else f"**{row['task']}**",
            f"{row['documents']:,}"
            if row["documents"] == row["available"]
            else f"{row['documents']:,} of {row['available']:,}",
            number(row["shots"], 0) if row["shots"] is not None else "",
            f"{_named(row)} {'↑' if row['higher_is_better'] else '↓'}",
            _with_error(row["value"]["model"], row["value_error"]["model"]),
        ]
        if paired:
            line.append(_with_error(row["value"]["baseline"], row["value_error"]["baseline"]))
            line.append(_with_error(row["difference"], row["difference_error"], sign="+"))
        lines.append(line)
    if paired:
        head += ["baseline", "difference"]
    tokens = result["tokens"]["model"] + result["generated"]["model"]
    data = (
        f"Tasks of lm-evaluation-harness, {tokens:,} tokens per network, at most {result['window']:,} at once; texts "
        f"without a context begin behind `{result['prefix_token']}`."
    )
    if paired:
        data += " Model and baseline on the same documents."
    note = "- ↑, ↓: whether more or less is better. ±: standard error over documents"
    if paired:
        note += (
            "; of the difference, with documents paired: where both find the same ones hard, it is smaller than those "
            "of the two would suggest"
        )
    notes = [note + "."]
    if bundled := [name for name in BUNDLED if any(row["task"] == name for row in result["rows"])]:
        notes.append(
            f"- {', '.join(bundled)}: come with spikelm; Python's reference text (other paragraphs than those of the "
            "built-in calibration), and generated keys."
        )
    if shortened := result["shortened"]["model"]:
        notes.append(f"- {shortened:,} requests were longer than {result['window']:,} tokens and lost their beginning.")
    return [data, table(head, lines), "\n".join(notes)]


def summary(result: Result) -> dict[str, float | str | None]:
    """Every metric of the model, with its error."""
    return {
        f"{row['task']}: {_named(row)}": _with_error(row["value"]["model"], row["value_error"]["model"])
        for row in result["rows"]
    }


def _named(row: Row) -> str:
    return row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "n/a"
    return f"{value:{sign}.4g}" + ("" if error is None else f" ± {error:.2g}")


def _window(subject: Subject, settings: Settings) -> int:
    """Tokens at once: the same for both networks, so that both are asked the same."""
    limits = [getattr(network.config, "max_position_embeddings", None) for network, _ in subject.networks().values()]
    return min(settings.window, *(limit for limit in limits if limit is not None))


def _rows(loaded: Loaded, outputs: dict[str, Any]) -> list[Row]:
    """Rows of the tasks in their order, and of the groups that aggregate some."""
    rows = []
    for name, task in loaded["tasks"].items():
        aggregates = task.aggregation()
        columns = {network: _values(out["samples"][name]) for network, out in outputs.items()}
        size = outputs["model"]["n-samples"][name]
        about = {
            "task": name,
            "kind": task.OUTPUT_TYPE,
            "data": "spikelm" if name in BUNDLED else _data(task),
            "version": str(task.VERSION),
            "shots": task.get_config("num_fewshot"),
            "documents": size["effective"],
            "available": size["original"],
        }
        for metric, filtered in columns["model"]:
            values = {network: _number(out["results"][name], metric, filtered) for network, out in outputs.items()}
            found = [column.get((metric, filtered), {}) for column in columns.values()]
            if any(value is None for value in values.values()):
                continue  # a metric that is no number
            aggregate = aggregates.get(metric)
            own: list[float | None] = [None] * len(found)
            paired = None
            same = all(one.keys() == found[0].keys() for one in found)
            if aggregate is not None and aggregate.__name__ not in _SLOW and same:
                own, paired = errors(aggregate, *(list(one.values()) for one in found))
            better = task.higher_is_better().get(metric, True)
            rows.append(_row(about, metric, filtered, better, values, dict(zip(values, own)), paired))
    return rows + [row for group in loaded["groups"].values() for row in _group_rows(group, rows, outputs)]


def _group_rows(group: Any, rows: list[Row], outputs: dict[str, Any]) -> list[Row]:
    """What a group makes of its tasks: means over them, perhaps weighted by documents."""
    found = []
    members = {task.task_name for task in group.get_all_tasks()}
    for rule in group.aggregate_metric_list or ():
        lines = [row for row in rows if row["task"] in members and row["metric"] == rule.metric]
        for filtered in dict.fromkeys(row["filter"] for row in lines):
            parts = [row for row in lines if row["filter"] == filtered]
            values = {
                network: _number(out["results"][group.name], rule.metric, filtered) for network, out in outputs.items()
            }
            if any(value is None for value in values.values()):
                continue
            sizes = [row["documents"] if rule.weight_by_size else 1 for row in parts]
            weights = [size / sum(sizes) for size in sizes]
            own = {name: combined([row["value_error"][name] for row in parts], weights) for name in values}
            paired = combined([row["difference_error"] for row in parts], weights) if len(values) == 2 else None
            about = {
                "task": group.name,
                "kind": "group",
                "data": None,
                "version": str(group.version),
                "shots": None,
                "documents": sum(row["documents"] for row in parts),
                "available": sum(row["available"] for row in parts),
            }
            better = parts[0]["higher_is_better"]
            found.append(_row(about, rule.metric, filtered, better, values, own, paired))
    return found


def _row(
    about: Row,
    metric: str,
    filtered: str,
    higher_is_better: bool,
    values: dict[str, float | None],
    own: dict[str, float | None],
    paired: float | None,
) -> Row:
    model, baseline = values["model"], values.get("baseline")
    return about | {
        "metric": metric,
        "filter": filtered,
        "higher_is_better": higher_is_better,
        "value": {"model": model, "baseline": baseline},
        "value_error": {"model": own["model"], "baseline": own.get("baseline")},
        "difference": None if model is None or baseline is None else model - baseline,
        "difference_error": paired,
    }


def _values(samples: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """Metric and filter -> document -> its value."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return found


def _number(results: dict[str, Any], metric: str, filtered: str) -> float | None:
    value: Any = results.get(f"{metric},{filtered}")
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _data(task: Any) -> str | None:
    """Where the documents come from."""
    named = (task.DATASET_PATH, task.DATASET_NAME)
    return " ".join(str(one) for one in named if one) or None


def _lacks(subject: Subject) -> str | None:
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed: pip install 'spikelm[eval]'"
    return None


PART = Part(
    name="tasks",
    title="Tasks",
    full=Settings(),
    quick=Settings(limit=32),
    run=measure,
    cost=cost,
    page=page,
    summary=summary,
    reads=lambda settings: (file for folder in settings.include_path for file in sorted(Path(folder).rglob("*"))),
    lacks=_lacks,
)
