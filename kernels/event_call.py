"""One step of a decoder around an event product, prepared once: fixed buffers, one call, nothing allocated.

    v = x,  or  silu(gate) * up  with x = [gate | up]                    `gated`
    v = norm_weight * v / sqrt(mean(v^2) + eps)                          `norm`
    s, V = spike_encode(v)                                               `code`: what is read is s V
    y = product + bias,  or  y + product + bias                          `add`: the residual stream

x [B, in] or [B, 2 in]   y [B, out], both float32; every part in front of the product may be left out.

A decoder of thirty layers makes some hundred products per token. Called one by one through torch they cost more in
Python than the products themselves take; a prepared call is one call into C++ with a pointer that was made before. The
counts have the bits of `spike_encode` on the same v. Without the compiled file the same steps run in torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels import event_linear_cpp
from spikelm.kernels.event_linear import event_linear, spike_linear, table_linear
from spikelm.kernels.runtime import expect
from spikelm.kernels.weight_rows import Rows, Table


@dataclass(frozen=True)
class Code:
    """What a site decides with; arguments of `spike_encode`. `rectify` takes max(v, 0) first."""

    k: Tensor
    dead_zone: Tensor | None = None
    magnitude: Tensor | None = None
    max_count: int | None = None
    rectify: bool = False


@dataclass(frozen=True)
class Norm:
    """RMSNorm in front of a site: weight [in] (or 1 + weight with `one_plus`) and eps."""

    weight: Tensor
    eps: float
    one_plus: bool = False


class EventCall:
    """A prepared product; calling it reads x and writes y.

    Args:
        weights: `Rows`, or a `Table` (whose product is dense and takes no code).
        x: float32 [B, in], or [B, 2 in] if gated; the buffer that every call reads.
        y: float32 [B, out]; the buffer that every call writes, or with `add` adds to.
        bias: float32 [out].
        code, norm, gated, add: see the head of the file.
        dense: read all weights, also those of silent inputs.

    Attributes:
        counts: [B, in], threshold [B, 1]: what the last call coded; None without a code.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """

    def __init__(
        self,
        weights: Rows | Table,
        x: Tensor,
        y: Tensor,
        *,
        bias: Tensor | None = None,
        code: Code | None = None,
        norm: Norm | None = None,
        gated: bool = False,
        add: bool = False,
        dense: bool = False,
    ):
        self.weights, self.x, self.y, self.bias = weights, x, y, bias
        self.code, self.norm, self.gated, self.add, self.dense = code, norm, gated, add, dense
        self._check()
        self.counts = None if code is None else x.new_zeros(x.shape[0], weights.inputs)
        self.threshold = None if code is None else x.new_zeros(x.shape[0], 1)
        self.compiled = event_linear_cpp.prepare(self)

    def __call__(self) -> None:
        """Read x, write y."""
        (self.compiled or self._torch)()

    def _torch(self) -> None:
        v = self.x
        if self.gated:
            gate, up = v.chunk(2, 1)
            v = F.silu(gate) * up
        if self.norm is not None:
            v = v * torch.rsqrt(v.square().mean(1, keepdim=True) + self.norm.eps)
            v *= 1.0 + self.norm.weight if self.norm.one_plus else self.norm.weight
        y = self._product(v)
        if self.add:
            self.y.add_(y)
        else:
            self.y.copy_(y)

    def _product(self, v: Tensor) -> Tensor:
        if isinstance(self.weights, Table):
            return table_linear(v, self.weights, self.bias)
        if self.code is None:
            return event_linear(v, self.weights, self.bias, dense=self.dense)
        code = self.code
        v = v.relu() if code.rectify else v
        y, counts, threshold = spike_linear(
            v,
            self.weights,
            code.k,
            self.bias,
            dead_zone=code.dead_zone,
            magnitude=code.magnitude,
            max_count=code.max_count,
            dense=self.dense,
        )
        for kept, fresh in ((self.counts, counts), (self.threshold, threshold)):
            if kept is not None:
                kept.copy_(fresh)
        return y

    def _check(self) -> None:
        inputs, outputs = self.weights.inputs * (2 if self.gated else 1), self.weights.outputs
        for name, t, width in (("x", self.x, inputs), ("y", self.y, outputs)):
            expect(
                t.dtype == torch.float32 and t.ndim == 2 and t.shape[1] == width and t.is_contiguous(),
                "EventCall",
                name,
                f"contiguous float32 [B, {width}]",
                f"{t.dtype} {tuple(t.shape)}",
                "It is a buffer that is used again and again.",
            )
        expect(
            self.x.shape[0] == self.y.shape[0],
            "EventCall",
            "y",
            f"{self.x.shape[0]} rows, as x has",
            self.y.shape[0],
            "One per row of x.",
        )
        expect(
            not isinstance(self.weights, Table) or self.code is None,
            "EventCall",
            "code",
            "None with a Table",
            self.code,
            "A site reads `Rows`.",
        )
