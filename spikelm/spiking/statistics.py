"""The four spike statistics, counted while a model runs, padding excluded.

    silent share          inputs of a site that are exactly zero; also weighted by the weights that each would read
    spike-slot sparsity   zero slots of the bitwise train with T fixed, the share of clipped counts beside it
    firing rate           mean spikes per input: unary |s|, bitwise popcount(|s|)
    synaptic operations   spikes times fan-out per token, unary and bitwise; the dense MACs that remain are listed

Sums stay on the device of the model and are read once, in `summary`.
"""

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikelm.kernels.spike_train import bit_spikes
from spikelm.mixers.attention import SoftmaxCore
from spikelm.mixers.window_linear import WindowLinearCore
from spikelm.spiking.site import Site, SpikeGroup, spike_groups

if TYPE_CHECKING:
    from spikelm.context import ForwardContext

SLOTS = (3, 4)
_LARGE = 2 ** max(SLOTS)  # counts from here on fit no train of fixed slots
_BINS = 2 * _LARGE + 1  # -16 or below, -15, ..., 15, 16 or above
_OCTAVES = 32  # of larger counts: 2^i to 2^(i + 1) - 1
# Positions 0, 1, 2 to 3, 4 to 7, ...; the last place is for rows whose position nobody knows.
_PLACES = 33


