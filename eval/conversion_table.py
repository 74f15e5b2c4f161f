"""What a conversion costs and what training gives back: one table, rebuilt by one command.

    python -m spikelm.eval.conversion_table eval/conversion_table.yaml --out runs/table

All rows are measured on the same windows of the same held-out texts, beside their controls (`spikelm.eval.controls`):

    silence    dead zones calibrated for a silent share, untrained, then trained by the recipe `distill`; beside them,
               untrained and at the same silent share: a uniform dead zone with the same mean k and with k = 4, TEAL;
               and an int-k ANN
    linear     some layers in a linear form, after attention transfer, then distilled; beside them the window alone at
               the same layers, distilled in the same way; late positions also on their own, where a window no longer
               sees the beginning

    loss = exp(mean NLL - mean NLL of the source) - 1

The source and all rows run in the same precision: decoder products in `dtype` by autocast, the head in float32.

Every step leaves a file in `out/rows`, and what is there is not made again; a training that was interrupted goes on
from its last checkpoint. `--row` leaves the other rows for later, or for another process.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from spikelm import convert
from spikelm.conversion.smollm import smollm2_gguf
from spikelm.eval.controls import MagnitudeProfile, same_code
from spikelm.eval.data import read_text, tokenize
from spikelm.eval.fidelity import Row, WindowScore, combine, log_probs, run_counted, score
from spikelm.eval.rows import control_rows, mean_share, probe
from spikelm.kernels.runtime import processor_name
from spikelm.loading import load_model
from spikelm.spiking.silence import counted_silence, silent_reads
from spikelm.spiking.site import spike_groups

CONTROLS = ("uniform_dead_zone", "teal", "int_k")
_PIECE = 4096  # tokens of one document that calibration and transfer read, so that there are many documents
_CALIBRATION_WINDOW = 512


@dataclass(frozen=True)
class Table:
    """What the YAML file says.

    Attributes:
        texts: name -> held-out file in the folder of the corpora. tokens, window: of each text.
        late: positions from here on are also measured on their own. dtype: of the decoder's products.
        train: pattern of files -> weight in the mixture; calibration, transfer and distillation draw on it.
        calibration_tokens: for dead zones and controls.
        k: counts per mean magnitude, of all spiking rows.
        silence: silent shares `share`, and the tokens to `distill` on, if any.
        linear: `layers`, `mixers` (name of a row -> mixer), `window`, `sinks`; tokens to `transfer` and `distill` on.
        distill: fields of the recipe: `window`, `batch` and `micro_batch` for `silence` and `linear`; `training`.
    """

    texts: dict[str, str]
    tokens: int
    window: int
    late: int
    dtype: str
    train: dict[str, float]
    calibration_tokens: int
    k: float
    silence: list[dict[str, Any]]
    linear: dict[str, Any]
    distill: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Raises ValueError if a field is missing or unknown."""
        content = yaml.safe_load(path.read_text()) or {}
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ set(content)):
            raise ValueError(f"{path} must give exactly {', '.join(sorted(names))}; look at {', '.join(wrong)}.")
        return cls(**content)

    def steps(self) -> dict[str, tuple[str, Any]]:
        """Name of a row -> (kind, what it is made from)."""
        steps: dict[str, tuple[str, Any]] = {}
        for entry in self.silence:
            steps[f"calibrated-{entry['share']:g}"] = ("calibrated", entry["share"])
            if entry.get("distill"):
                steps[f"distilled-{entry['share']:g}"] = ("distilled", entry)
        for name in self.linear["mixers"]:
            steps[f"{name}-transferred"] = ("transferred", name)
            steps[f"{name}-distilled"] = ("linear", name)
        return steps


