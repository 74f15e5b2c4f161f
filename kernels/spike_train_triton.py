"""Triton kernels of the spike trains; `spike_train.py` holds the definitions.

All are elementwise: one program takes a block of counts (or of packed bytes) and walks over the slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
# How a kernel treats a code: unary or bits, with the sign on the spikes or in the bits.
_UNARY, _BITS, _COMPLEMENT = (tl.constexpr(i) for i in range(3))
_KIND = {"binary": 0, "ternary": 0, "bitwise": 1, "twos_complement": 2}


@triton.jit
def _whole(counts):
    """Counts as int64; the interpreter converts bfloat16 to float32 only."""
    if counts.dtype == tl.bfloat16:
        counts = counts.to(tl.float32)
    return counts.to(tl.int64)


@triton.jit
def expand_kernel(counts, trains, n, slots, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """trains [slots, n] int8 from counts [n]."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    s = _whole(tl.load(counts + o_n, mask=mask, other=0))
    size = s if KIND == _COMPLEMENT else tl.abs(s)
    p_train = trains + o_n
    for t in range(slots):
        if KIND == _UNARY:
            bit = (size > t).to(tl.int64)
        else:
            bit = (size >> (slots - 1 - t)) & 1
        if KIND != _COMPLEMENT:
            bit = tl.where(s < 0, -bit, bit)
        tl.store(p_train, bit.to(tl.int8), mask=mask)
        p_train += n


@triton.jit
def collapse_kernel(trains, counts, n, slots, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """counts [n] from trains [slots, n], most significant slot first."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    p_train = trains + o_n
    for t in range(slots):
        bit = tl.load(p_train, mask=mask, other=0).to(tl.int64)
        if KIND == _UNARY:
            total += bit
        elif KIND == _COMPLEMENT:
            total = 2 * total + tl.where(t == 0, -bit, bit)
        else:
            total = 2 * total + bit
        p_train += n
    if counts.dtype.element_ty == tl.bfloat16:
        total = total.to(tl.float32)
    tl.store(counts + o_n, total.to(counts.dtype.element_ty), mask=mask)


@triton.jit
def bit_spikes_kernel(counts, spikes, n, slots, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """spikes [n] int32: |s|, or the number of set bits of |s| or of s mod 2^slots."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n
    v = _whole(tl.load(counts + o_n, mask=mask, other=0))
    if KIND == _COMPLEMENT:
        one = tl.full((BLOCK,), 1, dtype=tl.int64)
        v = v & ((one << slots) - 1)
    else:
        v = tl.abs(v)
    if KIND != _UNARY:
        v = (v & 0x5555555555555555) + ((v >> 1) & 0x5555555555555555)
        v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
        v = (v & 0x0F0F0F0F0F0F0F0F) + ((v >> 4) & 0x0F0F0F0F0F0F0F0F)
        v = v + (v >> 8)
        v = v + (v >> 16)
        v = (v + (v >> 32)) & 0x7F
    tl.store(spikes + o_n, v.to(tl.int32), mask=mask)


@triton.jit
def pack_kernel(trains, packed, n_bytes, n_trains, C, W, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """packed [PLANES, n_bytes] from trains [n_trains]; rows of C slots become rows of W bytes."""
    o_b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, first = o_b // W, (o_b % W) * 8
    o_bit = tl.arange(0, 8)
    channel = first[:, None] + o_bit[None, :]
    mask = (o_b < n_bytes)[:, None] & (channel < C)
    # [BLOCK, 8]
    spike = tl.load(trains + row[:, None] * C + channel, mask=mask, other=0).to(tl.int32)
    weight = tl.full((8,), 1, dtype=tl.int32) << o_bit
    up = tl.sum(tl.where(spike > 0, weight[None, :], 0), axis=1)
    tl.store(packed + o_b, up.to(tl.uint8), mask=o_b < n_bytes)
    if PLANES == 2:
        down = tl.sum(tl.where(spike < 0, weight[None, :], 0), axis=1)
        tl.store(packed + n_bytes + o_b, down.to(tl.uint8), mask=o_b < n_bytes)


@triton.jit
def unpack_kernel(packed, trains, n_bytes, n_trains, C, W, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """trains [n_trains] int8 from packed [PLANES, n_bytes]."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < n_trains
    channel = o_n % C
    p_byte = packed + (o_n // C) * W + channel // 8
    shift = (channel % 8).to(tl.int32)
    spike = (tl.load(p_byte, mask=mask, other=0).to(tl.int32) >> shift) & 1
    if PLANES == 2:
        spike -= (tl.load(p_byte + n_bytes, mask=mask, other=0).to(tl.int32) >> shift) & 1
    tl.store(trains + o_n, spike.to(tl.int8), mask=mask)


def expand_triton(counts: Tensor, code: str, slots: int) -> Tensor:
    """Launch `expand_kernel`: [...] -> int8 [slots, ...]."""
    trains = counts.new_empty((slots, *counts.shape), dtype=torch.int8)
    _launch(expand_kernel, counts.contiguous(), trains, counts.numel(), slots, _KIND[code])
    return trains


def collapse_triton(trains: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    """Launch `collapse_kernel`: [T, ...] -> [...] in `dtype`."""
    counts = trains.new_empty(trains.shape[1:], dtype=dtype)
    _launch(collapse_kernel, trains.contiguous(), counts, counts.numel(), trains.shape[0], _KIND[code])
    return counts


def bit_spikes_triton(counts: Tensor, code: str, slots: int) -> Tensor:
    """Launch `bit_spikes_kernel`: [...] -> int32 [...]."""
    spikes = counts.new_empty(counts.shape, dtype=torch.int32)
    _launch(bit_spikes_kernel, counts.contiguous(), spikes, counts.numel(), slots, _KIND[code])
    return spikes


def pack_triton(trains: Tensor, planes: int) -> Tensor:
    """Launch `pack_kernel`: int8 [T, ..., C] -> uint8 [planes, T, ..., ceil(C / 8)]."""
    channels, width = trains.shape[-1], (trains.shape[-1] + 7) // 8
    packed = trains.new_empty((planes, *trains.shape[:-1], width), dtype=torch.uint8)
    n_bytes = packed.numel() // planes
    if n_bytes:
        pack_kernel[(triton.cdiv(n_bytes, 128),)](
            trains.contiguous(), packed, n_bytes, trains.numel(), channels, width, PLANES=planes, BLOCK=128
        )
    return packed


def unpack_triton(packed: Tensor, channels: int) -> Tensor:
    """Launch `unpack_kernel`: uint8 [planes, T, ..., bytes] -> int8 [T, ..., channels]."""
    planes, width = packed.shape[0], packed.shape[-1]
    trains = packed.new_empty((*packed.shape[1:-1], channels), dtype=torch.int8)
    n_trains = trains.numel()
    if n_trains:
        unpack_kernel[(triton.cdiv(n_trains, _BLOCK),)](
            packed.contiguous(),
            trains,
            packed.numel() // planes,
            n_trains,
            channels,
            width,
            PLANES=planes,
            BLOCK=_BLOCK,
        )
    return trains


def _launch(kernel, source: Tensor, target: Tensor, n: int, slots: int, kind: int) -> None:
    if n:
        kernel[(triton.cdiv(n, _BLOCK),)](source, target, n, slots, KIND=kind, BLOCK=_BLOCK)
