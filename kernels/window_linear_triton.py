"""Launchers of the kernels of windowed softmax and linear attention; the twins of those in `window_linear_torch.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikelm.kernels.runtime import INTERPRETED, chunk_table
from spikelm.kernels.triton_tools import next_power_of_two
from spikelm.kernels.window_linear_state import EPSILON
from spikelm.kernels.window_linear_triton_backward import (
    window_linear_keys_backward_kernel,
    window_linear_queries_backward_kernel,
    window_linear_states_backward_kernel,
)
from spikelm.kernels.window_linear_triton_forward import window_linear_output_kernel, window_linear_states_kernel

# Tokens of a tile for half-precision products and for full ones, which need registers where the others use matrix
# units; half as many where rows are wider than WIDE. Small tiles let the interpreter's small cases cross several.
HALF, FULL = 64, 32
WIDE = 64
# Widest tile of the sums.
STATE = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor,
    norm: Tensor,
    bounds: list[int],
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last sums and norms, weights and peaks; arguments as in `window_linear_torch.forward`, contiguous."""
    constants = _constants(q, k, v, fq, fk)
    table = _table(bounds, constants["BT"], q.device)
    last, last_norm, h, hz = _states(v, fk, sums, norm, table, window, constants)
    (tokens, heads), tiles = q.shape[:2], table[0]
    o = torch.empty(tokens, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    weight = torch.empty(tokens, heads, 2, dtype=torch.float32, device=q.device)
    peak = torch.empty(tokens, heads, dtype=torch.int32, device=q.device)
    if len(tiles):
        window_linear_output_kernel[(len(tiles) * heads,)](
            q, k, v, fq, fk, gamma, h, hz, o, weight, peak, *table, scale, window, heads, k.shape[1], **constants
        )
    return o, last, last_norm, weight, peak


def backward(
    do: Tensor,
    o: Tensor,
    weight: Tensor,
    peak: Tensor,
    dsums: Tensor,
    dnorm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    sums: Tensor,
    norm: Tensor,
    bounds: list[int],
    window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, fq, fk, gamma, sums, norm; arguments as in `window_linear_torch.backward`, contiguous."""
    constants = _constants(q, k, v, fq, fk)
    table = _table(bounds, constants["BT"], q.device)
    _, _, h, hz = _states(v, fk, sums, norm, table, window, constants)
    tiles, heads, shared = table[0], q.shape[1], k.shape[1]
    dq, dk, dv, dfq, dfk, dh, dhz = (torch.empty_like(x) for x in (q, k, v, fq, fk, h, hz))
    dfirst, dfirst_norm = torch.empty_like(sums), torch.empty_like(norm)
    rows = torch.empty(*q.shape[:2], 3, dtype=torch.float32, device=q.device)
    sizes = window, heads, shared
    if len(tiles):
        window_linear_queries_backward_kernel[(len(tiles) * heads,)](
            q, k, v, fq, fk, gamma, h, hz, o, do, weight, peak, dq, dfq, rows, *table, scale, *sizes, **constants
        )
    window_linear_states_backward_kernel[_state_grid(sums, constants)](
        fq, do, weight, rows, dh, dhz, dsums, dnorm, dfirst, dfirst_norm, *table[1:], *sizes, **_narrow(constants)
    )
    if len(tiles):
        window_linear_keys_backward_kernel[(len(tiles) * shared,)](
            q, k, v, fq, fk, gamma, do, weight, peak, rows, dh, dhz, dk, dv, dfk, *table, scale, *sizes, **constants
        )
    return dq, dk, dv, dfq, dfk, rows[..., 2].sum(0).to(gamma.dtype), dfirst, dfirst_norm


def _states(
    v: Tensor, fk: Tensor, sums: Tensor, norm: Tensor, table: tuple[Tensor, ...], window: int, constants: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and norms behind the parts, and those in front of every tile."""
    narrow = torch.bfloat16 if constants["DT"] == tl.bfloat16 else torch.float32
    last, last_norm = torch.empty_like(sums), torch.empty_like(norm)
    h = torch.empty(len(table[0]), *sums.shape[1:], dtype=narrow, device=v.device)
    hz = torch.empty(len(table[0]), *norm.shape[1:], dtype=torch.float32, device=v.device)
    small = {name: value for name, value in _narrow(constants).items() if name != "EPSILON"}
    window_linear_states_kernel[_state_grid(sums, constants)](
        v, fk, h, hz, sums, norm, last, last_norm, *table[1:], window, fk.shape[1], **small
    )
    return last, last_norm, h, hz


def _state_grid(sums: Tensor, constants: dict) -> tuple[int, int, int]:
    parts, shared, *widths = sums.shape
    return parts * shared, *(triton.cdiv(n, min(STATE, constants["B" + name])) for n, name in zip(widths, "FV"))


def _narrow(constants: dict) -> dict:
    """The constants of the kernels that go through the states tile by tile; they read no keys."""
    tiles = {name: min(STATE, constants[name]) for name in ("BF", "BV")}
    return {name: value for name, value in constants.items() if name not in ("D", "BD")} | tiles


def _table(bounds: list[int], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The part of every tile, the bounds of the parts, and their first tiles: int64 on the device."""
    _, tokens, offsets = chunk_table(torch.tensor(bounds), 1, bounds[-1], size, torch.device("cpu"), "window_linear")
    parts = torch.arange(len(bounds) - 1).repeat_interleave(offsets.diff())
    return parts.to(device), tokens.to(device), offsets.to(device)


def _constants(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor) -> dict:
    """What the kernels are compiled for.

    bfloat16 inputs meet in bfloat16 products. float16 could not hold sums over many tokens, so float16 inputs meet in
    tf32, which rounds alike and has float32's range; anything else is computed in full float32.
    """
    kinds = {x.dtype for x in (q, k, v, fq, fk)}
    half = kinds <= {torch.float16, torch.bfloat16}
    widths = {"D": q.shape[-1], "F": fq.shape[-1], "V": v.shape[-1]}
    size = (HALF if half else FULL) // (2 if max(widths.values()) > WIDE else 1)
    return {
        **widths,
        "EPSILON": EPSILON,
        "PRECISION": "tf32" if half else "ieee",
        "DT": tl.bfloat16 if kinds == {torch.bfloat16} else tl.float32,
        "BT": 16 if INTERPRETED else size,
        **{"B" + name: next_power_of_two(width) for name, width in widths.items()},
    }
