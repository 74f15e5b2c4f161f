"""The event product in plain torch: right on every device and dtype, and fast where torch has the loop.

`torch.nn.functional.embedding_bag` sums chosen rows of a matrix with weights, which is the product with one index list,
where rows and inputs have one dtype. Other formats read the rows of all inputs that any row of the batch uses, widen
them, and multiply.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.runtime import wide_dtype
from spikelm.kernels.weight_rows import Rows, Table, unpack, unpacked_halves

FEW = 8  # rows of a batch; of more, hardly an input is silent in all
_WIDENED = 4096  # outputs


def event_linear(x: Tensor, threshold: Tensor | None, rows: Rows, bias: Tensor | None, dense: bool) -> Tensor:
    """x [B, in], counts if there is a threshold [B, 1] -> y [B, out] in float32 or better."""
    wide, dense = wide_dtype(x, rows.data), dense or x.shape[0] > FEW
    if threshold is not None and rows.scales is not None:
        # Integers up to 2^53 are exact in float64.
        y = _chosen(x.double(), rows, dense) * threshold
    else:
        v = x.to(wide) if threshold is None else x.to(wide) * threshold.to(wide)
        y = _bags(v, rows.data) if rows.data.dtype == wide and not dense else _chosen(v, rows, dense)
    return (y if bias is None else y + bias).to(wide)


def table_linear(x: Tensor, table: Table, bias: Tensor | None) -> Tensor:
    """x [B, in] -> y [B, out] in float32 or better; other formats are widened a part at a time."""
    wide = wide_dtype(x, table.data)
    v = x.to(wide)
    if table.data.dtype == wide:
        return F.linear(v, table.data, None if bias is None else bias.to(wide))
    parts = [table.part(slice(i, i + _WIDENED)) for i in range(0, table.outputs, _WIDENED)]
    y = torch.cat([F.linear(v, unpack(part).to(wide)) for part in parts], 1)
    return y if bias is None else y + bias.to(wide)


def _bags(v: Tensor, data: Tensor) -> Tensor:
    """Sum of the rows of data [in, out] that v [B, in] uses, times v."""
    if v.shape[0] == 1:
        events = v[0].nonzero().squeeze(1)
        start = torch.zeros(1, dtype=torch.int64, device=v.device)
        return F.embedding_bag(events, data, start, mode="sum", per_sample_weights=v[0, events])
    batch, events = v.nonzero().unbind(1)
    offsets = torch.searchsorted(batch, torch.arange(v.shape[0], device=v.device))
    return F.embedding_bag(events, data, offsets, mode="sum", per_sample_weights=v[batch, events])


def _chosen(v: Tensor, rows: Rows, dense: bool) -> Tensor:
    """v [B, in] times the rows that any of the batch uses, widened to the dtype of v."""
    data, events = rows.data, torch.arange(v.shape[1], device=v.device)
    if not dense:
        events = (v != 0).any(0).nonzero().squeeze(1)
        v, data = v[:, events], data[events]
    codes = unpacked_halves(data, rows.outputs) if rows.format == "int4" else data
    weights = codes.to(v.dtype)
    if rows.scales is not None:
        weights = weights * rows.scales[events // rows.group]
    return v @ weights