class Builder:
    """Makes the rows of a table, each once."""

    def __init__(self, table: Table, source: Path, corpora: Path, out: Path):
        self.table, self.source, self.corpora, self.out = table, source, corpora, out
        self.baseline, self.tokenizer = load_model(source, dtype=torch.float32)
        texts = [read_text(corpora / file, name) for name, file in table.texts.items()]
        self.texts = [tokenize(text, self.tokenizer, table.tokens, table.window) for text in texts]
        (out / "rows").mkdir(parents=True, exist_ok=True)

    def make(self, name: str) -> None:
        """Measure a row and what stands beside it, unless it is there."""
        file = self.out / "rows" / f"{name}.json"
        if file.is_file():
            return
        print(f"{name}", file=sys.stderr, flush=True)
        kind, given = self.table.steps()[name]
        load, started = os.getloadavg()[0], time.monotonic()
        entries, facts = getattr(self, f"_{kind}")(given)
        seconds = round(time.monotonic() - started)
        content = {"entries": entries, **facts, "seconds": seconds, "load_average": [load, os.getloadavg()[0]]}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content | machine(), indent=1) + "\n")
        part.replace(file)

    def _calibrated(self, share: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        model = self._silent(share)
        uniform = convert(self.source, k=self.table.k, dtype="float32", progress=False)  # its row sets dead zones
        profile = MagnitudeProfile(uniform)
        with self._precision(), torch.no_grad():
            with profile.collecting():
                for window in self._training_ids(self.table.calibration_tokens).split(_CALIBRATION_WINDOW):
                    uniform.model(window[None], use_cache=False)
            target = mean_share([run_counted(model, window)[1] for window in probe(self.texts)])
            rows = [row for row in control_rows(uniform, self.texts, profile, target=target) if row.name in CONTROLS]
        dead_zone = rows[0].setting["dead_zone"]
        rows.insert(1, Row("uniform_k4", partial(same_code, uniform, k=4.0, dead_zone=dead_zone)))
        entries = self._measure([(model, Row("calibrated")), *((uniform, row) for row in rows)])
        return entries, {"calibration": model.conversion["calibration"]}

    def _distilled(self, entry: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        before = f"calibrated-{entry['share']:g}"
        if not (self.out / "models" / before).is_dir():
            self._silent(entry["share"])
        model, report = self._train(f"distilled-{entry['share']:g}", before, entry["distill"], "silence")
        return self._measure([(model, Row("distilled"))]), {"training": report}

    def _transferred(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        plan = self.table.linear
        count = self.baseline.config.num_hidden_layers
        mixers = [plan["mixers"][name] if i in plan["layers"] else "keep" for i in range(count)]
        model = convert(
            self.source,
            self.out / "models" / f"{name}-transferred",
            mixers=mixers,
            window=plan["window"],
            sinks=plan["sinks"],
            sites="none",
            transfer_tokens=plan["transfer"],
            transfer_text=self._training_ids(plan["transfer"]),
            dtype="float32",
            overwrite=True,
        )
        return self._measure([(model, Row(name))]), {"transfer": model.conversion["transfer"]}

    def _linear(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        before = f"{name}-transferred"
        self.make(before)
        model, report = self._train(f"{name}-distilled", before, self.table.linear["distill"], "linear")
        return self._measure([(model, Row(name))]), {"training": report}

    def _silent(self, share: float) -> Any:
        """The calibrated model, kept as a folder for a training to begin with."""
        return convert(
            self.source,
            self.out / "models" / f"calibrated-{share:g}",
            silent_share=share,
            k=self.table.k,
            calibration_text=self._training_ids(self.table.calibration_tokens),
            dtype="float32",
            overwrite=True,
        )

    def _train(self, name: str, before: str, tokens: int, kind: str) -> tuple[nn.Module, dict[str, Any]]:
        """Run the recipe `distill` in a process of its own; the trained model, and the recipe's report."""
        own = dict(self.table.distill[kind])
        sources = [
            {"files": str(self.corpora / pattern), "weight": weight} for pattern, weight in self.table.train.items()
        ]
        settings = {
            "model": str(self.out / "models" / before),
            "teacher": str(self.source),
            "out": str(self.out / "training" / name),
            "data": {"sources": sources, "window": own.pop("window"), "heldout": list(self.table.texts.values())},
            "tokens": tokens,
            "checkpoints": max(tokens // 4, 1),
            "heldout_tokens": 2 * self.table.window,
            "training": self.table.distill["training"],
            **own,
        }
        file = self.out / "training" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        run_recipe("distill", file)
        folder = self.out / "training" / name
        model, _ = load_model(folder / "model", dtype=torch.float32)
        return model, json.loads((folder / "report.json").read_text())

    def _training_ids(self, tokens: int) -> Tensor:
        """Ids `[tokens]` from the beginnings of documents of the mixture, spread over all files, none held out."""
        heldout = {self.corpora / file for file in self.table.texts.values()}
        pieces = []
        for pattern, weight in self.table.train.items():
            quota = round(tokens * weight / sum(self.table.train.values()))
            files = [file for file in sorted(self.corpora.glob(pattern)) if file not in heldout]
            wanted = max(1, quota // min(_PIECE, max(quota, 1)) * 2)  # some documents are short
            for file in files[:: max(1, len(files) // wanted)]:
                ids = self.tokenizer(file.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
                pieces.append(torch.tensor(ids[: min(_PIECE, quota)]))
                quota -= len(pieces[-1])
                if quota <= 0:
                    break
        return torch.cat(pieces)

    def _precision(self) -> Any:
        return torch.autocast("cpu", getattr(torch, self.table.dtype), enabled=self.table.dtype != "float32")

    def _logits(self, model: Any, window: Tensor) -> Tensor:
        """`[tokens, vocabulary]`, float32."""
        with self._precision():
            hidden = model.model(window[None], use_cache=False).last_hidden_state[0]
        return model.lm_head(hidden.float())

    @torch.no_grad()
    def _measure(self, rows: list[tuple[nn.Module, Row]]) -> list[dict[str, Any]]:
        """Every row on all windows, with one pass of the source for all of them."""
        found: list[dict[str, list[Any]]] = [{"all": [], "late": [], "silence": [], "text": []} for _ in rows]
        windows = [(t, w, window) for t, text in enumerate(self.texts) for w, window in enumerate(text.windows)]
        for t, w, window in tqdm(windows, desc="Measuring", unit="window", disable=None):
            reference = log_probs(self._logits(self.baseline, window))
            size, late = self.texts[t].text_bytes[w], slice(self.table.late, None)
            for (model, row), sums in zip(rows, found):
                with row.apply(), counted_silence(model) as silence:
                    logits = self._logits(model, window)
                sums["text"].append(t)
                sums["all"].append(score(window, logits, reference, size))
                sums["late"].append(score(window[late], logits[late], reference[late], size))
                sums["silence"].append(silent_reads(list(spike_groups(model)), silence))
        return [self._entry(row, sums) for (_, row), sums in zip(rows, found)]

    def _entry(self, row: Row, sums: dict[str, list[Any]]) -> dict[str, Any]:
        def quality(scores: list[WindowScore]) -> dict[str, Any]:
            kept = combine(scores)
            names = ("perplexity_ratio", "perplexity_ratio_error", "kl_nats", "top1_agreement")
            return {"loss": kept["perplexity_ratio"] - 1, **{name: kept[name] for name in names}}

        def of(t: int, scores: list[WindowScore]) -> list[WindowScore]:
            return [s for s, text in zip(scores, sums["text"]) if text == t]

        silent, reads = (sum(counts) for counts in zip(*sums["silence"]))
        return {
            "name": row.name,
            "setting": row.setting,
            "silent_share_reads": silent / reads if reads else None,
            **quality(sums["all"]),
            "late": quality(sums["late"]),
            "texts": {text.name: quality(of(t, sums["all"])) for t, text in enumerate(self.texts)},
        }


def run_recipe(name: str, argument: Path) -> None:
    """A module of `spikelm.recipes` in a process of its own, which says by itself what goes wrong.

    Raises:
        SystemExit: it failed, with its exit code.
    """
    if code := subprocess.run([sys.executable, "-m", f"spikelm.recipes.{name}", str(argument)]).returncode:
        raise SystemExit(code)


def machine() -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def as_markdown(table: Table, rows: dict[str, dict[str, Any]]) -> str:
    """The rows that are there, as tables."""
    names = list(table.texts)
    head = ["row", "silent share (reads)", "loss", *names, "KL (nats)", "top-1", "tokens trained on"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    linear = [
        f"| row | perplexity ratio | from position {table.late:,} on | KL (nats) | top-1 | transfer | distilled |",
        "|---|---|---|---|---|---|---|",
    ]
    for step, (kind, given) in table.steps().items():
        if step not in rows:
            continue
        trained = rows[step].get("training", {}).get("tokens", 0)
        for entry in rows[step]["entries"]:
            if kind in ("calibrated", "distilled"):
                cells = [entry["name"].replace("_", " "), f"{entry['silent_share_reads']:.3f}", _loss(entry)]
                cells += [_loss(entry["texts"][name]) for name in names]
                cells += [f"{entry['kl_nats']:.4f}", f"{entry['top1_agreement']:.3f}", f"{trained:,}"]
                lines.append("| " + " | ".join(cells) + " |")
            else:
                cells = [str(given), _ratio(entry), _ratio(entry["late"]), f"{entry['kl_nats']:.4f}"]
                fitted = rows.get(f"{given}-transferred", {}).get("transfer", {}).get("tokens", 0)
                cells += [f"{entry['top1_agreement']:.3f}", f"{fitted:,}", f"{trained:,}"]
                linear.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *linear]) + "\n"


def _loss(entry: dict[str, Any]) -> str:
    return f"{entry['loss']:.3f} ± {entry['perplexity_ratio_error']:.3f}"


def _ratio(entry: dict[str, Any]) -> str:
    return f"{entry['perplexity_ratio']:.3f} ± {entry['perplexity_ratio_error']:.3f}"


@click.command()
@click.argument("config", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--corpora", type=click.Path(path_type=Path), help="Texts; fetched if not there.  [default: OUT/corpora]")
@click.option("--source", type=click.Path(path_type=Path), help="A model.  [default: SmolLM2-135M-Instruct]")
@click.option("--row", "chosen", multiple=True, help="Only this row; may be repeated.")
def main(config: Path, out: Path, corpora: Path | None, source: Path | None, chosen: tuple[str, ...]) -> None:
    """Make the rows of CONFIG that are not there yet, and OUT/table.md."""
    try:
        table = Table.read(config)
        if unknown := sorted(set(chosen) - set(table.steps())):
            raise ValueError(f"There is no row {unknown[0]!r}; there are {', '.join(table.steps())}.")
        corpora = corpora or out / "corpora"
        run_recipe("corpora", corpora)  # does nothing where they are already
        builder = Builder(table, source or smollm2_gguf(), corpora, out)
        for name in chosen or table.steps():
            builder.make(name)
            rows = {file.stem: json.loads(file.read_text()) for file in (out / "rows").glob("*.json")}
            (out / "table.md").write_text(as_markdown(table, rows))
    except (ValueError, OSError) as error:
        print(f"spikelm: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
