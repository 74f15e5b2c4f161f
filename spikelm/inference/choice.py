"""`events="auto"`: which share of active inputs makes skipping worth while, measured on this machine and remembered.

For every shape of product, format and number of rows in a batch, the dense product and the event product are timed on
rotating inputs and weights; the share of active inputs at which the two cost the same is kept. A product then counts
its active inputs and takes the cheaper way. Results lie in the cache folder, in one file for each machine (processor or
GPU, threads, torch version) and format; what is known is not measured again.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikelm.conversion.smollm import cache_folder
from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.runtime import processor_name
from spikelm.kernels.weight_rows import LARGEST_CODE, Rows

SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0)  # active inputs
BATCHES = (1, 2, 4, 8)
REPEATS = 5
# Weights that stay in a cache are read faster than those of a model: copies that together exceed a usual one.
_BYTES, _COPIES = 64 << 20, 256

Clock = Callable[[], float]


def most_active(products: dict[tuple[int, int], Rows], clock: Clock = time.perf_counter) -> dict[str, float]:
    """Break-even shares of active inputs, `{"576x960x1": 0.9, ...}` (inputs, outputs, rows of the batch).

    Args:
        products: one `Rows` for each shape (inputs, outputs), all of one format and on one device.
        clock: seconds.
    """
    first = next(iter(products.values()))
    path, machine = _place(first)
    known = _read(path, machine)
    for (inputs, outputs), rows in products.items():
        missing = [batch for batch in BATCHES if f"{inputs}x{outputs}x{batch}" not in known]
        if missing:
            times = _measure(rows, missing, clock)
            known |= {f"{inputs}x{outputs}x{b}": break_even(times[b, None], _events(times, b)) for b in missing}
            _write(path, machine, known)
    return known


def break_even(dense: float, events: dict[float, float]) -> float:
    """The share of active inputs up to which events take no longer than the dense product, interpolated.

    Args:
        dense: seconds of the dense product.
        events: share of active inputs -> seconds of the event product, shares rising.
    """
    shares = list(events)
    if events[shares[0]] > dense:
        return 0.0
    for low, high in pairwise(shares):
        if events[high] > dense:
            return low + (high - low) * (dense - events[low]) / (events[high] - events[low])
    return 1.0


def limits(choices: dict[str, float], inputs: int, outputs: int) -> dict[int, float]:
    """Rows of a batch -> break-even share for one shape; sizes between the measured ones take the next larger."""
    return {
        rows: choices[f"{inputs}x{outputs}x{next(b for b in BATCHES if b >= rows)}"]
        for rows in range(1, BATCHES[-1] + 1)
    }


def _events(times: dict[tuple[int, float | None], float], batch: int) -> dict[float, float]:
    return {share: times[batch, share] for share in SHARES}


def _measure(rows: Rows, batches: list[int], clock: Clock) -> dict[tuple[int, float | None], float]:
    """Median seconds by (rows of the batch, share of active inputs); share None is the dense product."""
    copies = [rows] + [_copy(rows) for _ in range(min(_COPIES, _BYTES // rows.nbytes))]
    spent: dict[tuple[int, float | None], list[float]] = {}
    turn = 0
    for repeat in range(REPEATS + 1):
        for batch in batches:
            for share in (None, *SHARES):
                x, threshold = _inputs(rows, batch, share or 1.0)
                weights, turn = copies[turn % len(copies)], turn + 1
                _settle(rows)
                started = clock()
                event_linear(x, weights, threshold=threshold, dense=share is None)
                _settle(rows)
                if repeat:  # the first round warms up
                    spent.setdefault((batch, share), []).append(clock() - started)
    return {key: statistics.median(values) for key, values in spent.items()}


def _copy(rows: Rows) -> Rows:
    return replace(rows, data=rows.data.clone(), scales=None if rows.scales is None else rows.scales.clone())


def _inputs(rows: Rows, batch: int, share: float) -> tuple[Tensor, Tensor | None]:
    """Counts with a threshold where weights are integers, else values; the same inputs are active in all rows."""
    device = rows.data.device
    dtype = torch.float64 if rows.data.dtype == torch.float64 else torch.float32
    x = torch.randint(1, 4, (batch, rows.inputs), device=device).to(dtype)
    silent = torch.randperm(rows.inputs, device=device)[: round((1 - share) * rows.inputs)]
    x[:, silent] = 0
    return x, torch.ones(batch, 1, dtype=dtype, device=device) if rows.format in LARGEST_CODE else None


def _settle(rows: Rows) -> None:
    if rows.data.is_cuda:
        torch.cuda.synchronize(rows.data.device)


def _place(rows: Rows) -> tuple[Path, dict[str, Any]]:
    machine = {
        "processor": processor_name(rows.data.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "format": f"{rows.format}/{rows.group}",
    }
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    return cache_folder() / f"events-{key}.json", machine


def _read(path: Path, machine: dict[str, Any]) -> dict[str, float]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(stored, dict) and stored.get("machine") == machine
    return stored["most_active"] if fits else {}


def _write(path: Path, machine: dict[str, Any], known: dict[str, float]) -> None:
    """Results that cannot be kept are measured again next time."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"machine": machine, "most_active": known}, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
