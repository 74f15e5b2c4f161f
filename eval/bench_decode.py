"""Decoding speed: an event-driven model, the same engine without events, its dense source, and llama.cpp, side by side.

Everybody reads the same tokens of the same texts, in turn, token by token; what is reported is the median of a step and
its quartiles. Beside it stand the weight bytes that a token reads, where the time goes, and a curve of speed against
the share of silent inputs, with silence made by dead zones: a random share of the channels of every site, another one
for every token, so that no row of weights stays in a cache for being read again and again.
"""

import copy
import json
import os
import platform
import statistics
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from spikelm.configuration import SpikeLMConfig
from spikelm.conversion.texts import evaluation_sample
from spikelm.eval import bench_decode_page
from spikelm.eval.decode_profile import SILENT, WeightBytes, where_time_goes
from spikelm.eval.decoders import Decoder, LlamaCppDecoder, ModelDecoder, fastest_dense, seconds
from spikelm.eval.files import write_whole
from spikelm.inference import prepare_for_inference
from spikelm.inference.prepare import set_events
from spikelm.kernels.runtime import processor_name
from spikelm.loading import load_model
from spikelm.modeling import SpikeLMForCausalLM
from spikelm.spiking.site import SpikeSite

SHARES = (0.0, 0.1, 0.2, 0.3, 0.38, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
QUICK_SHARES = (0.0, 0.38, 0.7, 0.95)
FINE = 64.0  # counts per mean magnitude, at which hardly any input is silent by itself
WARM_UP = 3

SHAPES = {
    # Four layers of a 1B decoder: more than any cache holds. A small vocabulary, so that projections are what counts.
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 4,
        "vocab_size": 1024,
    },
}


def run(
    model: str | None,
    *,
    baseline: str | None = None,
    shape: str | None = None,
    weights: list[str],
    batches: list[int],
    contexts: list[int],
    steps: int = 48,
    curve: bool = True,
    quick: bool = False,
    out: str | Path = "bench_decode",
) -> dict[str, Any]:
    """Measure, print, and write `decode.json`, `decode.md` and `decode.png` into `out`.

    Args:
        model: a spikelm folder; None with `shape`.
        baseline: its dense source; a `.gguf` file also runs in llama.cpp, where that is installed.
        shape: a name of `SHAPES`, a decoder with random weights.
        weights: formats of `prepare_for_inference`, one after the other.
        batches: sizes of a batch, each at the shortest context. contexts: tokens in front, each at batch 1.
        steps: tokens timed for every point. curve: whether to measure speed against silence. quick: fewer points.

    Raises:
        ValueError: neither or both of model and shape.
    """
    if (model is None) == (shape is None):
        raise ValueError("Give either a model folder or --shape with one of its names.")
    spiking, tokens = _load(model) if model is not None else _random(SHAPES[shape])  # type: ignore[index]
    contexts = sorted(n for n in contexts if n + steps <= spiking.config.max_position_embeddings)
    points = [(1, n) for n in contexts] + [(b, contexts[0]) for b in batches if b > 1]
    texts = Texts(tokens, max(n for _, n in points) + steps + WARM_UP)
    outside: dict[str, Decoder] = {}
    report: dict[str, Any] = {"schema": 1, "machine": _machine(), "model": model or f"random weights, {shape}"}
    if baseline is not None:
        source, _ = load_model(baseline, dtype=torch.float32)
        outside["dense"], report["dense_ways_ms"] = fastest_dense(source, texts.of(1, 32))
        report["dense_weight_bytes"] = sum(p.nbytes for p in source.parameters())
        if baseline.endswith(".gguf"):
            outside |= _llama_cpp(baseline, texts.length)
    report["formats"] = {}
    shares = (QUICK_SHARES if quick else SHARES) if curve else ()
    for name in weights:
        engine = prepare_for_inference(copy.deepcopy(spiking), name, "always")
        report["formats"][name] = _measure(engine, outside, points, texts, steps, shares)
    report["machine"]["load_after"] = _load_average()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "decode.json", (json.dumps(report, indent=1) + "\n").encode())
    bench_decode_page.write(report, folder)
    return report


