"""One switch from a model that trains to a model that decodes: weights by input row, silent inputs not read.

    prepare_for_inference(model, weights="int8", events="always")

Every spike site and the linears that read it become one `EventProduct`; linears that no site feeds become products of
their own; embedding and head share one table if they are tied. All that decides how tokens mix, the sites, norms,
states and the cache, stays what it is. The router of a mixture, whose output is a decision, stays a dense linear.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.ffns.moe import MixtureFFN
from spikelm.grid import codes_of
from spikelm.inference.choice import limits, most_active
from spikelm.inference.decoder import plain_runs
from spikelm.inference.linears import EventProduct, Reader, StoredEmbedding, StoredHead, StoredWeights
from spikelm.kernels.runtime import expect
from spikelm.kernels.weight_rows import GROUP, LARGEST_CODE, Rows, pack_rows, pack_table, rows_of_codes
from spikelm.spiking.site import Site
from spikelm.validation import PACKED_WEIGHTS

EVENTS = ("auto", "always", "never")
_OP = "prepare_for_inference"


@dataclass(frozen=True)
class Prepared:
    """How a model was prepared: its `prepared` attribute."""

    weights: str
    events: str


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input: `owner.get_submodule(name)` for every name; `site` codes it, or None."""

    owner: nn.Module
    names: tuple[str, ...]
    site: Site | None

    @property
    def linears(self) -> list[nn.Linear]:
        """The linears, in order."""
        return [self.owner.get_submodule(name) for name in self.names]  # type: ignore[misc]


@torch.no_grad()
def prepare_for_inference(model: Any, weights: str = "fp32", events: str = "auto") -> Any:
    """Lay out the weights of `model` for decoding, in place; silent inputs are then neither read nor multiplied.

    Args:
        model: a spikelm model. It is set to evaluation mode and no longer trains; what it computes stays the same up
            to rounding and, with integers, up to their grid (`restore_dense` gives the dense model on that grid).
        weights: format of all matrices: "fp32" (float64 models keep float64), "bf16", or integers, "int8" or "int4",
            with one scale for every output and group of 128 inputs (of `weight_group_size`, if the model has one: then
            its weights lie on a grid already, and codes that the format holds are kept as they are).
        events: "always" skips what is silent, "never" reads all, "auto" takes the faster one for each product, size of
            the batch and share of active inputs, by a table that is measured once on each machine.

    Returns:
        The model.

    Raises:
        ValueError: an unknown option, or a model that is prepared already or has no linears of the kind expected.
    """
    formats = f"one of {PACKED_WEIGHTS}"
    expect(weights in PACKED_WEIGHTS, _OP, "weights", formats, repr(weights), "Choose one of them.")
    expect(events in EVENTS, _OP, "events", f"one of {EVENTS}", repr(events), "Choose one of them.")
    known = getattr(model, "prepared", None)
    expect(known is None, _OP, "the model", "not prepared yet", known, "Call restore_dense first.")
    dtype = model.get_input_embeddings().weight.dtype
    stored = "fp64" if weights == "fp32" and dtype == torch.float64 else weights
    size = model.config.weight_group_size or GROUP
    for group in list(linear_groups(model)):
        install_group(group, _packed(group.linears, stored, size), _joined_bias(group.linears), events)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    table = StoredWeights(pack_table(embedding.weight, stored, size), None)
    own = table if head is None or tied else StoredWeights(pack_table(head.weight, stored, size), None)
    install_tables(model, table, own)
    return finish(model, Prepared(weights, events))


