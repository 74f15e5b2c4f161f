"""Event-driven linear: inputs that are exactly zero cost nothing, neither arithmetic nor the reading of their weights.

    y[b, o] = bias[o] + sum over i with x[b, i] != 0 of x[b, i] W[o, i]                         values
    y[b, o] = bias[o] + V[b] sum_g scale[g, o] sum over i in g with s[b, i] != 0 of s[b, i] c[i, o]   counts, integer W

x [..., in]   counts s [..., in] with threshold V [..., 1]   y [..., out]   W = `Rows` [in, out], see `weight_rows.py`

With counts, integer weights are a true integer product: sums within a group are exact whatever the size of a count
(int32 where the sum of |s| times the largest code fits, else float64, exact to 2^53), and scaled once per group. With
floating-point weights, or values, sums are float32 (float64 for float64 inputs). The order of a sum depends neither on
the number of threads nor on the other rows of a batch.

`dense=True` takes all inputs, silent or not: the same engine without its switch, for comparison and for inputs that
are hardly ever silent. `spike_linear` is `spike_encode` and `event_linear` in one pass. `table_linear` is the dense
product with a `Table`, the output head.

Inference only: nothing here carries gradients, and inputs that ask for them are refused.
"""

import torch
from torch import Tensor

from spikelm.kernels import event_linear_cpp, event_linear_torch
from spikelm.kernels.event_linear_torch import FEW
from spikelm.kernels.runtime import check_floating, contiguous, expect, use_triton, wide_dtype, without_autocast
from spikelm.kernels.spike_encode import _check as _check_code
from spikelm.kernels.spike_encode import _on_triton, spike_encode_reference
from spikelm.kernels.weight_rows import Rows, Table, codes_of, unpack


def event_linear(
    x: Tensor, rows: Rows, bias: Tensor | None = None, *, threshold: Tensor | None = None, dense: bool = False
) -> Tensor:
    """Linear of inputs most of which may be silent.

    Args:
        x: [..., in], any floating dtype: values, or with `threshold` integer counts held as floats.
        rows: weights of one or several linears, `pack_rows`.
        bias: [out].
        threshold: [..., 1], what one count stands for.
        dense: read all weights, also those of silent inputs.

    Returns:
        y [..., out] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a gradient that would be lost.
    """
    _check("event_linear", x, rows, bias, threshold)
    flat, threshold = x.reshape(-1, rows.inputs), None if threshold is None else threshold.reshape(-1, 1)
    y = _event_linear(
        flat, threshold, rows.data, rows.scales, bias, rows.format, rows.group, rows.inputs, rows.outputs, dense
    )
    return y.view(*x.shape[:-1], rows.outputs)


