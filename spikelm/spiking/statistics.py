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
_SUMS = (
    "tokens",
    "silent",
    "unary",
    "bitwise",
    *(f"{what}_{t}" for t in SLOTS for what in ("zero_slots", "clipped")),
)


class SpikeStatistics:
    """Counts spikes of a model within a `with` block, in evaluation, generation or training.

    Under activation checkpointing every pass is made, and counted, twice: shares stay right, `tokens` doubles.

        with SpikeStatistics(model) as statistics:
            model.generate(...)
        statistics.summary()["silent_share_reads"]

    Raises:
        ValueError: the model has no spike sites.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.groups = list(spike_groups(model))
        if not self.groups:
            raise ValueError("The model has no spike sites, so there are no spikes to count; convert it with sites.")
        self._sums: dict[Site, dict[str, Tensor]] = {}
        self._attended: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "SpikeStatistics":
        for group in self.groups:
            group.site.observers.append(self._count)
        for module in self.model.modules():
            if isinstance(module, (SoftmaxCore, WindowLinearCore)):
                self._hooks.append(module.register_forward_hook(self._count_attention))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self.groups:
            group.site.observers.remove(self._count)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _count(self, site: Site, counts: Tensor, threshold: Tensor, context: "ForwardContext | None") -> None:
        rows = counts.flatten(0, -2)
        if context is not None and context.valid is not None:
            rows = rows[context.valid.flatten()]
        if rows.shape[0] == 0:
            return
        sizes = rows.abs()
        histogram = torch.bincount(sizes.clamp(max=_LARGE).to(torch.int32).flatten(), minlength=_LARGE + 1)
        # Large counts are rare; they alone are looked at one by one.
        large = sizes[sizes >= _LARGE]
        small = torch.arange(_LARGE, device=rows.device)
        bits = bit_spikes(small, "bitwise")
        new = {
            "tokens": rows.new_tensor(rows.shape[0]),
            "silent": histogram[0],
            "unary": (histogram[:-1] * small).sum() + large.sum(dtype=torch.float64),
            "bitwise": (histogram[:-1] * bits).sum() + bit_spikes(large, "bitwise").sum(),
        }
        for slots in SLOTS:
            fits = 2**slots
            clipped = histogram[fits:].sum()
            # A clipped count fills all its slots.
            new[f"clipped_{slots}"] = clipped
            new[f"zero_slots_{slots}"] = slots * (rows.numel() - clipped) - (histogram[:fits] * bits[:fits]).sum()
        sums = self._sums.setdefault(site, {})
        for name, value in new.items():
            sums[name] = sums.get(name, 0) + value.double()
        sums["max_count"] = torch.maximum(sums.get("max_count", sizes.new_zeros(())), sizes.max())

    def _count_attention(self, core: SoftmaxCore | WindowLinearCore, args: tuple, output: tuple) -> None:
        q, context = args[0], args[4]
        seen = context.time - context.start + 1  # real tokens of the document so far, the query's own among them
        if context.valid is not None:
            seen = seen[context.valid]
        if (most := core.most_keys(q.shape[1])) is not None:
            seen = seen.clamp_max(most)
        self._attended.append(2 * seen.sum().double() * q.shape[2] * q.shape[3])

    def by_site(self) -> list[dict[str, Any]]:
        """One row per site: layer, site, tokens, width, fan_out, and its statistics."""
        return [self._row(group) for group in self.groups if group.site in self._sums]

    def _row(self, group: SpikeGroup) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self._sums[group.site].items()}
        inputs = sums["tokens"] * group.site.width
        return {
            "layer": group.layer_idx,
            "site": group.name,
            "path": group.path,
            "tokens": int(sums["tokens"]),
            "width": group.site.width,
            "fan_out": group.fan_out,
            "silent_share": sums["silent"] / inputs,
            "firing_rate": {"unary": sums["unary"] / inputs, "bitwise": sums["bitwise"] / inputs},
            "spike_slot_sparsity": {str(t): sums[f"zero_slots_{t}"] / (t * inputs) for t in SLOTS},
            "clipped_share": {str(t): sums[f"clipped_{t}"] / inputs for t in SLOTS},
            "max_count": int(sums["max_count"]),
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

        reads = sum(row["width"] * row["fan_out"] for row in rows)
        silent_reads = mean(lambda row: row["silent_share"], "reads")
        weights = _weights_per_token(self.model)
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
            "dense_macs_per_token": self._dense_macs(tokens),
            "max_count": max(row["max_count"] for row in rows),
        }

    def _dense_macs(self, tokens: int) -> dict[str, float]:
        """MACs per token that no spike replaces, by kind."""
        spiking = {id(linear) for group in self.groups for linear in group.readers.values()}
        linears = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        head = sum(_size(m) for name, m in linears.items() if name == "lm_head")
        floats = sum(_size(m) for n, m in linears.items() if n != "lm_head" and id(m) not in spiking)
        return {
            "head": head,
            "float_fed_linears": floats,
            "attention": float(sum(t.cpu() for t in self._attended)) / tokens if self._attended else 0.0,
            "linear_attention": float(sum(getattr(m, "state_macs", 0) for m in self.model.modules())),
            "norms": 2.0 * sum(m.weight.numel() for m in self.model.modules() if type(m).__name__.endswith("Norm")),
        }


def _weights_per_token(model: nn.Module) -> int:
    """Weights that one token reads: of linears, head included, and of recurrent matrices behind sites.

    An embedding row is a copy, not a product.
    """
    linears = sum(_size(m) for m in model.modules() if isinstance(m, nn.Linear))
    return linears + sum(m.width * m.recurrent_reads for m in model.modules() if isinstance(m, Site))


def _size(linear: nn.Linear) -> int:
    """Weights of a linear, wherever they are stored."""
    return linear.in_features * linear.out_features