class SpikeStatistics:
    """Counts spikes of a model within a `with` block, in evaluation, generation or training.

    Under activation checkpointing every pass is made, and counted, twice: shares stay right, `tokens` doubles.

        with SpikeStatistics(model) as statistics:
            model.generate(...)
        statistics.summary()["silent_share_reads"]

    Args:
        model: a spikelm model.
        positions: whether to count for every position of a token in its document, too, so that there is a
            `by_position`; costs a little time.

    Raises:
        ValueError: the model has no spike sites.
    """

    def __init__(self, model: nn.Module, positions: bool = False):
        self.model, self.positions = model, positions
        self.groups = list(spike_groups(model))
        if not self.groups:
            raise ValueError("The model has no spike sites, so there are no spikes to count; convert it with sites.")
        self._sums: dict[Site, dict[str, Tensor]] = {}
        self._attention = AttentionCounts(model)

    def __enter__(self) -> "SpikeStatistics":
        for group in self.groups:
            group.site.observers.append(self._count)
        self._attention.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self.groups:
            group.site.observers.remove(self._count)
        self._attention.__exit__(kind, error, trace)

    @torch.no_grad()
    def _count(self, site: Site, counts: Tensor, threshold: Tensor, context: "ForwardContext | None") -> None:
        rows, places = counts.flatten(0, -2), self._places(counts, context)
        if context is not None and context.valid is not None:
            real = context.valid.flatten()
            rows, places = rows[real], places[real]
        if rows.shape[0] == 0:
            return
        n = _PLACES if self.positions else 1
        sizes = rows.abs()
        bins = rows.clamp(-_LARGE, _LARGE).to(torch.int32).add_(_LARGE)
        if self.positions:
            bins += _BINS * places[:, None]
        # Large counts are rare; they alone are looked at one by one.
        is_large = sizes >= _LARGE
        large = rows[is_large]
        whose = places[:, None].expand_as(rows)[is_large].long()
        # Signs and octaves in one number: -20 and 40 are (0, 4) and (1, 5).
        octaves = torch.frexp(large.abs()).exponent.clamp(max=_OCTAVES) - 1
        tail = torch.bincount(octaves + _OCTAVES * (large > 0), minlength=2 * _OCTAVES)
        zeros = torch.zeros(n, dtype=torch.float64, device=rows.device)
        new = {
            "tokens": torch.bincount(places, minlength=n),
            "histogram": torch.bincount(bins.flatten(), minlength=n * _BINS).view(n, _BINS),
            "large_unary": zeros.index_add(0, whose, large.abs().double()),
            "large_bitwise": zeros.index_add(0, whose, bit_spikes(large, "bitwise").double()),
            "tail": tail.view(2, _OCTAVES),
        }
        largest = zeros.scatter_reduce(0, places.long(), sizes.amax(1).double(), "amax")
        sums = self._sums.setdefault(site, {})
        for name, value in new.items():
            sums[name] = sums.get(name, 0) + value.double()
        sums["max_count"] = torch.maximum(sums.get("max_count", zeros), largest)

    def _places(self, counts: Tensor, context: "ForwardContext | None") -> Tensor:
        """Place of every row among the sums, `[rows]` int32."""
        rows = counts.numel() // counts.shape[-1]
        if not self.positions or context is None:  # the tokens that an expert gets come without a context
            return torch.full((rows,), _PLACES - 1 if self.positions else 0, dtype=torch.int32, device=counts.device)
        position = (context.time - context.start).flatten().clamp_min(0)
        return torch.frexp(position.double()).exponent.clamp(max=_PLACES - 2)

    def by_site(self) -> list[dict[str, Any]]:
        """One row per site: layer, site, tokens, width, fan_out, and its statistics."""
        return [self._row(group) for group in self.groups if group.site in self._sums]

    def by_position(self) -> list[dict[str, Any]]:
        """One row per site and range of positions in the document, `first` to `last`: 0, 1, 2 to 3, 4 to 7, ...

        Keys as in `by_site`. Tokens of experts are left out: an expert is not told where they stood.

        Raises:
            ValueError: the statistics were made without `positions`.
        """
        if not self.positions:
            raise ValueError("Positions were not counted; make the statistics with SpikeStatistics(model, True).")
        rows = []
        for group in self.groups:
            for place in range(_PLACES - 1):
                if group.site in self._sums and self._sums[group.site]["tokens"][place]:
                    span = {"first": 2**place // 2, "last": max(2**place - 1, 0)}
                    rows.append(self._row(group, slice(place, place + 1)) | span)
        return rows

    def histograms(self) -> list[dict[str, Any]]:
        """One row per site: `layer`, `site`, `path` and `bins`, each with `low`, `high` and how many `inputs`.

        Signed counts, exact below 16 in size, in octaves beyond; octaves that nothing fell into are left out.
        """
        rows = []
        for group in self.groups:
            if group.site not in self._sums:
                continue
            sums = self._sums[group.site]
            exact, (negative, positive) = sums["histogram"].sum(0).tolist()[1:-1], sums["tail"].tolist()
            octaves = [(2**i, 2 ** (i + 1) - 1) for i in range(_OCTAVES)]
            bins = [(-high, -low, inputs) for (low, high), inputs in reversed([*zip(octaves, negative)]) if inputs]
            bins += [(count, count, inputs) for count, inputs in zip(range(1 - _LARGE, _LARGE), exact)]
            bins += [(low, high, inputs) for (low, high), inputs in zip(octaves, positive) if inputs]
            names = {"layer": group.layer_idx, "site": group.name, "path": group.path}
            rows.append(names | {"bins": [{"low": a, "high": b, "inputs": int(n)} for a, b, n in bins]})
        return rows

    def _row(self, group: SpikeGroup, places: slice = slice(None)) -> dict[str, Any]:
        sums = {name: value[places].cpu() for name, value in self._sums[group.site].items() if name != "tail"}
        signed = sums["histogram"].sum(0)
        sizes = signed[_LARGE:].clone()  # of 0, 1, ..., 15, and 16 or above
        sizes[1:] += signed[:_LARGE].flip(0)
        small = torch.arange(_LARGE)
        bits = bit_spikes(small, "bitwise")
        unary = (sizes[:-1] * small).sum() + sums["large_unary"].sum()
        bitwise = (sizes[:-1] * bits).sum() + sums["large_bitwise"].sum()
        inputs = float(sums["tokens"].sum()) * group.site.width
        clipped = {t: float(sizes[2**t :].sum()) for t in SLOTS}
        # A clipped count fills all its slots.
        spikes = {t: float((sizes[: 2**t] * bits[: 2**t]).sum()) + t * clipped[t] for t in SLOTS}
        return {
            "layer": group.layer_idx,
            "site": group.name,
            "path": group.path,
            "tokens": int(sums["tokens"].sum()),
            "width": group.site.width,
            "fan_out": group.fan_out,
            "silent_share": float(sizes[0]) / inputs,
            "firing_rate": {"unary": float(unary) / inputs, "bitwise": float(bitwise) / inputs},
            "spike_slot_sparsity": {str(t): 1 - spikes[t] / (t * inputs) for t in SLOTS},
            "clipped_share": {str(t): clipped[t] / inputs for t in SLOTS},
            "max_count": int(sums["max_count"].max()),
        }

    def summary(self) -> dict[str, Any]:
        """The statistics over all sites; keys as in the report's schema.

        Raises:
            ValueError: no token was seen within the block.
        """
        rows = self.by_site()
        if not rows:
            raise ValueError("No token passed through the model within the block; run it before asking for a summary.")
        tokens = max(row["tokens"] for row in rows)

        def mean(value: Any, weight: str) -> float:
            weights = [row["tokens"] * row["width"] * (row["fan_out"] if weight == "reads" else 1) for row in rows]
            total = sum(weights)  # no reads where spikes leave a block and no linear reads them: then none is saved
            return sum(value(row) * w for row, w in zip(rows, weights)) / total if total else 0.0

        # Of a token: an expert is read by the tokens that it gets.
        reads = sum(row["tokens"] * row["width"] * row["fan_out"] for row in rows) / tokens
        silent_reads = mean(lambda row: row["silent_share"], "reads")
        macs = dense_macs(self.model, self._attention, tokens)
        # An embedding row is a copy, not a product.
        weights = reads + macs["head"] + macs["float_fed_linears"]
        rates = {form: mean(lambda row, f=form: row["firing_rate"][f], "inputs") for form in ("unary", "bitwise")}
        return {
            "tokens": tokens,
            "silent_share": mean(lambda row: row["silent_share"], "inputs"),
            "silent_share_reads": silent_reads,
            "silent_share_reads_all_weights": silent_reads * reads / weights,
            "spike_slot_sparsity": {
                str(t): mean(lambda row, t=t: row["spike_slot_sparsity"][str(t)], "inputs") for t in SLOTS
            },
            "clipped_share": {str(t): mean(lambda row, t=t: row["clipped_share"][str(t)], "inputs") for t in SLOTS},
            "slots": list(SLOTS),
            "firing_rate": rates,
            "synops_per_token": {
                form: mean(lambda row, f=form: row["firing_rate"][f], "reads") * reads for form in rates
            },
            "dense_macs_per_token": macs,
            "max_count": max(row["max_count"] for row in rows),
        }


class AttentionCounts:
    """Counts what queries of softmax attention see while a model runs within a `with` block, padding excluded.

    Attributes:
        macs: of scores and values. read: numbers of keys and values that were read; query heads share them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # Keys that were seen; channels of all query heads, and of all heads of keys.
        self._seen: list[tuple[Tensor, int, int]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "AttentionCounts":
        for module in self.model.modules():
            if isinstance(module, (SoftmaxCore, WindowLinearCore)):
                self._hooks.append(module.register_forward_hook(self._count))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _count(self, core: SoftmaxCore | WindowLinearCore, args: tuple, output: tuple) -> None:
        q, k, context = args[0], args[1], args[4]
        seen = context.time - context.start + 1  # real tokens of the document so far, the query's own among them
        if context.valid is not None:
            seen = seen[context.valid]
        if (most := core.most_keys(q.shape[1])) is not None:
            seen = seen.clamp_max(most)
        self._seen.append((seen.sum().double(), q.shape[2] * q.shape[3], k.shape[2] * k.shape[3]))

    @property
    def macs(self) -> float:
        """MACs of all passes."""
        return sum(2 * float(seen) * queries for seen, queries, _ in self._seen)

    @property
    def read(self) -> float:
        """Keys and values of all passes, counted as numbers."""
        return sum(2 * float(seen) * keys for seen, _, keys in self._seen)


def dense_macs(model: nn.Module, attention: AttentionCounts, tokens: int) -> dict[str, float]:
    """MACs per token that no spike replaces, by kind."""
    spiking = {id(linear) for group in spike_groups(model) for linear in group.readers.values()}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = sum(_size(m) for name, m in linears.items() if name == "lm_head")
    floats = sum(_size(m) for n, m in linears.items() if n != "lm_head" and id(m) not in spiking)
    return {
        "head": head,
        "float_fed_linears": floats,
        "attention": attention.macs / tokens,
        "linear_attention": float(sum(getattr(m, "state_macs", 0) for m in model.modules())),
        "norms": 2.0 * sum(m.weight.numel() for m in model.modules() if type(m).__name__.endswith("Norm")),
    }


def _size(linear: nn.Linear) -> int:
    """Weights of a linear, wherever they are stored."""
    return linear.in_features * linear.out_features
