"""What every op family shares: which path runs, argument checks, packed sequences.

Nothing here imports Triton, so `import spikelm` does not either: kernels live in `*_triton.py` files, which launchers
import when `use_triton` says that they will run. The Triton side of this file is `triton_tools.py`.
"""

import importlib.util
import os
import platform
from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the switch when a kernel is defined, so it holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels compute on `tensors`: all on a GPU, or on the CPU under the interpreter.

    float64 always takes the torch path: it is there to be exact, not fast.
    """
    present = [t for t in tensors if t is not None]
    if not HAS_TRITON or any(t.dtype == torch.float64 for t in present):
        return False
    return all(t.is_cuda for t in present) or (INTERPRETED and all(t.device.type == "cpu" for t in present))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor in contiguous memory. Upstream gradients often arrive expanded, so launchers call this first."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that sums and states have: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def processor_name(device: torch.device | None = None) -> str:
    """What a device is called, for records of measurements; None: the CPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def without_autocast(function: Function) -> Function:
    """`function` with the dtypes that it chooses: autocast reaches into an op and would narrow its inner products."""

    @wraps(function)
    def run(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(Function, run)


def expect(condition: bool, op: str, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise a ValueError that names the argument, what was expected, what came, and what to do."""
    if not condition:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}. {remedy}")


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is floating point and all are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    for name, t in tensors.items():
        if t is not None:
            expect(t.is_floating_point(), op, name, "a floating-point tensor", t.dtype, "Convert it first.")
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {devices}. Move them together.")


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, batch: int) -> None:
    """Check what can be checked without reading values, so that tracing passes."""
    if cu_seqlens is None:
        return
    integer = not cu_seqlens.is_floating_point() and not cu_seqlens.is_complex() and cu_seqlens.dtype != torch.bool
    expect(
        integer and cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2,
        op,
        "cu_seqlens",
        "integers [N + 1] with N >= 1",
        f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}",
        "Pass the cumulative lengths of the packed sequences, starting with 0.",
    )
    expect(batch == 1, op, "the batch size", "1 with cu_seqlens", batch, "Concatenate the sequences along T.")


def sequence_bounds(op: str, cu_seqlens: Tensor, length: int) -> list[int]:
    """Values of `cu_seqlens` as a list, checked: rising (empty sequences allowed) from 0 to T. Waits for the device."""
    bounds = cu_seqlens.tolist()
    expect(
        bounds[0] == 0 and bounds[-1] == length and all(a <= b for a, b in pairwise(bounds)),
        op,
        "cu_seqlens",
        f"rising from 0 to T = {length}",
        bounds,
        "Its last entry is the length of the packed batch.",
    )
    return bounds


def chunk_table(cu_seqlens: Tensor | None, batch: int, length: int, size: int, device: torch.device, op: str):
    """Cut sequences into chunks of at most `size` tokens that never cross a sequence bound.

    Batch and time are taken as one axis of B * T tokens.

    Returns:
        chunks [C, 2] int64: first token and number of tokens of every chunk; bounds [N + 1] int64: first token of
        every sequence; offsets [N + 1] int64: first chunk of every sequence.
    """
    if cu_seqlens is None:
        return _uniform_table(batch, length, size, device)
    return _table(sequence_bounds(op, cu_seqlens, length), size, device)


@lru_cache(maxsize=64)
def _uniform_table(batch: int, length: int, size: int, device: torch.device):
    return _table([b * length for b in range(batch + 1)], size, device)


def _table(bounds: list[int], size: int, device: torch.device):
    chunks, offsets = [], [0]
    for begin, end in pairwise(bounds):
        chunks += [(t, min(size, end - t)) for t in range(begin, end, size)]
        offsets.append(len(chunks))
    table = torch.tensor(chunks, dtype=torch.int64).reshape(-1, 2)
    return tuple(t.to(device) for t in (table, torch.tensor(bounds), torch.tensor(offsets)))