@torch.no_grad()
def restore_dense(model: Any) -> Any:
    """Undo `prepare_for_inference`, in place: ordinary linears and embeddings again, with the stored weights.

    The weights are those from before exactly if the format holds them ("fp32"), else their nearest values in it: the
    dense model that the prepared one is equal to. Raises ValueError for a model that is not prepared.
    """
    expect(getattr(model, "prepared", None) is not None, "restore_dense", "the model", "prepared", "a dense one", "")
    dtype = model.get_input_embeddings().dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, Reader):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight = nn.Parameter(module.weight.to(dtype))
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.to(dtype, copy=True))
            if hasattr(module, "grid"):
                linear.grid = module.grid
            model.set_submodule(name, linear.eval())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    words = nn.Embedding(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
    words.weight = nn.Parameter(embedding.weight.to(dtype))
    model.set_input_embeddings(words)
    if head is not None:
        dense = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        dense.weight = words.weight if head.tied else nn.Parameter(head.weight.to(dtype))
        if head.bias is not None:
            dense.bias = nn.Parameter(head.bias)
        model.set_output_embeddings(dense.eval())
    for module in model.modules():
        if isinstance(module, Site):
            module.hands_counts, module.handed_on = False, None
    model.base_model.runs = None
    del model.prepared
    return model.requires_grad_(True)


def set_events(model: Any, events: str) -> Any:
    """Change `events` of a prepared model; returns it. Raises ValueError for an unknown name or a dense model."""
    expect(events in EVENTS, "set_events", "events", f"one of {EVENTS}", repr(events), "Choose one of them.")
    known: Any = getattr(model, "prepared", None)
    remedy = "Choose a format of its weights first."
    expect(known is not None, "set_events", "the model", "prepared", "a dense one", remedy)
    for module in model.modules():
        if isinstance(module, EventProduct):
            module.events = events
    return finish(model, Prepared(known.weights, events))


def linear_groups(model: nn.Module) -> Iterator[LinearGroup]:
    """All linears but the head and routers, joined where they read one site, in the order of the modules."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    left = {id(m) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    left -= {id(m.router) for m in model.modules() if isinstance(m, MixtureFFN)}
    for owner in model.modules():
        for site_name, readers in getattr(owner, "site_readers", {}).items():
            names = tuple(name for name in readers if id(owner.get_submodule(name)) in left)
            if names:
                site = owner.get_submodule(site_name)
                left -= {id(owner.get_submodule(name)) for name in names}
                yield LinearGroup(owner, names, site if isinstance(site, Site) else None)
    for owner in model.modules():
        for name, child in owner.named_children():
            if id(child) in left:
                yield LinearGroup(owner, (name,), None)


def install_group(group: LinearGroup, rows: Rows, bias: Tensor | None, events: str) -> None:
    """Replace the linears of a group by readers of one product."""
    linears = group.linears
    product = EventProduct(rows, bias, [linear.out_features for linear in linears], group.site, events)
    for index, (name, linear) in enumerate(zip(group.names, linears)):
        group.owner.set_submodule(name, Reader(linear, product, index))
    if group.site is not None and rows.format in LARGEST_CODE:
        group.site.hands_counts = True


def install_tables(model: Any, table: StoredWeights, own: StoredWeights) -> None:
    """Replace embedding and head; `own` is the table of the head, or `table` again if they are tied."""
    head = model.get_output_embeddings()
    model.set_input_embeddings(StoredEmbedding(model.get_input_embeddings(), table))
    if head is not None:
        model.set_output_embeddings(StoredHead(head, own, tied=own is table))


def finish(model: Any, prepared: Prepared) -> Any:
    """Mark the model, fill in what "auto" must know, join plain layers into runs."""
    model.prepared = prepared
    if prepared.events == "auto":
        products = [m for m in model.modules() if isinstance(m, EventProduct)]
        by_format: dict[str, dict[tuple[int, int], Rows]] = {}
        for product in products:
            shapes = by_format.setdefault(f"{product.format}/{product.group}", {})
            shapes[product.inputs, product.outputs] = product.packed
        choices = {name: most_active(shapes) for name, shapes in by_format.items()}
        for product in products:
            known = choices[f"{product.format}/{product.group}"]
            product.most_active = limits(known, product.inputs, product.outputs)
    model.base_model.runs = plain_runs(list(model.base_model.layers))
    return model.eval().requires_grad_(False)


def _packed(linears: list[nn.Linear], format: str, group: int) -> Rows:
    """Rows of all linears side by side; codes of a grid are kept if the format holds them all."""
    grids = [linear.grid for linear in linears if hasattr(linear, "grid")]
    if format in LARGEST_CODE and len(grids) == len(linears):
        codes = torch.cat([codes_of(linear) for linear in linears])
        if int(codes.abs().max()) <= LARGEST_CODE[format]:
            return rows_of_codes(codes, torch.cat([grid.scales for grid in grids]), format, group)
    return pack_rows([linear.weight for linear in linears], format, group)


def _joined_bias(linears: list[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    return torch.cat([part.detach() for part in parts])
