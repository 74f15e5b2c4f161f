"""What a decoded token costs: bytes of weights that it reads, and milliseconds by part.

    products   rows of weights, scaled and summed       coding   values, thresholds, counts, lists of events
    state      attention, recurrent states, their cache    head   logits
    python     all the rest: calls, norms outside of products, embeddings, bookkeeping

Coding is measured as what the same calls take when every input is silent, so that no row is read.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spikelm.cache import CACHE_NAME
from spikelm.inference.decoder import LayerRun
from spikelm.inference.linears import EventProduct, StoredHead
from spikelm.inference.prepare import set_events
from spikelm.spiking import SpikeStatistics
from spikelm.spiking.site import SpikeSite

SILENT = 1e30  # a dead zone that nothing leaves
_WARM_UP = 2


class WeightBytes:
    """Bytes of weights that a token of a prepared model reads."""

    def __init__(self, model: Any):
        self.model = model
        self.products = [m for m in model.modules() if isinstance(m, EventProduct)]
        head = model.get_output_embeddings()
        self.head = head.packed.nbytes if isinstance(head, StoredHead) else 0

    @torch.no_grad()
    def of_text(self, ids: Tensor) -> dict[str, float]:
        """Per token of `[B, T]`: with events "never" and "always", the head's part of both, and the silent share."""
        with SpikeStatistics(self.model) as statistics:
            self.model(ids)
        silent = {row["path"]: row["silent_share"] for row in statistics.by_site()}
        paths = {id(group.site): group.path for group in statistics.groups}
        always = never = float(self.head)
        for product in self.products:
            share = silent.get(paths.get(id(product.site), ""), 0.0)
            scales = 0 if product.scales is None else product.scales.nbytes
            never += product.packed.nbytes
            always += (1 - share) * product.data.nbytes + scales
        reads = statistics.summary()["silent_share_reads"]
        return {"never": never, "always": always, "head": self.head, "silent_share_reads": reads}


@torch.no_grad()
def where_time_goes(model: Any, text: Tensor, context: int) -> dict[str, float]:
    """Milliseconds of a token of text `[B, T]` behind the first `context`, by part, and in all (`total`)."""
    spent = _decode(model, text, context)
    events = model.prepared.events
    zones = [(m, m.dead_zone) for m in model.modules() if isinstance(m, SpikeSite)]
    for site, zone in zones:
        site.dead_zone = torch.full_like(zone, SILENT)
    try:
        silent = _decode(set_events(model, "always"), text, context)
    finally:
        for site, zone in zones:
            site.dead_zone = zone
        set_events(model, events)
    coding = min(silent["products"] + silent["coding"], spent["products"] + spent["coding"])
    products = spent["products"] + spent["coding"] - coding
    parts = {"products": products, "coding": coding, "state": spent["state"], "head": spent["head"]}
    return parts | {"python": spent["total"] - sum(parts.values()), "total": spent["total"]}


def _decode(model: Any, text: Tensor, context: int) -> dict[str, float]:
    """Milliseconds of a token, parts as they can be timed one by one."""
    out = model(text[:, :context], use_cache=True, logits_to_keep=1)
    tokens = text[:, context:].unbind(1)
    for token in tokens[:_WARM_UP]:
        out = model(token[:, None], use_cache=True, **{CACHE_NAME: out[CACHE_NAME]})
    meter = dict.fromkeys(("products", "coding", "state", "head", "layers"), 0.0)
    started = time.perf_counter()
    with _metered(model, meter):
        for token in tokens[_WARM_UP:]:
            out = model(token[:, None], use_cache=True, **{CACHE_NAME: out[CACHE_NAME]})
    total = time.perf_counter() - started
    if any(not isinstance(run, LayerRun) for run in model.base_model.runs):
        # In the modules of a layer, what is neither product nor code is state, and the calls around it.
        meter["state"] += meter["layers"] - meter["products"] - meter["coding"]
    del meter["layers"]
    scale = 1e3 / len(tokens[_WARM_UP:])
    return {name: scale * value for name, value in (meter | {"total": total}).items()}


@contextmanager
def _metered(model: Any, meter: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every part to `meter` while the model runs."""
    timed: list[tuple[Any, str, Any]] = []

    def time_it(owner: Any, name: str, part: str) -> None:
        timed.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, _timer(getattr(owner, name), part, meter))

    for module in model.modules():
        if isinstance(module, (EventProduct, SpikeSite, StoredHead)):
            part = {EventProduct: "products", StoredHead: "head"}.get(type(module), "coding")
            time_it(module, "forward", part)
    for run in model.base_model.runs:
        if isinstance(run, LayerRun):
            for prepared in run.prepared.values():
                timed.append((prepared, "chain", prepared.chain))
                prepared.chain = _MeteredChain(prepared.steps, meter)
        else:
            time_it(run, "forward", "layers")
    try:
        yield
    finally:
        for owner, name, before in timed:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class _MeteredChain:
    """The calls of a run one by one, each with its time."""

    def __init__(self, steps: list[Any], meter: dict[str, float]):
        self.calls = [
            _timer(call, "state" if call is step.attend else "products", meter) for step in steps for call in step.calls
        ]

    def __call__(self) -> None:
        for call in self.calls:
            call()


def _timer(function: Callable, part: str, meter: dict[str, float]) -> Callable:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        meter[part] += time.perf_counter() - started
        return result

    return timed
