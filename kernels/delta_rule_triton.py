"""Launchers of the Triton kernels of the delta rule; the twins of those in `delta_rule_torch.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.delta_rule_triton_backward import (
    delta_keys_backward_kernel,
    delta_scores_backward_kernel,
    delta_states_backward_kernel,
)
from spikelm.kernels.delta_rule_triton_forward import (
    delta_decayed_kernel,
    delta_output_kernel,
    delta_scores_kernel,
    delta_states_kernel,
)
from spikelm.kernels.runtime import INTERPRETED, chunk_table
from spikelm.kernels.triton_tools import next_power_of_two

# Tokens of a chunk: the smaller one lets the interpreter's small cases cross several of them.
BLOCK = 16 if INTERPRETED else 32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [N, H, K, V]; arguments as in `delta_rule`, checked and contiguous."""
    constants = _constants(q, k, v, g, a, b, floor)
    table = chunk_table(cu_seqlens, q.shape[0], q.shape[1], BLOCK, q.device, "delta_rule")
    _, final, (scores, decayed, _), u, states = _chunk_values(q, k, v, g, a, b, state, table, constants)
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    chunks, heads = table[0], q.shape[2]
    if len(chunks):
        grid = (len(chunks) * heads, triton.cdiv(v.shape[-1], constants["BV"]))
        tensors = (v, u, scores, decayed, states, out)
        delta_output_kernel[grid](*tensors, scale, chunks, *_counts(q), **_pick(constants, delta_output_kernel))
    return out, final


def backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> list[Tensor]:
    """Gradients of q, k, v, g, a, b (if it is given) and of the initial state. Scores, states and u come anew."""
    constants = _constants(q, k, v, g, a, b, floor)
    chunks, bounds, offsets = table = chunk_table(cu_seqlens, *q.shape[:2], BLOCK, q.device, "delta_rule")
    first, _, within, u, states = _chunk_values(q, k, v, g, a, b, state, table, constants)
    dfirst, dscores, du, dstates = (torch.empty_like(x) for x in (first, within[0], u, states))
    dlast = torch.zeros_like(first) if dfinal is None else dfinal
    do = torch.zeros(v.shape, dtype=q.dtype, device=q.device) if do is None else do
    dq, dk, dv, da = (torch.empty_like(x) for x in (q, k, v, a))
    dg = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    along, dalong = (k, dk) if b is None else (b, torch.empty_like(b))
    heads = q.shape[2]

    grid = (first.shape[0] * heads, triton.cdiv(v.shape[-1], constants["BV"]))
    delta_states_backward_kernel[grid](
        *within, do, du, dv, dstates, dlast, dfirst, scale, bounds, offsets, *_counts(q),
        **_pick(constants, delta_states_backward_kernel),
    )  # fmt: skip
    if len(chunks):
        programs = len(chunks) * heads
        delta_scores_backward_kernel[(programs,)](
            v, u, do, du, dscores, scale, chunks, *_counts(q), **_pick(constants, delta_scores_backward_kernel)
        )
        narrow = {**_pick(constants, delta_keys_backward_kernel), "BK": 16}  # wider tiles spill
        delta_keys_backward_kernel[(programs, triton.cdiv(k.shape[-1], narrow["BK"]))](
            q, k, v, g, a, along, u, do, du, dscores, states, dstates, dq, dk, dg, da, dalong,
            scale, chunks, *_counts(q), **narrow,
        )  # fmt: skip
    dg = dg.sum_to_size(g.shape).masked_fill_(g < floor, 0.0).to(g.dtype)
    return [dq, dk, dv, dg, da, *([] if b is None else [dalong]), dfirst]


def _chunk_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor | None,
    state: Tensor | None,
    table: tuple[Tensor, ...],
    constants: dict,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """First and last state of every sequence; scores within chunks, decayed inputs and decays over chunks; u of every
    token; states at chunk starts.
    """
    chunks, bounds, offsets = table
    batch, length, heads, width = q.shape
    b = k if b is None else b
    narrow = q.dtype if constants["DT"] == tl.bfloat16 else torch.float32
    shape = (len(bounds) - 1, heads, width, v.shape[-1])
    first = torch.zeros(shape, dtype=torch.float32, device=q.device) if state is None else state.float()
    last = torch.empty_like(first)
    states = torch.empty(len(chunks), *shape[1:], dtype=narrow, device=q.device)
    u = torch.empty(v.shape, dtype=narrow, device=q.device)
    scores = torch.empty(2 * constants["M"], batch * length, heads, BLOCK, dtype=torch.float32, device=q.device)
    decayed = torch.empty(2 + constants["M"], *q.shape, dtype=narrow, device=q.device)
    keep = torch.empty(len(chunks), heads, width, dtype=torch.float32, device=q.device)
    if len(chunks):
        programs = len(chunks) * heads
        delta_scores_kernel[(programs,)](
            q, k, g, a, b, scores, chunks, *_counts(q), **_pick(constants, delta_scores_kernel)
        )
        delta_decayed_kernel[(programs, triton.cdiv(width, constants["BK"]))](
            q, k, g, a, b, scores, decayed, keep, chunks, *_counts(q), **_pick(constants, delta_decayed_kernel)
        )
    grid = (shape[0] * heads, triton.cdiv(v.shape[-1], constants["BV"]))
    delta_states_kernel[grid](
        v, scores, decayed, keep, u, states, first, last, bounds, offsets, *_counts(q),
        **_pick(constants, delta_states_kernel),
    )  # fmt: skip
    return first, last, (scores, decayed, keep), u, states


def _constants(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor | None, floor: float) -> dict:
    """What the kernels are compiled for; precision as in `gla_triton.py`, by the dtypes of q, k and b.

    A program of the states' kernels holds all K channels (BS) of some of V, so BV shrinks as K grows.
    """
    kinds = {x.dtype for x in (q, k, b) if x is not None}
    half = kinds <= {torch.float16, torch.bfloat16}
    whole = next_power_of_two(k.shape[-1])
    return {
        "K": k.shape[-1],
        "V": v.shape[-1],
        "W": g.shape[-1],
        "M": 1 if b is None else 2,
        "FLOOR": floor,
        "PRECISION": "tf32" if half else "ieee",
        "DT": tl.bfloat16 if kinds == {torch.bfloat16} else tl.float32,
        "BT": BLOCK,
        "BK": min(32, whole),
        "BS": whole,
        "BV": min(max(16, (4096 if half else 2048) // whole), 32, next_power_of_two(v.shape[-1])),
        "LEVELS": BLOCK.bit_length() - 1,
    }


def _pick(constants: dict, kernel) -> dict:
    """Those that a kernel takes."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def _counts(q: Tensor) -> tuple[int, int]:
    """Tokens of the whole batch, and heads."""
    return q.shape[0] * q.shape[1], q.shape[2]
