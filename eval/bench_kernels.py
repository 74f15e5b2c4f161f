"""Kernel benchmark: every op beside its definition and, where installed, beside the kernels that people use today.

    spikelm bench kernels --length 512 --length 2048 --op gla --op scan --out kernels.json

What is compared runs interleaved in one process, on inputs that rotate, after a warm-up; a time is the median of the
repeats, its spread the distance of the quartiles. Bytes and operations are those that the formula needs at least
(every input read once, every output written once, a multiply-add counted as two), as a share of the copy bandwidth and
matrix product rate that the same machine reaches in the same run. What cannot run here stays empty.
"""

import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikelm.eval.bench_ops import OPS, Op, Sizes
from spikelm.kernels.runtime import processor_name

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "forward_backward", "step")


def run(
    *,
    ops: Sequence[str] | None = None,
    lengths: Sequence[int] = (512, 2048),
    batch: int = 4,
    heads: int = 9,
    width: int = 64,
    dtype: str = "float32",
    device: str | None = None,
    repeats: int = 7,
    rotate: int = 3,
    reference_limit: int = 2048,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and return what was measured (written as JSON to `output` if that is given).

    Args:
        ops: names of `OPS`; all by default.
        lengths: numbers of tokens T.
        batch: sequences; heads: heads; width: channels per head. Ops without heads get heads * width channels.
        heads: see batch.
        width: see batch.
        dtype: a name of `DTYPES`; gates and states stay float32.
        device: "cuda" or "cpu"; by default a GPU if there is one.
        repeats: timed rounds; in each, every candidate runs once.
        rotate: sets of inputs taken in turn.
        reference_limit: definitions are loops over time, so they only run up to this T.
        output: path of the JSON file.

    Raises:
        ValueError: an unknown op or dtype.
    """
    ops = list(OPS) if ops is None else list(ops)
    if unknown := [name for name in ops if name not in OPS]:
        raise ValueError(f"ops: expected names of {list(OPS)}, got {unknown}; leave them out")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}; pass one of these names")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rates = _machine_rates(where, DTYPES[dtype])
    rows = []
    for name in ops:
        for length in lengths:
            sizes = Sizes(batch, length, heads, width)
            for kind in PASSES:
                row = _measure(OPS[name], kind, sizes, DTYPES[dtype], where, repeats, rotate, length <= reference_limit)
                if row is not None:
                    _add_shares(row, OPS[name], kind, sizes, rates)
                    rows.append({"op": name, "pass": kind, "length": length, **row})
                    print(_line(rows[-1]) if len(rows) > 1 else f"{_HEADER}\n{_line(rows[-1])}", flush=True)
    report = {
        "schema": SCHEMA,
        "machine": {**_describe(where), **rates},
        "settings": {"batch": batch, "heads": heads, "width": width, "dtype": dtype, "repeats": repeats},
        "rows": rows,
    }
    if output is not None:
        Path(output).write_text(json.dumps(report, indent=1) + "\n")
    return report


def exponent(rows: list[dict[str, Any]], op: str, kind: str = "forward_backward") -> float | None:
    """Slope of log time over log T for an op, by least squares; None with fewer than two lengths."""
    points = [(math.log(r["length"]), math.log(r["ms"])) for r in rows if r["op"] == op and r["pass"] == kind]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def _measure(
    op: Op, kind: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, repeats: int, rotate: int, loops: bool
) -> dict[str, Any] | None:
    """One row: times of the op, its definition and its peers, and the op's peak memory and bytes."""
    if (kind == "forward_backward" and not op.differentiable) or (kind == "step" and op.step is None):
        return None
    candidates: dict[str, Callable[..., Any]] = {"op": op.op}
    if kind == "step":
        assert op.step is not None  # as checked above
        candidates = {"op": op.step}
    else:
        if loops:
            candidates["reference"] = op.reference
        for name, (module, build) in op.peers.items():
            try:
                candidates[name] = build(importlib.import_module(module))
            except ImportError:
                continue
    sets = [_inputs(op, sizes, dtype, device, seed, kind) for seed in range(rotate)]
    calls = {name: _call(function, kind) for name, function in candidates.items()}
    moved = _bytes(sets[0], calls["op"](sets[0]), kind)
    for name in list(calls):
        try:
            calls[name](sets[0])
            calls[name](sets[-1])
        except Exception:
            if name in ("op", "reference"):
                raise
            del calls[name]  # a peer that does not run on this device
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name, call in calls.items():
            times[name].append(_seconds(lambda call=call, i=i: call(sets[i % rotate]), device))
    row: dict[str, Any] = {**_summary(times.pop("op")), "peak_mib": _peak(lambda: calls["op"](sets[0]), device)}
    row["bytes"] = moved
    for name in ("reference", *op.peers):
        other = _summary(times[name]) if name in times else {"ms": None, "spread_ms": None}
        row[name] = {**other, "ratio": other["ms"] / row["ms"] if other["ms"] else None}
    return row


def _inputs(op: Op, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, kind: str) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    one = Sizes(sizes.batch, 1, sizes.heads, sizes.width) if kind == "step" else sizes
    tensors = [x.to(dtype) if i < op.narrow and x.is_floating_point() else x for i, x in enumerate(op.make(one, draw))]
    if kind == "step":
        timed = len(tensors) - op.parameters
        tensors = [x[:, 0].contiguous() if i < timed else x for i, x in enumerate(tensors)]
        return [*tensors, draw(*op.state(sizes))] if op.state else tensors
    return [x.requires_grad_(kind == "forward_backward" and x.is_floating_point()) for x in tensors]


def _call(function: Callable[..., Any], kind: str) -> Callable[[list[Tensor]], Any]:
    def forward(inputs: list[Tensor]) -> Any:
        with torch.no_grad():
            return function(*inputs)

    def forward_backward(inputs: list[Tensor]) -> Any:
        out, leaves = _first(function(*inputs)), [x for x in inputs if x.requires_grad]
        return out, torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return forward_backward if kind == "forward_backward" else forward


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _bytes(inputs: list[Tensor], result: Any, kind: str) -> int:
    """What must at least be moved: inputs and outputs; backward reads all of it again and writes the gradients."""
    inside = sum(x.numel() * x.element_size() for x in inputs)
    outputs = (result[0],) if kind == "forward_backward" else result if isinstance(result, tuple) else (result,)
    outside = sum(x.numel() * x.element_size() for x in outputs)
    return 3 * inside + 2 * outside if kind == "forward_backward" else inside + outside


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _summary(seconds: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"ms": 1e3 * statistics.median(seconds), "spread_ms": 1e3 * (quartiles[2] - quartiles[0])}


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB in use at most during a call, beyond those in use before; on the CPU only where Linux tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before) / 1024
    except OSError:
        return None


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth (bytes read and written per second) and matrix product rate, each the best of five."""
    big = torch.empty((256 if device.type == "cuda" else 32) << 20, dtype=torch.float32, device=device).fill_(1.0)
    to = torch.empty_like(big)
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy, product = (min(_seconds(call, device) for _ in range(6)) for call in (lambda: to.copy_(big), lambda: a @ b))
    return {"copy_bytes_per_s": 2 * big.numel() * 4 / copy, "matmul_flops_per_s": 2 * side**3 / product}


def _add_shares(row: dict[str, Any], op: Op, kind: str, sizes: Sizes, rates: dict[str, float]) -> None:
    one = Sizes(sizes.batch, 1, sizes.heads, sizes.width) if kind == "step" else sizes
    flops = op.flops(one) * (3 if kind == "forward_backward" else 1)
    row["share_of_copy"] = row["bytes"] / (row["ms"] / 1e3) / rates["copy_bytes_per_s"]
    row["share_of_matmul"] = flops / (row["ms"] / 1e3) / rates["matmul_flops_per_s"]


def _describe(device: torch.device) -> dict[str, Any]:
    load = [round(x, 2) for x in os.getloadavg()]
    return {
        "device": device.type,
        "name": processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": load,
    }


_HEADER = (
    f"{'op':<21}{'pass':<18}{'T':>7}{'ms':>10}{'spread':>9}{'reference':>11}{'ratio':>7}"
    f"{'peer':>10}{'ratio':>7}{'copy':>7}{'matmul':>8}{'MiB':>8}"
)


def _line(row: dict[str, Any]) -> str:
    def cell(value: float | None, width: int, form: str = ".2f") -> str:
        return " " * width if value is None else f"{value:>{width}{form}}"

    empty = {"ms": None, "ratio": None}
    peer = next((row[name] for name in ("fla", "spikingjelly", "dense") if name in row), empty)
    return (
        f"{row['op']:<21}{row['pass']:<18}{row['length']:>7}{cell(row['ms'], 10)}{cell(row['spread_ms'], 9)}"
        f"{cell(row['reference']['ms'], 11)}{cell(row['reference']['ratio'], 7, '.1f')}{cell(peer['ms'], 10)}"
        f"{cell(peer['ratio'], 7, '.1f')}{cell(row['share_of_copy'], 7, '.0%')}{cell(row['share_of_matmul'], 8, '.0%')}"
        f"{cell(row['peak_mib'], 8, '.0f')}"
    )
