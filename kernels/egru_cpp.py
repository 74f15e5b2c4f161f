"""The event-based GRU on the CPU through `egru.cpp`, in float32: as `egru_torch.py`, without its calls per token.

Events are decided by the same comparison of a state that other sums have rounded, so they agree with the other paths
except where a state meets its threshold to the last bits.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from spikelm.kernels import cpp
from spikelm.kernels.segments import Segments

# Tasks that share a head's tiles of four segments: at least this many in all, whatever the number of threads, so that
# sums are always the same.
_TASKS = 16


class _Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "weight", "bias", "threshold", "first", "mask")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("offsets", "tokens", "previous")]
    _fields_ += [(name, ctypes.c_int64) for name in ("segments", "steps", "heads", "width", "groups", "evnn")]
    _fields_ += [("keep", ctypes.c_float)]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("dy", "dends", "before", "da", "dfirst")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("dweight", "dthreshold", "dbias")]
    _fields_ += [("dampening", ctypes.c_float), ("support", ctypes.c_float)]


def available() -> bool:
    """Whether the compiled file is there."""
    return cpp.library("egru") is not None


def _problem(a, weight, threshold, bias, first, mask, segments: Segments, evnn, keep) -> tuple[_Problem, list[Tensor]]:
    """The problem, and the tensors it points to."""
    heads, width = weight.shape[:2]
    bias = a.new_zeros(3 * heads * width) if bias is None else bias
    offsets = torch.tensor([0, *accumulate(segments.running)])
    floats: Sequence[Tensor | None] = [
        None if x is None else x.float() for x in (a, weight, bias, threshold, first, mask)
    ]
    tensors = [*floats, offsets, segments.tokens, segments.before]
    count = len(segments.sequence)
    groups = max(1, min(-(-count // 4), -(-_TASKS // heads)))
    sizes = count, len(segments.running), heads, width, groups, int(evnn)
    return _Problem(*map(cpp.pointer, tensors), *sizes, keep), tensors


def forward(
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    first: Tensor,
    mask: Tensor | None,
    segments: Segments,
    evnn: bool,
    keep: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `egru_torch.forward`."""
    problem, _alive = _problem(a, weight, threshold, bias, first, mask, segments, evnn, keep)
    shape = (*a.shape[:2], first.shape[2])
    events, before = (segments.blank(shape, torch.float32, a.device) for _ in range(2))
    ends = torch.empty_like(first)
    results = map(cpp.pointer, (events, before, ends))
    cpp.library("egru").egru_forward(ctypes.byref(problem), *results, ctypes.c_int64(torch.get_num_threads()))
    return events.to(a.dtype), ends, before


def backward(
    dy: Tensor | None,
    dends: Tensor,
    a: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    first: Tensor,
    before: Tensor,
    mask: Tensor | None,
    segments: Segments,
    evnn: bool,
    keep: float,
    dampening: float,
    support: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `egru_torch.backward`."""
    problem, _alive = _problem(a, weight, threshold, bias, first, mask, segments, evnn, keep)
    dy = None if dy is None else dy.float()
    da = segments.blank(a.shape, torch.float32, a.device)
    dfirst = torch.empty_like(first)
    heads, width = weight.shape[:2]
    sums = [torch.zeros(problem.groups, *size) for size in (weight.shape, (heads * width,), (3 * heads * width,))]
    pointers = map(cpp.pointer, (dy, dends, before, da, dfirst, *sums))
    gradients = _Gradients(*pointers, dampening, support)
    threads = ctypes.c_int64(torch.get_num_threads())
    cpp.library("egru").egru_backward(ctypes.byref(problem), ctypes.byref(gradients), threads)
    dweight, dthreshold, dbias = (x.sum(0) for x in sums)
    return da.to(a.dtype), dweight, dthreshold, dbias, dfirst
