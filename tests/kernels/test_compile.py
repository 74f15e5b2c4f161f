"""Compile tier: what the launchers would launch is compiled for GPUs that this machine need not have.

The ops run on CPU tensors with every launch recorded instead of executed, so the kernels, dtypes and constants are
those that ship. The default run compiles one recorded launch per kernel for two targets. The slow run compiles every
configuration that autotuning may choose, for every dtype and target:

    SPIKELM_COMPILE_TABLE=docs/compile_tier.md python -m pytest tests/kernels/test_compile.py -m slow
"""

import importlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from every_op import run_every_op
from spikelm.kernels import runtime

pytestmark = pytest.mark.compile

TARGETS = {"cuda80": ("cuda", 80, 32), "cuda90": ("cuda", 90, 32), "cuda100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)
# Bytes of shared memory that one program can have.
SHARED = {"cuda80": 166_912, "cuda90": 232_448, "cuda100": 232_448, "gfx942": 65_536}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8"}
TYPES |= {torch.bool: "i1"}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types of its arguments, its constants and options."""

    kernel: object
    signature: tuple
    constants: tuple
    options: tuple

    def compile(self, target):
        """Compile for the named target; pointers are taken to be aligned, as those of tensors are."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        signature = dict(self.signature)
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(self.kernel, signature=signature, constexprs=dict(self.constants), attrs=aligned)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(self.options))


def describe(kernel, args, kwargs, options):
    """The launch of a jitted function as what is compiled."""
    values = {**dict(zip(kernel.arg_names, args)), **{n: v for n, v in kwargs.items() if n in kernel.arg_names}}
    known = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
    options = {**{n: v for n, v in kwargs.items() if n in known}, **options}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i1" if isinstance(value, bool) else "i32"
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(options.items()))


def triton_modules():
    """Every module of the package that holds kernels."""
    files = sorted(Path(runtime.__file__).parent.glob("*_triton*.py"))
    return [importlib.import_module(f"spikelm.kernels.{file.stem}") for file in files]


@pytest.fixture
def launches(monkeypatch):
    """The launches made while a test runs ops on CPU tensors; none of them is executed."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    triton_modules()
    recorded = {}

    def launch(kernel, *args, grid=None, warmup=False, **kwargs):
        recorded.setdefault(describe(kernel, args, kwargs, {}))

    def tune(tuner, *args, **kwargs):
        for config in tuner.configs:
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            recorded.setdefault(describe(tuner.fn, args, {**kwargs, **config.kwargs}, options))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(Autotuner, "run", tune)
    # The modules above are imported and compile for a GPU; from here on the CPU takes the Triton path.
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    return recorded


def test_every_kernel_is_launched(launches):
    """A kernel that no op reaches here would go uncompiled."""
    run_every_op(torch.bfloat16, 64)
    kernels = {name for module in triton_modules() for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {launch.kernel.__name__ for launch in launches}


@pytest.mark.parametrize("target", ["cuda90", "gfx942"])
def test_one_launch_per_kernel(launches, target):
    run_every_op(torch.bfloat16, 64)
    first = {}
    for launch in launches:
        first.setdefault(launch.kernel.__name__, launch)
    for name, launch in first.items():
        shared = launch.compile(target).metadata.shared
        assert shared <= SHARED[target], f"{name} wants {shared} bytes of shared memory on {target}"


def resources(compiled, target):
    """Registers per thread and bytes (CUDA) or registers (HIP) spilled, as the assembler tells."""
    if target == "gfx942":
        find = {
            key: re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"]) for key in ("vgpr_count", "vgpr_spill_count")
        }
        return tuple(int(match.group(1)) for match in find.values())
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK"))


def as_markdown(rows):
    """One line per kernel, dtype and configuration; launches that differ otherwise share it: their largest needs."""
    import triton

    lines = [
        "# Compile tier",
        "",
        f"Triton {triton.__version__}, ops on 128 channels. Per target: KiB of shared memory / registers of a thread /",
        "spilled (bytes of stack for CUDA, registers for gfx942). Written by `tests/kernels/test_compile.py -m slow`.",
        "",
        f"| kernel | gates | dtype | warps | tile | {' | '.join(TARGETS)} |",
        "|---" * (5 + len(TARGETS)) + "|",
    ]
    merged = {}
    for key, target, needs in rows:
        known = merged.setdefault(key, {}).get(target, needs)
        merged[key][target] = tuple(map(max, known, needs))
    for key, cells in merged.items():
        needs = [f"{shared / 1024:.0f} / {registers} / {spilled}" for shared, registers, spilled in cells.values()]
        lines.append("| " + " | ".join([*map(str, key), *needs]) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_every_configuration(launches):
    """All dtypes, configurations and targets; the table of them is written to SPIKELM_COMPILE_TABLE if that is set."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        launches.clear()
        run_every_op(dtype, 128)
        for launch in list(launches):
            constants, options = dict(launch.constants), dict(launch.options)
            gates = {1: "head", 128: "channel"}.get(constants.get("W"), "")
            key = launch.kernel.__name__, gates, dtype_name, options.get("num_warps", 4), constants.get("BK", "")
            for target in TARGETS:
                compiled = launch.compile(target)
                rows.append((key, target, (compiled.metadata.shared, *resources(compiled, target))))
    if path := os.environ.get("SPIKELM_COMPILE_TABLE"):
        Path(path).write_text(as_markdown(rows))
    assert not [(key, target, needs) for key, target, needs in rows if needs[0] > SHARED[target]]
