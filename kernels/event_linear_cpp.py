"""The event product on the CPU through `event_linear.cpp`, in float32: any number of rows, meant for few."""

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikelm.kernels import cpp
from spikelm.kernels.chain import Compiled
from spikelm.kernels.event_linear_torch import FEW
from spikelm.kernels.weight_rows import Rows, Table

if TYPE_CHECKING:
    from spikelm.kernels.event_call import EventCall

_FORMATS = ("fp32", "bf16", "int16", "int8", "int4")  # as enum Format


class _Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "data", "scales", "bias", "norm")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("k", "zone", "magnitude", "counts", "threshold")]
    _fields_ += [(name, ctypes.c_int64) for name in ("format", "batch", "inputs", "outputs", "group", "zones")]
    _fields_ += [(name, ctypes.c_int64) for name in ("max_count", "gated", "one_plus", "rectify", "add", "dense")]
    _fields_ += [("by_output", ctypes.c_int64), ("eps", ctypes.c_float)]


def library() -> ctypes.CDLL | None:
    """The compiled file, with the threads of torch; None where it cannot be had."""
    return cpp.library("event_linear", "-fopenmp")


def _function() -> Callable[..., None]:
    """The compiled entry; only where `takes` has said that it is there."""
    compiled = library()
    assert compiled is not None
    return compiled.event_linear


def takes(x: Tensor, weights: Rows | Table) -> bool:
    """Whether the compiled file computes on x [B, in]: float32 or narrower, on the CPU, few rows."""
    return (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and x.shape[0] <= FEW
        and weights.format in _FORMATS
        and library() is not None
    )


def event_linear(
    x: Tensor, threshold: Tensor | None, weights: Rows | Table, bias: Tensor | None, dense: bool
) -> Tensor:
    """x [B, in], counts if there is a threshold [B, 1] -> y [B, out] float32. A table's product is dense."""
    x = x.float()
    y = x.new_empty(x.shape[0], weights.outputs)
    call, _alive = _describe(weights, x, y, {"bias": bias, "threshold": threshold}, {"dense": dense})
    _function()(ctypes.byref(call), torch.get_num_threads())
    return y


def spike_linear(
    x: Tensor,
    rows: Rows,
    bias: Tensor | None,
    k: Tensor,
    dead_zone: Tensor | None,
    magnitude: Tensor | None,
    max_count: int | None,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, in] -> y [B, out], counts [B, in], threshold [B, 1], all float32."""
    x = x.float()
    y, counts, threshold = x.new_empty(x.shape[0], rows.outputs), torch.empty_like(x), x.new_empty(x.shape[0], 1)
    parts = {"bias": bias, "k": k, "zone": dead_zone, "magnitude": magnitude, "counts": counts, "threshold": threshold}
    zones = 0 if dead_zone is None else dead_zone.numel()
    options = {"dense": dense, "zones": zones, "max_count": max_count or 0}
    call, _alive = _describe(rows, x, y, parts, options)
    _function()(ctypes.byref(call), torch.get_num_threads())
    return y, counts, threshold


def prepare(call: "EventCall") -> Compiled | None:
    """What runs a prepared call; None where torch must."""
    if not takes(call.x, call.weights):
        return None
    parts: dict[str, Tensor | None] = {"bias": call.bias, "counts": call.counts, "threshold": call.threshold}
    options: dict[str, float] = {"gated": call.gated, "add": call.add, "dense": call.dense}
    if call.norm is not None:
        parts["norm"] = call.norm.weight
        options |= {"one_plus": call.norm.one_plus, "eps": call.norm.eps}
    if (code := call.code) is not None:
        parts |= {"k": code.k, "zone": code.dead_zone, "magnitude": code.magnitude}
        zones = 0 if code.dead_zone is None else code.dead_zone.numel()
        options |= {"zones": zones, "max_count": code.max_count or 0, "rectify": code.rectify}
    return Compiled(_function(), *_describe(call.weights, call.x, call.y, parts, options))


def _describe(
    weights: Rows | Table, x: Tensor, y: Tensor, parts: dict[str, Tensor | None], options: dict[str, float]
) -> tuple[_Call, list[Tensor | None]]:
    """The call, and the tensors it points to."""
    floats = {name: None if t is None else t.detach().float().contiguous() for name, t in parts.items()}
    tensors = {"x": x, "y": y, "data": weights.data, "scales": weights.scales, **floats}
    described = _Call(
        format=_FORMATS.index(weights.format),
        batch=x.shape[0],
        inputs=weights.inputs,
        outputs=weights.outputs,
        group=weights.group,
        by_output=isinstance(weights, Table),
        **{name: cpp.pointer(t) for name, t in tensors.items()},
        **options,
    )
    return described, list(tensors.values())