def spike_linear(
    x: Tensor,
    rows: Rows,
    k: Tensor | float,
    bias: Tensor | None = None,
    *,
    dead_zone: Tensor | float | None = None,
    magnitude: Tensor | float | None = None,
    max_count: int | None = None,
    dense: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Code an activation, and multiply the counts with the weights that read it.

    Args:
        x: [..., in], any floating dtype.
        rows, bias, dense: as in `event_linear`.
        k, dead_zone, magnitude, max_count: as in `spike_encode`.

    Returns:
        y [..., out] in the dtype of x, and counts [..., in] and threshold [..., 1] as `spike_encode` returns them, with
        the same bits.

    Raises:
        ValueError: shapes that do not fit, or a gradient that would be lost.
    """
    _check("spike_linear", x, rows, bias, None)
    code = (*_check_code(x, k, dead_zone, magnitude, max_count), max_count)
    flat = x.reshape(-1, rows.inputs)
    y, counts, threshold = _spike_linear(
        flat, rows.data, rows.scales, bias, *code, rows.format, rows.group, rows.inputs, rows.outputs, dense
    )
    lead = x.shape[:-1]
    return y.view(*lead, rows.outputs), counts.view(x.shape), threshold.view(*lead, 1)


def table_linear(x: Tensor, table: Table, bias: Tensor | None = None) -> Tensor:
    """Dense product with a table, such as the output head: x [..., in] -> y [..., out] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a gradient that would be lost.
    """
    _check("table_linear", x, table, bias, None)
    flat = x.reshape(-1, table.inputs)
    y = _table_linear(flat, table.data, table.scales, bias, table.format, table.group, table.inputs, table.outputs)
    return y.view(*x.shape[:-1], table.outputs)


@without_autocast
def event_linear_reference(
    x: Tensor, rows: Rows | Table, bias: Tensor | None = None, *, threshold: Tensor | None = None
) -> Tensor:
    """The definition of `event_linear` and `table_linear`, in float64 throughout. Arguments as there."""
    _check("event_linear_reference", x, rows, bias, threshold)
    v = x.double()
    if threshold is not None and rows.scales is not None:
        codes, scales = codes_of(rows).double(), rows.scales.double()
        if isinstance(rows, Table):
            codes, scales = codes.t(), scales.t()
        y = v.new_zeros(*x.shape[:-1], rows.outputs)
        for group, scale in enumerate(scales):
            span = slice(group * rows.group, (group + 1) * rows.group)
            y += scale * (v[..., span] @ codes[span])
        y *= threshold.double()
    else:
        y = (v if threshold is None else v * threshold.double()) @ unpack(rows).double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def _check(op: str, x: Tensor, weights: Rows | Table, bias: Tensor | None, threshold: Tensor | None) -> None:
    check_floating(op, x=x, bias=bias, threshold=threshold, scales=weights.scales)
    expect(
        x.ndim >= 1 and x.shape[-1] == weights.inputs,
        op,
        "x",
        f"[..., {weights.inputs}]",
        tuple(x.shape),
        "The weights have that many inputs.",
    )
    expected = (*x.shape[:-1], 1)
    expect(
        threshold is None or tuple(threshold.shape) == expected,
        op,
        "threshold",
        f"{list(expected)}",
        None if threshold is None else tuple(threshold.shape),
        "One per row of counts, as `spike_encode` returns it.",
    )
    expect(
        bias is None or tuple(bias.shape) == (weights.outputs,),
        op,
        "bias",
        f"[{weights.outputs}]",
        None if bias is None else tuple(bias.shape),
        "One per output of all linears together.",
    )
    expect(
        not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, bias, threshold)),
        op,
        "inputs",
        "free of gradients",
        "some that require them",
        "It is for inference: call it under torch.no_grad().",
    )


@torch.library.custom_op("spikelm::event_linear", mutates_args=())
@without_autocast
def _event_linear(
    x: Tensor,
    threshold: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    format: str,
    group: int,
    inputs: int,
    outputs: int,
    dense: bool,
) -> Tensor:
    x, threshold, bias = contiguous(x, threshold, bias)
    rows = Rows(format, *contiguous(data, scales), group, inputs, outputs)
    if format != "fp64" and x.shape[0] <= FEW and use_triton(x, threshold, data, scales, bias):
        from spikelm.kernels.event_linear_triton import event_linear_triton

        y = event_linear_triton(x, threshold, rows, bias, dense)
    elif event_linear_cpp.takes(x, rows):
        y = event_linear_cpp.event_linear(x, threshold, rows, bias, dense)
    else:
        y = event_linear_torch.event_linear(x, threshold, rows, bias, dense)
    return y.to(x.dtype)


@_event_linear.register_fake
def _(x, threshold, data, scales, bias, format, group, inputs, outputs, dense):
    return x.new_empty(x.shape[0], outputs)


@torch.library.custom_op("spikelm::spike_linear", mutates_args=())
@without_autocast
def _spike_linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
    format: str,
    group: int,
    inputs: int,
    outputs: int,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (x, bias), code = contiguous(x, bias), (k, dead_zone, magnitude, max_count)
    rows = Rows(format, *contiguous(data, scales), group, inputs, outputs)
    if format != "fp64" and x.shape[0] <= FEW and _on_triton(x, data, scales, bias):
        from spikelm.kernels.event_linear_triton import spike_linear_triton

        y, counts, threshold = spike_linear_triton(x, rows, bias, *code, dense)
    elif event_linear_cpp.takes(x, rows):
        y, counts, threshold = event_linear_cpp.spike_linear(x, rows, bias, *code, dense)
    else:
        counts, threshold = spike_encode_reference(x, *code)
        y = event_linear_torch.event_linear(counts, threshold, rows, bias, dense)
    return y.to(x.dtype), counts, threshold


@_spike_linear.register_fake
def _(x, data, scales, bias, k, dead_zone, magnitude, max_count, format, group, inputs, outputs, dense):
    wide = wide_dtype(x)
    return x.new_empty(x.shape[0], outputs), x.new_empty(x.shape, dtype=wide), x.new_empty(x.shape[0], 1, dtype=wide)


@torch.library.custom_op("spikelm::table_linear", mutates_args=())
@without_autocast
def _table_linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    format: str,
    group: int,
    inputs: int,
    outputs: int,
) -> Tensor:
    x, bias = contiguous(x, bias)
    table = Table(format, *contiguous(data, scales), group, inputs, outputs)
    if event_linear_cpp.takes(x, table):
        return event_linear_cpp.event_linear(x, None, table, bias, True).to(x.dtype)
    return event_linear_torch.table_linear(x, table, bias).to(x.dtype)


@_table_linear.register_fake
def _(x, data, scales, bias, format, group, inputs, outputs):
    return x.new_empty(x.shape[0], outputs)
