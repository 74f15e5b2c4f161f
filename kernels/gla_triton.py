"""Launchers of the Triton kernels of gated linear attention; the twins of those in `gla_torch.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.gla_triton_backward import (
    gla_keys_backward_kernel,
    gla_scores_backward_kernel,
    gla_states_backward_kernel,
    gla_values_backward_kernel,
)
from spikelm.kernels.gla_triton_forward import gla_output_kernel, gla_scores_kernel, gla_states_kernel
from spikelm.kernels.runtime import INTERPRETED, chunk_table
from spikelm.kernels.triton_tools import next_power_of_two

# Tokens of a chunk and width of a tile for half-precision products and for full ones, which need registers where the
# others use matrix units. Smaller chunks let the interpreter's small cases cross several of them.
HALF = {"BT": 16 if INTERPRETED else 64, "tile": 64}
FULL = {"BT": 16 if INTERPRETED else 32, "tile": 32}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and final states [N, Hk, K, V]; arguments as in `gla`, checked and contiguous."""
    constants = _constants(q, k, v, g, floor)
    table = chunk_table(cu_seqlens, q.shape[0], q.shape[1], constants["BT"], q.device, "gla")
    _, final, scores, states = _chunk_values(q, k, v, g, state, table, constants)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    chunks, heads, shared = table[0], q.shape[2], k.shape[2]
    if len(chunks):
        grid = (len(chunks) * heads, triton.cdiv(v.shape[-1], constants["BV"]))
        gla_output_kernel[grid](q, v, g, scores, states, out, scale, chunks, heads, shared, **constants)
    return out, final


def backward(
    do: Tensor | None,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and of the initial state. Scores and states are computed anew."""
    constants = _constants(q, k, v, g, floor)
    table = chunk_table(cu_seqlens, q.shape[0], q.shape[1], constants["BT"], q.device, "gla")
    first, _, scores, states = _chunk_values(q, k, v, g, state, table, constants)
    dfirst = torch.empty_like(first)
    dlast = torch.zeros_like(first) if dfinal is None else dfinal
    do = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device) if do is None else do
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    dscores, dstates = torch.empty_like(scores), torch.empty_like(states)
    chunks, bounds, offsets = table
    heads, shared = q.shape[2], k.shape[2]
    tiles_k, tiles_v = (triton.cdiv(constants[width], constants["B" + width]) for width in "KV")

    gla_states_backward_kernel[(first.shape[0] * shared, tiles_k, tiles_v)](
        q, g, do, dstates, dlast, dfirst, scale, bounds, offsets, heads, shared, **constants
    )
    if len(chunks):
        small = {name: value for name, value in constants.items() if name not in ("K", "W", "FLOOR", "BK")}
        gla_scores_backward_kernel[(len(chunks) * heads,)](v, do, dscores, scale, chunks, heads, shared, **small)
        gla_values_backward_kernel[(len(chunks) * shared, tiles_v)](
            k, g, scores, do, dstates, dv, scale, chunks, heads, shared, **constants
        )
        tensors = (q, k, v, g, do, dscores, states, dstates, dq, dk, dg)
        free = {name: value for name, value in constants.items() if name != "BK"}
        gla_keys_backward_kernel[lambda meta: (len(chunks) * shared, triton.cdiv(meta["K"], meta["BK"]))](
            *tensors, scale, chunks, heads, shared, **free, LEVELS=_levels(constants)
        )
    dg = dg.sum_to_size(g.shape).masked_fill_(g < floor, 0.0).to(g.dtype)
    return dq, dk, dv, dg, dfirst


def _chunk_values(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, table: tuple[Tensor, ...], constants: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last state of every sequence, scores within chunks, states at chunk starts."""
    chunks, bounds, offsets = table
    heads, shared = q.shape[2], k.shape[2]
    narrow = q.dtype if constants["DT"] == tl.bfloat16 else torch.float32
    shape = (len(bounds) - 1, shared, k.shape[-1], v.shape[-1])
    first = torch.zeros(shape, dtype=torch.float32, device=q.device) if state is None else state.float()
    last = torch.empty_like(first)
    states = torch.empty(len(chunks), *shape[1:], dtype=narrow, device=q.device)
    scores = torch.empty(q.shape[0] * q.shape[1], heads, constants["BT"], dtype=narrow, device=q.device)
    grid = (shape[0] * shared, *(triton.cdiv(constants[width], constants["B" + width]) for width in "KV"))
    gla_states_kernel[grid](k, v, g, states, first, last, bounds, offsets, shared, **constants)
    if len(chunks):
        small = {name: value for name, value in constants.items() if name not in ("V", "BV")}
        gla_scores_kernel[(len(chunks) * heads,)](
            q, k, g, scores, chunks, heads, shared, **small, LEVELS=_levels(constants)
        )
    return first, last, scores, states


def _constants(q: Tensor, k: Tensor, v: Tensor, g: Tensor, floor: float) -> dict:
    """What the kernels are compiled for.

    bfloat16 inputs meet in bfloat16 products. float16 could not hold a state that has summed many tokens, so float16
    inputs meet in tf32, which rounds alike and has float32's range; anything else is computed in full float32.
    """
    kinds = {q.dtype, k.dtype, v.dtype}
    half = kinds <= {torch.float16, torch.bfloat16}
    sizes = HALF if half else FULL
    return {
        "K": k.shape[-1],
        "V": v.shape[-1],
        "W": g.shape[-1],
        "FLOOR": floor,
        "PRECISION": "tf32" if half else "ieee",
        "DT": tl.bfloat16 if kinds == {torch.bfloat16} else tl.float32,
        "BT": sizes["BT"],
        "BK": min(sizes["tile"], next_power_of_two(k.shape[-1])),
        "BV": min(sizes["tile"], next_power_of_two(v.shape[-1])),
    }


def _levels(constants: dict) -> int:
    return constants["BT"].bit_length() - 1
