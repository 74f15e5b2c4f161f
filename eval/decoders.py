"""What the decoding benchmark lets run against each other: models of this library, of transformers, of llama.cpp.

All of them read the same tokens: `start` takes the beginnings of some texts, every `step` one more token of each and
makes logits of it. What is timed is the step.
"""

import importlib
import statistics
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from spikelm.cache import CACHE_NAME

PREFILL = 512  # tokens of a pass over a long beginning
_TRIAL = 6  # tokens that choose the fastest way to run a dense model


class Decoder(Protocol):
    """A contender."""

    batches: tuple[int, ...] | None  # sizes of a batch that it can run; None: any

    def start(self, texts: Tensor) -> None:
        """Read the beginnings `[B, T]` of some texts, and forget what was before."""

    def step(self, tokens: Tensor) -> Tensor:
        """The next tokens `[B]` of the texts -> the likeliest ones behind them, `[B]`."""


class ModelDecoder:
    """A causal language model of this library or of transformers."""

    batches: tuple[int, ...] | None = None

    def __init__(self, model: Any):
        self.model, self.cache = model, None
        self.device = next(model.buffers(), next(model.parameters(), torch.empty(0))).device

    @torch.no_grad()
    def start(self, texts: Tensor) -> None:
        """See `Decoder`."""
        self.cache = None
        for piece in texts.split(PREFILL, 1):
            self._run(piece)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        likeliest = self._run(tokens[:, None]).argmax(-1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return likeliest

    def _run(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids.to(self.device), use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache})
        self.cache = out[CACHE_NAME]
        return out.logits[:, -1]


class LlamaCppDecoder:
    """A `.gguf` file in llama.cpp, through its Python package."""

    batches: tuple[int, ...] | None = (1,)

    def __init__(self, path: str, longest: int):
        package = importlib.import_module("llama_cpp")
        threads = torch.get_num_threads()
        self.llama = package.Llama(path, n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False)

    def start(self, texts: Tensor) -> None:
        """See `Decoder`."""
        self.llama.reset()
        self.llama.eval(texts[0].tolist())

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        self.llama.eval(tokens.tolist())
        return tokens  # it makes logits without being asked for the likeliest


def fastest_dense(model: Any, texts: Tensor) -> tuple[ModelDecoder, dict[str, float]]:
    """A dense model in its fastest dtype and attention, and the milliseconds of a token of every way that was tried.

    Args:
        model: a model of transformers, in float32. texts: `[1, T]`, T above ten.
    """
    tried: dict[str, float] = {}
    ways: dict[str, tuple[torch.dtype, str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("sdpa", "eager"):
            name = f"{str(dtype).removeprefix('torch.')}, {attention}"
            model.to(dtype).set_attn_implementation(attention)
            decoder = ModelDecoder(model)
            decoder.start(texts[:, :-_TRIAL])
            tried[name] = 1e3 * statistics.median(seconds(decoder, token) for token in texts[:, -_TRIAL:].unbind(1))
            ways[name] = dtype, attention
        if dtype == torch.float32:
            weights = {key: value.clone() for key, value in model.state_dict().items()}
    best = min(tried, key=tried.__getitem__)
    dtype, attention = ways[best]
    model.to(torch.float32).load_state_dict(weights)
    model.to(dtype).set_attn_implementation(attention)
    return ModelDecoder(model), tried


def seconds(decoder: Decoder, tokens: Tensor) -> float:
    """Time of one step."""
    started = time.perf_counter()
    decoder.step(tokens)
    return time.perf_counter() - started
