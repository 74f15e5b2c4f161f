"""Tokens per second of a model and its baseline, side by side: interleaved, after warm-up, medians, rotating inputs."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.cache import CACHE_NAME

PREFILL_PASSES = 5
PROMPT_TOKENS = 32
DECODE_TOKENS = 32


Networks = dict[str, tuple[nn.Module, Callable[[], AbstractContextManager]]]


@torch.no_grad()
def tokens_per_second(networks: Networks, windows: list[Tensor]) -> dict[str, dict[str, float]]:
    """Speed at batch size 1: name -> `{"prefill": .., "decode": ..}`, in tokens per second.

    Args:
        networks: name -> a causal language model, and what makes the context in which it runs.
        windows: `[tokens]` int64 each; prefill takes them in turn, decoding goes on from the first.
    """
    spent: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in networks}
    for i in range(1 + PREFILL_PASSES):
        window = windows[i % len(windows)]
        for name, (network, context) in networks.items():
            with context():
                seconds, _ = _timed(network, window[None], None)
            if i:
                spent[name]["prefill"].append(seconds / len(window))

    prompt = windows[0][None, :PROMPT_TOKENS]
    latest = dict.fromkeys(networks, prompt)
    caches: dict[str, Any] = dict.fromkeys(networks)
    for i in range(2 + DECODE_TOKENS):
        for name, (network, context) in networks.items():
            with context():
                seconds, out = _timed(network, latest[name], caches[name], use_cache=True)
            latest[name], caches[name] = out.logits[:, -1:].argmax(-1), out[CACHE_NAME]
            if i > 1:  # the prompt and the first step warm up
                spent[name]["decode"].append(seconds)
    return {name: {kind: 1 / statistics.median(t) for kind, t in kinds.items()} for name, kinds in spent.items()}


def _timed(network: nn.Module, ids: Tensor, cache: Any, use_cache: bool = False) -> tuple[float, Any]:
    device = next(network.parameters()).device
    ids = ids.to(device)
    _settle(device)
    start = time.perf_counter()
    out = network(input_ids=ids, use_cache=use_cache, **{CACHE_NAME: cache})
    _settle(device)
    return time.perf_counter() - start, out


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