class Texts:
    """Beginnings of texts that differ from point to point: windows of one long list of tokens, each further on."""

    def __init__(self, tokens: Tensor, length: int):
        self.tokens = tokens.repeat(1 + 2 * length // len(tokens))
        self.length, self._turn = length, 0

    def of(self, batch: int, length: int) -> Tensor:
        """`[batch, length]` tokens."""
        rows = []
        for _ in range(batch):
            self._turn += 1
            at = 977 * self._turn % (len(self.tokens) - length)
            rows.append(self.tokens[at : at + length])
        return torch.stack(rows)


def _measure(
    engine: Any,
    outside: dict[str, Decoder],
    points: list[tuple[int, int]],
    texts: Texts,
    steps: int,
    shares: tuple[float, ...],
) -> dict[str, Any]:
    never = ModelDecoder(set_events(copy.deepcopy(engine), "never"))
    always = ModelDecoder(engine)
    contenders: dict[str, Decoder] = {"never": never, "always": always, **outside}
    speed = []
    for batch, context in tqdm(points, desc=f"{engine.prepared.weights}: batches and contexts"):
        some = {name: c for name, c in contenders.items() if c.batches is None or batch in c.batches}
        text = texts.of(batch, context + steps + WARM_UP)
        spent = race(some, text, context)
        summaries = {name: _summary(times, batch) for name, times in spent.items()}
        speed.append({"batch": batch, "context": context, "contenders": summaries})
    context = points[0][1]
    result: dict[str, Any] = {"speed": speed, "weight_bytes": WeightBytes(engine).of_text(texts.of(1, 64))}
    result["profile"] = {
        name: where_time_goes(decoder.model, texts.of(1, context + steps), context)
        for name, decoder in (("never", never), ("always", always))
    }
    if shares:
        result["curve"] = silence_curve(never, always, shares, texts, context, steps)
    return result


def race(contenders: dict[str, Decoder], text: Tensor, context: int) -> dict[str, list[float]]:
    """Seconds of every step by contender. They take turns token by token, and in another order each time."""
    for contender in contenders.values():
        contender.start(text[:, :context])
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i, tokens in enumerate(text[:, context:].unbind(1)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took = seconds(contenders[name], tokens)
            if i >= WARM_UP:
                spent[name].append(took)
    return spent


def silence_curve(
    never: ModelDecoder, always: ModelDecoder, shares: tuple[float, ...], texts: Texts, context: int, steps: int
) -> dict[str, Any]:
    """Seconds of a token against the share of silent inputs, for both engines, and where events begin to pay.

    The models' sites are changed for it, and changed back.
    """
    pair, models = (("never", never), ("always", always)), (never.model, always.model)
    saved = [_make_silenceable(model) for model in models]
    rows = []
    try:
        for share in tqdm(shares, desc=f"{always.model.prepared.weights}: silent shares"):
            text = texts.of(1, context + steps + WARM_UP)
            for _, decoder in pair:
                decoder.start(text[:, :context])
            spent: dict[str, list[float]] = {"never": [], "always": []}
            for i, tokens in enumerate(text[:, context:].unbind(1)):
                _silence(models, share)
                for name, decoder in pair[:: 1 if i % 2 else -1]:
                    took = seconds(decoder, tokens)
                    if i >= WARM_UP:
                        spent[name].append(took)
            rows.append({"silent": share} | {name: _summary(t, 1) for name, t in spent.items()})
    finally:
        for model, values in zip(models, saved):
            _give_back(model, values)
    return {"points": rows, "break_even": break_even(rows)}


def break_even(rows: list[dict[str, Any]]) -> float | None:
    """The silent share from which events are never slower, interpolated; None if they are at the largest."""
    gains = [(row["silent"], row["never"]["ms"] / row["always"]["ms"] - 1) for row in rows]
    if gains[-1][1] < 0:
        return None
    for (low, below), (high, above) in reversed(list(pairwise(gains))):
        if below < 0:
            return low + (high - low) * -below / (above - below)
    return 0.0


def _sites(model: Any) -> list[SpikeSite]:
    return [module for module in model.modules() if isinstance(module, SpikeSite)]


def _make_silenceable(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Give every site fine steps and one dead zone per channel; returns what they had."""
    before = [(site.k, site.dead_zone) for site in _sites(model)]
    for site in _sites(model):
        site.k, site.dead_zone = torch.full_like(site.k, FINE), torch.zeros(site.width, device=site.k.device)
    set_events(model, model.prepared.events)  # prepared calls hold the old tensors
    return before


def _give_back(model: Any, values: list[tuple[Tensor, Tensor]]) -> None:
    for site, (k, zone) in zip(_sites(model), values):
        site.k, site.dead_zone = k, zone
    set_events(model, model.prepared.events)


def _silence(models: tuple[Any, ...], share: float) -> None:
    """Silence a random `share` of the channels of every site, the same ones in all models."""
    for sites in zip(*(_sites(model) for model in models)):
        silent = torch.randperm(sites[0].width)[: round(share * sites[0].width)]
        for site in sites:
            site.dead_zone.zero_()[silent] = SILENT


def _summary(spent: list[float], batch: int) -> dict[str, float]:
    low, middle, high = statistics.quantiles(spent, n=4)
    return {"ms": 1e3 * middle, "low_ms": 1e3 * low, "high_ms": 1e3 * high, "tokens_per_s": batch / middle}


def _load(folder: str) -> tuple[Any, Tensor]:
    model, tokenizer = load_model(folder, dtype=torch.float32)
    if model.config.model_type != SpikeLMConfig.model_type or not model.config.is_spiking:
        raise ValueError(f"{folder} is not a spiking spikelm model; convert it first, with spike sites.")
    if model.prepared is not None:
        raise ValueError(f"{folder} is packed already; give the model that it was packed from.")
    return model, tokenizer(evaluation_sample(), return_tensors="pt")["input_ids"][0]


def _random(shape: dict[str, int]) -> tuple[Any, Tensor]:
    config = SpikeLMConfig(**shape, spike_sites=["qkv", "o", "gate_up", "down"], max_position_embeddings=8192)
    return SpikeLMForCausalLM(config).eval(), torch.randint(config.vocab_size, (20_000,))


def _llama_cpp(path: str, longest: int) -> dict[str, Decoder]:
    try:
        return {"llama.cpp": LlamaCppDecoder(path, longest)}
    except ImportError:
        return {}


def _machine() -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "load_before": _load_average(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _load_average() -> list[float]:
    return [round(x, 2) for x in os.getloadavg()]
