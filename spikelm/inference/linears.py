"""Stored weights in place of `nn.Linear` and `nn.Embedding`: one product for all linears that read one site.

    readers q, k, v of a site     y = x [W_q; W_k; W_v]^T        one list of events, one pass over contiguous rows
    embedding and head            one `Table` `[words, hidden]`  a row is an embedding, its product a logit

A `Reader` stands where a linear stood and is still an `nn.Linear` to whoever asks: it hands its input to the
`EventProduct` of its group and returns its own part of what comes back. The product is computed when the first reader
asks and kept until the last one has taken its part.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spikelm.kernels.event_call import EventCall
from spikelm.kernels.event_linear import event_linear, table_linear
from spikelm.kernels.weight_rows import Rows, Table, lookup, unpack
from spikelm.precision import KeepsDtype
from spikelm.spiking.site import Site

# Rows of a batch up to which skipping can pay: their events are merged, and 8 rows seldom leave an input silent.
EVENT_ROWS = 8


class StoredWeights(KeepsDtype):
    """Weights in one of `spikelm.kernels.weight_rows`' formats as the buffers `data` and `scales`, and a `bias`."""

    def __init__(self, packed: Rows | Table, bias: Tensor | None):
        super().__init__()
        self.format, self.group = packed.format, packed.group
        self.inputs, self.outputs = packed.inputs, packed.outputs
        self.layout = type(packed)
        self.data: Tensor
        self.scales: Tensor | None
        self.bias: Tensor | None
        for name, tensor in (("data", packed.data), ("scales", packed.scales), ("bias", bias)):
            self.register_buffer(name, tensor)

    @property
    def packed(self) -> Rows | Table:
        """The weights as the kernels take them."""
        return self.layout(self.format, self.data, self.scales, self.group, self.inputs, self.outputs)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.inputs} -> {self.outputs}, {self.format}"


class EventProduct(StoredWeights):
    """`[..., in]` -> `[..., out]`, the outputs of all readers side by side.

    Attributes:
        site: what codes the input, or None.
        events: "always", "never" or "auto".
        most_active: with "auto", the share of inputs up to which events beat the dense product, by rows of the batch.
    """

    def __init__(self, rows: Rows, bias: Tensor | None, widths: list[int], site: Site | None, events: str):
        super().__init__(rows, bias)
        self.widths, self.events = widths, events
        self.most_active: dict[int, float] = {}
        self._site = (site,)  # in a tuple: a module inside would be saved and listed twice
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._left = 0

    @property
    def site(self) -> Site | None:
        """What codes the input, or None."""
        return self._site[0]

    def part(self, x: Tensor, index: int) -> Tensor:
        """What reader `index` makes of `x`; one product serves all readers of the same tensor."""
        if self._input is not x:
            self._parts = self(x).split(self.widths, -1)
            self._input, self._left = x, len(self.widths)
        part = self._parts[index]
        self._left -= 1
        if not self._left:
            self._input, self._parts = None, ()
        return part

    def forward(self, x: Tensor) -> Tensor:
        """The product of `x`, and of the counts behind it where weights are integers."""
        rows = x.numel() // self.inputs
        coded = None
        if self.site is not None:
            coded, self.site.handed_on = self.site.handed_on, None
        if rows > EVENT_ROWS:
            return event_linear(x, self.packed, self.bias, dense=True)
        if coded is not None and coded[0] is x:
            _, counts, threshold = coded
            dense = self._reads_all(counts, rows)
            return event_linear(counts, self.packed, self.bias, threshold=threshold, dense=dense).to(x.dtype)
        return event_linear(x, self.packed, self.bias, dense=self._reads_all(x, rows))

    def _reads_all(self, x: Tensor, rows: int) -> bool:
        if self.events != "auto":
            return self.events == "never"
        active = (x if rows == 1 else x.reshape(rows, -1).abs().amax(0)).count_nonzero()
        return int(active) > self.most_active.get(rows, 0.0) * self.inputs


class Reader(nn.Linear):
    """A linear whose weights lie with those of its group.

    The first reader of a group holds the `product`. `grid`, if the linear had one, stays with it.
    """

    def __init__(self, linear: nn.Linear, product: EventProduct, index: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.index = index
        self.train(linear.training)
        if index == 0:
            self.product = product
        if hasattr(linear, "grid"):
            self.grid = linear.grid
        self._shared = (product,)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy `[out, in]` in float32 or better: what the product is defined on."""
        return unpack(self._shared[0].packed)[self._span()]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias `[out]`, a view."""
        bias = self._shared[0].bias
        return None if bias is None else bias[self._span()]

    def _span(self) -> slice:
        begin = sum(self._shared[0].widths[: self.index])
        return slice(begin, begin + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self._shared[0].part(x, self.index)

    def extra_repr(self) -> str:
        """Sizes, and whose weights are read."""
        return f"{self.in_features} -> {self.out_features}, part {self.index} of its group"


class StoredEmbedding(nn.Embedding):
    """Embeddings out of a table, in the dtype of the model."""

    def __init__(self, embedding: nn.Embedding, table: StoredWeights):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.dtype = embedding.padding_idx, embedding.weight.dtype
        self.train(embedding.training)
        self.table = table

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy `[words, hidden]` in float32 or better."""
        return unpack(self.table.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, words: Tensor) -> Tensor:
        """`[B, T]` -> `[B, T, hidden]`."""
        return lookup(self.table.packed, words).to(self.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class StoredHead(nn.Linear):
    """A head that reads a table: its own, or that of the embedding if the two are tied."""

    def __init__(self, head: nn.Linear, table: StoredWeights, tied: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.train(head.training)
        bias = None if head.bias is None else head.bias.detach()
        self.register_buffer("bias", bias)
        self.tied, self._shared = tied, (table,)
        if not tied:
            self.table = table
        self._calls = _Calls()

    @property
    def packed(self) -> Table:
        """The table as the kernels take it."""
        return self._shared[0].packed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy `[words, hidden]` in float32 or better."""
        return unpack(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredHead":
        self._calls.clear()
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` -> logits `[..., words]`."""
        rows = x.numel() // self.in_features
        if rows > EVENT_ROWS or x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return table_linear(x, self.packed, self.bias)
        if rows not in self._calls:
            buffers = torch.empty(rows, self.in_features), torch.empty(rows, self.out_features)
            self._calls[rows] = EventCall(self.packed, *buffers, bias=self.bias)
        call = self._calls[rows]
        call.x.copy_(x.view(rows, -1))
        call()
        return call.y.view(*x.shape[:-1], -1).clone()


class _Calls(dict):
    """Prepared calls by rows of a batch. They hold addresses: a copy of a module starts without."""

    def __reduce__(self) -> tuple:
        return _Calls, ()
