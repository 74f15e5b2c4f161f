"""What the products of a network read while it runs, and what the channels of its spike sites do; padding excluded.

    behind a site     inputs are counts times one threshold: one addition per spike and weight (unary or bitwise)
    behind events     inputs are graded events: one MAC per event and weight, none for a silent input
    values            inputs are real numbers: one MAC per input that is not zero and weight

A network is a spikelm model with or without sites, or any causal language model of transformers made of `nn.Linear`;
what it attends to is counted only in spikelm's own mixers.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.cache import Stateful
from spikelm.kernels.weight_rows import GROUP, Rows, Table, stored_bytes
from spikelm.mixers.attention import SoftmaxCore
from spikelm.spiking.neurons import DynamicSite, LIFSite
from spikelm.spiking.site import Site, SpikeGroup, spike_groups
from spikelm.spiking.statistics import SLOTS, AttentionCounts, SpikeStatistics, dense_macs

FORMATS = ("fp32", "bf16", "int8", "int4")
_MANY = 2 ** max(SLOTS)  # counts from here on do not fit the longest train of fixed slots


@dataclass(frozen=True)
class Product:
    """Linears that read one activation.

    Attributes:
        path: of the site in front of them, or of the linear. readers: the linears' names.
        fed_by: "counts", "events" or "values". group: the site, if there is one. linear: of values.
        inputs, outputs: sizes; a recurrent matrix that reads events counts among the outputs.
    """

    path: str
    readers: tuple[str, ...]
    fed_by: str
    inputs: int
    outputs: int
    group: SpikeGroup | None = None
    linear: nn.Linear | None = None

    @property
    def layer(self) -> int | None:
        """Index of the layer; None outside of layers."""
        if self.group is not None:
            return self.group.layer_idx
        found = re.search(r"\.(\d+)\.", self.path)
        return int(found[1]) if found else None


def products(network: nn.Module) -> Iterator[Product]:
    """All products with matrices of weights, those behind sites first, the head last."""
    fed: set[int] = set()
    for group in spike_groups(network):
        fed |= {id(linear) for linear in group.readers.values()}
        if group.fan_out:
            names = (*group.readers, *(["recurrent"] if group.site.recurrent_reads else []))
            kind = "events" if group.site.graded else "counts"
            yield Product(group.path, names, kind, group.site.width, group.fan_out, group)
    head = head_path(network)
    linears = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear) and id(m) not in fed]
    for path, linear in sorted(linears, key=lambda named: named[0] == head):
        readers = (path.rpartition(".")[2],)
        yield Product(path, readers, "values", linear.in_features, linear.out_features, linear=linear)


def head_path(network: Any) -> str | None:
    """Full name of a language model's head; None without one."""
    head = network.get_output_embeddings()
    return next((path for path, module in network.named_modules() if module is head), None)


class ProductCounts:
    """Counts, within a `with` block, tokens and inputs that are not zero of every product that reads values.

    Attributes:
        products: of the network. tokens: that went through it.
    """

    def __init__(self, network: Any):
        self.network = network
        self.products = list(products(network))
        self.tokens = 0
        self._sums: dict[str, list[Any]] = {}
        self._mask: Tensor | None = None
        self._exits = ExitStack()

    def __enter__(self) -> "ProductCounts":
        hooks = [self.network.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        embedding = self.network.get_input_embeddings()
        hooks.append(embedding.register_forward_pre_hook(self._count_tokens))
        for product in self.products:
            if product.linear is not None:
                hooks.append(product.linear.register_forward_pre_hook(partial(self._count, product.path)))
        for hook in hooks:
            self._exits.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def seen(self, path: str) -> tuple[int, float]:
        """Tokens that a product of values has read, and the share of its inputs that were not zero."""
        tokens, active = self._sums.get(path, (0, 0))
        inputs = next(product.inputs for product in self.products if product.path == path)
        return tokens, float(active) / max(tokens * inputs, 1)

    def _see_mask(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _count_tokens(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        ids = args[0]
        self.tokens += ids.numel() if self._mask is None else int(self._mask[:, -ids.shape[1] :].bool().sum())

    @torch.no_grad()
    def _count(self, path: str, linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if self._mask is not None and x.dim() == 3:  # an expert gets the real tokens alone, `[tokens, inputs]`
            x = x[self._mask[:, -x.shape[1] :].bool()]
        sums = self._sums.setdefault(path, [0, 0])
        sums[0] += x.numel() // x.shape[-1]
        sums[1] = sums[1] + x.count_nonzero()


@dataclass
class Channels:
    """What the channels of one site did.

    Attributes:
        tokens: seen. active: `[width]`, tokens with a spike. large: `[width]`, tokens whose count fits no train.
        at_limit: inputs at `spike_max_count`. lowest: the smallest count.
    """

    tokens: int
    active: Tensor
    large: Tensor
    at_limit: Tensor
    lowest: Tensor

    def row(self, site: Site) -> dict[str, Any]:
        """The report's fields; see docs/report.md."""
        kinds = {
            "dead": self.active == 0,
            "always_active": self.active == self.tokens,
            "overflowing": 2 * self.large > self.tokens,
        }
        numbers = {name: int(which.sum()) for name, which in kinds.items()}
        limit = getattr(site, "max_count", None)
        return {f"{name}_channels": number for name, number in numbers.items()} | {
            **{f"{name}_share": number / site.width for name, number in numbers.items()},
            "limit": limit,
            "at_limit_share": None if limit is None else float(self.at_limit) / (self.tokens * site.width),
            "signed": float(self.lowest) < 0,
        }


@contextmanager
def watched_channels(network: nn.Module) -> Iterator[dict[str, Channels]]:
    """Within this context: path of every site that was run -> what its channels did so far."""
    seen: dict[str, Channels] = {}

    @torch.no_grad()
    def observe(path: str, site: Site, counts: Tensor, threshold: Tensor, context: Any) -> None:
        rows = counts.flatten(0, -2)
        if context is not None and context.valid is not None:
            rows = rows[context.valid.flatten()]
        if not len(rows):
            return
        limit = getattr(site, "max_count", None)
        large = rows.abs() >= _MANY
        at_limit = rows.new_zeros(()) if limit is None else (rows.abs() >= limit).sum()
        new = Channels(len(rows), (rows != 0).sum(0), large.sum(0), at_limit, rows.amin())
        old = seen.get(path)
        if old is not None:
            new.tokens += old.tokens
            new.lowest = torch.minimum(new.lowest, old.lowest)
            for name in ("active", "large", "at_limit"):
                setattr(new, name, getattr(new, name) + getattr(old, name))
        seen[path] = new

    observers = [(group.site.observers, partial(observe, group.path)) for group in spike_groups(network)]
    for watching, observer in observers:
        watching.append(observer)
    try:
        yield seen
    finally:
        for watching, observer in observers:
            watching.remove(observer)


def linear_rows(counts: ProductCounts, spikes: SpikeStatistics | None) -> list[dict[str, Any]]:
    """One row per product, operations per token of the text; see docs/report.md."""
    sites = {} if spikes is None else {row["path"]: row for row in spikes.by_site()}
    rows = []
    for product in counts.products:
        site = sites.get(product.path)
        tokens, active = counts.seen(product.path)
        rates = {"unary": 0.0, "bitwise": 0.0}
        if product.group is not None:  # an expert that no token was sent to has no row
            tokens, active = (site["tokens"], 1 - site["silent_share"]) if site else (0, 0.0)
        if site is not None and product.fed_by == "counts":
            rates = site["firing_rate"]
        share = tokens / counts.tokens
        dense = share * product.inputs * product.outputs
        rows.append(
            {
                "layer": product.layer,
                "path": product.path,
                "linears": " ".join(product.readers),
                "fed_by": product.fed_by,
                "inputs": product.inputs,
                "outputs": product.outputs,
                "tokens_share": share,
                "nonzero_share": active,
                "dense_macs": dense,
                "macs": 0.0 if product.fed_by == "counts" else dense * active,
                "acs": {form: dense * rate for form, rate in rates.items()},
            }
        )
    return rows


def operation_rows(
    network: nn.Module, name: str, linears: list[dict[str, Any]], attention: AttentionCounts, tokens: int
) -> list[dict[str, Any]]:
    """Operations per token by kind, of one network."""
    head = head_path(network)
    kinds = {"counts": "spike_fed", "events": "event_fed", "values": "float_fed"}
    rows: dict[str, dict[str, Any]] = {}
    for line in linears:
        kind = "head" if line["path"] == head else kinds[line["fed_by"]]
        row = rows.setdefault(kind, _operations(name, kind, 0.0))
        row["dense_macs"] += line["dense_macs"]
        row["macs"] += line["macs"]
        row["acs"] = {form: value + line["acs"][form] for form, value in row["acs"].items()}
    others = dense_macs(network, attention, tokens)
    own = any(isinstance(module, Stateful) for module in network.modules())
    for kind in ("attention", "linear_attention", "norms"):
        rows[kind] = _operations(name, kind, others[kind] if own or kind == "norms" else None)
    return list(rows.values())


def _operations(network: str, kind: str, macs: float | None) -> dict[str, Any]:
    zero = {"unary": 0.0, "bitwise": 0.0}
    return {"network": network, "kind": kind, "dense_macs": macs, "macs": macs, "acs": zero}


def byte_rows(network: Any, name: str, linears: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes of weights that a token reads, by format: all of them, and the rows of inputs that are not zero."""
    group = getattr(network.config, "weight_group_size", None) or GROUP
    head = head_path(network)
    rows = []
    for format in FORMATS:
        total = {"dense": 0.0, "event_driven": 0.0, "head": 0.0, "scales": 0.0}
        for line in linears:
            layout = Table if line["path"] == head else Rows
            data, scales = stored_bytes(layout, format, line["inputs"], line["outputs"], group)
            share = line["tokens_share"]
            # A head is laid out by word: a silent input saves none of it.
            active = 1.0 if layout is Table else line["nonzero_share"]
            total["dense"] += share * (data + scales)
            total["event_driven"] += share * (active * data + scales)
            total["head"] += share * (data + scales) if layout is Table else 0.0
            total["scales"] += share * scales
        rows.append({"network": name, "format": format, **total})
    return rows


def states(model: nn.Module, attention: AttentionCounts, tokens: int) -> dict[str, float]:
    """Numbers of state that a token reads: keys and values, recurrent states of mixers, membranes of sites.

    States that are at least float32 are recurrent; windows of keys, values and inputs have the model's dtype.
    """
    sites = {id(inner) for module in model.modules() if isinstance(module, Site) for inner in module.modules()}
    recurrent = membranes = 0
    for module in model.modules():
        if not isinstance(module, Stateful) or isinstance(module, SoftmaxCore):
            continue
        fixed = [spec for spec in module.state_specs().values() if spec.dtype == torch.float32]
        numbers = sum(prod(size for size in spec.shape if size is not None) for spec in fixed)
        if id(module) in sites:
            membranes += numbers
        else:
            recurrent += numbers
    return {"keys_values": attention.read / tokens, "recurrent": float(recurrent), "membranes": float(membranes)}


def kind_of(site: Site) -> str:
    """What a site is: "code", "neuron" (its spikes are 0 or 1, with a sign), "neuron_code" or "events"."""
    if site.graded:
        return "events"
    if isinstance(site, DynamicSite):
        return "neuron_code"
    return "neuron" if isinstance(site, LIFSite) else "code"
